"""Hybrids of reward and teacher (kdrl, rlad, rlsd) against losses written out token by token and differentiated in
float64, against GRPO where they become it, and against the papers' numbers."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tabled import (
    F64,
    GOOD,
    V,
    gradient,
    hear,
    packed,
    prefix,
    random_rollouts,
    random_table,
    relative,
    rollout,
    sampled_logp,
    table,
)

from opd.anchors import blend, old
from opd.credits import Evident, evident, log_ratio
from opd.errors import OpdError
from opd.loss import push
from opd.math.credit import evident as size
from opd.math.divergence import reverse_kl
from opd.method import TEACHER, build
from opd.methods.grpo import grpo
from opd.methods.kdrl import kdrl
from opd.methods.rlad import rlad
from opd.methods.rlsd import rlsd
from opd.schedule import linear, value
from opd.types import Judge, Says

ANSWERED = Judge("reference", "answer")
JUDGES = {"teacher": 2, "reference": 3, "*": 4}  # * sees the answer


def scene(method, seed=0):
    """A batch on which every one of live, old, behaviour and the judges differs, and the student's table."""
    batch = packed(random_rollouts(("student",), seed=seed), 1.0)
    batch = hear(batch, method.needs, {name: random_table(n) for name, n in JUDGES.items()})
    model = random_table(1)
    wobble = torch.sin(torch.arange(len(batch.row_N), dtype=F64)) / 2
    return model, replace(batch, old_N=sampled_logp(model, batch) + wobble)


def written_out(model, batch, token_loss, per):
    """[S, V] gradient of the mean of `token_loss(i, live)` over tokens, by autograd through the table, one by one."""
    z_SV = model.module.model.logits_SV.detach().clone().requires_grad_()
    per_row: dict[int, list[torch.Tensor]] = {}
    for i, (row, place) in enumerate(zip(batch.row_N.tolist(), batch.position_N.tolist(), strict=True)):
        state = (place - 1) * V + batch.rollouts[row].tokens[place - 1]
        live = z_SV[state][batch.token_N[i]] - z_SV[state].exp().sum().log()
        per_row.setdefault(row, []).append(token_loss(i, live))
    means = [sum(x) / len(x) for x in per_row.values()]
    every = [x for xs in per_row.values() for x in xs]
    total = sum(every) / len(every) if per == "token" else sum(means) / len(means)
    return torch.autograd.grad(total, z_SV)[0]


def advantages(batch):
    """[N] (reward - mean) / (unbiased deviation + 1e-6) of each token's group."""
    out = []
    for row in batch.row_N.tolist():
        mates = [r.reward for r in batch.rollouts if r.prompt.id == batch.rollouts[row].prompt.id]
        mean = sum(mates) / len(mates)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in mates) / (len(mates) - 1))
        out.append((batch.rollouts[row].reward - mean) / (deviation + 1e-6))
    return out


def clipped(log_ratio, credit, low, high):
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * credit, ratio.clamp(1 - low, 1 + high) * credit)


def bitwise(a, b, **changes):
    """Loss and gradient of two methods on one batch, to the bit."""
    model, batch = scene(a)
    one, other = gradient(model, batch, a.loss, **changes), gradient(model, batch, b.loss, **changes)
    assert torch.equal(one[0], other[0]) and one[0].norm() > 0
    assert one[1]["loss/total"] == other[1]["loss/total"]


# --- kdrl ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spare", [False, True])
def test_kdrl_is_grpo_plus_the_gradient_of_k2(spare):
    method = kdrl(beta=0.3, spare_correct=spare, success=0.2)
    model, batch = scene(method)
    credit, teacher = advantages(batch), sampled_logp(random_table(2), batch)

    def token_loss(i, live):
        wrong = not spare or batch.rollouts[int(batch.row_N[i])].reward <= 0.2
        k2 = (live - teacher[i]) ** 2 / 2
        return clipped(live - batch.old_N[i], credit[i], 0.2, 0.2) + 0.3 * wrong * k2

    assert relative(gradient(model, batch, method.loss)[0], written_out(model, batch, token_loss, "token")) < 1e-12
    rewards = [r.reward for r in batch.rollouts]
    assert min(rewards) < 0.2 < max(rewards)


