"""Expected gradients, enumerated over every answer of a tiny vocabulary and held against exact ones.

Values alone would not catch a KL estimator that is differentiated the wrong way.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from tabled import F64, V, gradient, hear, packed, prefix, random_table, relative, rollout, sampled_logp, table

from opd.anchors import behaviour, old
from opd.credits import discounted, log_ratio, reward
from opd.divergences import Divergence
from opd.loss import Loss, k3, match, nll, push
from opd.math import divergence as D
from opd.method import CRITIC, REFERENCE, TEACHER, build
from opd.signals import Score

RKL, FKL = Divergence("reverse_kl"), Divergence("forward_kl")
STEPS = 2


def answers():
    return list(itertools.product(range(V), repeat=STEPS))  # no stop token here: every answer has STEPS tokens


def states(given, answer):
    row = (*given, *answer)
    return [(p - 1) * V + row[p - 1] for p in range(len(given), len(row))]


def expectation(model, speaker, loss, teacher, temperature=1.0):
    """sum_y p_speaker(y) gradient(loss on y), over every answer to one prompt."""
    logp_SV, total = table(speaker, temperature).detach(), 0.0
    for answer in answers():
        at = states(prefix(0), answer)
        said = [(v, float(logp_SV[s, v])) for s, v in zip(at, answer, strict=True)]
        batch = packed([rollout(0, "student", prefix(0), said)], temperature)
        batch = hear(batch, loss.needs, {"*": teacher})
        weight = float(torch.tensor([x for _, x in said], dtype=F64).sum().exp())
        total = total + weight * gradient(model, batch, loss.per("sequence_sum"))[0]
    return total


def exact(model, objective):
    """Gradient in the table of sum over answers of objective(answer), which may differentiate everything."""
    parameter = model.module.model.logits_SV
    value = sum(objective(states(prefix(0), a), a) for a in answers())
    (grad,) = torch.autograd.grad(value, parameter)
    return grad


def path(logp_SV, at, answer):
    return sum(logp_SV[s, v] for s, v in zip(at, answer, strict=True))


def per_state(model, teacher, divergence, walker=None, temperature=1.0):
    """The per-token objective: E over answers of the sum of D at their states, without gradient through the walk."""
    s, t = table(model, temperature), table(teacher, temperature).detach()
    walk = table(walker or model, temperature).detach()
    d_S = divergence.entries(s, t).sum(-1)
    return exact(model, lambda at, a: path(walk, at, a).exp() * d_S[at].sum())


MODEL, JUDGE = 1, 2


def test_pushed_log_ratio_has_the_gradient_of_matched_reverse_kl():
    """The sampled-token method is the full-vocabulary one in expectation, whichever log-probability it subtracts."""
    model, teacher = random_table(MODEL), random_table(JUDGE)
    want = per_state(model, teacher, RKL)
    assert relative(expectation(model, model, match(TEACHER, RKL), teacher), want) < 1e-12
    for against in ("live", "old", "behaviour"):
        pushed = push(log_ratio(TEACHER, against))
        assert relative(expectation(model, model, pushed, teacher), want) < 1e-12
    token = build("token_opd").loss
    assert relative(expectation(model, model, token, teacher), want) < 1e-12


def test_no_head_falls_into_the_k1_trap():
    """E grad of (log q - log p) itself is 0 for every teacher: no loss here may be blind to whom it learns from."""
    model, a, b = random_table(MODEL), random_table(JUDGE), random_table(JUDGE + 1)
    for loss in (push(log_ratio(TEACHER)), k3(TEACHER), match(TEACHER, RKL), match(TEACHER, FKL)):
        first, second = expectation(model, model, loss, a), expectation(model, model, loss, b)
        assert first.norm() > 0.05 and relative(first, second) > 0.1, str(loss)


def test_discount_one_is_the_gradient_of_sequence_reverse_kl():
    """Rewards-to-go of the log ratio: the long part too, against autograd through the walk itself."""
    model, teacher = random_table(MODEL), random_table(JUDGE)
    q, p = table(model), table(teacher).detach()
    want = exact(model, lambda at, a: path(q, at, a).exp() * (path(q, at, a) - path(p, at, a)))
    far = expectation(model, model, push(discounted(log_ratio(TEACHER, "old"), 1.0), anchor=old()), teacher)
    assert relative(far, want) < 1e-12
    near = expectation(model, model, push(log_ratio(TEACHER)), teacher)
    assert relative(near, want) > 0.05  # discount 0 leaves the long part out


def test_k3_has_the_gradient_of_forward_kl():
    """Mild tables: the papers' clamp of the value at 10 is not reached."""
    model, teacher = random_table(MODEL, 0.4), random_table(JUDGE, 0.4)
    got = expectation(model, model, k3(TEACHER), teacher)
    assert relative(got, per_state(model, teacher, FKL)) < 1e-12
    assert relative(got, per_state(model, teacher, RKL)) > 0.02


