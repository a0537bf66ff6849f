"""What a term sees of some loss tokens: the student with its gradient, and the judges, over the whole vocabulary.

Shapes: n tokens of a tile, V vocabulary, K kept entries.
"""

from __future__ import annotations

from torch import Tensor

from opd import math
from opd.aligned import Crossed, Pairing, SpanDense
from opd.batch import Batch, Prepared
from opd.expression import Expression
from opd.signals import Distribution, TopK
from opd.types import Judge


class TileScope:
    """The scope of some loss tokens with the vocabulary axis (`loss.Tile`). Gradient flows through `logits_nV`."""

    def __init__(self, logits_nV: Tensor, batch: Batch, prepared: Prepared, at_n: Tensor) -> None:
        self.batch, self.prepared, self.at = batch, prepared, at_n
        self.logits_nV, self.step = logits_nV, prepared.step
        self._student: dict[float, Tensor] = {}
        self._judges: dict[tuple[Judge, float], Tensor] = {}
        self._crossed: dict[tuple[Judge, float, Pairing], Crossed] = {}

    def only(self, keep_m: Tensor) -> TileScope:
        """The tile of some of its tokens, without gradient."""
        part = TileScope(self.logits_nV.detach()[keep_m], self.batch, self.prepared, self.at[keep_m])
        part._student = {key: logp_nV.detach()[keep_m] for key, logp_nV in self._student.items()}
        part._judges = {key: logp_nV[keep_m] for key, logp_nV in self._judges.items()}
        return part

    def student(self, temperature: float) -> Tensor:
        if temperature not in self._student:
            z_nV = self.logits_nV if temperature == 1 else self.logits_nV / temperature
            self._student[temperature] = z_nV.log_softmax(-1)
        return self._student[temperature]

    def distribution(self, judge: Judge, temperature: float) -> Tensor:
        key = (judge, temperature)
        if key not in self._judges:
            signal = self.batch.signals[judge]
            assert isinstance(signal, Distribution)
            z_nV = signal.logits(self.at).to(self.logits_nV.dtype)
            self._judges[key] = (z_nV if temperature == 1 else z_nV / temperature).log_softmax(-1)
        return self._judges[key]

    def top(self, judge: Judge, k: int, temperature: float) -> tuple[Tensor, Tensor]:
        signal = self.batch.signals[judge]
        if not isinstance(signal, TopK):
            return math.support.top(self.distribution(judge, temperature), k)
        assert signal.temperature == temperature and signal.ids_NK.shape[1] >= min(k, self.logits_nV.shape[1])
        ids_nK, logp_nK = signal.ids_NK[self.at, :k], signal.top_NK[self.at, :k]
        return ids_nK, logp_nK.to(self.logits_nV.dtype)

    def crossed(self, judge: Judge, temperature: float, by: Pairing) -> Crossed:
        key = (judge, temperature, by)
        if key not in self._crossed:
            signal = self.batch.signals[judge]
            assert isinstance(signal, SpanDense)
            token_n, mine_nV = self.batch.token_N[self.at], self.student(temperature)
            self._crossed[key] = signal.cross(mine_nV, token_n, self.at, temperature, by)
        return self._crossed[key]

    def _token(self, logp_nV: Tensor) -> Tensor:
        return logp_nV.gather(-1, self.batch.token_N[self.at, None])[:, 0]

    @property
    def live(self) -> Tensor:
        return self._token(self.student(self.batch.temperature))

    @property
    def target(self) -> Tensor:
        return self._token(self.student(1.0))

    @property
    def old(self) -> Tensor:
        return self.live.detach() if self.batch.old_N is None else self.batch.old_N[self.at]

    @property
    def behaviour(self) -> Tensor:
        return _filled(self.batch.behaviour_N[self.at])

    def judged(self, judge: Judge) -> Tensor:
        signal = self.batch.signals[judge]
        if isinstance(signal, Distribution):
            return self._token(self.distribution(judge, self.batch.temperature))
        return _filled(self.batch.judged(judge)[self.at])

    def heard(self, judge: Judge) -> Tensor:
        return self.batch.heard(judge)[self.at]

    def column(self, expression: Expression) -> Tensor:
        return _filled(self.prepared.columns[expression][self.at])


def _filled(x_n: Tensor) -> Tensor:
    """0 for what is missing on tokens that no term counts (elsewhere `prepare` refused it): 0 * nan would be nan."""
    return x_n.nan_to_num(0.0, 0.0, 0.0)
