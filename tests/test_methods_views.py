"""Methods whose judge sees more, or is chosen by domain: gradients against plain float64 autograd over the whole
vocabulary, written out here; and where OPSD's clipped objective ends.

Shapes: S states, V vocabulary, n loss tokens of a row.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from tabled import F64, V, gradient, hear, packed, random_rollouts, random_table, relative, table

from opd.divergences import Divergence
from opd.method import build

GOLDEN_S = torch.tensor([2.0, 1.0, 0.5, -1.0, 0.0], dtype=F64)
GOLDEN_T = torch.tensor([0.5, 2.5, 1.0, -2.0, 0.3], dtype=F64)


def case(method, temperature=1.0):
    """A student, a judge of its own, and rows of unequal lengths, some of two turns; ratios differ from 1."""
    model, judge = random_table(1), random_table(2)
    rows = random_rollouts(["student"])
    batch = hear(packed(rows, temperature), method.needs, {"*": judge, "reference": random_table(3)})
    wobble = torch.sin(torch.arange(len(batch.row_N), dtype=F64)) / 4
    old_N = (live(model, batch, temperature) + wobble).detach()
    return model, judge, replace(batch, old_N=old_N)


def states(batch):
    return [(p - 1) * V + batch.rollouts[r].tokens[p - 1] for r, p in _places(batch)]


def _places(batch):
    return zip(batch.row_N.tolist(), batch.position_N.tolist(), strict=True)


def live(model, batch, temperature=1.0):
    return table(model, temperature)[states(batch), batch.token_N]


def by_hand(model, batch, per_token, per="sequence"):
    """The gradient of the mean, over rows of their token means or over all tokens, of what `per_token` gives [N]."""
    logits_SV = model.module.model.logits_SV.detach().clone().requires_grad_()
    value_N = per_token(logits_SV)
    rows = len(batch.rollouts)
    by_row = sum(value_N[batch.row_N == r].mean() for r in range(rows)) / rows
    total = by_row if per == "sequence" else value_N.mean()
    total.backward()
    return logits_SV.grad, float(total.detach())


def check(name, args, per_token, per="sequence", temperature=1.0):
    method = build(name, args)
    model, judge, batch = case(method, temperature)
    at = states(batch)
    want, value = by_hand(
        model, batch, lambda z: per_token(z[at], judge.module.model.logits_SV.detach()[at], batch), per
    )
    got, stats = gradient(model, batch, method.loss)
    assert relative(got, want) < 1e-12, name
    assert stats["loss/total"] == pytest.approx(value, rel=1e-10, abs=1e-12)


def both(z_NV, t_NV, temperature=1.0):
    return (z_NV / temperature).log_softmax(-1), (t_NV / temperature).log_softmax(-1)


# --- one judge that sees more -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_opsd_is_the_forward_kl(temperature):
    def per_token(z, t, _):
        q, p = both(z, t, temperature)
        return (p.exp() * (p - q)).sum(-1)

    check("opsd", {"temperature": temperature}, per_token)


@pytest.mark.parametrize(("divergence", "beta"), [("reverse_kl", 0.5), ("jsd", 0.3)])
def test_opsd_speaks_the_other_divergences(divergence, beta):
    def per_token(z, t, _):
        q, p = both(z, t)
        if divergence == "reverse_kl":
            return (q.exp() * (q - p)).sum(-1)
        m = (beta * p.exp() + (1 - beta) * q.exp()).log()
        return (beta * p.exp() * (p - m) + (1 - beta) * q.exp() * (q - m)).sum(-1)

    check("opsd", {"divergence": divergence, "beta": beta}, per_token)


def test_opsd_with_its_cap():
    def per_token(z, t, _):
        q, p = both(z, t)
        entries = p.exp() * (p - q)
        return torch.where(entries > 0.05, torch.full_like(entries, 0.05), entries).sum(-1)

    check("opsd", {"cap": 0.05}, per_token)


@pytest.mark.parametrize("top_k", [None, 2, V, 256])
def test_opcd_sums_over_the_students_own_top_k(top_k):
    def per_token(z, t, _):
        q, p = both(z, t)
        kept = torch.ones_like(q, dtype=torch.bool)
        if top_k is not None and top_k < V:
            kept = torch.zeros_like(kept).scatter(-1, q.topk(top_k, -1).indices, True)
        return (q.exp() * (q - p)).masked_fill(~kept, 0.0).sum(-1)

    check("opcd", {"top_k": top_k}, per_token)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("tail", [True, False])
def test_sdft_is_a_jsd_on_the_students_top_k_and_a_bucket_weighed(alpha, tail):
    def per_token(z, t, batch):
        q, p = both(z, t)
        top = q.topk(3, -1).indices
        q_k, p_k = q.gather(-1, top).exp(), p.gather(-1, top).exp()
        if tail:
            q_k, p_k = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (q_k, p_k))
        else:
            q_k, p_k = (x / x.sum(-1, keepdim=True) for x in (q_k, p_k))
        if alpha in (0.0, 1.0):
            a, b = (p_k, q_k) if alpha == 0 else (q_k, p_k)
            divergence = (a * (a / b).log()).sum(-1)
        else:
            m = alpha * p_k + (1 - alpha) * q_k
            divergence = (alpha * p_k * (p_k / m).log() + (1 - alpha) * q_k * (q_k / m).log()).sum(-1)
        now = q.gather(-1, batch.token_N[:, None])[:, 0]
        return (now - batch.old_N).detach().exp().clamp(max=1.1) * divergence

    check("sdft", {"alpha": alpha, "top_k": 3, "tail": tail, "clip": 1.1}, per_token)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0)], ids=["both", "distil", "binary"])
def test_hindsight_pushes_by_the_hint_and_the_reward(weights):
    """A hint exists for two rows in three; where it does not, the distillation part is 0 and the token still counts."""
    distil, binary = weights

    def per_token(z, t, batch):
        q, p = both(z, t, 1.3)
        pick = lambda logp: logp.gather(-1, batch.token_N[:, None])[:, 0]
        heard = (batch.row_N % 3 != 1).to(F64)
        credit = binary * batch.reward_B[batch.row_N] + distil * heard * (pick(p) - batch.old_N)
        ratio = (pick(q) - batch.old_N).exp()
        return -torch.minimum(ratio * credit, ratio.clamp(0.8, 1.28) * credit)

    check("hindsight", {"distil": distil, "binary": binary}, per_token, temperature=1.3)


def test_hindsight_of_a_hint_that_says_nothing_and_no_reward_is_nothing():
    method = build("hindsight", {"binary": 0.0})
    assert "reward" not in method.loss.reads
    model, rows = random_table(1), random_rollouts(["student"])
    batch = hear(packed(rows), method.needs, {"*": model})
    grad, stats = gradient(model, batch, method.loss)
    assert stats["loss/total"] == pytest.approx(0, abs=1e-12) and float(grad.norm()) < 1e-12


def test_full_vocab_is_the_exact_reverse_kl_to_each_rows_expert():
    """Two experts share the rows: half of the tokens' logits come from another table than the other half's."""
    method = build("full_vocab")
    model, first, second = random_table(1), random_table(2), random_table(3)
    batch = packed(random_rollouts(["student"]))
    (judge,) = method.needs
    own = [hear(batch, method.needs, {"*": m}).signals[judge] for m in (first, second)]
    mine = own[0].judge_N == 0
    at = states(batch)
    t_NV = torch.where(
        mine[:, None], first.module.model.logits_SV.detach()[at], second.module.model.logits_SV.detach()[at]
    )
    mixed = replace(
        own[0],
        hidden=(own[0].hidden[0], own[1].hidden[1]),
        shelf=type(own[0].shelf)((first.head, second.head), torch.device("cpu")),
    )

    def per_token(z_SV):
        q, p = both(z_SV[at], t_NV)
        return (q.exp() * (q - p)).sum(-1)

    want, value = by_hand(model, batch, per_token, "token")
    got, stats = gradient(model, replace(batch, signals={judge: mixed}), method.loss)
    assert relative(got, want) < 1e-12 and stats["loss/total"] == pytest.approx(value)


def test_the_phases_of_strong_to_weak_are_cross_entropy_and_the_reverse_kl():
    off, on = (build("strong_to_weak", {"phase": p}).loss for p in ("off_policy", "on_policy"))
    assert str(off) == str(build("seqkd").loss)
    assert str(on) == str(build("gkd", {"on_policy": 1.0, "divergence": "reverse_kl"}).loss.per("token"))


# --- OPSD's clipped objective -----------------------------------------------------------------------------------------


def clipped(z, p, cap):
    divergence = Divergence("forward_kl", cap=cap)
    return divergence.entries(z.log_softmax(-1)[None], p.log()[None]).sum()


def lowest(p, cap):
    """Its infimum over all students, by enumeration of who is given up: P_U log P_U + cap |rest|, at p / P_U on U."""
    tokens = range(len(p))
    parts = [u for size in range(1, len(p) + 1) for u in combinations(tokens, size)]
    value = lambda u: float(p[list(u)].sum()) * math.log(float(p[list(u)].sum())) + cap * (len(p) - len(u))
    return min(((value(u), u) for u in parts), key=lambda x: x[0])


def test_the_clipped_objective_has_its_golden_value_and_gradient():
    z = GOLDEN_S.clone().requires_grad_()
    value = clipped(z, GOLDEN_T.softmax(-1), 0.05)
    value.backward()
    assert float(value.detach()) == pytest.approx(-0.09996063, abs=1e-8)
    torch.testing.assert_close(
        z.grad, torch.tensor([0.091279, 0.067211, -0.109960, 0.001592, -0.050122], dtype=F64), rtol=0, atol=1e-6
    )


def test_the_clipped_objective_is_lowest_where_the_teachers_favourite_is_given_up():
    """docs/sparse.md: from the golden student descent ends at p / (1 - 0.68) on the four others, at -0.315; at the
    teacher it is 0: stationary, and not the lowest."""
    p, cap = GOLDEN_T.softmax(-1), 0.05
    value, kept = lowest(p, cap)
    assert kept == (0, 2, 3, 4) and value == pytest.approx(-0.3152, abs=1e-4) and int(p.argmax()) == 1

    at_teacher = p.log().clone().requires_grad_()
    clipped(at_teacher, p, cap).backward()
    assert float(clipped(p.log(), p, cap)) == pytest.approx(0, abs=1e-12)
    assert float(at_teacher.grad.abs().max()) < 1e-12

    z = GOLDEN_S.clone().requires_grad_()
    for _ in range(4000):
        (slope,) = torch.autograd.grad(clipped(z, p, cap), z)
        z = (z - 0.5 * slope).detach().requires_grad_()
    q = z.softmax(-1).detach()
    assert float(q[1]) < 2e-3 and float(p[1]) > 0.67
    others = [0, 2, 3, 4]
    torch.testing.assert_close(q[others], p[others] / p[others].sum(), rtol=0.02, atol=2e-3)
    assert float(clipped(z.detach(), p, cap)) == pytest.approx(value, abs=5e-3)


@pytest.mark.parametrize("cap", [1e9, 5.0])
def test_a_cap_that_no_entry_reaches_is_none(cap):
    p = GOLDEN_T.softmax(-1)
    assert float(clipped(GOLDEN_S, p, cap)) == pytest.approx(0.64857939, abs=1e-8)
    if cap > 1e6:
        assert lowest(p, cap) == (pytest.approx(0.0, abs=1e-12), (0, 1, 2, 3, 4))
