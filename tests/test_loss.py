"""The algebra: what follows from the symbols, what every filter counts, and what is missing being refused."""

from dataclasses import replace

import pytest
import torch
from tabled import gradient, hear, packed, random_rollouts, random_table, relative, rollout, sampled_logp

from opd.anchors import old
from opd.credits import Discounted, LogRatio, Reward, discounted, log_ratio, reward
from opd.divergences import Divergence
from opd.errors import OpdError
from opd.expression import Zero
from opd.gates import Band, band
from opd.loss import Loss, bradley_terry, k3, learn, match, nll, push
from opd.method import CRITIC, REFERENCE, TEACHER
from opd.schedule import Schedule, cosine, linear, parse, value
from opd.signals import Score, Token
from opd.types import Judge, Says

RKL = Divergence("reverse_kl")
NAN = float("nan")


# --- what follows from the symbols ------------------------------------------------------------------------------------


def test_needs_and_reads_are_derived():
    assert match(TEACHER, RKL).needs == {TEACHER: Says.DENSE}
    assert push(log_ratio(TEACHER)).needs == k3(TEACHER).needs == {TEACHER: Says.TOKEN}
    assert (push(log_ratio(TEACHER)) + match(TEACHER, RKL)).needs == {TEACHER: Says.DENSE}  # the most that is asked
    assert push(reward()).needs == nll().needs == {}
    assert push(reward(CRITIC)).needs == {CRITIC: Says.SCORE}
    assert learn(CRITIC, bradley_terry(good="teacher", bad="student")).needs == {TEACHER: Says.TEXT}
    assert nll().where(band(0.5, 2)).reads == {"old", "behaviour"}
    assert push(reward(), anchor=old()).reads == {"reward", "old"}
    assert push(log_ratio(TEACHER)).reads == {"live", "behaviour"}
    assert push(reward(CRITIC), anchor=old()).reads == {"old"}
    assert match(TEACHER, RKL).reads == nll().reads == frozenset()
    deep = push(discounted(log_ratio(TEACHER, "old") + 0.5 * reward(), 0.9))
    assert deep.needs == {TEACHER: Says.TOKEN} and deep.reads == {"old", "behaviour", "reward"}
    informed = Judge("student", "answer")  # the same role behind another view is another judge
    assert (push(log_ratio(informed)) + k3(Judge("student"))).needs.keys() == {informed, Judge("student")}


def test_a_factor_of_zero_removes_what_would_be_asked():
    assert 0 * match(TEACHER, RKL) == Loss(())
    assert (nll() + 0.0 * k3(TEACHER)).needs == {}
    assert 0 * reward() == Zero() and str(push(0 * reward() + log_ratio(TEACHER))) == str(push(log_ratio(TEACHER)))
    lone = push(log_ratio(TEACHER, "old") + 0 * reward(), anchor=old())
    assert lone.needs == {TEACHER: Says.TOKEN} and lone.reads == {"old"}
    assert (linear(0, 1, 5) * match(TEACHER, RKL)).needs == {TEACHER: Says.DENSE}  # it will be read later


def test_schedules():
    line = linear(1, 0.1, 10)
    assert [value(line, s) for s in (0, 5, 10, 99)] == pytest.approx([1, 0.55, 0.1, 0.1])
    assert [value(cosine(0, 1, 4), s) for s in (0, 2, 4)] == pytest.approx([0, 0.5, 1])
    assert value(linear(3, 7, 0), 0) == 7 and value(2, 5) == 2.0
    assert parse(" linear(1, 1e-1, 10) ") == line and parse(0.3) == 0.3
    for wrong in ("linear(1, 2)", "step(1, 2, 3)", "linear(1, 2, 3.5)", "0.3"):
        with pytest.raises(ValueError, match="linear"):
            parse(wrong)
    with pytest.raises(ValueError, match="two schedules"):
        line * (cosine(0, 1, 4) * nll())
    (term,) = (2 * (line * nll())).terms
    assert term.coefficient == Schedule("linear", 2, 0.2, 10) == (line * (2 * nll())).terms[0].coefficient


