"""The student beside each judge, token by token: how far apart they are, where in the answer, on how much of what is
likely they agree, and what a judge that was shown more knows better.

Exact where the judge gave distributions; of the student's sampled tokens else. Nothing here carries gradient.

Shapes: n tokens of a tile, m of those that count and that the judge was heard at, V vocabulary.
"""

from __future__ import annotations

from math import log

from torch import Tensor

from opd import math
from opd.aligned import SpanToken
from opd.loss import Loss, Match
from opd.tally import Tally
from opd.tile import TileScope
from opd.types import Judge
from opd.views import SAME

CERTAIN, UNLIKELY = 0.9, 0.1  # a judge that knows, beside a student that does not


def _is_reference(judge: Judge) -> bool:
    return judge.role == "reference" and judge.view == SAME


def distributions(judge: Judge, tile: TileScope, tally: Tally) -> None:
    """Add what two whole distributions let be known, at all of a tile's tokens that the judge was heard at."""
    part = tile.only(tile.heard(judge).nonzero()[:, 0])
    if not len(part.at):
        return
    place_m, s_mV, t_mV = part.batch.place_N[part.at], part.student(1.0), part.distribution(judge, 1.0)
    reverse_m = math.divergence.reverse_kl(s_mV, t_mV).sum(-1)
    if _is_reference(judge):
        tally.mean("kl/reference_nats", reverse_m)
        return
    tally.mean("kl/reverse_nats", reverse_m)
    tally.means("position/kl_nats_from_{}", reverse_m, place_m)
    tally.mean("kl/forward_nats", math.divergence.forward_kl(s_mV, t_mV).sum(-1))
    own_m, other_m = math.divergence.entropy(s_mV), math.divergence.entropy(t_mV)
    tally.mean("entropy/teacher_nats", other_m)
    tally.mean("entropy/gap_nats", (other_m - own_m).abs())
    both = math.agreement.overlap(s_mV, t_mV)
    tally.mean("overlap/ratio", both.ratio_n)
    tally.means("position/overlap_from_{}", both.ratio_n, place_m)
    tally.mean("overlap/advantage_nats", both.advantage_n[both.ratio_n > 0])
    tally.mean("overlap/student_mass", both.student_mass_n)
    tally.mean("overlap/teacher_mass", both.teacher_mass_n)
    if judge.view != SAME:
        sure_m, choice_m = t_mV.max(-1)
        doubt_m = s_mV.gather(-1, choice_m[:, None])[:, 0]
        tally.mean("leak/certain_share", (sure_m > log(CERTAIN)) & (doubt_m < log(UNLIKELY)))


def samples(judge: Judge, tile: TileScope, on_n: Tensor, tally: Tally) -> None:
    """Add what the student's own samples let be known: the mean of a log-ratio is unbiased for the reverse KL."""
    at_n = on_n & (tile.heard(judge) > 0) & tile.batch.own_N[tile.at]
    gap_m = (tile.live - tile.judged(judge))[at_n]
    if _is_reference(judge):
        tally.mean("kl/reference_nats", gap_m)
        return
    tally.mean("kl/reverse_nats", gap_m)
    tally.means("position/kl_nats_from_{}", gap_m, tile.batch.place_N[tile.at][at_n])


def spans(judge: Judge, tile: TileScope, on_n: Tensor, loss: Loss, tally: Tally) -> None:
    """Add the same of a judge with another tokenizer: of whole spans, the text that the student said."""
    own_n, signal = on_n & tile.batch.own_N[tile.at], tile.batch.signals[judge]
    if isinstance(signal, SpanToken):
        span_n = signal.alignment.span_N[tile.at]
        gap_n = math.align.totals(tile.live - tile.judged(judge), span_n)
        tally.mean("kl/reverse_nats", gap_n[own_n & math.align.closing(span_n)])
        return
    for tau in {t.head.divergence.temperature for t in loss.token_terms if isinstance(t.head, Match)}:
        pair = tile.crossed(judge, tau, "span")
        tally.mean("kl/reverse_nats", (pair.said[0] - pair.said[1])[own_n[pair.place_g]])
