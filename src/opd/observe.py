"""What is measured at a step's tokens besides the loss: how far the judges are, how sure everybody is, what is clipped.

Nothing here carries gradient or is asked for: it reads what the loss needed anyway.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from opd import math
from opd.aligned import SpanDense, SpanToken
from opd.batch import Prepared
from opd.loss import Loss, Match, Push
from opd.signals import Distribution, Token
from opd.tally import Tally

if TYPE_CHECKING:
    from opd.student import TileScope


@torch.no_grad()
def observe(loss: Loss, tile: TileScope, prepared: Prepared, tally: Tally) -> None:
    """Add a tile's numbers, of the tokens that some term counts."""
    on_n = (prepared.weight_KN[:, tile.at] != 0).any(0)
    tally.mean("entropy/student_nats", math.divergence.entropy(tile.student(1.0))[on_n])
    _distances(loss, tile, on_n, tally)
    _trust(loss, tile, prepared, tally)
    _gates(loss, tile, prepared, tally)


def _distances(loss: Loss, tile: TileScope, on_n: torch.Tensor, tally: Tally) -> None:
    """KL to each judge: exact where it gave distributions, an unbiased estimate from the student's samples else."""
    matched = any(isinstance(t.head, Match) for t in loss.token_terms)
    spoken_n = tile.batch.behaviour_N[tile.at].isfinite()
    for judge, signal in tile.batch.signals.items():
        if isinstance(signal, Distribution) and matched:
            own_n = on_n & (tile.heard(judge) > 0)
            s_nV, t_nV = tile.student(1.0)[own_n], tile.distribution(judge, 1.0)[own_n]
            tally.mean("kl/reverse_nats", math.divergence.reverse_kl(s_nV, t_nV).sum(-1))
            tally.mean("kl/forward_nats", math.divergence.forward_kl(s_nV, t_nV).sum(-1))
            tally.mean("entropy/teacher_nats", math.divergence.entropy(t_nV))
        elif isinstance(signal, Token):
            own_n = on_n & (tile.heard(judge) > 0) & spoken_n
            which = "reference" if judge.role == "reference" and judge.view == "same" else "reverse"
            tally.mean(f"kl/{which}_nats", (tile.live - tile.judged(judge))[own_n])
        elif isinstance(signal, SpanToken):  # of whole spans: the text that the student said
            span_n = signal.alignment.span_N[tile.at]
            gap_n = math.align.totals(tile.live - tile.judged(judge), span_n)
            tally.mean("kl/reverse_nats", gap_n[on_n & spoken_n & math.align.closing(span_n)])
        elif isinstance(signal, SpanDense):
            for tau in {t.head.divergence.temperature for t in loss.token_terms if isinstance(t.head, Match)}:
                pair = tile.crossed(judge, tau, "span")
                gap_g = pair.said[0] - pair.said[1]
                tally.mean("kl/reverse_nats", gap_g[(on_n & spoken_n)[pair.place_g]])


def _trust(loss: Loss, tile: TileScope, prepared: Prepared, tally: Tally) -> None:
    """The ratio of the first push, and how much of it its clip stops."""
    pushes = [(k, t.head) for k, t in enumerate(loss.token_terms) if isinstance(t.head, Push)]
    for k, head in pushes[:1]:
        own_n = prepared.weight_KN[k, tile.at] != 0
        ratio_m = head.anchor.log_ratio(tile.live, tile).exp()[own_n]
        credit_m = head.credit.value(tile)[own_n]
        low, high = head.clip or (float("inf"), float("inf"))
        stopped_m = ((credit_m > 0) & (ratio_m > 1 + high)) | ((credit_m < 0) & (ratio_m < 1 - low))
        tally.mean("ratio/mean", ratio_m)
        tally.mean("ratio/clipped_share", stopped_m)


def _gates(loss: Loss, tile: TileScope, prepared: Prepared, tally: Tally) -> None:
    """At which share of its tokens each gated term is let through."""
    for k, term in enumerate(loss.token_terms):
        if term.gates:
            open_n = torch.stack([gate.value(tile) != 0 for gate in term.gates]).all(0)
            tally.mean(f"gate/{term.name}_open_share", open_n[prepared.weight_KN[k, tile.at] != 0])