@pytest.mark.parametrize(
    ("loss", "equation"),
    [
        (nll(), "mean_t[-log π(y)]"),
        (0.1 * nll().on("data"), "0.1 · mean_t[-log π(y)] over data rows"),
        (match(TEACHER, Divergence("jsd", (("beta", 0.5),), 2.0)).per("sequence"),
         "mean_y mean_t[jsd(beta=0.5, temperature=2)(teacher, π)]"),
        (push(log_ratio(TEACHER, "behaviour")).per("sequence_sum"),
         "mean_y Σ_t[-exp(log π - log μ) · [log teacher - log μ]]"),
        (push(reward(std=True), anchor=old(), clip=(0.2, 0.28)).where(band(0.5, 2)),
         "mean_t[band(π_old/μ, 0.5, 2) · -clip[-0.2, +0.28](exp(log π - log π_old) · "
         "[(reward - group mean) / group std])]"),
        (linear(1, 0, 9) * k3(REFERENCE) + learn(CRITIC, bradley_terry(good="teacher", bad="student")),
         "linear(1, 0, 9) · mean_t[k3(reference, π)] + learn(critic: -log σ(D(teacher) - D(student)))"),
        (push(discounted(log_ratio(Judge("student", "answer")) + 0.5 * reward(CRITIC), 0.9)),
         "mean_t[-exp(log π - log μ) · [Σ_k 0.9^k (log student[answer] - log π + "
         "0.5 ((score_critic - group mean)))_t+k]]"),
        (Loss(()), "0"),
    ],
)  # fmt: skip
def test_equations(loss, equation):
    assert str(loss) == equation


# --- what is counted --------------------------------------------------------------------------------------------------


def both_batch(needs=None):
    """Rows of student and data for the same prompts."""
    batch = packed(random_rollouts(("student", "data")))
    return hear(batch, needs or {}, {"*": random_table(7)})


def rows_of(batch, speaker):
    return [i for i, r in enumerate(batch.rollouts) if r.speaker == speaker]


def test_on_counts_only_its_rows():
    """A term on rollouts is the same whatever else is in the batch, and the data's term adds to it unchanged."""
    model, batch = random_table(1), both_batch({TEACHER: Says.TOKEN})
    pushed = push(log_ratio(TEACHER, "old"), anchor=old())
    mine, given = batch.rows(rows_of(batch, "student")), batch.rows(rows_of(batch, "data"))
    for per in ("token", "sequence", "sequence_sum"):
        whole, stats = gradient(model, batch, (pushed.on("student") + 0.1 * nll().on("data")).per(per))
        a, one_stats = gradient(model, mine, pushed.per(per))
        b, _ = gradient(model, given, nll().per(per))
        assert relative(whole, a + 0.1 * b) < 1e-12
        assert stats["loss/push_teacher"] == pytest.approx(one_stats["loss/push_teacher"], abs=1e-12)


def test_where_gates_without_recounting():
    """A gate of 0 on half of the tokens halves the loss: they still count in the mean."""
    model, batch = random_table(1), packed(random_rollouts(("student",)))
    old_N = batch.behaviour_N + torch.where(torch.arange(len(batch.row_N)) % 2 == 0, 0.0, 5.0)
    batch = replace(batch, old_N=old_N)
    grad, stats = gradient(model, batch, nll().where(band(0.5, 2)))
    kept = torch.arange(len(batch.row_N)) % 2 == 0
    logp = sampled_logp(model, batch)
    assert stats["loss/nll"] == pytest.approx(float(-(logp * kept).mean()))
    assert grad.norm() > 0


def test_per():
    """By hand, on rows of lengths 3 and 1; and the three agree where lengths do."""
    model = random_table(1)
    said = lambda n: [(k, -1.0) for k in range(n)]
    unequal = packed([rollout(0, "student", (1,), said(3)), rollout(1, "student", (2, 3), said(1))])
    x = -sampled_logp(model, unequal)
    want = {
        "token": x.mean(),
        "sequence": (x[:3].mean() + x[3]) / 2,
        "sequence_sum": (x[:3].sum() + x[3]) / 2,
    }
    for per, number in want.items():
        assert gradient(model, unequal, nll().per(per))[1]["loss/nll"] == pytest.approx(float(number)), per
    equal = packed([rollout(0, "student", (1,), said(3)), rollout(1, "student", (2, 3), said(3))])
    grads = {per: gradient(model, equal, nll().per(per))[0] for per in want}
    assert relative(grads["token"], grads["sequence"]) < 1e-14
    assert relative(grads["token"] * 3, grads["sequence_sum"]) < 1e-14


