"""What is measured at a step's tokens besides the loss: how sure the student is, what its trust region and its gates
stop, how far the engine that spoke is from the trainer. What is measured against each judge is in `opd.compare`.

Nothing here carries gradient or is asked for: it reads what the loss needed anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import log

import torch

from opd import math
from opd.aligned import SpanDense, SpanToken
from opd.batch import Prepared
from opd.compare import distributions, samples, spans
from opd.expression import Expression, Gated, Reach
from opd.loss import Loss, Push, Term
from opd.signals import Distribution, Token
from opd.tally import Tally
from opd.tile import TileScope

FAR = 2.0  # a factor between sampler and trainer that no rounding explains
WIDE, EVERY = 1024, 8  # above this vocabulary, whole distributions are read at one token in so many


@torch.no_grad()
def observe(loss: Loss, tile: TileScope, prepared: Prepared, tally: Tally) -> None:
    """Add a tile's numbers, of the tokens that some term counts.

    What takes a whole distribution would cost a tenth of an update where the vocabulary is wide: there it is read at
    an eighth of the tokens, the same ones however the batch is cut.
    """
    on_n = (prepared.weight_KN[:, tile.at] != 0).any(0)
    every = EVERY if tile.logits_nV.shape[-1] > WIDE else 1
    part = tile.only((on_n & (tile.batch.lot_N[tile.at] % every == 0)).nonzero()[:, 0])
    tally.mean("entropy/student_nats", math.divergence.entropy(part.student(1.0)))
    for judge, signal in tile.batch.signals.items():
        if isinstance(signal, Distribution):
            distributions(judge, part, tally)
        elif isinstance(signal, Token):
            samples(judge, tile, on_n, tally)
        elif isinstance(signal, SpanToken | SpanDense):
            spans(judge, tile, on_n, loss, tally)
    _mismatch(tile, on_n, tally)
    _trust(loss, tile, prepared, tally)
    _gates(loss, tile if tile.batch.alignments else part, prepared, tally)  # spans are not to be cut


def _mismatch(tile: TileScope, on_n: torch.Tensor, tally: Tally) -> None:
    """How far the engine that spoke is from the trainer, on the tokens that it sampled as the student."""
    own_n = on_n & tile.batch.own_N[tile.at]
    gap_m = (tile.behaviour - tile.old)[own_n]
    tally.mean("mismatch/mean_nats", gap_m.abs())
    tally.mean("mismatch/outside_share", gap_m.abs() > log(FAR))
    tally.max("mismatch/nats_max", gap_m.abs())


def _trust(loss: Loss, tile: TileScope, prepared: Prepared, tally: Tally) -> None:
    """The ratio of the first push that has a clip (else of the first push), and what its clip stops."""
    pushes = [(k, t.head) for k, t in enumerate(loss.token_terms) if isinstance(t.head, Push)]
    for k, head in sorted(pushes, key=lambda push: push[1].clip is None)[:1]:
        own_n = prepared.weight_KN[k, tile.at] != 0
        ratio_m = head.anchor.log_ratio(tile.live, tile).exp()[own_n]
        tally.mean("ratio/mean", ratio_m)
        if head.clip is None:
            continue
        credit_m, (low, high) = head.credit.value(tile)[own_n], head.clip
        above_m, below_m = ratio_m > 1 + high, ratio_m < 1 - low
        tally.mean("ratio/clipped_share", ((credit_m > 0) & above_m) | ((credit_m < 0) & below_m))
        tally.mean("clip/above_share", above_m)
        tally.mean("clip/below_share", below_m)
        tally.mean("clip/positive_stopped_share", above_m[credit_m > 0])
        tally.mean("clip/negative_stopped_share", below_m[credit_m < 0])


def _gates(loss: Loss, tile: TileScope, prepared: Prepared, tally: Tally) -> None:
    """At which share of its tokens each term is let through, and each of its gates where that says more."""
    for k, term in enumerate(loss.token_terms):
        own_n = prepared.weight_KN[k, tile.at] != 0
        if term.gates:
            open_n = torch.stack([gate.value(tile) != 0 for gate in term.gates]).all(0)
            tally.mean(f"gate/{term.name}_open_share", open_n[own_n])
        for gate in _parts(term, prepared):
            kind = type(gate).__name__.lower()
            tally.mean(f"gate/{term.name}_{kind}_open_share", (gate.value(tile) != 0)[own_n])


def _parts(term: Term, prepared: Prepared) -> Iterator[Expression]:
    """The gates of a term that has several, and those inside its credit."""
    inner = [e.gate for outer in term.expressions for e in outer.every() if isinstance(e, Gated)]
    for gate in dict.fromkeys([*(term.gates if len(term.gates) > 1 else ()), *inner]):
        if gate in prepared.columns or all(e.reach is Reach.TOKEN for e in gate.every()):
            yield gate
