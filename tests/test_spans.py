"""gold and uld against naive references in float64, and what they become where both tokenizers are the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tabled import F64, V, gradient, hear, packed, random_rollouts, random_table, relative, sampled_logp
from torch import Tensor

from opd.aligned import Alignment, Shared, SpanDense, SpanToken
from opd.anchors import behaviour
from opd.batch import Batch
from opd.credits import discounted, log_ratio, reward
from opd.divergences import Divergence
from opd.errors import UsageError
from opd.gates import band
from opd.head import tiles
from opd.loss import Loss, k3, match, push
from opd.method import EXPERT, RETOKENIZED_TEACHER, TEACHER, Method, Setting, bind, build, one
from opd.model import CausalModel
from opd.signals import Dense, Token
from opd.spans import hybrid, ranked
from opd.student import Optim, Student
from opd.types import RETOKENIZED, Judge, Says

J = RETOKENIZED_TEACHER


def spoken(
    speakers: tuple[str, ...] = ("student",), temperature: float = 1.0
) -> tuple[CausalModel, CausalModel, Batch]:
    """A student, a teacher and rows of unequal lengths."""
    return random_table(1), random_table(2), packed(random_rollouts(speakers), temperature)


def token_by_token(batch: Batch, teacher: CausalModel, says: Says) -> Batch:
    """The teacher as a judge with another tokenizer that happens to be the same."""
    every = torch.arange(len(batch.row_N))
    alignment = Alignment(every, every, torch.ones_like(every), every, batch.token_N == V - 1)
    ids = torch.arange(V)
    shared = Shared(ids, ids, torch.tensor([0]), torch.tensor([V]), torch.zeros_like(every))
    dense = SpanDense(teacher.all_hidden(batch), teacher.head, batch.token_N, alignment, shared)
    signal = dense if says is Says.DENSE else SpanToken(dense.logp(batch.token_N, batch.temperature), alignment)
    return replace(batch, signals={J: signal})


# --- the same tokenizer on both sides ---------------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["token", "sequence", "sequence_sum"])
@pytest.mark.parametrize(("beta", "temperature"), [(0.5, 1.0), (0.2, 1.7)])
def test_gold_with_one_tokenizer_is_gkd(per: str, beta: float, temperature: float) -> None:
    student, teacher, batch = spoken()
    args = {"beta": beta, "temperature": temperature, "per": per}
    plain = replace(batch, signals={TEACHER: Dense(teacher.all_hidden(batch), teacher.head)})
    want, stats = gradient(student, plain, build("gkd", {**args, "on_policy": 1.0}).loss)
    got, same = gradient(student, token_by_token(batch, teacher, Says.DENSE), build("gold", args).loss)
    assert relative(got, want) < 1e-10
    assert same["loss/total"] == pytest.approx(stats["loss/total"], rel=1e-10)


@pytest.mark.parametrize("temperature", [1.0, 1.3])
def test_pushed_gold_with_one_tokenizer_is_token_opd(temperature: float) -> None:
    student, teacher, batch = spoken(temperature=temperature)
    plain = hear(batch, {TEACHER: Says.TOKEN}, {"*": teacher})
    assert isinstance(plain.signals[TEACHER], Token)
    want, stats = gradient(student, plain, build("token_opd", {"per": "sequence"}).loss)
    got, same = gradient(student, token_by_token(batch, teacher, Says.TOKEN), build("gold", {"form": "push"}).loss)
    assert relative(got, want) < 1e-10
    for name in ("loss/total", "kl/reverse_nats", "ratio/mean"):
        assert same[name] == pytest.approx(stats[name], rel=1e-10)


# --- against everything written out ----------------------------------------------------------------------------------


Value = Callable[[list[int], Tensor, SpanDense], Tensor]


def logp_written_out(student: CausalModel, batch: Batch) -> Tensor:
    """[N, V] the student's distribution at every loss token, read off its table, with gradient."""
    places = zip(batch.row_N.tolist(), batch.position_N.tolist(), strict=True)
    states = [(p - 1) * V + batch.rollouts[r].tokens[p - 1] for r, p in places]
    logits_SV: Tensor = student.module.model.logits_SV
    return logits_SV[states].log_softmax(-1)


