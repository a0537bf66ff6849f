"""exopd, paced, mopd, cross_stage: against losses written out token by token, exact optima, limits, golden numbers."""

import math
from dataclasses import replace

import pytest
import torch
from tabled import (
    F64,
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
from test_hybrids import advantages, clipped, written_out

from opd.errors import OpdError, UsageError
from opd.expression import Expression
from opd.loss import Push
from opd.math.credit import pass_rate
from opd.math.divergence import forward_kl, reverse_kl
from opd.method import REFERENCE, TEACHER, build
from opd.methods.cross_stage import cross_stage
from opd.methods.exopd import exopd
from opd.methods.mopd import mopd
from opd.methods.paced import paced
from opd.types import Judge, Says

EXPERT = Judge("expert")
JUDGES = {"teacher": 2, "reference": 3, "expert": 2, "base": 3}
ZS = torch.tensor([2, 1, 0.5, -1, 0], dtype=F64)
ZT = torch.tensor([0.5, 2.5, 1, -2, 0.3], dtype=F64)
ZR = torch.tensor([0.2, 0.1, -0.3, 0.4, 0], dtype=F64)


def scene(method):
    """Every one of live, old, behaviour and the judges differs; some ratios leave the bands, some do not."""
    batch = packed(random_rollouts(("student",)), 1.0)
    batch = hear(batch, method.needs, {name: random_table(n) for name, n in JUDGES.items()})
    model = random_table(1)
    live_N, n = sampled_logp(model, batch), torch.arange(len(batch.row_N), dtype=F64)
    return model, replace(batch, old_N=live_N + torch.sin(n) / 2, behaviour_N=live_N + torch.cos(2 * n))


# --- exopd -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("against", ["live", "old", "behaviour"])
@pytest.mark.parametrize("lam", [0.0, 0.4, 1.25])
def test_exopd_is_the_papers_cost(lam, against):
    method = exopd(lam=lam, against=against)
    model, batch = scene(method)
    teacher, reference = (sampled_logp(random_table(n), batch) for n in (2, 3))
    anchor = batch.old_N if against == "old" else batch.behaviour_N
    mine = {"live": sampled_logp(model, batch), "old": batch.old_N, "behaviour": batch.behaviour_N}[against]

    def token_loss(i, live):
        cost = (mine[i] - teacher[i]) + (lam - 1) * (reference[i] - teacher[i])
        return (live - anchor[i]).exp() * cost

    assert relative(gradient(model, batch, method.loss)[0], written_out(model, batch, token_loss, "token")) < 1e-12


@pytest.mark.parametrize("against", ["live", "old", "behaviour"])
def test_exopd_at_lambda_one_is_token_opd_for_any_reference(against):
    method, opd = exopd(lam=1.0, against=against), build("token_opd", {"against": against})
    assert method.needs == opd.needs == {TEACHER: Says.TOKEN}
    model, batch = scene(method)
    assert torch.equal(gradient(model, batch, method.loss)[0], gradient(model, batch, opd.loss)[0])


def test_exopd_at_lambda_zero_stays_at_the_reference_and_asks_nobody_else():
    method = exopd(lam=0.0)
    assert method.needs == {REFERENCE: Says.TOKEN}
    model, batch = scene(method)
    stays = replace(batch, behaviour_N=sampled_logp(model, batch))
    stays = hear(stays, method.needs, {"reference": model})
    assert gradient(model, stays, method.loss)[0].norm() < 1e-15


def test_the_reference_may_be_a_role_of_the_recipe():
    method = exopd(reference="base")
    assert method.needs == {TEACHER: Says.TOKEN, Judge("base"): Says.TOKEN}
    model, batch = scene(method)
    assert torch.equal(gradient(model, batch, method.loss)[0], gradient(*scene(exopd()), exopd().loss)[0])


def exact_gradient(method, model, judges):
    """[V] over one state: every token said once, weighted by its probability under the student."""
    state = (len(prefix(0)) - 1) * V + prefix(0)[-1]
    logp = table(model).detach()[state]
    total = torch.zeros(V, dtype=F64)
    for v in range(V):
        batch = packed([rollout(0, "student", prefix(0), [(v, float(logp[v]))])])
        total += logp[v].exp() * gradient(model, hear(batch, method.needs, judges), method.loss)[0][state]
    return state, total


def test_exopd_minimises_its_objective_whose_optimum_is_the_extrapolation():
    """Expected gradient = that of -[lam E log teacher/ref - KL(student || ref)]; descended, it ends at the golden."""
    model, teacher, reference = random_table(None), random_table(None), random_table(None)
    pad = lambda z: torch.cat([z, z.new_tensor([-60.0])])  # the sixth token is practically never said
    with torch.no_grad():
        for each, z in ((model, ZS), (teacher, ZT), (reference, ZR)):
            each.module.model.logits_SV[:] = pad(z)
    judges = {"teacher": teacher, "reference": reference}
    method, lam = exopd(lam=1.25), 1.25
    t, r = ZT.log_softmax(-1), ZR.log_softmax(-1)
    for step in range(60):
        state, got = exact_gradient(method, model, judges)
        z = model.module.model.logits_SV.detach()[state, :5].clone().requires_grad_()
        s = z.log_softmax(-1)
        objective = lam * (s.exp() * (t - r)).sum() - reverse_kl(s, r).sum()
        want = torch.autograd.grad(-objective, z)[0]
        torch.testing.assert_close(got[:5], want, rtol=0, atol=1e-10)
        if step == 0:
            assert want.norm() > 0.1
        with torch.no_grad():
            model.module.model.logits_SV[state, :5] -= 0.5 * (got / table(model)[state].exp())[:5]  # natural gradient
    optimum = (lam * t + (1 - lam) * r).softmax(-1)
    golden = torch.tensor([0.06072228, 0.75847563, 0.12854907, 0.00253783, 0.0497152], dtype=F64)
    torch.testing.assert_close(optimum, golden, rtol=0, atol=1e-8)
    torch.testing.assert_close(table(model).detach()[state, :5].exp(), golden, rtol=0, atol=1e-6)


# --- paced -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize(("a", "b"), [(1, 1), (2, 0.5)])
def test_paced_weighs_prompts_by_what_the_student_can(divergence, a, b):
    method = paced(divergence=divergence, a=a, b=b, success=0.2)
    model, batch = scene(method)
    teacher_SV, fn = table(random_table(2)).detach(), {"forward_kl": forward_kl, "reverse_kl": reverse_kl}[divergence]
    z_SV = model.module.model.logits_SV.detach().clone().requires_grad_()
    rates, total = set(), torch.zeros((), dtype=F64)
    for row, said in enumerate(batch.rollouts):
        mates = [r.reward for r in batch.rollouts if r.prompt.id == said.prompt.id]
        p = sum(reward > 0.2 for reward in mates) / len(mates)
        rates.add(p)
        places = batch.position_N[batch.row_N == row].tolist()
        states = [(at - 1) * V + said.tokens[at - 1] for at in places]
        each = fn(z_SV[states].log_softmax(-1), teacher_SV[states]).sum(-1)
        total = total + p**a * (1 - p) ** b * each.mean() / len(batch.rollouts)
    assert len(rates) > 1 and any(0 < p < 1 for p in rates)
    want = torch.autograd.grad(total, z_SV)[0]
    assert relative(gradient(model, batch, method.loss, tile=3, micro=9)[0], want) < 1e-12


def test_paced_without_exponents_is_gkd():
    for name in ("forward_kl", "reverse_kl"):
        method = paced(divergence=name, a=0, b=0)
        model, batch = scene(method)
        gkd = build("gkd", {"divergence": name, "on_policy": 1.0})
        assert torch.equal(gradient(model, batch, method.loss)[0], gradient(model, batch, gkd.loss)[0])


def test_the_weight_vanishes_at_both_ends_and_is_highest_between():
    rewards = torch.tensor([0, 0, 0, 0, 1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 1], dtype=F64)
    group = torch.arange(16) // 4
    p = pass_rate(rewards, group, 0.0)
    assert p[::4].tolist() == [0, 0.25, 0.5, 1]
    method = paced(a=1, b=1)
    model = random_table(1)
    rows = [
        rollout(i // 4, "student", prefix(i // 4), [(1, -1.0)], sample=i, reward=float(rewards[i])) for i in range(16)
    ]
    batch = hear(packed(rows), method.needs, {"teacher": random_table(2)})
    norms = [gradient(model, batch.rows(list(range(4 * g, 4 * g + 4))), method.loss)[0].norm() for g in range(4)]
    assert norms[0] == norms[3] == 0 and norms[2] > 0
    free = paced(a=0, b=0).loss
    plain = [gradient(model, batch.rows(list(range(4 * g, 4 * g + 4))), free)[0].norm() for g in range(4)]
    assert float(norms[1] / plain[1]) == pytest.approx(3 / 16) and float(norms[2] / plain[2]) == pytest.approx(1 / 4)


def test_a_missing_reward_is_no_failure():
    assert pass_rate(torch.tensor([1.0, float("nan"), 0.0]), torch.tensor([0, 0, 1]), 0.0).isnan().tolist() == [1, 1, 0]
    model, batch = scene(paced())
    holes = replace(batch, reward_B=batch.reward_B.index_fill(0, torch.tensor(0), float("nan")))
    with pytest.raises(OpdError, match="match_teacher have no finite value"):
        gradient(model, holes, paced().loss)


# --- mopd ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_mopd_as_mimo_prints_it(alpha):
    """The weight is of the student now over the sampler, kept inside the band and 0 outside, and still counted."""
    method = mopd(alpha=alpha)
    model, batch = scene(method)
    expert, credit = sampled_logp(random_table(2), batch), advantages(batch)
    weights = []

    def token_loss(i, live):
        ratio = float((live.detach() - batch.behaviour_N[i]).exp())
        weights.append(ratio if 0.5 <= ratio <= 2 else 0.0)
        advantage = float(expert[i] - live.detach()) + alpha * credit[i]
        return -weights[-1] * advantage * live

    want = written_out(model, batch, token_loss, "sequence")
    assert relative(gradient(model, batch, method.loss, tile=3)[0], want) < 1e-12
    assert 0 in weights and any(w not in (0, 1) for w in weights)


def test_mopd_asks_for_a_reward_only_when_it_counts():
    assert mopd().needs == mopd(alpha=1).needs == {EXPERT: Says.TOKEN}
    assert "reward" not in mopd().loss.reads and "reward" in mopd(alpha=1).loss.reads
    with pytest.raises(UsageError, match="mopd: alpha compares the samples"):
        build("mopd", {"alpha": 0.5, "group": 1})


def test_an_expert_that_is_the_student_leaves_the_outcome_alone():
    for alpha in (0.0, 1.0):
        model, batch = scene(mopd(alpha=alpha))
        batch = hear(batch, {EXPERT: Says.TOKEN}, {"expert": model})
        batch = replace(batch, behaviour_N=sampled_logp(model, batch), old_N=None)
        grad = gradient(model, batch, mopd(alpha=alpha).loss)[0]
        grpo = gradient(model, batch, build("grpo", {"per": "sequence"}).loss)[0]
        assert (grad - alpha * grpo).norm() < 1e-14 and grpo.norm() > 0.01


def test_an_open_band_is_importance_sampling():
    """[0, inf): the gradient of token_opd against the student now, anchored at the sampler."""
    method = mopd(low=0.0, high=math.inf)
    model, batch = scene(method)
    batch = hear(batch, {EXPERT: Says.TOKEN, TEACHER: Says.TOKEN}, {"*": random_table(2)})
    opd = build("token_opd", {"against": "live", "per": "sequence"})
    assert relative(gradient(model, batch, method.loss)[0], gradient(model, batch, opd.loss)[0]) < 1e-12


# --- cross_stage -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [2.0, math.inf])
def test_cross_stage_as_glm_prints_it(beta):
    """At beta inf the gate is plain importance sampling between the engines."""
    method = cross_stage(beta=beta)
    model, batch = scene(method)
    expert = sampled_logp(random_table(2), batch)
    pops = []

    def token_loss(i, live):
        rho = float((batch.old_N[i] - batch.behaviour_N[i]).exp())
        pops.append(rho if 1 / beta <= rho <= beta else 0.0)
        return pops[-1] * clipped(live - batch.old_N[i], float(expert[i] - live.detach()), 0.2, 0.28)

    want = written_out(model, batch, token_loss, "sequence")
    assert relative(gradient(model, batch, method.loss, tile=3)[0], want) < 1e-12
    assert (0 in pops) is (beta == 2) and any(pops)


class Given(Expression):
    """A credit that is told."""

    def at(self, scope):
        return torch.full_like(scope.behaviour, -0.3)


def test_cross_stage_golden():
    """rho = 1.1, r = 1.4, A = -0.3: the gate multiplies after the min, and the token's loss is 0.462."""
    model = random_table(1)
    (term,) = cross_stage().loss.terms
    assert isinstance(term.head, Push)
    loss = type(cross_stage().loss)((replace(term, head=replace(term.head, credit=Given())),))
    batch = packed([rollout(0, "student", prefix(0), [(1, -1.0)])])
    old = sampled_logp(model, batch) - math.log(1.4)
    batch = replace(batch, old_N=old, behaviour_N=old - math.log(1.1))
    assert gradient(model, batch, loss)[1]["loss/total"] == pytest.approx(0.462, abs=1e-12)


def test_where_one_engine_speaks_and_trains_cross_stage_is_clipped_token_opd():
    model, batch = scene(cross_stage())
    alike = replace(batch, behaviour_N=batch.old_N)
    opd = build("token_opd", {"against": "live", "per": "sequence", "clip": (0.2, 0.28)}).loss
    heard = hear(alike, {EXPERT: Says.TOKEN, TEACHER: Says.TOKEN}, {"*": random_table(2)})
    assert relative(gradient(model, heard, cross_stage().loss)[0], gradient(model, heard, opd)[0]) < 1e-12


@pytest.mark.parametrize("method", [mopd(), cross_stage(), exopd(lam=1.0)], ids=["mopd", "cross_stage", "exopd"])
def test_a_judge_that_is_the_student_teaches_nothing(method):
    model, batch = scene(method)
    same = hear(batch, method.needs, {"*": model})
    same = replace(same, behaviour_N=sampled_logp(model, batch), old_N=None)
    assert gradient(model, same, method.loss)[0].norm() < 1e-14
