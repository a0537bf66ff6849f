"""Two tokenisations of one text: spans that both end in the same place, and what a span is worth to each model.

Positions are byte offsets in the text's UTF-8, so that two tokenizers that cut a character in pieces still meet. A
*span* is a run of one side's tokens and a run of the other's that cover exactly the same bytes; it is as short as it
can be. A token that is in no span is masked by whoever reads them, never guessed.

Shapes: n tokens of a tile, g the spans that end in it, V one vocabulary, W the other's, A and B parts of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Interval = tuple[int, int]  # from byte, to byte


def intervals(ends: Sequence[int]) -> list[Interval]:
    """Tokens that follow one another, from where each ends."""
    return [(ends[i - 1] if i else 0, end) for i, end in enumerate(ends)]


def spans(a: Sequence[Interval | None], b: Sequence[Interval | None]) -> list[tuple[range, range]]:
    """The spans of two tokenisations, in order: which tokens of each cover the same bytes.

    Two pointers: from a common start, whichever side ends earlier takes its next token, until both end together. None
    stands for a token that has no known place in the text; no span is drawn across one, and tokens without a partner
    (a text that goes on on one side alone) are in no span.
    """
    found = []
    i = j = 0
    while i < len(a) and j < len(b):
        mine, theirs = a[i], b[j]
        if mine is None or (theirs is not None and mine[0] < theirs[0]):
            i += 1
        elif theirs is None or theirs[0] < mine[0]:
            j += 1
        else:
            start = i, j
            i, j, whole = _grown(a, b, i, j)
            if whole:
                found.append((range(start[0], i), range(start[1], j)))
    return found


def _grown(a: Sequence[Interval | None], b: Sequence[Interval | None], i: int, j: int) -> tuple[int, int, bool]:
    """Where the span that starts at tokens i and j ends on each side, and whether both ends meet."""
    ends = [_end(a[i]), _end(b[j])]
    at, sides = [i + 1, j + 1], (a, b)
    while ends[0] != ends[1]:
        short = 0 if ends[0] < ends[1] else 1
        following = sides[short][at[short]] if at[short] < len(sides[short]) else None
        if following is None or following[0] != ends[short]:
            return at[0], at[1], False
        ends[short] = following[1]
        at[short] += 1
    return at[0], at[1], True


def _end(interval: Interval | None) -> int:
    assert interval is not None
    return interval[1]


def placed(pieces: Sequence[bytes | None], text: bytes) -> list[Interval | None]:
    """Where each token stands in a text, from what it spells; None where that cannot be known.

    Tokens are laid from the front up to the first that spells nothing known, and from the back likewise; what is
    between has no place. Where a token spells something else than the text has there, nothing from that side on has.
    """
    front = _laid(pieces, text)
    if len(front) == len(pieces):
        return [*front]
    mirrored = _laid([None if piece is None else piece[::-1] for piece in reversed(pieces)], text[::-1])
    last = front[-1][1] if front else 0
    back = [(len(text) - end, len(text) - start) for start, end in reversed(mirrored)]
    back = [x for x in back if x[0] >= last]
    return [*front, *[None] * (len(pieces) - len(front) - len(back)), *back]


def _laid(pieces: Sequence[bytes | None], text: bytes) -> list[Interval]:
    found: list[Interval] = []
    at = 0
    for piece in pieces:
        if piece is None:
            return found
        if not text.startswith(piece, at):
            return []
        found.append((at, at + len(piece)))
        at += len(piece)
    return found


# --- chain rule ------------------------------------------------------------------------------------------------------


def closing(span_n: Tensor) -> Tensor:
    """True for the last token of each span; tokens of a span are adjacent, -1 stands for none."""
    after_n = torch.cat([span_n[1:], span_n.new_full((1,), -1)]) if len(span_n) else span_n
    return (span_n >= 0) & (span_n != after_n)


def merged(logp_nV: Tensor, token_n: Tensor, span_n: Tensor) -> Tensor:
    """[g, V] log-probability of "the tokens of the span as they are, but any last one": the chain rule.

    log P(y_i .. y_{j-1}, v) = sum_k log P(y_k | before) + log P(v | y_i .. y_{j-1}), gradient through every factor.
    Row k of `logp_nV` predicts token k. Rows do not sum to 1: their mass is that of the tokens before the last.
    """
    closes_n = closing(span_n)
    said_n = logp_nV.gather(-1, token_n[:, None])[:, 0]
    early_n = (span_n >= 0) & ~closes_n
    number_n = closes_n.cumsum(0)  # of a token before the last: how many spans ended before it
    last_gV = logp_nV[closes_n]
    before_g = last_gV.new_zeros(len(last_gV)).index_add(0, number_n[early_n], said_n[early_n])
    return last_gV + before_g[:, None]


def totals(x_n: Tensor, span_n: Tensor) -> Tensor:
    """[n] for each token the sum of x over its span; 0 where it is in none."""
    inside_n = span_n >= 0
    _, index_n = span_n.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    size = int(index_n.max()) + 1 if len(index_n) else 0
    sum_s = x_n.new_zeros(size).index_add(0, index_n[inside_n], x_n[inside_n])
    return torch.where(inside_n, sum_s[index_n], torch.zeros_like(x_n))


def members(first_g: Tensor, count_g: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers first, first + 1, .., first + count - 1 of every g, end to end, and the g of each."""
    number_m = torch.arange(len(count_g), device=count_g.device).repeat_interleave(count_g)
    start_g = count_g.cumsum(0) - count_g
    within_m = torch.arange(len(number_m), device=count_g.device) - start_g[number_m]
    return first_g[number_m] + within_m, number_m


# --- distributions over different vocabularies ------------------------------------------------------------------------


def sorted_l1(s_gA: Tensor, t_gB: Tensor) -> Tensor:
    """sum_i |p_(i) - q_(i)| [g] of log-probabilities sorted by size, the shorter padded with zeros (ULD, eq. 5).

    It does not see *which* token is likely: it is 0 between a distribution and any permutation of it. Probabilities of
    the student that are equal share their gradient, so that the order in which a sort leaves them means nothing.
    """
    width = max(s_gA.shape[-1], t_gB.shape[-1])
    s_gW, t_gW = (F.pad(x.exp().sort(-1, descending=True)[0], (0, width - x.shape[-1])) for x in (s_gA, t_gB))
    gap_gW = s_gW.detach() - t_gW.detach()
    if width == 0 or not s_gW.requires_grad:
        return gap_gW.abs().sum(-1)
    fresh_gW = F.pad((s_gW[:, 1:] != s_gW[:, :-1]).long(), (1, 0)).cumsum(-1)  # which run of equals
    sums_gW = torch.zeros_like(gap_gW).scatter_add(-1, fresh_gW, gap_gW.sign())
    size_gW = torch.zeros_like(gap_gW).scatter_add(-1, fresh_gW, torch.ones_like(gap_gW))
    slope_gW = sums_gW.gather(-1, fresh_gW) / size_gW.gather(-1, fresh_gW)
    return gap_gW.abs().sum(-1) + (slope_gW * (s_gW - s_gW.detach())).sum(-1)