def test_kl_to_the_reference_in_both_forms():
    model, reference = random_table(MODEL, 0.4), random_table(JUDGE, 0.4)
    for form, divergence in (("push", RKL), ("k3", FKL)):
        loss = build("grpo", {"kl": 0.3, "kl_form": form}).loss
        (term,) = [t for t in loss.terms if REFERENCE in t.needs]
        got = expectation(model, model, Loss((term,)), reference)
        assert relative(got, 0.3 * per_state(model, reference, divergence)) < 1e-12


def test_nll_of_the_teachers_text_is_forward_kl():
    model, teacher = random_table(MODEL), random_table(JUDGE)
    got = expectation(model, teacher, nll(), teacher)
    assert relative(got, per_state(model, teacher, FKL, walker=teacher)) < 1e-12


def test_pushed_reward_is_the_policy_gradient():
    """Each answer with its own credit: E grad = -grad E[reward]. (Alone in its group a row's reward is its own mean, so
    the credit here comes from a critic over a pair of rows whose second is fixed.)"""
    model = random_table(MODEL)
    worth = lambda a: float(sum(a)) + 0.5 * (a[0] == 3)
    logp_SV, total = table(model).detach(), 0.0
    for answer in answers():
        at = states(prefix(0), answer)
        said = [(v, float(logp_SV[s, v])) for s, v in zip(at, answer, strict=True)]
        spoken = rollout(0, "student", prefix(0), said)
        silent = replace(spoken, mask=(False,) * len(spoken.tokens), sample=1)
        batch = replace(
            packed([spoken, silent]), signals={CRITIC: Score(torch.tensor([worth(answer), 0.0], dtype=F64))}
        )
        total = (
            total
            + path(logp_SV, at, answer).exp()
            * gradient(model, batch, push(reward(CRITIC), anchor=old()).per("sequence_sum"))[0]
        )
    q = table(model)
    want = exact(model, lambda at, a: -path(q, at, a).exp() * worth(a) / 2)
    assert relative(total, want) < 1e-12


def test_importance_sampling_from_another_engine():
    """One token: with the live student in the credit the reverse KL's gradient whoever spoke; with
    the speaker's own, that of KL(q, p) - KL(q, mu)."""
    model, teacher, speaker = random_table(MODEL), random_table(JUDGE), random_table(5)
    state = states(prefix(0), (0,))[0]
    mu = table(speaker).detach()

    def over(against):
        total, loss = 0.0, push(log_ratio(TEACHER, against), anchor=behaviour())
        for v in range(V):
            batch = packed([rollout(0, "student", prefix(0), [(v, float(mu[state, v]))])])
            batch = hear(batch, loss.needs, {"*": teacher})
            total = total + float(mu[state, v].exp()) * gradient(model, batch, loss)[0]
        return total

    def kl(other):
        s, t = table(model)[state], table(other).detach()[state]
        return torch.autograd.grad(D.reverse_kl(s, t).sum(), model.module.model.logits_SV)[0]

    assert relative(over("live"), kl(teacher)) < 1e-12
    assert relative(over("behaviour"), kl(teacher) - kl(speaker)) < 1e-12


@pytest.mark.parametrize("temperature", [0.7, 1.6])
def test_log_probabilities_are_of_the_sampling_distribution(temperature):
    """Spoken at a temperature: the push is of that distribution, the nll and a divergence at 1 are not."""
    model, teacher = random_table(MODEL), random_table(JUDGE)
    pushed = expectation(model, model, push(log_ratio(TEACHER, "old"), anchor=old()), teacher, temperature)
    assert relative(pushed, per_state(model, teacher, RKL, temperature=temperature)) < 1e-12
    hot = Divergence("reverse_kl", temperature=temperature)
    matched = expectation(model, model, match(TEACHER, hot), teacher, temperature)
    assert relative(matched, pushed) < 1e-12
    batch = packed([rollout(0, "student", prefix(0), [(1, -1.0)])], temperature)
    assert gradient(model, batch, nll())[1]["loss/nll"] == pytest.approx(float(-sampled_logp(model, batch)))