def written_out(student: CausalModel, batch: Batch, value: Value) -> Tensor:
    """Mean over rows of the mean over their spans of value(loss tokens of the span, log pi [N, V], signal)."""
    signal = batch.signals[J]
    assert isinstance(signal, SpanDense)
    logp_NV = logp_written_out(student, batch)
    span = signal.alignment.span_N.tolist()
    rows = []
    for row in range(len(batch.rollouts)):
        own = [n for n in range(len(span)) if int(batch.row_N[n]) == row and span[n] >= 0]
        spans = [list(members) for _, members in itertools.groupby(own, key=lambda n: span[n])]
        if spans:
            rows.append(sum(value(members, logp_NV, signal) for members in spans) / len(spans))
    return sum(rows) / len(rows)


def naive_hybrid(beta: float, w_m: float, w_u: float) -> Value:
    """The loss of one span in probabilities, column by column."""

    def value(members: list[int], logp_NV: Tensor, signal: SpanDense) -> Tensor:
        first = signal.alignment.first_G.tolist()[int(signal.alignment.span_N[members[0]])]
        q = torch.ones((), dtype=F64)
        p = torch.ones((), dtype=F64)
        token = signal.token_M.tolist()
        teacher = signal.head.logits(signal.hidden_MH).softmax(-1).detach()
        for k, n in enumerate(members[:-1]):
            q = q * logp_NV[n].exp()[V - 1 - token[first + k]]  # the teacher's ids are the student's backwards
            p = p * teacher[first + k][token[first + k]]
        last = len(members) - 1
        q, p = q * logp_NV[members[-1]].exp(), p * teacher[first + last]
        known = [v for v in range(V) if v != 4 and not (last and v == 3)]
        total = torch.zeros((), dtype=F64)
        for v in known:
            a, b = p[V - 1 - v], q[v]
            m = beta * a + (1 - beta) * b
            total = total + w_m * (beta * a * (a / m).log() + (1 - beta) * b * (b / m).log())
        rest = [v for v in range(V) if v not in known]
        ordered = [
            sorted(x, key=lambda z: float(z.detach()), reverse=True)
            for x in ([q[v] for v in rest], [p[V - 1 - v] for v in rest])
        ]
        return total + w_u * sum((a - b).abs() for a, b in zip(*ordered, strict=True))

    return value


@pytest.mark.parametrize("beta", [0.5, 0.1])
@pytest.mark.parametrize("weights", [None, (0.7, 1.9)])
def test_gold_is_what_it_says_span_by_span(beta: float, weights: tuple[float, float] | None) -> None:
    """Several tokens a span, tokens in none, columns that are not shared: value and gradient."""
    student, teacher, batch = spoken()
    args = {"beta": beta} | ({} if weights is None else {"mapped": weights[0], "rest": weights[1]})
    loss = build("gold", args).loss
    batch = hear(batch, loss.needs, {"*": teacher})
    got, stats = gradient(student, batch, loss)
    want = written_out(student, batch, naive_hybrid(beta, *(weights or ((V - 1) / V, 1 / V))))
    assert stats["loss/total"] == pytest.approx(float(want.detach()), rel=1e-12)
    (naive,) = torch.autograd.grad(want, student.module.model.logits_SV)
    assert relative(got, naive) < 1e-12
    sizes = batch.signals[J].alignment.count_G
    unmapped = (batch.signals[J].alignment.span_N < 0).double().mean()
    assert (
        set(sizes.tolist()) == {1, 2} and stats["align/unmapped_share"] == pytest.approx(float(unmapped)) and unmapped
    )