def test_rows_without_loss_tokens_teach_and_dilute_nothing():
    model = random_table(1)
    rows = random_rollouts(("student",))
    silent = replace(rows[0], mask=(False,) * len(rows[0].tokens))
    for per in ("token", "sequence", "sequence_sum"):
        a, stats = gradient(model, packed([silent, *rows]), nll().per(per), micro=9)
        assert relative(a, gradient(model, packed(rows), nll().per(per))[0]) < 1e-14
    nothing, stats = gradient(model, packed([silent]), nll())
    assert stats == {} and nothing.norm() == 0
    assert gradient(model, packed([]), nll())[1] == {}


def test_a_schedule_is_read_at_its_step():
    model, batch = random_table(1), packed(random_rollouts(("student",)))
    plain, _ = gradient(model, batch, nll())
    for step, factor in ((0, 1.0), (5, 0.5), (10, 0.0), (40, 0.0)):
        assert (gradient(model, batch, linear(1, 0, 10) * nll(), step=step)[0] - factor * plain).norm() < 1e-14
    credit = linear(1, 0, 10) * reward()
    for step, factor in ((0, 1.0), (5, 0.5)):
        scheduled, _ = gradient(model, batch, push(credit, anchor=old()), step=step)
        fixed, _ = gradient(model, batch, push(factor * reward(), anchor=old()))
        assert relative(scheduled, fixed) < 1e-14


def test_wide_expressions_are_evaluated_once_a_batch(monkeypatch):
    """On all rows, whatever the tiles, micro-batches and terms that read them."""
    seen = []
    at = Reward.at
    monkeypatch.setattr(Reward, "at", lambda self, scope: seen.append(len(scope.row)) or at(self, scope))
    model, batch = random_table(1), packed(random_rollouts(("student",)))
    loss = push(reward(std=True), anchor=old()) + 0.3 * push(log_ratio(TEACHER, "old") + reward(std=True), anchor=old())
    batch = hear(batch, loss.needs, {"*": random_table(2)})
    gradient(model, batch, loss, tile=2, micro=6)
    assert seen == [len(batch.row_N)]


def test_reach_finds_the_outermost_wide_part():
    credit = log_ratio(TEACHER) + 0.5 * discounted(log_ratio(TEACHER, "old") + reward(), 0.9)
    assert [type(w) for w in credit.wide()] == [Discounted]
    assert [type(w) for w in (2 * (log_ratio(TEACHER) + reward())).wide()] == [Reward]
    assert not list(log_ratio(TEACHER).wide()) and isinstance(band(0, 1), Band)
    assert isinstance(discounted(log_ratio(TEACHER), 0.0), LogRatio)


def test_discounted_over_two_turns_and_the_live_student():
    """A wide credit of the live student gets its own pass, and positions count spoken tokens."""
    model, teacher = random_table(1), random_table(2)
    said = lambda *t: [(x, -1.0) for x in t]
    batch = packed([rollout(0, "student", (1,), said(2, 3), (0, 4), said(1)), rollout(1, "student", (2,), said(5))])
    loss = push(discounted(log_ratio(TEACHER, "live"), 0.5), anchor=old()).per("sequence_sum")
    batch = hear(batch, loss.needs, {"*": teacher})
    ratio = sampled_logp(teacher, batch) - sampled_logp(model, batch)
    credit = torch.stack([ratio[0] + 0.5 * ratio[1] + 0.25 * ratio[2], ratio[1] + 0.5 * ratio[2], ratio[2], ratio[3]])
    assert gradient(model, batch, loss, tile=1, micro=1)[1]["loss/push_teacher"] == pytest.approx(
        float(-credit.sum() / 2)
    )


# --- what is missing is refused ---------------------------------------------------------------------------------------


def test_a_missing_behaviour_is_refused_where_it_is_read_and_nowhere_else():
    model = random_table(1)
    batch = hear(packed(random_rollouts(("student", "data"))), {TEACHER: Says.TOKEN}, {"*": random_table(2)})
    readers = (
        push(log_ratio(TEACHER, "old")),
        push(log_ratio(TEACHER, "behaviour"), anchor=old()),
        nll().where(band(0, 9)),
        push(discounted(log_ratio(TEACHER, "behaviour"), 0.5), anchor=old()),
    )
    for loss in readers:
        with pytest.raises(OpdError, match=r"loss tokens of .* have no finite value for .*a missing score would teach"):
            gradient(model, batch, loss)
        assert gradient(model, batch, loss.on("student"))[0].isfinite().all()
    free = push(log_ratio(TEACHER, "old"), anchor=old()) + match(TEACHER, RKL) + nll()
    dense = hear(batch, free.needs, {"*": random_table(2)})
    none = replace(dense, behaviour_N=torch.full_like(dense.behaviour_N, NAN))
    assert torch.equal(gradient(model, none, free)[0], gradient(model, dense, free)[0])


