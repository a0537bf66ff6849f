"""Methods that match distributions: gradients against plain autograd over the whole vocabulary, and their limits."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tabled import F64, V, gradient, hear, packed, random_rollouts, random_table, relative, table

from opd.batch import Batch
from opd.errors import UsageError
from opd.method import TEACHER, build
from opd.student import Optim, Student
from opd.types import Says


def situation(speakers: tuple[str, ...], seed: int = 0) -> tuple[object, object, Batch]:
    """(student, teacher, batch): the teacher is sure in some states and not in others; ratios differ from 1."""
    model, teacher = random_table(1), random_table(2, 2.0)
    batch = packed(random_rollouts(speakers, seed=seed))
    old = Student(model, Optim()).logp(batch) + torch.sin(torch.arange(len(batch.row_N), dtype=F64)) / 3
    return model, teacher, hear(replace(batch, old_N=old), {TEACHER: Says.DENSE}, {"*": teacher})


def state(batch: Batch, row: int, position: int) -> int:
    """The state of the table that predicts this token."""
    return (position - 1) * V + batch.rollouts[row].tokens[position - 1]


def by_hand(model, teacher, batch: Batch, per_token: Callable, per: str = "token"):
    """The gradient in the table of a naive loss: `per_token(z, t, token, old)` summed row by row with its own mean."""
    z_SV = model.module.model.logits_SV.detach().clone().requires_grad_()
    t_SV = teacher.module.model.logits_SV.detach()
    places = list(zip(batch.row_N.tolist(), batch.position_N.tolist(), strict=True))
    lengths = batch.length_B.tolist()
    rows, total = sum(n > 0 for n in lengths), z_SV.new_zeros(())
    for i, (r, p) in enumerate(places):
        at = state(batch, r, p)
        one = per_token(z_SV[at], t_SV[at], int(batch.token_N[i]), batch.old_N[i])
        total = total + one / (len(places) if per == "token" else lengths[r] * rows)
    (grad,) = torch.autograd.grad(total, z_SV)
    return grad, float(total.detach())


def checked(method, per_token: Callable, per: str = "token") -> None:
    model, teacher, batch = situation(method.speaks.names)
    want, value = by_hand(model, teacher, batch, per_token, per)
    got, stats = gradient(model, batch, method.loss, tile=5)
    assert relative(got, want) < 1e-12
    assert stats["loss/total"] == pytest.approx(value, abs=1e-12)


def kl(a, b):
    return (a * (a / b).log()).sum()


# --- gkd --------------------------------------------------------------------------------------------------------------


def head(p, mu):
    """The teacher's likeliest tokens, one after the other until their mass reaches mu."""
    kept, mass = [], 0.0
    for v in p.argsort(descending=True).tolist():
        if mass >= mu:
            break
        kept, mass = [*kept, v], mass + float(p[v])
    return kept


def adaptive(p, q, mu=0.5):
    gap = (p - q).abs().detach()
    first = gap[head(p, mu)].sum() / gap.sum()
    return first * kl(p, q) + (1 - first) * kl(q, p)


def jsd(p, q, beta):
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def tailed(p, q, ids):
    close = lambda x: torch.cat([x[ids], 1 - x[ids].sum()[None]])
    return close(p), close(q)


def own(x, k):
    return sorted(x.topk(k).indices.tolist())


FAMILY = {
    "forward_kl": ({}, kl),
    "reverse_kl": ({}, lambda p, q: kl(q, p)),
    "jsd": ({"beta": 0.3}, lambda p, q: jsd(p, q, 0.3)),
    "jsd ": ({"beta": 0.3, "scaled": True}, lambda p, q: jsd(p, q, 0.3) / 0.21),
    "jsd  ": ({"beta": 1.0, "scaled": True}, lambda p, q: kl(q, p)),
    "skew_forward_kl": ({}, lambda p, q: kl(p, 0.1 * p + 0.9 * q)),
    "skew_reverse_kl": ({}, lambda p, q: kl(q, 0.9 * p + 0.1 * q)),
    "tvd": ({}, lambda p, q: (p - q).abs().sum() / 2),
    "alpha_divergence": ({"alpha": 0.4}, lambda p, q: (1 - (p**0.4 * q**0.6).sum()) / 0.24),
    "adaptive_kl": ({"mu": 0.6}, lambda p, q: adaptive(p, q, 0.6)),
    "jeffreys": ({}, lambda p, q: kl(p, q) + kl(q, p)),
    "hellinger": ({}, lambda p, q: 1 - (p * q).sqrt().sum()),
    "pearson": ({}, lambda p, q: ((p - q) ** 2 / q).sum()),
    "neyman": ({}, lambda p, q: ((p - q) ** 2 / p).sum()),
}


@pytest.mark.parametrize("name", FAMILY)
def test_gkd_is_the_family(name):
    """Mean over rows of the mean over their tokens, student's and data's rows alike."""
    args, by_definition = FAMILY[name]
    method = build("gkd", {"divergence": name.strip(), **args})
    assert method.speaks.names == ("student", "data")
    checked(method, lambda z, t, *_: by_definition(t.softmax(-1), z.softmax(-1)), "sequence")


