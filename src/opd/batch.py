"""Rollouts packed for a loss: flat loss tokens of all rows, what judges said about them, and the weights of every term.

Shapes: B rows, N loss tokens of all rows (a row's tokens adjacent, in order), V vocabulary, H a judge's width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from zlib import crc32

import torch
from torch import Tensor

from opd.aligned import Alignment, Retokenized, SpanToken
from opd.errors import OpdError
from opd.expression import Expression
from opd.gates import Heard
from opd.loss import Loss
from opd.schedule import value
from opd.signals import Experts, Score, Signal, Token, TopK
from opd.types import Judge, Rollout


@dataclass(frozen=True)
class Batch:
    """All that a loss may read. `position_N` is a loss token's place in its row; its logits are one place earlier."""

    rollouts: tuple[Rollout, ...]
    row_N: Tensor
    position_N: Tensor
    token_N: Tensor
    behaviour_N: Tensor  # nan where the token was not sampled
    group_B: Tensor
    reward_B: Tensor
    temperature: float
    signals: Mapping[Judge, Signal] = field(default_factory=dict)
    old_N: Tensor | None = None  # None: the same as live, no update has been made on this batch

    @cached_property
    def length_B(self) -> Tensor:
        return torch.bincount(self.row_N, minlength=len(self.rollouts))

    @cached_property
    def place_N(self) -> Tensor:
        """How many loss tokens of its row stand before each."""
        start_B = self.length_B.cumsum(0) - self.length_B
        return torch.arange(len(self.row_N), device=self.row_N.device) - start_B[self.row_N]

    @cached_property
    def own_N(self) -> Tensor:
        """True for each token that the student sampled."""
        own = [r.speaker == "student" for r in self.rollouts]
        return torch.tensor(own, dtype=torch.bool, device=self.row_N.device)[self.row_N] & self.behaviour_N.isfinite()

    @cached_property
    def lot_N(self) -> Tensor:
        """A number for each token that depends on who said it to what and where, but on no layout: to choose by."""
        said = [crc32(f"{r.prompt.id} {r.speaker} {r.sample}".encode()) for r in self.rollouts]
        return torch.tensor(said, dtype=torch.long, device=self.row_N.device)[self.row_N] + self.place_N

    @cached_property
    def logp_cache(self) -> dict[Judge, Tensor]:
        return {}

    def judged(self, judge: Judge) -> Tensor:
        """[N] the judge's log-probability of the sampled tokens, at the rollouts' temperature."""
        signal = self.signals[judge]
        if isinstance(signal, Token | SpanToken | TopK):
            return signal.logp_N
        assert not isinstance(signal, Score), f"{judge} gave a score, not log-probabilities"
        if judge not in self.logp_cache:
            self.logp_cache[judge] = signal.logp(self.token_N, self.temperature)
        return self.logp_cache[judge]

    def heard(self, judge: Judge) -> Tensor:
        """[N] 1 where the judge had something to look at."""
        signal = self.signals[judge]
        assert not isinstance(signal, Score)
        if signal.heard_N is None:
            return torch.ones_like(self.behaviour_N)
        return signal.heard_N.to(self.behaviour_N.dtype)

    @cached_property
    def alignments(self) -> dict[Judge, Alignment]:
        """How the tokens of judges with other tokenizers meet the student's."""
        return {j: s.alignment for j, s in self.signals.items() if isinstance(s, Retokenized)}

    @cached_property
    def joined_N(self) -> Tensor:
        """True for each token that has to be in one tile with the token before it."""
        none_N = torch.zeros_like(self.row_N, dtype=torch.bool)
        return torch.stack([none_N, *(a.joined_N for a in self.alignments.values())]).any(0)

    def by_expert(self, rows: Sequence[int]) -> list[list[int]]:
        """Rows that are judged by the same experts together, so that each expert's head is taken once."""
        last_R = (self.length_B.cumsum(0) - 1)[list(rows)]
        judges = [s.judge_N[last_R].tolist() for s in self.signals.values() if isinstance(s, Experts)]
        companies: dict[tuple[int, ...], list[int]] = {}
        for i, r in enumerate(rows):
            companies.setdefault(tuple(judge[i] for judge in judges), []).append(r)
        return [companies[key] for key in sorted(companies)]

    def rows(self, keep: Sequence[int]) -> Batch:
        """The batch of some rows, in the order given. Groups keep their numbers."""
        rows_B = torch.as_tensor(list(keep), dtype=torch.long, device=self.row_N.device)
        start_B = self.length_B.cumsum(0) - self.length_B
        spans = [torch.arange(int(start_B[r]), int(start_B[r] + self.length_B[r])) for r in keep]
        at_N = (torch.cat(spans) if spans else torch.zeros(0, dtype=torch.long)).to(self.row_N.device)
        number = torch.arange(len(keep), device=self.row_N.device)
        return replace(
            self,
            rollouts=tuple(self.rollouts[r] for r in keep),
            row_N=number.repeat_interleave(self.length_B[rows_B]),
            position_N=self.position_N[at_N],
            token_N=self.token_N[at_N],
            behaviour_N=self.behaviour_N[at_N],
            group_B=self.group_B[rows_B],
            reward_B=self.reward_B[rows_B],
            signals={j: s.rows(at_N, rows_B) for j, s in self.signals.items()},
            old_N=None if self.old_N is None else self.old_N[at_N],
        )