@pytest.mark.parametrize("wrong", [NAN, -float("inf")])
def test_a_missing_score_is_refused_or_not_counted_never_zero(wrong):
    model = random_table(1)
    batch = hear(packed(random_rollouts(("student", "data"))), {TEACHER: Says.TOKEN}, {"*": random_table(2)})
    given = torch.tensor([r.speaker == "data" for r in batch.rollouts])[batch.row_N]
    heard = batch.signals[TEACHER].logp_N
    holes = replace(batch, signals={TEACHER: Token(torch.where(given, wrong, heard))})
    pushed, anchored = log_ratio(TEACHER, "old"), {"anchor": old()}
    for loss in (push(pushed, **anchored), k3(TEACHER)):
        with pytest.raises(OpdError, match="log-probability of `teacher`"):
            gradient(model, holes, loss)
        ours = loss.on("student") + nll().on("data")
        assert torch.equal(gradient(model, holes, ours)[0], gradient(model, batch, ours)[0])


def test_a_missing_reward_is_refused():
    """Also when only one of a group is missing, which is no group of equals; and a critic's likewise."""
    model = random_table(1)
    rows = random_rollouts(("student",))
    holes = [replace(rows[0], reward=None), *rows[1:]]
    with pytest.raises(OpdError, match=r"push_reward have no finite value for \[\(reward - group mean\) / group std\]"):
        gradient(model, packed(holes), push(reward(std=True), anchor=old()))
    batch = packed(holes)
    batch = replace(batch, signals={CRITIC: Score(batch.reward_B)})
    with pytest.raises(OpdError, match="score_critic"):
        gradient(model, batch, push(reward(CRITIC), anchor=old()))
    mixed = packed([*rows, *random_rollouts(("data",))])  # given rows have none, and no term asks
    loss = push(reward(std=True), anchor=old()).on("student") + nll().on("data")
    assert gradient(model, mixed, loss)[0].isfinite().all()
    pushed = gradient(model, mixed, loss)[0] - gradient(model, mixed, nll().on("data"))[0]
    assert relative(pushed, gradient(model, packed(rows), push(reward(std=True), anchor=old()))[0]) < 1e-12


def test_a_loss_token_that_nothing_precedes_is_refused():
    with pytest.raises(OpdError, match="nothing precedes it"):
        packed([rollout(0, "student", [(1, -1.0)])])


def test_the_kl_of_sampled_tokens_is_of_the_students_own_samples():
    """Where a judge gives the sampled token alone, metrics have the mean log-ratio, over what the student spoke."""
    student, teacher, reference = random_table(1), random_table(2), random_table(3)
    loss = push(log_ratio(TEACHER), anchor=old()) + 0.1 * k3(REFERENCE) + nll().on("teacher")
    batch = packed(random_rollouts(("student", "teacher")))
    batch = hear(batch, loss.needs, {"teacher": teacher, "reference": reference})
    _, stats = gradient(student, batch, loss, tile=3, micro=8)
    spoken = batch.behaviour_N.isfinite()
    assert 0 < spoken.sum() < len(spoken)
    gap = lambda judge: float((sampled_logp(student, batch) - sampled_logp(judge, batch))[spoken].mean())
    assert stats["kl/reverse_nats"] == pytest.approx(gap(teacher), rel=1e-9)
    assert stats["kl/reference_nats"] == pytest.approx(gap(reference), rel=1e-9)
    assert not any(name.startswith("sampled") for name in stats)


def test_a_push_is_named_by_all_that_its_credit_reads():
    named = lambda credit: push(credit).terms[0].name
    assert named(reward()) == "push_reward" and named(reward(CRITIC)) == "push_critic"
    assert named(log_ratio(TEACHER)) == "push_teacher"
    assert named(log_ratio(TEACHER) + 0.5 * reward()) == "push_reward_teacher"
    assert named(log_ratio(TEACHER) + log_ratio(REFERENCE)) == "push_teacher_reference"