SPARSE = {
    "opcd": (
        {"divergence": "reverse_kl", "top_k": 2, "whose": "student", "rest": "dropped"},
        lambda p, q: (q * (q / p).log())[own(q, 2)].sum(),
    ),
    "verl": (
        {"divergence": "forward_kl", "top_k": 3, "rest": "dropped"},
        lambda p, q: (p * (p / q).log())[own(p, 3)].sum(),
    ),
    "lsm": (
        {"divergence": "reverse_kl", "top_k": 3, "rest": "renormalised"},
        lambda p, q: kl(q[own(p, 3)] / q[own(p, 3)].sum(), p[own(p, 3)] / p[own(p, 3)].sum()),
    ),
    "tail": ({"divergence": "reverse_kl", "top_k": 2}, lambda p, q: kl(*reversed(tailed(p, q, own(p, 2))))),
    "union": (
        {"divergence": "jsd", "top_k": 2, "whose": "union"},
        lambda p, q: jsd(*tailed(p, q, sorted({*own(p, 2), *own(q, 2)})), 0.5),
    ),
    "cap": ({"divergence": "forward_kl", "cap": 0.05}, lambda p, q: (p * (p / q).log()).clamp(max=0.05).sum()),
}


@pytest.mark.parametrize("name", SPARSE)
def test_gkd_on_part_of_the_vocabulary_and_with_a_cap(name):
    args, by_definition = SPARSE[name]
    method = build("gkd", {"on_policy": 1.0, "per": "token", **args})
    checked(method, lambda z, t, *_: by_definition(t.softmax(-1), z.softmax(-1)))


def test_gkd_at_a_temperature_ranks_and_matches_there():
    method = build(
        "gkd", {"on_policy": 1.0, "divergence": "forward_kl", "temperature": 2.0, "top_k": 2, "per": "token"}
    )
    checked(method, lambda z, t, *_: kl(*tailed((t / 2).softmax(-1), (z / 2).softmax(-1), own(t, 2))))


def test_gkd_with_everything_kept_or_nothing_capped_is_plain():
    plain = {"on_policy": 1.0, "divergence": "forward_kl"}
    model, _, batch = situation(("student",))
    want, _ = gradient(model, batch, build("gkd", plain).loss)
    for more in ({"top_k": 6}, {"top_k": 10**6, "rest": "dropped"}, {"cap": 1e9}, {"beta": 0.9, "alpha": 0.9}):
        assert torch.equal(gradient(model, batch, build("gkd", plain | more).loss)[0], want)


def test_gkd_refuses_what_would_be_zero_or_without_effect():
    for args, said in (
        ({"divergence": "jsd", "beta": 0.0}, "its limit per unit is forward_kl"),
        ({"divergence": "reverse_kl", "scaled": True}, "scaled is an argument of jsd"),
        ({"divergence": "skew_forward_kl", "alpha": 1.0}, "zero everywhere"),
    ):
        with pytest.raises(UsageError, match=said):
            build("gkd", args)


def test_gkd_prints_the_objective_that_it_really_has():
    text = str(build("gkd", {"divergence": "reverse_kl", "top_k": 64, "whose": "student", "cap": 0.05}).loss)
    assert "reverse_kl(entries <= 0.05, student's top 64, the rest as one)(teacher, π)" in text


# --- token_kd ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "tau"), [(0.5, 1.0), (0.3, 2.0), (1.0, 4.0), (0.0, 2.0)])
def test_token_kd_is_a_mixture(share, tau):
    def per_token(z, t, y, _):
        soft = tau**2 * kl((t / tau).softmax(-1), (z / tau).softmax(-1))
        return -(1 - share) * z.log_softmax(-1)[y] + share * soft

    checked(build("token_kd", {"share": share, "temperature": tau}), per_token)


def test_token_kd_at_its_ends():
    """Share 0 is SFT and asks no teacher; share 1 at temperature 1 is GKD's forward KL on data."""
    model, _, batch = situation(("data",))
    none, full = build("token_kd", {"share": 0.0}), build("token_kd", {"share": 1.0})
    assert not none.needs and str(none.loss) == str(build("sft").loss)
    gkd = build("gkd", {"on_policy": 0.0, "divergence": "forward_kl", "per": "token"})
    torch.testing.assert_close(*(gradient(model, batch, m.loss)[0] for m in (full, gkd)), atol=1e-15, rtol=1e-12)


