"""The model that learns: head, loss and backward in tiles; micro-batches; the optimizer step and its guards.

Shapes: N loss tokens of a batch, m of a micro-batch, n of a tile, V vocabulary, K terms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import isfinite

import torch
from torch import Tensor, nn

from opd.batch import Batch, Prepared, Total, needs_pass, prepare
from opd.errors import OpdError
from opd.head import fitting, tiled_loss, token_logp
from opd.layered import Layers
from opd.loss import Loss
from opd.model import CausalModel, flat_index, micro_batches, trained
from opd.observe import observe
from opd.projector import Beside, Projectors
from opd.tally import Tally, over_updates
from opd.tile import TileScope


@dataclass(frozen=True)
class Optim:
    """AdamW and what bounds its step. `lr` is set anew every step by the schedule."""

    lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    updates: int = 1  # optimizer batches a rollout batch is cut into
    passes: int = 1  # times each of them is learned from
    tokens_per_micro: int = 8192
    tile: int | None = None  # None: as the vocabulary has it


def adamw(module: nn.Module, optim: Optim) -> torch.optim.AdamW:
    """AdamW over the parameters that learn; matrices decay, vectors do not."""
    matrices = [p for _, p in trained(module) if p.ndim >= 2]
    vectors = [p for _, p in trained(module) if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=optim.lr, betas=optim.betas, eps=optim.eps)


def measure(loss: Loss, tile: TileScope, prepared: Prepared, tally: Tally) -> Tensor:
    """The weighted loss of a tile (a scalar with gradient), its terms and what else is seen there added to `tally`."""
    total = tile.logits_nV.new_zeros(())
    for k, term in enumerate(loss.token_terms):
        if isinstance(term.head, Layers):
            continue  # (stands beside the tiles)
        weight_n = prepared.weight_KN[k, tile.at]
        part = (weight_n * term.at(tile)).sum()
        total = total + part
        tally.add(f"loss/{term.name}", part.detach())
    observe(loss, tile, prepared, tally)
    return total


class Trainee(nn.Module):
    """The root module of a training forward: hidden states and the tiled loss are both inside it, so that tied weights,
    adapters, autocast and sharding see ordinary gradients."""

    def __init__(self, model: CausalModel) -> None:
        super().__init__()
        self.module = model.module
        self.projectors = Projectors()
        self.model = model

    def forward(
        self, rows: Sequence[int], value: Callable[[slice, Tensor], Tensor], tile: int, beside: Beside
    ) -> Tensor:
        batch, depths, at_m = beside.batch, beside.depths, flat_index(beside.batch, rows)
        h_mH, inner = self.model.states(batch, rows, depths)
        with self.model.autocast():
            total = tiled_loss(self.model.head, h_mH, value, tile, batch.joined_N[at_m])
            return total + beside.value(inner, self.projectors, at_m) if depths else total


@dataclass
class Student:
    """A causal model with an optimizer. `version` counts its updates."""

    model: CausalModel
    optim: Optim
    version: int = 0
    optimizer: torch.optim.AdamW = field(init=False)
    trainee: Trainee = field(init=False)

    def __post_init__(self) -> None:
        self.trainee = Trainee(self.model)
        self.fresh_optimizer()

    def fresh_optimizer(self, optim: Optim | None = None) -> None:
        """Start the moments anew, with other settings if given."""
        self.optim = optim or self.optim
        self.optimizer = adamw(self.trainee, self.optim)

    @property
    def learned(self) -> dict[str, nn.Parameter]:
        """What the optimizer holds, by name: the model's own, and the maps to judges' layers."""
        maps = {f"projectors.{name}": p for name, p in self.trainee.projectors.named_parameters()}
        return dict(trained(self.model.module)) | maps

    @property
    def like(self) -> Tensor:
        """An empty tensor of the device and the type of what learns: float32 at least."""
        weight = self.model.head.weight
        return weight.new_zeros((), dtype=torch.promote_types(weight.dtype, torch.float32))

    def _fit(self, loss: Loss, batch: Batch) -> None:
        """The maps that a loss asks, of the widths that its signals have, under the optimizer."""
        if self.trainee.projectors.fit(loss, batch, self.model.head.weight.shape[1], self.like):
            moments = self.optimizer.state
            self.optimizer = adamw(self.trainee, self.optim)
            held = {p for group in self.optimizer.param_groups for p in group["params"]}
            self.optimizer.state.update({p: state for p, state in moments.items() if p in held})

    @property
    def tile(self) -> int:
        """Tokens whose logits exist at once."""
        return self.optim.tile or fitting(self.model.head)

    @torch.no_grad()
    def logp(self, batch: Batch) -> Tensor:
        """[N] the trainer's own log-probabilities of the sampled tokens, at the rollouts' temperature."""
        h_NH = self.model.all_hidden(batch, 4 * self.optim.tokens_per_micro)
        with self.model.autocast():
            return token_logp(self.model.head, h_NH, batch.token_N, batch.temperature, self.tile)

    def gradient(self, batch: Batch, loss: Loss, step: int = 0, total: Total | None = None) -> dict[str, float]:
        """Add one optimizer batch's gradient to `.grad`; returns the loss, its terms and diagnostics."""
        self._fit(loss, batch)
        live = self.logp(batch) if needs_pass(loss, batch.old_N is not None) else None
        prepared = prepare(loss, batch, step, live, total)
        counted = set(batch.row_N[prepared.live_rows].tolist())
        tally = Tally()
        beside = Beside(loss, batch, prepared, tally)
        for name, values in prepared.measures.items():
            tally.mean(name, values)
        for cut in self._cuts(batch, sorted(counted)):
            at_m = flat_index(batch, cut)

            def value(at: slice, logits_nV: Tensor, at_m: Tensor = at_m) -> Tensor:
                return measure(loss, TileScope(logits_nV, batch, prepared, at_m[at]), prepared, tally)

            self.trainee(cut, value, self.tile, beside).backward()
        for alignment in batch.alignments.values() if counted else ():
            for name, x_N in alignment.seen().items():
                tally.mean(name, x_N)
        if total is not None and not counted:  # a rank without rows of its own still takes part in every sum
            for _, p in trained(self.trainee):
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        stats = tally.result(total)
        if stats:
            stats["loss/total"] = sum(v for k, v in stats.items() if k.startswith("loss/"))
        return stats

    def _cuts(self, batch: Batch, rows: Sequence[int]) -> list[list[int]]:
        """Micro-batches, those of one expert after the other."""
        size, layout = self.optim.tokens_per_micro, self.model.layout
        return [cut for part in batch.by_expert(rows) for cut in micro_batches(batch, part, size, layout)]

    def update(self, batch: Batch, loss: Loss, step: int, lr: float, total: Total | None = None) -> dict[str, float]:
        """Learn from a rollout batch: `passes` times over `updates` optimizer batches of whole groups.

        Raises `OpdError` for a loss or gradient that is not finite (before the optimizer step: no weight is touched)
        and for a parameter that should have learned and has no gradient.
        """
        optim = self.optim
        if optim.updates * optim.passes > 1 and "old" in loss.reads:
            batch = replace(batch, old_N=self.logp(batch))
        parts = whole_groups(batch, optim.updates)
        stats: list[dict[str, float]] = []
        for _ in range(optim.passes):
            for part in parts:
                self.optimizer.zero_grad(set_to_none=True)
                one = self.gradient(batch if len(parts) == 1 else batch.rows(part), loss, step, total)
                if "loss/total" not in one:
                    continue
                if stats and batch.old_N is None:  # the student has moved: what differs is not the sampler alone
                    one = {k: v for k, v in one.items() if not k.startswith("mismatch/")}
                one["grad/norm"] = guarded_step(self.trainee, self.optimizer, optim.clip, lr, one, total)
                stats.append(one)
        self.version += bool(stats)
        return over_updates(stats)