def test_the_teachers_term_has_the_reverse_kls_gradient_by_enumeration():
    """Every token said once, weighted by its probability: 1.2 of methods.md, for what kdrl adds to GRPO."""
    teacher, model = random_table(2), random_table(1)
    state = (len(prefix(0)) - 1) * V + prefix(0)[-1]
    logp = table(model).detach()[state]
    (pull,) = [t for t in kdrl(beta=1.0).loss.terms if t.head.credit.needs]
    total = torch.zeros(V, dtype=F64)
    for v in range(V):
        batch = packed([rollout(0, "student", prefix(0), [(v, float(logp[v]))], reward=0.0)])
        heard = hear(batch, {TEACHER: Says.TOKEN}, {"teacher": teacher})
        total += logp[v].exp() * gradient(model, heard, type(kdrl().loss)((pull,)))[0][state]
    z = model.module.model.logits_SV.detach()[state].clone().requires_grad_()
    want = torch.autograd.grad(reverse_kl(z.log_softmax(-1), table(teacher).detach()[state]).sum(), z)[0]
    torch.testing.assert_close(total, want, rtol=0, atol=1e-12)


def test_kdrl_without_a_teacher_is_grpo():
    assert kdrl(beta=0, group=4, min_std=0.1).loss == grpo(group=4, min_std=0.1).loss and not kdrl(beta=0).needs
    faded = kdrl(beta=linear(0.5, 0, 10))
    model, batch = scene(faded)
    assert torch.equal(gradient(model, batch, faded.loss, step=10)[0], gradient(model, batch, grpo().loss)[0])
    assert not torch.equal(gradient(model, batch, faded.loss, step=9)[0], gradient(model, batch, grpo().loss)[0])


def test_without_rewards_kdrl_is_distillation():
    """Groups that tie leave the teacher's term alone: k2's gradient, which on these samples is token_opd's of live."""
    model, batch = scene(kdrl(beta=1.0))
    tied = replace(batch, reward_B=torch.ones_like(batch.reward_B), old_N=None)
    opd = build("token_opd", {"against": "live"}).loss
    at_once = replace(tied, behaviour_N=sampled_logp(model, batch))
    assert relative(gradient(model, at_once, kdrl(beta=1.0).loss)[0], gradient(model, at_once, opd)[0]) < 1e-12


def test_a_missing_reward_does_not_count_as_wrong():
    method = kdrl(spare_correct=True)
    model, batch = scene(method)
    holes = replace(batch, reward_B=batch.reward_B.index_fill(0, torch.tensor(0), float("nan")))
    with pytest.raises(OpdError, match=r"push_teacher have no finite value for \[\[reward ≤ 0\]\]"):
        gradient(model, holes, method.loss)


# --- rlad ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clamp", [None, 1.0, 0.3])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5])
def test_rlad_as_the_paper_prints_it(alpha, clamp):
    """The two ratios to their powers, the clamp a plain clamp: value, and autograd's own gradient."""
    method = rlad(alpha=alpha, clamp=clamp, kl=0.05)
    model, batch = scene(method)
    teacher, reference = (sampled_logp(random_table(n), batch) for n in (2, 3))
    credit = advantages(batch)
    held = []

    def token_loss(i, live):
        over_teacher = live - teacher[i]
        held.append(clamp is not None and bool(over_teacher.abs() > clamp))
        over_teacher = over_teacher if clamp is None else over_teacher.clamp(-clamp, clamp)
        log_r = alpha * (live - batch.old_N[i]) + (1 - alpha) * over_teacher
        ratio = (live - batch.old_N[i]).exp()
        kl = -ratio * (reference[i] - live).detach()
        return clipped(log_r, credit[i], 0.2, 0.28) + 0.05 * kl

    want = written_out(model, batch, token_loss, "sequence")
    assert relative(gradient(model, batch, method.loss, tile=3)[0], want) < 1e-12
    assert any(held) is (clamp is not None)


