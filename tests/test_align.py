"""Alignment and the chain rule: golden vectors, enumeration over a toy alphabet, and sorted distances."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tabled import F64, random_table

from opd.math.align import closing, intervals, members, merged, placed, sorted_l1, spans, totals
from opd.model import CausalModel


def numbers(found: list[tuple[range, range]]) -> list[tuple[list[int], list[int]]]:
    return [(list(a), list(b)) for a, b in found]


# --- spans -----------------------------------------------------------------------------------------------------------


def test_the_golden_vectors() -> None:
    """methods.md, T: ends [2, 5, 6] and [3, 5, 6]; merge of P0 = [.6, .3, .1], P1 = [.2, .5, .3], tokens (0, 1)."""
    found = numbers(spans(intervals([2, 5, 6]), intervals([3, 5, 6])))
    assert found == [([0, 1], [0, 1]), ([2], [2])]
    logp = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3]], dtype=F64).log()
    chained = merged(logp, torch.tensor([0, 1]), torch.tensor([0, 0])).exp()
    assert torch.allclose(chained, torch.tensor([[0.12, 0.3, 0.18]], dtype=F64))  # not [.3, .15, .05]: one late
    s, t = (torch.tensor([p], dtype=F64).log() for p in ([0.7, 0.2, 0.1], [0.1, 0.5, 0.15, 0.25]))
    assert float(sorted_l1(s, t)) == pytest.approx(0.4)


def test_a_text_that_goes_on_on_one_side_is_in_no_span() -> None:
    assert numbers(spans(intervals([2, 4]), intervals([2, 5]))) == [([0], [0])]
    assert numbers(spans(intervals([2, 4]), intervals([2]))) == [([0], [0])]
    assert spans([], intervals([3])) == []


def test_no_span_is_drawn_across_a_token_without_a_place() -> None:
    whole = intervals([5])
    assert spans([(0, 2), None, (2, 5)], whole) == []
    assert numbers(spans([None, (0, 5), None], whole)) == [([1], [0])]
    cut, other = [(0, 2), None, (2, 5), (5, 7)], [(0, 5), (5, 7)]
    assert numbers(spans(cut, other)) == [([3], [1])]


cuts = st.lists(st.integers(1, 3), min_size=1, max_size=12)


@given(cuts, cuts)
@settings(max_examples=300, deadline=None)
def test_spans_are_the_common_cuts(a: list[int], b: list[int]) -> None:
    """On one text: as many spans as both have ends in common, each the same bytes on both sides, none left out."""
    ends = [list(itertools.accumulate(x)) for x in (a, b)]
    total = max(e[-1] for e in ends)
    ends = [e if e[-1] == total else [*e, total] for e in ends]
    left, right = map(intervals, ends)
    found = spans(left, right)
    assert len(found) == len(set(ends[0]) & set(ends[1]))
    assert [i for mine, _ in found for i in mine] == list(range(len(left)))
    assert [j for _, theirs in found for j in theirs] == list(range(len(right)))
    for mine, theirs in found:
        assert (left[mine[0]][0], left[mine[-1]][1]) == (right[theirs[0]][0], right[theirs[-1]][1])


def test_tokens_are_placed_from_both_sides_of_what_is_unknown() -> None:
    text = "ab中cd".encode()
    assert placed([b"a", b"b", None, b"c", b"d"], text) == [(0, 1), (1, 2), None, (5, 6), (6, 7)]
    assert placed([b"ab", b"\xe4", b"\xb8\xad", b"cd"], text) == [(0, 2), (2, 3), (3, 5), (5, 7)]
    assert placed([b"ab", b"X", b"cd"], text) == [None, None, None]  # it says something else: nothing is guessed
    assert placed([None], text) == [None] and placed([], text) == []


# --- chain rule ------------------------------------------------------------------------------------------------------

PIECES = {"letters": ["a", "b"], "pairs": ["a", "b", "ab", "ba"]}  # a table has room for six tokens, the last is STOP


def joint(model: CausalModel, tokens: tuple[int, ...]) -> float:
    """The probability of tokens behind a prompt of one token, as a product of one conditional after the other."""
    at, p = (0, *tokens), torch.ones((), dtype=F64)
    for place, token in enumerate(tokens):
        logits = model.module.model.logits_SV[place * 6 + at[place]]
        p = p * logits.exp()[token] / logits.exp().sum()
    return float(p.detach())


def greedy(text: str, pieces: list[str]) -> tuple[int, ...]:
    out: tuple[int, ...] = ()
    while text:
        best = max((p for p in pieces if text.startswith(p)), key=len)
        out, text = (*out, pieces.index(best)), text[len(best) :]
    return out


@pytest.mark.parametrize("text", ["".join(x) for n in (1, 2, 3, 4) for x in itertools.product("ab", repeat=n)])
def test_the_same_string_in_two_tokenisations_by_enumeration(text: str) -> None:
    """Every merged row against sums over all sequences that begin so; a text's spans multiply to its probability."""
    models = {name: random_table(seed) for seed, name in enumerate(PIECES, 1)}
    ids = {name: greedy(text, pieces) for name, pieces in PIECES.items()}
    lengths = {name: [len(PIECES[name][i]) for i in row] for name, row in ids.items()}
    places = {name: intervals([*itertools.accumulate(x)]) for name, x in lengths.items()}
    found = spans(places["letters"], places["pairs"])
    for side, name in enumerate(PIECES):
        row = (*ids[name], 5)
        span = torch.tensor([g for g, pair in enumerate(found) for _ in pair[side]] + [len(found)])
        states = [p * 6 + t for p, t in enumerate((0, *row[:-1]))]
        logp = models[name].module.model.logits_SV.detach()[states].log_softmax(-1)
        rows, done = merged(logp, torch.tensor(row), span), 0
        said = []
        for g, merged_row in enumerate(rows):
            size = int((span == g).sum())
            before, early = row[:done], row[done : done + size - 1]
            given = joint(models[name], before)
            for v in range(6):  # of all sequences of one token more, those that begin like this
                longer = [(*before, *early, v, w) for w in range(6)]
                want = sum(joint(models[name], seq) for seq in longer) / given
                assert float(merged_row[v].exp()) == pytest.approx(want, rel=1e-12)
            done += size
            said.append(merged_row[row[done - 1]])
        assert float(sum(said).exp()) == pytest.approx(joint(models[name], row), rel=1e-12)