def test_a_pushed_span_gives_its_credit_to_each_of_its_tokens() -> None:
    """Log p of the span less log mu of the span; the mean is over the tokens that are in one."""
    student, teacher, batch = spoken()
    loss = build("gold", {"form": "push"}).loss
    span = hear(batch, {J: Says.DENSE}, {"*": teacher}).signals[J].alignment.span_N.tolist()
    theirs = sampled_logp(teacher, batch)  # the other tokenizer's tokens are the same ones by another name
    got, stats = gradient(student, hear(batch, loss.needs, {"*": teacher}), loss)
    live_N, rows = logp_written_out(student, batch).gather(-1, batch.token_N[:, None])[:, 0], []
    for row in range(len(batch.rollouts)):
        own = [n for n in range(len(span)) if int(batch.row_N[n]) == row and span[n] >= 0]
        parts = []
        for n in own:
            members = [m for m in own if span[m] == span[n]]
            credit = (theirs[members] - batch.behaviour_N[members]).sum()
            parts.append(-(live_N[n] - batch.behaviour_N[n]).exp() * credit)
        rows += [sum(parts) / len(parts)] if parts else []
    want = sum(rows) / len(rows)
    assert stats["loss/total"] == pytest.approx(float(want.detach()), rel=1e-12)
    (naive,) = torch.autograd.grad(want, student.module.model.logits_SV)
    assert relative(got, naive) < 1e-12


def test_uld_is_cross_entropy_and_the_distance_place_by_place() -> None:
    student, teacher, batch = spoken(("data",))
    loss = build("uld", {"distance": 1.5}).loss
    batch = hear(batch, loss.needs, {"*": teacher})
    signal = batch.signals[J]
    short = torch.where(batch.position_N % 4 == 3, -1, signal.alignment.same_N)  # as if some had no partner
    batch = replace(batch, signals={J: replace(signal, alignment=replace(signal.alignment, same_N=short))})
    got, stats = gradient(student, batch, loss)
    logp_NV, theirs = logp_written_out(student, batch), logp_written_out(teacher, batch)
    nll, far = [], []
    for row in range(len(batch.rollouts)):
        own = [n for n in range(len(short)) if int(batch.row_N[n]) == row]
        nll.append(sum(-logp_NV[n, batch.token_N[n]] for n in own) / len(own))
        paired = [n for n in own if short[n] >= 0]
        gaps = [logp_NV[n].exp().sort()[0] - theirs[n].exp().detach().sort()[0] for n in paired]
        far += [sum(g.abs().sum() for g in gaps) / len(paired)] if paired else []
    want = sum(nll) / len(nll) + 1.5 * sum(far) / len(far)
    assert stats["loss/total"] == pytest.approx(float(want.detach()), rel=1e-12)
    (naive,) = torch.autograd.grad(want, student.module.model.logits_SV)
    assert relative(got, naive) < 1e-12


def test_the_stop_token_can_be_left_out() -> None:
    student, teacher, batch = spoken()
    with_stop, without = (build("gold", {"stop": stop, "per": "token"}).loss for stop in (True, False))
    batch = hear(batch, with_stop.needs, {"*": teacher})
    alignment = batch.signals[J].alignment
    stops = alignment.counted("span", True) & ~alignment.counted("span", False)
    assert torch.equal(stops, alignment.counted("span", True) & (batch.token_N == V - 1)) and stops.any()
    assert relative(gradient(student, batch, with_stop)[0], gradient(student, batch, without)[0]) > 0.05


@pytest.mark.parametrize("w_u", [0.0, 2.0])
def test_the_order_of_unmatched_columns_means_nothing(w_u: float) -> None:
    student, teacher, batch = spoken()
    loss = build("gold", {"mapped": 1.0, "rest": w_u}).loss
    batch = hear(batch, loss.needs, {"*": teacher})
    signal = batch.signals[J]
    known, entries = [0, 2], torch.tensor([0, 0])  # of both entries
    shared = Shared(torch.tensor(known), V - 1 - torch.tensor(known), entries, entries + 2, signal.shared.entry_G)
    few = replace(signal, shared=shared)
    want, _ = gradient(student, replace(batch, signals={J: few}), loss)
    others = [w for w in range(V) if V - 1 - w not in known]
    swapped = torch.arange(V)
    swapped[others] = torch.tensor([others[k] for k in (2, 0, 3, 1)])
    head = replace(few.head, weight=few.head.weight[swapped])
    inverse = swapped.argsort()
    moved = replace(few, head=head, token_M=inverse[few.token_M])
    got, _ = gradient(student, replace(batch, signals={J: moved}), loss)
    assert relative(got, want) < 1e-14