@pytest.mark.parametrize("clamp", [None, 1.0])
@pytest.mark.parametrize("form", ["push", "k3"])
def test_rlad_at_alpha_one_is_grpo_to_the_bit(clamp, form):
    shared = {"clip": (0.2, 0.28), "kl": 0.01, "kl_form": form, "min_std": 0.1, "per": "sequence"}
    one, other = rlad(alpha=1.0, clamp=clamp, **shared), grpo(**shared)
    assert one.loss == other.loss and TEACHER not in one.needs
    bitwise(one, other, tile=4, micro=11)


def at(student, anchors):
    """A scope of one token of which only log-probabilities are asked."""
    names = {"live": student, **anchors}
    values = {k: torch.tensor([math.log(v)], dtype=F64) for k, v in names.items()}
    told = {"judged": lambda self, judge: values["teacher"], **{k: v for k, v in values.items() if k != "teacher"}}
    return type("Scope", (), told)()


@pytest.mark.parametrize(
    ("student", "alpha", "ratio"),
    [(0.30, 0.0, 0.5), (0.30, 0.5, 0.77459667), (0.30, 1.0, 1.2), (0.25, 0.5, 0.64549722)],
)
def test_rlads_ratio_golden(student, alpha, ratio):
    scope = at(student, {"old": 0.25, "teacher": 0.60})
    for limit in (None, 1.0):
        anchor = blend(TEACHER, alpha, limit)
        assert float(anchor.log_ratio(scope.live, scope).exp()) == pytest.approx(ratio, abs=1e-8)
        assert float((scope.live - anchor.at(scope)).exp()) == pytest.approx(ratio, abs=1e-8)


@pytest.mark.parametrize(("student", "dead"), [(0.30, False), (0.02, True), (0.9, True)])
def test_the_clamp_leaves_alpha_of_the_gradient(student, dead):
    """By finite differences: where it holds, log r moves alpha for 1 of log student; the ratio itself is bounded."""
    alpha, step = 0.25, 1e-6
    teacher = 0.15 if student == 0.9 else 0.20
    at_log = lambda x: float(blend(TEACHER, alpha, 1.0).log_ratio(x, at(student, {"old": 0.25, "teacher": teacher})))
    live = torch.tensor([math.log(student)], dtype=F64)
    slope = (at_log(live + step) - at_log(live - step)) / (2 * step)
    assert slope == pytest.approx(alpha if dead else 1.0, abs=1e-8)
    x = live.clone().requires_grad_()
    blend(TEACHER, alpha, 1.0).log_ratio(x, at(student, {"old": 0.25, "teacher": teacher})).sum().backward()
    assert float(x.grad) == pytest.approx(slope, abs=1e-8)


def test_at_alpha_zero_the_clamp_stops_a_token_altogether():
    """A token that the teacher finds e times likelier than the student gets no gradient at all, however rewarded."""
    model, teacher = random_table(None), random_table(None)
    with torch.no_grad():
        teacher.module.model.logits_SV[:, GOOD] += 4.0
    rows = [rollout(0, "student", prefix(0), [(v, -1.8)], sample=v, reward=float(v == GOOD)) for v in (0, GOOD)]
    moved = {}
    for clamp in (None, 1.0):
        method = rlad(alpha=0.0, clamp=clamp, clip=None)
        batch = hear(packed(rows), method.needs, {"teacher": teacher})
        moved[clamp] = gradient(model, batch, method.loss)[0]
    assert moved[None].norm() > 0.1 and moved[1.0].norm() == 0


def test_a_tied_group_learns_nothing_from_the_teacher_either():
    model, batch = scene(rlad())
    tied = replace(batch, reward_B=torch.ones_like(batch.reward_B))
    assert gradient(model, tied, rlad().loss)[0].norm() == 0


