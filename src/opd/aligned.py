"""What a judge with another tokenizer says: its tokens of the same text, and the spans in which both meet.

Shapes: N loss tokens of the student, M the judge's tokens of the same answers (row after row), G spans of a batch; n, g
those of a tile; V the student's vocabulary, W the judge's, H the judge's width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from opd import math
from opd.head import Head, token_logp

Pairing = Literal["span", "index"]


@dataclass(frozen=True)
class Alignment:
    """Which tokens of the judge meet which of the student's. Spans have numbers that stay when rows are taken out."""

    span_N: Tensor  # the span of each loss token, -1 where it is in none; tokens of a span are adjacent
    first_G: Tensor  # where a span's tokens of the judge begin, and how many there are
    count_G: Tensor
    same_N: Tensor  # the judge's token at the same place of its own answer, -1 where its answer is over
    stop_N: Tensor  # True where the loss token is the stop token

    def rows(self, at_N: Tensor) -> Alignment:
        return replace(self, span_N=self.span_N[at_N], same_N=self.same_N[at_N], stop_N=self.stop_N[at_N])

    @property
    def inside_N(self) -> Tensor:
        return self.span_N >= 0

    @property
    def joined_N(self) -> Tensor:
        """True for each token that is in one span with the token before it: no tile may come between them."""
        joined_N = torch.zeros_like(self.stop_N)
        joined_N[1:] = self.inside_N[1:] & (self.span_N[1:] == self.span_N[:-1])
        return joined_N

    def counted(self, by: Pairing, stop: bool) -> Tensor:
        """[N] True for the token at which a pair has its value: a span's last, or every token that has a partner."""
        at_N = math.align.closing(self.span_N) if by == "span" else self.same_N >= 0
        return at_N if stop else at_N & ~self.stop_N

    def spoken(self, logp_M: Tensor) -> Tensor:
        """[N] the judge's log-probability of each span at its last token, 0 at the others, nan outside of spans.

        So sums over a row are log-probabilities of text, however either side cuts it.
        """
        closes_N = math.align.closing(self.span_N)
        span_G = self.span_N[closes_N]
        at_m, number_m = math.align.members(self.first_G[span_G], self.count_G[span_G])
        total_G = logp_M.new_zeros(len(span_G)).index_add(0, number_m, logp_M[at_m])
        out_N = torch.where(self.inside_N, 0.0, float("nan")).to(logp_M)
        out_N[closes_N] = total_G
        return out_N

    def seen(self) -> dict[str, Tensor]:
        """[N] numbers whose means say how well the two tokenizations meet."""
        return {"align/unmapped_share": ~self.inside_N, "align/spans_per_token": math.align.closing(self.span_N)}


