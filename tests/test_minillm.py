"""MiniLLM: its credits by the published numbers, its gradient against the reverse KL of whole sequences, enumerated."""

import threading
from dataclasses import replace

import pytest
import torch
from tabled import (
    F64,
    LENGTH,
    V,
    gradient,
    hear,
    packed,
    prefix,
    prompt,
    random_rollouts,
    random_table,
    relative,
    rollout,
    sampled_logp,
    table,
)

from opd.batch import Batch, WholeScope, prepare
from opd.credits import bounded, discounted, future, log_ratio, per_remaining, whitened
from opd.errors import OpdError, UsageError
from opd.gates import importance
from opd.loss import Loss, push
from opd.math import credit, trust
from opd.method import TEACHER, build
from opd.model import CausalModel
from opd.student import Optim, Student

NAN = float("nan")
EXACT = {"length_norm": False, "clip": None, "pretrain": 0.0, "per": "sequence_sum"}


def f64(*x):
    return torch.tensor(x, dtype=F64)


# --- credits ----------------------------------------------------------------------------------------------------------

GOLDEN, ROW = f64(0.5, -1, 0.2, -0.3), torch.zeros(4, dtype=torch.long)


def test_the_published_vectors():
    torch.testing.assert_close(credit.future(GOLDEN, ROW, mean=True), f64(-1.1 / 3, -0.05, -0.3, 0), rtol=0, atol=1e-12)
    torch.testing.assert_close(credit.future(GOLDEN, ROW, mean=False), f64(-1.1, -0.1, -0.3, 0), rtol=0, atol=1e-12)
    left = credit.remaining(ROW, F64)
    assert left.tolist() == [4, 3, 2, 1]
    for gamma, want in ((1.0, (-0.15, -0.36666667, -0.05, -0.3)), (0.95, (-0.13167812, -0.36025, -0.0425, -0.3))):
        torch.testing.assert_close(credit.discounted(GOLDEN, ROW, gamma) / left, f64(*want), rtol=0, atol=5e-9)


def test_the_future_ends_with_its_row():
    """Rows of 3, 1 and 2 tokens: nothing of one reaches another, and a last token has no future."""
    row, x = torch.tensor([0, 0, 0, 1, 2, 2]), f64(1, 2, 4, 8, 16, 32)
    assert credit.future(x, row, mean=False).tolist() == [6, 4, 0, 0, 32, 0]
    assert credit.future(x, row, mean=True).tolist() == [3, 4, 0, 0, 32, 0]
    assert credit.remaining(row, F64).tolist() == [3, 2, 1, 1, 2, 1]
    assert credit.future(x[:0], row[:0], mean=True).tolist() == []
    missing = credit.future(f64(1, NAN, 4), row[:3], mean=True).tolist()
    assert missing[0] != missing[0] and missing[1:] == [4, 0]


def test_whitened_is_over_the_speakers_tokens_alone():
    x, own = f64(1, 2, 4, NAN, 9), torch.tensor([True, True, True, False, False])
    got = credit.whitened(x, own, lambda x: x)
    mean = 7 / 3
    deviation = (sum((v - mean) ** 2 for v in (1, 2, 4)) / 3 + 1e-8) ** 0.5
    torch.testing.assert_close(got[:3], (x[:3] - mean) / deviation, rtol=1e-14, atol=0)
    assert got[3] != got[3] and got[4] == pytest.approx((9 - mean) / deviation)
    assert credit.whitened(x[:0], own[:0], lambda x: x).tolist() == []
    assert credit.whitened(f64(3, 3), own[:2], lambda x: x).tolist() == [0, 0]


def test_a_missing_log_ratio_stops_the_whole_batch():
    """One nan among the student's tokens leaves no mean; it must not pass for a number."""
    batch = hear(
        packed(random_rollouts(["student"])), {TEACHER: build("token_opd").needs[TEACHER]}, {"*": random_table(2)}
    )
    batch.signals[TEACHER].logp_N[3] = NAN
    loss = push(whitened(log_ratio(TEACHER, "behaviour")))
    with pytest.raises(OpdError, match=r"no finite value for .*whitened"):
        prepare(loss, batch, 0)


def test_bounded():
    batch = hear(
        packed(random_rollouts(["student"])), {TEACHER: build("token_opd").needs[TEACHER]}, {"*": random_table(2)}
    )
    scope, plain = WholeScope(batch, None, 0), log_ratio(TEACHER, "behaviour")
    assert plain.at(scope).min() < -0.5 and plain.at(scope).max() > 0.4
    assert torch.equal(bounded(2 * plain, -1, 0.8).at(scope), (2 * plain.at(scope)).clamp(-1, 0.8))