# --- cuts ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.booleans(), max_size=40), st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_tiles_do_not_cut_what_is_joined(joined: list[bool], size: int) -> None:
    if joined:
        joined[0] = False
    cuts = tiles(len(joined), size, torch.tensor(joined, dtype=torch.bool))
    assert [n for cut in cuts for n in range(cut.start, cut.stop)] == list(range(len(joined)))
    for cut in cuts:
        assert not joined[cut.start]
        assert cut.stop - cut.start <= size or all(joined[cut.start + 1 : cut.stop])
    for a, b in itertools.pairwise(cuts):  # as few as can be: what follows did not fit
        following = next((n for n in range(b.start + 1, len(joined)) if not joined[n]), len(joined))
        assert following - a.start > size


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(loss: Loss) -> str:
    roles = {"teacher": Says.DENSE, EXPERT: Says.DENSE}
    with pytest.raises(UsageError) as caught:
        bind(Method(one("student"), loss, name="mine"), Setting(roles, reward=True))
    return " ".join(caught.value.problems)


JSD = Divergence("jsd", (("beta", 0.5),))


@pytest.mark.parametrize(
    ("loss", "what"),
    [
        (push(reward(), anchor=log_ratio(J)), "makes an anchor of `teacher[retokenized]`"),
        (push(reward()).where(log_ratio(J)), "makes a gate of `teacher[retokenized]`"),
        (push(discounted(log_ratio(J), 1.0)), "makes a weight or a reward-to-go of `teacher[retokenized]`"),
        (k3(J), "makes a k3 penalty of `teacher[retokenized]`"),
        (match(J, JSD), "compares `teacher[retokenized]` with the student by jsd(beta=0.5)"),
        (match(TEACHER, hybrid(JSD)), "compares `teacher` with the student by (w_m jsd(beta=0.5) + w_u sorted_l1)"),
        (match(TEACHER, ranked()), "compares `teacher` with the student by sorted_l1"),
        (match(Judge(EXPERT, RETOKENIZED), hybrid(JSD)), "lets `expert` see `retokenized`"),
    ],
)
def test_a_retokenized_judge_is_not_read_token_by_token(loss: Loss, what: str) -> None:
    assert what in refused(loss)


def test_it_can_be_a_credit_among_others() -> None:
    credit = reward() + 0.5 * log_ratio(J, "behaviour")
    method = Method(one("student"), push(credit, anchor=behaviour()).where(band(0.5, 2.0)), name="mine")
    bind(method, Setting({"teacher": Says.TOKEN}, reward=True))
    student, teacher, batch = spoken()
    stats = gradient(student, hear(batch, method.needs, {"*": teacher}), method.loss)[1]
    assert stats["loss/total"] == stats["loss/total"]


def test_arguments_that_have_no_meaning_are_refused() -> None:
    for args in ({"form": "push", "beta": 0.3}, {"beta": 1.0}, {"beta": 0.0}):
        with pytest.raises(UsageError, match="method gold: "):
            build("gold", args)


def test_the_equation_says_that_spans_are_counted() -> None:
    assert str(build("gold").loss) == "mean_y mean_span[(w_m jsd(beta=0.5) + w_u sorted_l1)(teacher[retokenized], π)]"
    pushed = str(build("gold", {"form": "push", "per": "token"}).loss)
    assert pushed == "mean_t[-exp(log π - log μ) · [Σ_span (log teacher[retokenized] - log μ)]]"
    assert str(build("uld").loss).endswith("0.5 · mean_y mean_t[sorted_l1(teacher[retokenized], π)]")


def test_what_is_observed_of_a_span_is_its_texts_distance() -> None:
    """kl/reverse_nats: of the student's samples, a span's log pi less its log p, whichever way the teacher says it."""
    student, teacher, batch = spoken()
    seen = []
    for args in ({}, {"form": "push"}):
        loss = build("gold", args).loss
        heard = hear(batch, loss.needs, {"*": teacher})
        seen.append(gradient(student, heard, loss)[1]["kl/reverse_nats"])
    signal = hear(batch, {J: Says.DENSE}, {"*": teacher}).signals[J]
    gap = Student(student, Optim()).logp(batch) - sampled_logp(teacher, batch)
    span = signal.alignment.span_N
    per_span = [float(gap[span == g].sum()) for g in span.unique().tolist() if g >= 0]
    assert seen == [pytest.approx(sum(per_span) / len(per_span), rel=1e-10)] * 2