@dataclass(frozen=True)
class Shared:
    """Which tokens of the two vocabularies make a span the same text. That depends on what stands before them in it.

    Entry 0 is for spans whose earlier tokens spell the same on both sides: tokens that mean the same. In any other the
    earlier tokens of one side spell some bytes more, and the last token of the other has to begin with these. Pairs of
    an entry are adjacent.
    """

    mine_P: Tensor
    theirs_P: Tensor
    first_E: Tensor
    count_E: Tensor
    entry_G: Tensor  # of each span

    def of(self, entry_g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The pairs of these entries end to end: which of them, the student's id, the judge's."""
        at_p, number_p = math.align.members(self.first_E[entry_g], self.count_E[entry_g])
        return number_p, self.mine_P[at_p], self.theirs_P[at_p]


@dataclass(frozen=True)
class Crossed:
    """Student and judge side by side, pair by pair, each over its own vocabulary; gradient through the student.

    Rows are log-probabilities of "the span as it is, but any last token": they sum to less than 1 where a span has
    several tokens.
    """

    s_gV: Tensor
    t_gW: Tensor
    place_g: Tensor  # the loss token in the tile at which the pair has its value
    said: tuple[Tensor, Tensor]  # [g] what was really said: its log-probability to student and judge
    shared: Shared | None = None  # None: nothing is known to be
    entry_g: Tensor | None = None

    def put(self, value_g: Tensor, n: int) -> Tensor:
        """[n] a value per pair, at its place; 0 elsewhere."""
        return value_g.new_zeros(n).index_add(0, self.place_g, value_g)

    @property
    def share(self) -> float:
        """The part of the judge's vocabulary that has a token of the same meaning in the student's."""
        assert self.shared is not None
        return int(self.shared.count_E[0]) / self.t_gW.shape[-1]

    def matched(self, entries: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """[g] the sum of a divergence's entries over the tokens that make the span the same text on both sides."""
        even_g, mine, theirs, (number_p, mine_p, theirs_p) = self._columns()
        s_eV, t_eW = _of(self.s_gV, even_g), _of(self.t_gW, even_g)
        value_e = entries(s_eV[:, mine], t_eW[:, theirs]).sum(-1)
        value_g = self.s_gV.new_zeros(len(self.s_gV)).index_put((even_g.nonzero()[:, 0],), value_e)
        odd_p = entries(self.s_gV[number_p, mine_p][:, None], self.t_gW[number_p, theirs_p][:, None])[:, 0]
        return value_g.index_add(0, number_p, odd_p)

    def rest(self) -> Tensor:
        """[g] sorted L1 over all other tokens."""
        even_g, mine, theirs, (number_p, mine_p, theirs_p) = self._columns()
        nothing = self.s_gV.new_full((), float("-inf"))
        left = []
        for logp, ids, taken_p in ((self.s_gV, mine, mine_p), (self.t_gW, theirs, theirs_p)):
            row = even_g.nonzero()[:, 0].repeat_interleave(len(ids))
            gone = torch.cat([row, number_p]), torch.cat([ids.repeat(int(even_g.sum())), taken_p])
            left.append(logp.index_put(gone, nothing))
        return math.align.sorted_l1(*left)

    def _columns(self) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Which spans are of entry 0, its pairs once for all, and the pairs of the others one by one."""
        assert self.shared is not None and self.entry_g is not None
        even_g = self.entry_g == 0
        _, mine, theirs = self.shared.of(even_g.new_zeros(1, dtype=torch.long))
        at = (~even_g).nonzero()[:, 0]
        number_p, mine_p, theirs_p = self.shared.of(self.entry_g[at])
        return even_g, mine, theirs, (at[number_p], mine_p, theirs_p)


def _of(x_gV: Tensor, which_g: Tensor) -> Tensor:
    return x_gV if bool(which_g.all()) else x_gV[which_g]


@dataclass(frozen=True)
class SpanToken:
    """A judge's log-probability of every span of text; carries no vocabulary."""

    logp_N: Tensor  # see `Alignment.spoken`
    alignment: Alignment
    heard_N: Tensor | None = None

    def rows(self, at_N: Tensor, _rows_B: Tensor) -> SpanToken:
        return SpanToken(self.logp_N[at_N], self.alignment.rows(at_N))


@dataclass(frozen=True)
class SpanDense:
    """A judge's distribution at each of its own tokens, carried exactly as hidden states and a head."""

    hidden_MH: Tensor
    head: Head
    token_M: Tensor
    alignment: Alignment
    shared: Shared
    heard_N: Tensor | None = None

    def rows(self, at_N: Tensor, _rows_B: Tensor) -> SpanDense:
        return replace(self, alignment=self.alignment.rows(at_N))

    def logp(self, _token_N: Tensor, temperature: float) -> Tensor:
        """[N] as `SpanToken.logp_N`."""
        return self.alignment.spoken(token_logp(self.head, self.hidden_MH, self.token_M, temperature))

    def cross(self, logp_nV: Tensor, token_n: Tensor, at_n: Tensor, temperature: float, by: Pairing) -> Crossed:
        """Student and judge on the pairs of a tile that holds whole spans; `logp_nV` is the student's."""
        entry_g = None
        if by == "index":
            place_g = (self.alignment.same_N[at_n] >= 0).nonzero()[:, 0]
            s_gV, last_g = logp_nV[place_g], self.alignment.same_N[at_n][place_g]
            before_g = logp_nV.new_zeros(len(place_g))
        else:
            span_n = self.alignment.span_N[at_n]
            place_g = math.align.closing(span_n).nonzero()[:, 0]
            span_g = span_n[place_g]
            entry_g = self.shared.entry_G[span_g]
            s_gV = math.align.merged(logp_nV, token_n, span_n)
            last_g = self.alignment.first_G[span_g] + self.alignment.count_G[span_g] - 1
            before_g = self._before(span_g, temperature).to(logp_nV)
        with torch.no_grad():
            t_gW = (self.head.logits(self.hidden_MH[last_g]) / temperature).log_softmax(-1).to(logp_nV.dtype)
            t_gW = t_gW + before_g[:, None]
            said = _at(s_gV.detach(), token_n[place_g]), _at(t_gW, self.token_M[last_g])
        return Crossed(s_gV, t_gW, place_g, said, self.shared, entry_g)

    def _before(self, span_g: Tensor, temperature: float) -> Tensor:
        """[g] log-probability of all tokens of a span but the last."""
        at_m, number_m = math.align.members(self.alignment.first_G[span_g], self.alignment.count_G[span_g] - 1)
        logp_m = token_logp(self.head, self.hidden_MH[at_m], self.token_M[at_m], temperature)
        return logp_m.new_zeros(len(span_g)).index_add(0, number_m, logp_m)


def _at(logp_gV: Tensor, token_g: Tensor) -> Tensor:
    return logp_gV.gather(-1, token_g[:, None])[:, 0]


Retokenized = SpanToken | SpanDense
