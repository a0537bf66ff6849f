"""Lightning OPD: its update is k2's under a fixed sampler, its limits, and a run that does without the teacher."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from driven import metrics, run, short, small
from tabled import F64, V, gradient, hear, packed, prefix, random_rollouts, random_table, relative, rollout, table

from opd import offline
from opd.errors import UsageError
from opd.log import read
from opd.loss import Loss
from opd.math import divergence as D
from opd.method import build
from opd.model import CausalModel

STEPS = 2  # of every answer that is enumerated
NAN = float("nan")


def naive(model: CausalModel, teacher: CausalModel, rows, value) -> torch.Tensor:
    """Gradient in the table of the mean over tokens of value(log teacher - log student), written out row by row."""
    z_SV = model.module.model.logits_SV.detach().clone().requires_grad_()
    mine, theirs = z_SV.log_softmax(-1), table(teacher).detach()
    each = [
        value(theirs[(i - 1) * V + r.tokens[i - 1], r.tokens[i]] - mine[(i - 1) * V + r.tokens[i - 1], r.tokens[i]])
        for r in rows
        for i, spoken in enumerate(r.mask)
        if spoken
    ]
    (grad,) = torch.autograd.grad(torch.stack(each).mean(), z_SV)
    return grad


def updated(model: CausalModel, teacher: CausalModel, rows, **args) -> torch.Tensor:
    method = build("lightning", args)
    return gradient(model, hear(packed(rows), method.needs, {"*": teacher}), method.loss, tile=5, micro=11)[0]


def test_the_update_is_that_of_half_the_squared_log_ratio() -> None:
    model, teacher, rows = random_table(1), random_table(2), random_rollouts(("reference",), prompts=5)
    want = naive(model, teacher, rows, lambda d: d.square() / 2)
    assert want.norm() > 0.1 and relative(updated(model, teacher, rows), want) < 1e-12


def test_a_bound_makes_it_hubers() -> None:
    """Quadratic where the credit is inside [-tau, tau], linear outside; no bound is one that nothing reaches."""
    model, teacher, rows = random_table(1), random_table(2), random_rollouts(("reference",), prompts=5)
    huber = lambda d: torch.nn.functional.huber_loss(d, torch.zeros_like(d), delta=0.5)
    held = updated(model, teacher, rows, tau=0.5)
    assert relative(held, naive(model, teacher, rows, huber)) < 1e-12
    assert relative(held, updated(model, teacher, rows)) > 0.1
    assert torch.equal(updated(model, teacher, rows, tau=1e9), updated(model, teacher, rows))


def walks(speaker: CausalModel):
    """Every answer of STEPS tokens to prompt 0, with its probability under a speaker."""
    logp = table(speaker).detach()
    for tokens in product(range(V), repeat=STEPS):
        row = rollout(0, "reference", prefix(0), [(t, NAN) for t in tokens])
        n = len(prefix(0))
        states = [(n + t - 1) * V + row.tokens[n + t - 1] for t in range(STEPS)]
        yield row, float(logp[states, list(tokens)].sum().exp()), states


def in_expectation(model: CausalModel, teacher: CausalModel, speaker: CausalModel) -> torch.Tensor:
    """The method's gradient, summed over tokens, in expectation over what a speaker says: by enumeration."""
    total = torch.zeros_like(model.module.model.logits_SV)
    for row, probability, _ in walks(speaker):
        total += probability * updated(model, teacher, [row], per="sequence_sum")
    return total.detach()


def by_states(model: CausalModel, speaker: CausalModel, value_S) -> torch.Tensor:
    """The gradient of sum over states of how often the speaker comes there, times a value of the state."""
    visits = torch.zeros(len(model.module.model.logits_SV), dtype=F64)
    for _, probability, states in walks(speaker):
        visits[states] += probability
    z_SV = model.module.model.logits_SV.detach().clone().requires_grad_()
    (grad,) = torch.autograd.grad((visits * value_S(z_SV.log_softmax(-1))).sum(), z_SV)
    return grad