def test_gradient_reaches_the_earlier_tokens_of_a_span() -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 4, generator=g, dtype=F64, requires_grad=True)
    token, span = torch.tensor([1, 2, 0, 3, 1]), torch.tensor([0, 0, -1, 1, 2])
    weight = torch.randn(3, 4, generator=g, dtype=F64)
    (got,) = torch.autograd.grad((weight * merged(logits.log_softmax(-1), token, span).exp()).sum(), logits)
    p = logits.softmax(-1)
    naive = torch.stack([p[0, 1] * p[1], p[3], p[4]])
    (want,) = torch.autograd.grad((weight * naive).sum(), logits)
    assert torch.allclose(got, want, atol=1e-14) and got[0].abs().max() > 0 and got[2].abs().max() == 0


def test_spans_are_closed_counted_and_summed() -> None:
    span = torch.tensor([4, 4, -1, 7, 2, 2, 2])
    assert closing(span).tolist() == [False, True, False, True, False, False, True]
    x = torch.tensor([1.0, 2, 99, 3, 4, 5, 6])
    assert totals(x, span).tolist() == [3, 3, 0, 3, 15, 15, 15]
    at, whose = members(torch.tensor([5, 0, 9]), torch.tensor([2, 0, 3]))
    assert at.tolist() == [5, 6, 9, 10, 11] and whose.tolist() == [0, 0, 2, 2, 2]
    assert closing(span[:0]).tolist() == totals(x[:0], span[:0]).tolist() == []


# --- sorted distance --------------------------------------------------------------------------------------------------


def distributions(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).log_softmax(-1)


@pytest.mark.parametrize("widths", [(5, 5), (3, 7), (7, 3)])
def test_sorted_l1_has_the_gradient_of_sorting(widths: tuple[int, int]) -> None:
    s, t = distributions(1, 4, widths[0]).requires_grad_(), distributions(2, 4, widths[1])
    naive = 0
    for row in range(4):
        p, q = (sorted(x[row].exp().unbind(), key=lambda z: float(z.detach()), reverse=True) for x in (s, t))
        n = max(widths)
        zero = torch.zeros((), dtype=F64)
        p, q = ([*x, *[zero] * (n - len(x))] for x in (p, q))
        naive = naive + sum((a - b).abs() for a, b in zip(p, q, strict=True))
    got = sorted_l1(s, t).sum()
    assert float(got.detach()) == pytest.approx(float(naive.detach()), rel=1e-12)
    wants, gots = (torch.autograd.grad(x, s)[0] for x in (naive, got))
    assert torch.allclose(gots, wants, atol=1e-14)


def test_sorted_l1_does_not_see_which_token() -> None:
    s, t = distributions(1, 3, 6), distributions(2, 3, 6)
    assert torch.allclose(sorted_l1(s, t), sorted_l1(s, t[:, torch.tensor([3, 0, 5, 1, 4, 2])]), atol=1e-15)
    assert float(sorted_l1(s, s.flip(-1)).abs().max()) < 1e-15


def test_equal_probabilities_share_their_gradient() -> None:
    """Uniform: nothing says which token should be the likely one, so none is raised above the others."""
    s = torch.zeros(1, 5, dtype=F64, requires_grad=True)
    (flat,) = torch.autograd.grad(sorted_l1(s.log_softmax(-1), distributions(2, 1, 5)).sum(), s)
    assert float(flat.abs().max()) < 1e-15
    s = torch.tensor([[1.0, 0.0, 1.0, -1.0]], dtype=F64, requires_grad=True)
    (some,) = torch.autograd.grad(sorted_l1(s.log_softmax(-1), distributions(3, 1, 4)).sum(), s)
    assert float((some[0, 0] - some[0, 2]).abs()) < 1e-15 and float(some.abs().max()) > 1e-3