def pack(
    rollouts: Sequence[Rollout],
    *,
    temperature: float,
    signals: Mapping[Judge, Signal] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """Flatten rollouts; rows of one prompt and one speaker are a group. Signals are given in the same flat order."""
    row, position, token, behaviour = [], [], [], []
    for r, rollout in enumerate(rollouts):
        for p, spoken in enumerate(rollout.mask):
            if spoken and p == 0:
                raise OpdError(
                    f"prompt {rollout.prompt.id} ({rollout.prompt.where or 'no file'}): the first token of its row "
                    "carries loss, and nothing precedes it to predict it from: give the prompt at least one token"
                )
            if spoken:
                row.append(r)
                position.append(p)
                token.append(rollout.tokens[p])
                behaviour.append(rollout.behaviour[p])
    numbers: dict[tuple[str, str], int] = {}
    group = [numbers.setdefault((r.prompt.id, r.speaker), len(numbers)) for r in rollouts]
    reward = [float("nan") if r.reward is None else r.reward for r in rollouts]
    long: Callable[[list[int]], Tensor] = lambda numbers: torch.tensor(numbers, dtype=torch.long, device=device)
    return Batch(
        rollouts=tuple(rollouts),
        row_N=long(row),
        position_N=long(position),
        token_N=long(token),
        behaviour_N=torch.tensor(behaviour, dtype=dtype, device=device),
        group_B=long(group),
        reward_B=torch.tensor(reward, dtype=dtype, device=device),
        temperature=temperature,
        signals=dict(signals or {}),
    )


# --- what is computed once over an optimizer batch, before it is cut --------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """For every token term its weight per token (mask, mean and coefficient in one), and the wide expressions."""

    weight_KN: Tensor  # [terms, N]
    columns: Mapping[Expression, Tensor]  # each [N]
    step: int = 0
    measures: Mapping[str, Tensor] = field(default_factory=dict)  # values that wide expressions tell for the record

    @property
    def live_rows(self) -> Tensor:
        """True for each token that some term counts."""
        return (self.weight_KN != 0).any(0)


class WholeScope:
    """The scope of all tokens of an optimizer batch, for expressions that reach wider than one (`expression.Whole`)."""

    def __init__(self, batch: Batch, live_N: Tensor | None, step: int, total: Total | None = None) -> None:
        self.batch, self._live_N, self.step = batch, live_N, step
        self.row, self.group = batch.row_N, batch.group_B
        self.total: Callable[[Tensor], Tensor] = total or _here

    @property
    def behaviour(self) -> Tensor:
        return self.batch.behaviour_N

    @property
    def live(self) -> Tensor:
        assert self._live_N is not None, "a wide expression reads the live student, and no pass was made for it"
        return self._live_N

    @property
    def old(self) -> Tensor:
        return self.live if self.batch.old_N is None else self.batch.old_N

    @property
    def reward(self) -> Tensor:
        return self.batch.reward_B

    @property
    def finished(self) -> Tensor:
        ended = [r.finish != "length" for r in self.batch.rollouts]
        return torch.tensor(ended, dtype=torch.bool, device=self.row.device)

    @property
    def prompt(self) -> Tensor:
        numbers: dict[str, int] = {}
        of_B = [numbers.setdefault(r.prompt.id, len(numbers)) for r in self.batch.rollouts]
        return torch.tensor(of_B, dtype=torch.long, device=self.row.device)

    def spoken_by(self, speaker: str) -> Tensor:
        own = [r.speaker == speaker for r in self.batch.rollouts]
        return torch.tensor(own, dtype=torch.bool, device=self.row.device)

    def judged(self, judge: Judge) -> Tensor:
        return self.batch.judged(judge)

    def heard(self, judge: Judge) -> Tensor:
        return self.batch.heard(judge)

    def scored(self, judge: Judge) -> Tensor:
        signal = self.batch.signals[judge]
        assert isinstance(signal, Score)
        return signal.value_KB

    def alignment(self, judge: Judge) -> Alignment:
        return self.batch.alignments[judge]

    def column(self, expression: Expression) -> Tensor:
        return expression.at(self)


def needs_pass(loss: Loss, old_known: bool) -> bool:
    """Whether a wide expression reads the student's log-probabilities, so that a pass must be made before the cut."""
    wide = [w for t in loss.token_terms for e in t.expressions for w in e.wide()]
    reads = frozenset().union(*(w.reads for w in wide)) if wide else frozenset()
    return "live" in reads or ("old" in reads and not old_known)


def prepare(loss: Loss, batch: Batch, step: int, live_N: Tensor | None = None, total: Total | None = None) -> Prepared:
    """Weights and columns for one optimizer batch.

    Each term is divided by its own loss tokens (or sequences) over the whole optimizer batch; `total` adds the counts
    over ranks. Raises `OpdError` where a column is nan or infinite on a token that counts: a missing score is never 0.
    """
    scope = WholeScope(batch, live_N, step, total)
    columns: dict[Expression, Tensor] = {}
    measures: dict[str, Tensor] = {}
    weights, problems = [], []
    for term in loss.token_terms:
        own = [term.source in (None, r.speaker) for r in batch.rollouts]
        own_B = torch.tensor(own, dtype=torch.bool, device=batch.row_N.device)
        own_N = own_B[batch.row_N].to(batch.behaviour_N.dtype)
        for counted_N in term.counted(scope):
            own_N = own_N * counted_N
        length_B = own_N.new_zeros(len(own)).index_add(0, batch.row_N, own_N)
        counts = torch.stack([own_N.sum(), (length_B > 0).sum().to(own_N.dtype)])
        tokens, rows = (total or _here)(counts).clamp_min(1)
        match term.per:
            case "token":
                mean_N = own_N / tokens
            case "sequence":
                mean_N = own_N / length_B.clamp_min(1)[batch.row_N] / rows
            case "sequence_sum":
                mean_N = own_N / rows
        weights.append(value(term.coefficient, step) * mean_N)
        read: dict[str, Tensor] = {}
        with torch.no_grad():
            for wide in (w for e in term.expressions for w in e.wide()):
                if wide not in columns:
                    columns[wide] = wide.at(scope).detach()
                    measures |= wide.measures(scope)
                read[f"[{wide}]"] = columns[wide]
        if "behaviour" in term.reads:
            read["the log-probability they were sampled with"] = batch.behaviour_N
        silence = {e.judge for outer in term.expressions for e in outer.every() if isinstance(e, Heard)}
        for judge in term.needs:
            signal = batch.signals.get(judge)
            if signal is None or isinstance(signal, Score):
                continue
            known_N = batch.behaviour_N.new_zeros(len(own_N))
            if isinstance(signal, Token | SpanToken | TopK):
                known_N = signal.logp_N
            if signal.heard_N is not None:  # the term says what it does there, or a hole is a hole
                known_N = known_N.masked_fill(~signal.heard_N, 0.0 if judge in silence else float("nan"))
            read[f"the log-probability of `{judge}`"] = known_N
        for what, column_N in read.items():
            missing = int((~column_N.isfinite() & (own_N > 0)).sum())
            if missing:
                problems.append(
                    f"{missing} of the {int(own_N.sum())} loss tokens of {term.name} have no finite value for {what}"
                )
    if problems:
        raise OpdError("; ".join(problems) + ": a missing score would teach as if it were one, so the run stops here")
    weight_KN = torch.stack(weights) if weights else batch.behaviour_N.new_zeros((0, len(batch.row_N)))
    return Prepared(weight_KN, columns, step, measures)


class Total:
    """Adds a tensor over ranks; the identity in one process."""

    def __call__(self, x: Tensor) -> Tensor:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            x = x.clone()
            dist.all_reduce(x)
        return x

    def named(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Pairs by name, added over ranks; a rank that lacks a name adds nothing to it."""
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            return sums
        everyone: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, list(sums))
        device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
        zero = torch.zeros(2, dtype=torch.float64, device=device)
        return {k: self(sums.get(k, zero)) for k in sorted({n for names in everyone for n in names})}

    def most(self, values: dict[str, float]) -> dict[str, float]:
        """By name the largest over ranks."""
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            return values
        everyone: list[dict[str, float]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, values)
        names = sorted({name for own in everyone for name in own})
        return {name: max(own[name] for own in everyone if name in own) for name in names}


def _here(x: Tensor) -> Tensor:
    return x