def test_in_expectation_it_is_k2_under_the_fixed_sampler() -> None:
    model, teacher, reference = random_table(1), random_table(2), random_table(3)
    theirs, spoken = table(teacher).detach(), table(reference).detach().exp()
    want = by_states(model, reference, lambda mine: (spoken * (theirs - mine).square() / 2).sum(-1))
    assert relative(in_expectation(model, teacher, reference), want) < 1e-12


def test_while_the_student_is_the_sampler_it_is_the_reverse_kl() -> None:
    model, teacher = random_table(1), random_table(2)
    want = by_states(model, model, lambda mine: D.reverse_kl(mine, table(teacher).detach()).sum(-1))
    assert relative(in_expectation(model, teacher, model), want) < 1e-12
    moved = in_expectation(model, teacher, random_table(3))  # and afterwards it is not
    assert relative(moved, want) > 0.1


def test_the_teacher_is_its_fixed_point_whoever_sampled() -> None:
    teacher = random_table(2)
    assert updated(random_table(2), teacher, random_rollouts(("reference",))).abs().max() < 1e-15


def test_it_asks_the_teacher_once_and_never_the_reference_for_numbers() -> None:
    method = build("lightning", {"tau": 3.0})
    assert {str(j): s.name for j, s in method.needs.items()} == {"teacher": "TOKEN", "reference": "TEXT"}
    assert method.loss.reads == {"live"} and isinstance(method.loss, Loss) and method.taught_by is None
    assert str(method.loss) == "mean_t[-log π · [bounded(log teacher - log π, -3, 3)]]"


# --- a run ------------------------------------------------------------------------------------------------------------


def test_a_run_without_the_teacher_is_the_run_with_it(tmp_path: Path) -> None:
    """The reference's samples and the teacher's log-probabilities come from the record: the same numbers."""
    method = {"name": "lightning", "tau": 2.0}
    changes = {
        "data": {"train": "world:sort:8", "dev": [{"path": "world:sort:4", "split": "dev"}]},
        "eval": {"every": 3},
    }
    chosen = short(tmp_path, method, 5, "live", **changes)
    report = offline.record(chosen, tmp_path, tmp_path / "signals", "teacher")
    assert (report["keep"], report["rows"], report["bytes_per_token"]) == ("token", 8, 4)
    _, alive = run(chosen, tmp_path)
    record = {"teachers": {"teacher": {"cache": str(tmp_path / "signals")}}}
    _, from_disk = run(short(tmp_path, method, 5, "disk", **record, **changes), tmp_path)
    for event in (None, "eval"):
        for one, other in zip(metrics(alive, event), metrics(from_disk, event), strict=True):
            assert other.keys() == one.keys()
            for name, number in other.items():
                assert number == (
                    one[name] if isinstance(number, str) else pytest.approx(one[name], rel=1e-4, abs=1e-6)
                )
    said = {(r["role"], r["prompt_id"]): r["response"] for r in read(alive / "answers.jsonl")}
    stored = {(r["role"], r["prompt_id"]): r["response"] for r in read(tmp_path / "signals" / "answers.jsonl")}
    assert said == stored and len(said) == 8 and {role for role, _ in said} == {"reference of lightning"}
    with pytest.raises(UsageError, match="what was said of another student's samples"):
        run(short(tmp_path, method, 1, "x", student={"drop_layers": 1}, **record, **changes), tmp_path)


def test_a_reference_of_a_later_stage_is_not_there_yet(tmp_path: Path) -> None:
    stages = [{"name": "sft", "method": "token_kd", "steps": 1}, {"name": "then", "method": "lightning", "steps": 1}]
    chosen = small(tmp_path, stages=stages)
    with pytest.raises(UsageError, match=r"stage `then` lets its reference speak, .* which is not there yet"):
        offline.record(chosen, tmp_path, tmp_path / "signals", "teacher")
