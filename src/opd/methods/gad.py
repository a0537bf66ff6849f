"""Generative adversarial distillation: a teacher of which only text is known."""

from __future__ import annotations

from typing import Literal

from opd.anchors import old
from opd.credits import Combine, reward
from opd.loss import Objective, Per, learn, nll, push
from opd.method import CRITIC, Clip, Coefficient, Group, Method, NotNegative, both, one
from opd.methods.grpo import to_reference


def gad(
    *,
    group: Group = 8,
    clip: Clip = (0.2, 0.2),
    std: bool = True,
    min_std: NotNegative = 0.0,
    kl: Coefficient = 0.001,
    kl_form: Literal["push", "k3"] = "push",
    sft: Coefficient = 0.0,
    objective: Literal["bradley_terry", "bce"] = "bradley_terry",
    critics: Group = 1,
    combine: Combine = "mean",
    width: NotNegative = 1.0,
    per: Per = "token",
) -> Method:
    """A critic learns to tell the teacher's answers from the student's; its score is the reward of GRPO.

    Speaks: student, `group` samples a prompt (and teacher, when `sft` > 0). Judges: critic, SCORE; teacher, TEXT;
    reference, TOKEN when kl > 0.
    Loss: -mean over tokens of min(r A, clip(r) A), r = pi / pi_old, A = (D(y) - group mean) / (group std + 1e-6), D the
    critic before this step's update; plus `kl` times the KL to the student at stage start (the warmed-up one), plus
    `sft` times the cross entropy on the teacher's answer. The critic minimises -log sigmoid(D(teacher) - D(student))
    over the group, each distinct text scored once (`objective: bce` is the ablation's plain GAN). `critics` above 1
    learn the same, each with a body, head and optimizer of its own; D is then their mean, their `minimum`, or the
    `lower_bound` mean - width * deviation over critics, of scores centred in the group, for a critic is known up to a
    number per prompt: what only one of them likes is then not worth pleasing it for.
    Gradient: the student's through log pi of the sampled token, never through D; the critic's through D alone.
    Source: GAD, arXiv 2511.10643, eq. 1-8 and algorithm 1 (max over G, min over D, of E[-log sigmoid(D(y_t) -
    D(G(x)))]).
    Differs from the paper in: the KL's form (`kl_form: k3` is the paper's code), degenerate groups get no credit
    (`min_std`); it has one critic. `std: false` is the small recipes' choice: a group among which the critic hardly
    tells is then hardly obeyed, where division by its deviation makes the critic's noise as large as its knowledge.
    """
    if critics == 1 and combine != "mean":
        raise ValueError(f"combine: {combine} is of several critics, and there is 1: set critics to 3, say")
    credit = reward(CRITIC, std=std, min_std=min_std, combine=combine, width=width)
    loss = push(credit, anchor=old(), clip=clip)
    loss = (loss + to_reference(kl, kl_form)).per(per).on("student") + sft * nll().on("teacher")
    speaks = both("student", "teacher") if sft != 0 else one("student")
    critic = learn(CRITIC, Objective(objective, good="teacher", bad="student", critics=critics))
    return Method(speaks=speaks, loss=loss + critic, group=group, goal="text")