def whole_groups(batch: Batch, parts: int) -> list[list[int]]:
    """Rows cut into exactly `parts` of whole groups, as even as can be; where groups are fewer some parts are empty.

    (Every rank must make the same number of steps, however many groups it holds.)
    """
    groups: dict[str, list[int]] = {}
    for r, rollout in enumerate(batch.rollouts):
        groups.setdefault(rollout.prompt.id, []).append(r)
    listed = list(groups.values())
    edges = [i * len(listed) // parts for i in range(parts + 1)]
    return [[r for g in listed[a:b] for r in g] for a, b in pairwise(edges)]


def guarded_step(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    clip: float,
    lr: float,
    stats: dict[str, float],
    total: Total | None = None,
) -> float:
    """Reduce over ranks, check, clip, step. Returns the gradient's norm before clipping; a norm of 0 takes no step.

    What should learn is what the optimizer holds, not what `requires_grad` says now: leaving an adapter moves that.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    named = [(n.removeprefix("module."), p) for n, p in module.named_parameters() if id(p) in held]
    silent = [n for n, p in named if p.grad is None]
    if silent:
        raise OpdError(
            f"{len(silent)} of {len(named)} parameters that should learn got no gradient, the first is `{silent[0]}`: "
            "the run stops rather than train a part of the model in silence"
        )
    if total is not None:
        for _, p in named:
            p.grad = total(p.grad)  # type: ignore[arg-type]
    norm = float(nn.utils.clip_grad_norm_([p for _, p in named], clip if clip > 0 else float("inf")))
    bad = [f"{k} is {v}" for k, v in stats.items() if k.startswith("loss/") and not isfinite(v)]
    if bad or not isfinite(norm):
        which = ", ".join(bad) or "every term of the loss is finite"
        raise NotFiniteError(f"the gradient's norm is {norm} ({which}): no weight was changed")
    if norm > 0:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    return norm


class NotFiniteError(OpdError):
    """A loss or gradient that is nan or infinite."""