def test_a_certain_teacher_makes_token_kd_sft():
    """All of the teacher's mass on what was said: at any share the gradient is the cross entropy's."""
    model, _, batch = situation(("data",))
    sure, said = random_table(None), {}
    for r, p, y in zip(batch.row_N.tolist(), batch.position_N.tolist(), batch.token_N.tolist(), strict=True):
        said[state(batch, r, p)] = y
    with torch.no_grad():
        for at, y in said.items():
            sure.module.model.logits_SV[at] = 0.0
            sure.module.model.logits_SV[at, y] = 80.0
    on = [
        (r, p, y) for r, rollout in enumerate(batch.rollouts) for p, y in enumerate(rollout.tokens) if rollout.mask[p]
    ]
    unlike = {r for r, p, y in on if said[state(batch, r, p)] != y}  # two rows said otherwise in the same state
    alone = [r for r in range(len(batch.rollouts)) if r not in unlike]
    batch = hear(batch, {TEACHER: Says.DENSE}, {"*": sure}).rows(alone)
    assert len(alone) >= 2
    sft, _ = gradient(model, batch, build("sft").loss)
    for share in (0.2, 1.0):
        assert relative(gradient(model, batch, build("token_kd", {"share": share}).loss)[0], sft) < 1e-10


def test_hot_token_kd_matches_centred_logits():
    """tau -> inf: in each state, the difference of both sides' logits, each less its mean, over |V|."""
    model, teacher, batch = situation(("data",))
    got, _ = gradient(model, batch, build("token_kd", {"share": 1.0, "temperature": 1e4}).loss)
    centred = lambda m: m.module.model.logits_SV.detach() - m.module.model.logits_SV.detach().mean(-1, keepdim=True)
    gap = (centred(model) - centred(teacher)) / V
    want = torch.zeros_like(got)
    for r, p in zip(batch.row_N.tolist(), batch.position_N.tolist(), strict=True):
        want[state(batch, r, p)] += gap[state(batch, r, p)] / len(batch.row_N)
    assert relative(got, want) < 1e-3


# --- entropy_aware ----------------------------------------------------------------------------------------------------


def surrogate(z, t, y, old, clip=0.2):
    """PPO's clipped one: the credit is the teacher's log-ratio to `old`, without gradient."""
    credit = float(t.log_softmax(-1)[y] - old)
    ratio = (z.log_softmax(-1)[y] - old).exp()
    return -torch.minimum(ratio * credit, ratio.clamp(1 - clip, 1 + clip) * credit)


def unsure_forward(z, t, nats, k):
    p, q = t.softmax(-1), z.softmax(-1)
    ids = own(p, min(k, V))
    kept = p[ids] / p[ids].sum()
    return kl(kept, q[ids]) if float(-(p * p.log()).sum()) > nats else 0.0


@pytest.mark.parametrize(("nats", "top_k", "forward"), [(0.8, 16, 1.0), (0.8, 3, 1.0), (1.1, 2, 0.5)])
def test_entropy_aware_by_hand(nats, top_k, forward):
    method = build("entropy_aware", {"unsure_nats": nats, "top_k": top_k, "forward": forward})
    _, teacher, batch = situation(method.speaks.names)
    entropy_S = -(table(teacher).exp() * table(teacher)).sum(-1).detach()
    states = [state(batch, r, p) for r, p in zip(batch.row_N.tolist(), batch.position_N.tolist(), strict=True)]
    open_share = float((entropy_S[states] > nats).double().mean())
    assert 0.1 < open_share < 0.9, "the gate does something here"
    _, stats = gradient(random_table(1), batch, method.loss, tile=5, micro=9)
    assert stats["gate/match_teacher_open_share"] == pytest.approx(open_share)
    checked(method, lambda z, t, y, old: surrogate(z, t, y, old) + forward * unsure_forward(z, t, nats, top_k))


def test_entropy_aware_at_its_ends():
    """Never unsure: sampled-token distillation. Always: that plus the forward KL everywhere. Weight 0: no DENSE."""
    model, _, batch = situation(("student",))
    grad = lambda **args: gradient(model, batch, build("entropy_aware", args).loss)[0]
    opd = build("token_opd", {"against": "old", "clip": (0.2, 0.2)})
    sampled = gradient(model, batch, opd.loss)[0]
    torch.testing.assert_close(grad(unsure_nats=float("inf")), sampled, atol=1e-16, rtol=1e-12)
    everywhere = build("gkd", {"on_policy": 1.0, "divergence": "forward_kl", "per": "token"})
    both = sampled + gradient(model, batch, everywhere.loss)[0]
    torch.testing.assert_close(grad(unsure_nats=-1.0), both, atol=1e-15, rtol=1e-10)
    assert build("entropy_aware", {"forward": 0.0}).needs == {TEACHER: Says.TOKEN}
    assert torch.equal(grad(forward=0.0), sampled)
    assert build("entropy_aware").needs == {TEACHER: Says.DENSE}


@pytest.mark.parametrize("name", ["gkd", "token_kd", "entropy_aware"])
def test_a_teacher_that_is_the_student_teaches_nothing(name):
    model = random_table(1)
    args = {"share": 1.0} if name == "token_kd" else {}
    method = build(name, args)
    batch = packed(random_rollouts(method.speaks.names))
    batch = hear(batch, {TEACHER: Says.DENSE}, {"*": model.frozen_copy("teacher")})
    assert gradient(model, batch, method.loss)[0].abs().max() < 1e-12