# --- rlsd ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0, linear(0.8, 0.2, 4)])
def test_rlsd_as_the_paper_prints_it(lam):
    method = rlsd(lam=lam)
    model, batch = scene(method)
    judge, credit, share = sampled_logp(random_table(4), batch), advantages(batch), value(lam, 2)

    def token_loss(i, live):
        ratio = (judge[i] - live).detach().exp()
        weight = (ratio if credit[i] > 0 else 1 / ratio).clamp(0.8, 1.2)
        return clipped(live - batch.old_N[i], credit[i] * ((1 - share) + share * weight), 0.2, 0.2)

    want = written_out(model, batch, token_loss, "token")
    assert relative(gradient(model, batch, method.loss, tile=2, step=2)[0], want) < 1e-12


def test_rlsd_at_lambda_zero_is_grpo_to_the_bit():
    """As a number it asks no judge; as the end of a schedule it has asked, and the bits are the same."""
    shared = {"clip": (0.2, 0.28), "kl": 0.01, "std": False, "per": "sequence"}
    assert rlsd(lam=0, **shared).loss == grpo(**shared).loss
    assert ANSWERED not in rlsd(lam=0).needs and rlsd().needs == {ANSWERED: Says.TOKEN}
    bitwise(rlsd(lam=0, **shared), grpo(**shared), tile=4)
    bitwise(rlsd(lam=linear(0.5, 0, 5), **shared), grpo(**shared), tile=4, step=5)


def test_the_same_judge_as_student_is_grpo():
    """P_T = P_S: every weight is 1, whatever lambda."""
    model, batch = scene(rlsd(lam=1.0))
    same = hear(batch, {ANSWERED: Says.TOKEN}, {"*": model})
    got, want = (gradient(model, same, m.loss)[0] for m in (rlsd(lam=1.0), grpo()))
    assert relative(got, want) < 1e-12


def test_whose_weights_judge_is_an_argument():
    for role in ("reference", "ema", "student"):
        assert rlsd(role=role).needs == {Judge(role, "answer"): Says.TOKEN}
        assert rlsd(role=role, ema=0.9).ema == (0.9 if role == "ema" else None)


@pytest.mark.parametrize(("advantage", "weight", "credit"), [(1.0, 1.2, 1.1), (-1.0, 0.8, -0.9)])
def test_rlsds_credit_golden(advantage, weight, credit):
    """Student 0.3, judge 0.6: the weight is clipped to 1.2 and 0.8, and at lambda 0.5 the credit is 1.1 and -0.9."""
    a, delta = torch.tensor([advantage], dtype=F64), torch.tensor([math.log(2)], dtype=F64)
    assert float(size(a, delta, 1.0, 1e9)) == pytest.approx(advantage * 2**advantage)
    assert float(size(a, delta, 1.0, 0.2)) == pytest.approx(advantage * weight)
    assert float(size(a, delta, 0.5, 0.2)) == pytest.approx(credit)


@settings(max_examples=200, deadline=None)
@given(st.floats(-5, 5), st.floats(-800, 800), st.floats(0, 1), st.floats(0, 0.99))
def test_the_sign_is_the_environments_and_the_size_is_bounded(advantage, delta, share, eps):
    a = torch.tensor([advantage], dtype=F64)
    got = float(size(a, torch.tensor([delta], dtype=F64), share, eps))
    assert math.copysign(1, got) == math.copysign(1, advantage) or got == advantage == 0
    low, high = sorted(advantage * (1 + s * share * eps) for s in (-1, 1))
    assert low - 1e-12 <= got <= high + 1e-12


def test_evidence_prints_and_vanishes():
    delta = log_ratio(ANSWERED, "live")
    credit = evident(log_ratio(TEACHER, "old"), delta, 0.5, 0.2)
    assert isinstance(credit, Evident) and credit.needs.keys() == {TEACHER, ANSWERED}
    assert evident(delta, delta, 0, 0.2) == delta
    assert str(push(evident(delta, delta, linear(0.5, 0, 50), 0.2), anchor=old())) == (
        "mean_t[-exp(log π - log π_old) · [(log reference[answer] - log π) · (1 + linear(0.5, 0, 50) "
        "(clip[±0.2](exp(±(log reference[answer] - log π))) - 1))]]"
    )