# --- over ranks -------------------------------------------------------------------------------------------------------


class Meeting:
    """Threads that add up what each brings, in the place of processes."""

    def __init__(self, count: int) -> None:
        self.barrier, self.brought = threading.Barrier(count, timeout=20), {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.brought[threading.get_ident()] = x
        self.barrier.wait()
        total = sum(self.brought.values())
        self.barrier.wait()
        return total


@pytest.mark.parametrize("split", [({0, 1, 2}, {3}), ({0, 1, 2, 3}, set())], ids=["uneven", "idle"])
def test_the_official_form_on_two_ranks_is_one(split):
    """Whitening reaches the whole batch: gradient and numbers are those of one process."""
    loss = build("minillm", {"form": "official"}).loss
    model, batch = random_table(1), official_batch()
    want, stats = gradient(model, batch, loss)
    meeting, found = Meeting(2), {}

    def rank(number: int) -> None:
        mine = [i for i, r in enumerate(batch.rollouts) if r.prompt.id in {prompt(n).id for n in split[number]}]
        total = meeting
        total.named = total.most = lambda sums: sums
        grad, _ = gradient(random_table(1), batch.rows(mine), loss, micro=9, total=total)
        found[number] = grad

    threads = [threading.Thread(target=rank, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert relative(found[0] + found[1], want) < 1e-12
    alone = [i for i, r in enumerate(batch.rollouts) if r.prompt.id in {prompt(n).id for n in range(3)}]
    here, _ = gradient(model, batch.rows(alone), loss)
    assert relative(here, want) > 1e-2  # the parts are not the whole by themselves
    assert -1 < stats["loss/push_teacher"] < 1


def official_batch() -> Batch:
    method = build("minillm", {"form": "official"})
    return hear(packed(random_rollouts(["student", "data"])), method.needs, {"*": random_table(2)})


def test_the_official_form_by_hand():
    """Values and gradient against the formulas written out over padded tensors, as the authors' code has them."""
    method = build("minillm", {"form": "official"})
    model, teacher, batch = random_table(1), random_table(2), official_batch()
    old = replace(batch, old_N=sampled_logp(model, batch) + 0.1 * torch.sin(torch.arange(len(batch.row_N), dtype=F64)))
    got, _ = gradient(model, old, method.loss)

    logits = model.module.model.logits_SV.detach().clone().requires_grad_()
    q, p = logits.log_softmax(-1), table(teacher).detach()
    places = zip(batch.row_N.tolist(), batch.position_N.tolist(), strict=True)
    at = torch.tensor([(i - 1) * V + batch.rollouts[r].tokens[i - 1] for r, i in places])
    q_N, p_N = q[at, batch.token_N], p[at, batch.token_N]
    mine = [r for r, row in enumerate(batch.rollouts) if row.speaker == "student"]
    reward = (2 * (p_N - old.old_N)).detach().clamp(-100, 100)
    advantage = torch.zeros_like(reward)
    for r in mine:
        inside = (batch.row_N == r).nonzero()[:, 0].tolist()
        for k, n in enumerate(inside):
            advantage[n] = sum(0.95**j * reward[m] for j, m in enumerate(inside[k:])) / (len(inside) - k)
    own = torch.isin(batch.row_N, torch.tensor(mine))
    white = (advantage - advantage[own].mean()) / (advantage[own].var(unbiased=False) + 1e-8).sqrt()
    ratio = (q_N - batch.behaviour_N)[own].exp()  # exp(log q - log q_old) times w = q_old / mixture
    policy = torch.maximum(-white[own] * ratio, -white[own] * ratio.clamp(0.8, 1.2)).mean()
    reverse = (q.exp() * (q - p)).sum(-1)[at][own].mean()
    nll, soft = -q_N[~own].mean(), -(p.exp() * q).sum(-1)[at][~own].mean()
    (policy + reverse + 0.5 * nll + 0.5 * soft).backward()
    assert relative(got, logits.grad) < 1e-12
    assert ((ratio < 0.8) | (ratio > 1.2)).any()


# --- the gradient, enumerated -----------------------------------------------------------------------------------------


def sequences(length: int = LENGTH) -> list[tuple[int, ...]]:
    """Every answer of at most `length` tokens: the last id of the vocabulary ends one."""
    done, going = [], [()]
    for _ in range(length):
        grown = [(*y, v) for y in going for v in range(V)]
        done += [y for y in grown if y[-1] == V - 1]
        going = [y for y in grown if y[-1] != V - 1]
    return done + going


ANSWERS = sequences()
AT = [[(len(prefix(0)) - 1 + i) * V + (*prefix(0), *y)[len(prefix(0)) - 1 + i] for i in range(len(y))] for y in ANSWERS]


def along(logp_SV: torch.Tensor) -> list[torch.Tensor]:
    """Of every answer the log-probability of each token."""
    return [logp_SV[at, list(y)] for at, y in zip(AT, ANSWERS, strict=True)]


def exact(model: CausalModel, teacher: CausalModel) -> torch.Tensor:
    """The gradient of KL(student || teacher) between distributions of whole answers, by autograd over all of them."""
    logits = model.module.model.logits_SV.detach().clone().requires_grad_()
    mine, other = along(logits.log_softmax(-1)), along(table(teacher).detach())
    loss = sum(q.sum().exp() * (q.sum() - p.sum()) for q, p in zip(mine, other, strict=True))
    (grad,) = torch.autograd.grad(loss, logits)
    return grad


def walked(model: CausalModel, weights: list[torch.Tensor], heads: int = 2, **args) -> torch.Tensor:
    """The method's own gradient, summed over every answer with a weight per token.

    All answers are the rows of one batch. A row's mean weight is 1 / rows, and the importance weight of a token is the
    student's probability over the recorded one: so what is recorded gives it the weight that is wanted.
    """
    method = build("minillm", {**EXACT, **args})
    rows = [rollout(0, "student", prefix(0), [(v, 0.0) for v in y], sample=k) for k, y in enumerate(ANSWERS)]
    batch = packed(rows)
    wanted = torch.cat([w.expand(len(y)) for w, y in zip(weights, ANSWERS, strict=True)])
    recorded = sampled_logp(model, batch) - (len(rows) * wanted).log()
    batch = hear(replace(batch, behaviour_N=recorded), method.needs, {"*": TEACHER_TABLE})
    return gradient(model, batch, Loss(method.loss.terms[:heads]))[0]


STUDENT_TABLE, TEACHER_TABLE = random_table(1), random_table(2)


def test_the_answers_are_all_there_are():
    chances = [x.sum().exp() for x in along(table(STUDENT_TABLE).detach())]
    assert len(ANSWERS) == 1 + 5 + 25 * 6 and sum(chances) == pytest.approx(1)


def test_single_step_and_long_part_are_the_gradient_of_the_sequences_reverse_kl():
    """Property 2 of the reference: on-policy, unnormalised, nothing is left over."""
    want = exact(STUDENT_TABLE, TEACHER_TABLE)
    own = [q.sum().exp() for q in along(table(STUDENT_TABLE).detach())]
    assert relative(walked(STUDENT_TABLE, own, alpha=0.0), want) < 1e-12
    assert relative(walked(STUDENT_TABLE, own, alpha=0.0, length_norm=True), want) > 0.05
    alone = walked(STUDENT_TABLE, own, heads=1, alpha=0.0)
    assert relative(alone, want) > 0.05, "the single-step part alone is another gradient"


def mixed(alpha: float) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Probability of each answer under the blend, and the weights w of its tokens."""
    q, p = along(table(STUDENT_TABLE).detach()), along(table(TEACHER_TABLE).detach())
    blend = [torch.log(alpha * b.exp() + (1 - alpha) * a.exp()) for a, b in zip(q, p, strict=True)]
    return [x.sum().exp() for x in blend], [(a - x).exp() for a, x in zip(q, blend, strict=True)]


@pytest.mark.parametrize("alpha", [0.2, 0.7])
def test_with_a_blend_the_full_product_is_unbiased_and_the_papers_weight_is_not(alpha):
    """Property 3. The method weighs by the last factor of the product; by the whole of it, it would be exact."""
    chance, weight = mixed(alpha)
    assert sum(chance) == pytest.approx(1)
    want = exact(STUDENT_TABLE, TEACHER_TABLE)
    product = [c * w.prod() for c, w in zip(chance, weight, strict=True)]
    assert relative(walked(STUDENT_TABLE, product, alpha=alpha), want) < 1e-12
    begun = [c * w.cumprod(0) for c, w in zip(chance, weight, strict=True)]  # as printed, up to t: R lies after t
    assert relative(walked(STUDENT_TABLE, begun, alpha=alpha), want) > 0.01
    single = [c * w for c, w in zip(chance, weight, strict=True)]
    got = walked(STUDENT_TABLE, single, alpha=alpha)
    assert relative(got, want) > 0.01

    logits = STUDENT_TABLE.module.model.logits_SV.detach().clone().requires_grad_()  # eq. 9 of the paper, written out
    q, p = logits.log_softmax(-1), table(TEACHER_TABLE).detach()
    kl, loss = (q.exp() * (q - p)).sum(-1), 0.0
    for at, y, c, w in zip(AT, ANSWERS, chance, weight, strict=True):
        ratio = (p - q)[at, list(y)].detach()
        for t in range(len(y)):
            loss = loss + c * w[t] * (kl[at[t]] - ratio[t + 1 :].sum() * q[at[t], y[t]])
    loss.backward()
    assert relative(got, logits.grad) < 1e-12
    bound = max(float(w.max()) for w in weight)
    assert 1 < bound <= 1 / (1 - alpha) + 1e-9, "weights are bounded by the student's share"


# --- limits -----------------------------------------------------------------------------------------------------------


def sampled(speaker_SV: torch.Tensor, batch: Batch) -> Batch:
    places = zip(batch.row_N.tolist(), batch.position_N.tolist(), strict=True)
    at = [(i - 1) * V + batch.rollouts[r].tokens[i - 1] for r, i in places]
    return replace(batch, behaviour_N=speaker_SV.detach()[at, batch.token_N])


def test_without_a_blend_every_weight_is_one():
    batch = sampled(table(STUDENT_TABLE), packed(random_rollouts(["student"])))
    live = Student(STUDENT_TABLE, Optim()).logp(batch)
    torch.testing.assert_close(importance().at(WholeScope(batch, live, 0)), torch.ones(len(live), dtype=F64))


def test_an_answer_of_one_token_has_no_long_part():
    rows = [rollout(n, "student", prefix(n), [(v, -1.5)], sample=v) for n in range(3) for v in range(V)]
    method = build("minillm", {"pretrain": 0.0})
    batch = hear(packed(rows), method.needs, {"*": TEACHER_TABLE})
    got, stats = gradient(STUDENT_TABLE, batch, method.loss)
    single = Loss(method.loss.terms[:1])
    assert stats["loss/push_teacher"] == 0 and torch.equal(got, gradient(STUDENT_TABLE, batch, single)[0])


@pytest.mark.parametrize("alpha", [0.0, 0.2])
@pytest.mark.parametrize("length_norm", [True, False])
def test_a_student_that_is_its_teacher_stays(alpha, length_norm):
    method = build("minillm", {"alpha": alpha, "length_norm": length_norm, "pretrain": 0.0})
    batch = hear(packed(random_rollouts(["student"])), method.needs, {"*": STUDENT_TABLE})
    got, _ = gradient(STUDENT_TABLE, batch, method.loss)
    assert got.abs().max() < 1e-14


def test_with_one_sample_and_no_future_it_is_the_sampled_reverse_kl():
    """The official credit without discount, length and whitening is token_opd's."""
    plain = build("token_opd", {"against": "old"})
    batch = hear(packed(random_rollouts(["student"])), plain.needs, {"*": TEACHER_TABLE})
    batch = replace(batch, old_N=sampled_logp(STUDENT_TABLE, batch))
    same = push(bounded(discounted(log_ratio(TEACHER, "old"), 0.0), -100, 100), anchor=plain.loss.terms[0].head.anchor)
    assert torch.equal(gradient(STUDENT_TABLE, batch, same)[0], gradient(STUDENT_TABLE, batch, plain.loss)[0])


def test_the_clip_is_around_the_old_student_in_the_paper_and_around_the_sampler_in_the_code():
    paper, code = (build("minillm", {"form": form}).loss.terms[1].head for form in ("paper", "official"))
    assert (str(paper.anchor), str(code.anchor)) == ("log π_old", "log μ")
    one, far = f64(0.0), f64(-1.0)
    assert trust.surrogate(one - far, f64(1.0), (0.2, 0.2)) == -1.2
    with pytest.raises(UsageError, match="always divides by the tokens that are left"):
        build("minillm", {"form": "official", "length_norm": False})


def test_expressions_say_what_they_are():
    ratio = log_ratio(TEACHER, "old")
    assert str(future(ratio, mean=True)) == "mean_k>t (log teacher - log π_old)_k"
    assert str(future(ratio, mean=False)) == "Σ_k>t (log teacher - log π_old)_k"
    assert str(whitened(per_remaining(bounded(ratio, -1, 2)))).startswith("whitened((bounded(log teacher")
