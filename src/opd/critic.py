"""The critic: a backbone and a scalar read at the last token of an answer; it ranks the teacher above the student.

The score is the hidden state at the last response token (the stop token, for every answer that ended) through a linear
head. Teacher and student text reach it through the same rendering, so identical texts are one row and one score.

Shapes: R distinct rows, P pairs, L length, H width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opd.batch import Total
from opd.loss import Objective
from opd.model import CausalModel, adapter, copy_adapter, trained
from opd.student import Optim, adamw, guarded_step
from opd.types import Rollout

Row = tuple[int, ...]


@dataclass(frozen=True)
class Pairs:
    """Distinct rows, and which of them should rank above which. A pair's weight is its share of the loss."""

    rows: tuple[Row, ...]
    good_P: Tensor
    bad_P: Tensor
    weight_P: Tensor

    @property
    def count(self) -> int:
        return len(self.good_P)

    def at(self, place_P: Tensor) -> Pairs:
        """The pairs of these places, and their rows."""
        part = replace(self, good_P=self.good_P[place_P], bad_P=self.bad_P[place_P], weight_P=self.weight_P[place_P])
        used = sorted({*part.good_P.tolist(), *part.bad_P.tolist()})
        now = torch.zeros(len(self.rows), dtype=torch.long)
        now[used] = torch.arange(len(used))
        return replace(part, rows=tuple(self.rows[r] for r in used), good_P=now[part.good_P], bad_P=now[part.bad_P])


def pair_up(good: Mapping[str, Sequence[Rollout]], bad: Sequence[Rollout]) -> Pairs:
    """Every bad rollout against every good answer to its prompt (arXiv 2511.10643, eq. 8); weights add to 1.

    Rollouts come canonical (`Renderer.canonical`). Truncated ones are left out: a critic that may look at them learns
    "has no stop token" and nothing else. With K answers to a prompt each pair of a sample weighs 1 / K of it.
    """
    number: dict[Row, int] = {}
    goods, bads, weights = [], [], []
    for student in bad:
        if student.finish == "length":
            continue
        answers = [g for g in good.get(student.prompt.id, ()) if g.finish != "length"]
        for teacher in answers:
            goods.append(number.setdefault(teacher.tokens, len(number)))
            bads.append(number.setdefault(student.tokens, len(number)))
            weights.append(1.0 / len(answers))
    weight_P = torch.tensor(weights, dtype=torch.float64)
    return Pairs(tuple(number), torch.tensor(goods, dtype=torch.long), torch.tensor(bads, dtype=torch.long), weight_P)


def join(parts: Sequence[Pairs]) -> Pairs:
    """All pairs of several sets as one. Equal rows become one row; the first set's keep their numbers."""
    number: dict[Row, int] = {}
    place = [torch.tensor([number.setdefault(r, len(number)) for r in p.rows], dtype=torch.long) for p in parts]
    none, no_weight = torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.float64)
    good_P = torch.cat([none, *(at[p.good_P] for at, p in zip(place, parts, strict=True))])
    bad_P = torch.cat([none, *(at[p.bad_P] for at, p in zip(place, parts, strict=True))])
    return Pairs(tuple(number), good_P, bad_P, torch.cat([no_weight, *(p.weight_P for p in parts)]))


class CriticModule(nn.Module):
    """Backbone and head. Under LoRA the backbone is the student's own, entered with the critic's adapter."""

    def __init__(self, model: CausalModel, own: bool, seed: int) -> None:
        super().__init__()
        if own:
            self.body = model.module
        width = model.head.weight.shape[1]
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(1, width, generator=generator) * 0.02
        dtype = torch.float64 if model.compute == torch.float64 else torch.float32
        self.score = nn.Linear(width, 1).to(model.device, dtype)
        with torch.no_grad():
            self.score.weight.copy_(weight)
            self.score.bias.zero_()


@dataclass
class Critic:
    """A judge that learns. `steps` counts its updates."""

    model: CausalModel  # its backbone; under LoRA the student's module with adapter "critic"
    optim: Optim
    seed: int = 0
    score_l2: float = 0.0
    steps: int = 0
    module: CriticModule = field(init=False)
    optimizer: torch.optim.AdamW = field(init=False)

    def __post_init__(self) -> None:
        self.module = CriticModule(self.model, own=self.model.adapter is None, seed=self.seed)
        with self.entered():
            self.optimizer = adamw(self.learner, self.optim)

    @property
    def learner(self) -> nn.Module:
        """The module whose parameters with gradient are the critic's own; valid inside `entered`."""
        if self.model.adapter is None:
            return self.module
        return nn.ModuleDict({"body": self.model.module, "module": self.module})

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The critic's adapter is active inside; forward and backward must both end before it is left."""
        with adapter(self.model.module, self.model.adapter):
            yield

    def _forward(self, rows: Sequence[Row]) -> Tensor:
        """[len(rows)] scores of a micro-batch, with the gradient mode of the caller."""
        device = self.model.device
        length = torch.tensor([len(r) for r in rows])
        longest = int(length.max())
        ids = torch.tensor([[*r, *[0] * (longest - len(r))] for r in rows])
        mask = torch.arange(longest)[None] < length[:, None]
        inputs = {"input_ids": ids, "position_ids": torch.arange(longest)[None].expand_as(ids)}
        if not bool(mask.all()):
            inputs["attention_mask"] = mask.long()
        with self.model.autocast(), self.model.recomputing():
            h_RLH = self.model.backbone(**{k: v.to(device) for k, v in inputs.items()}, use_cache=False)
            last_RH = h_RLH.last_hidden_state[torch.arange(len(rows), device=device), (length - 1).to(device)]
        return self.module.score(last_RH.to(self.module.score.weight.dtype))[:, 0]  # type: ignore[no-any-return]

    def _cuts(self, rows: Sequence[Row]) -> list[list[int]]:
        cuts: list[list[int]] = []
        for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
            if cuts and len(rows[i]) * (len(cuts[-1]) + 1) <= self.optim.tokens_per_micro:
                cuts[-1].append(i)
            else:
                cuts.append([i])
        return cuts

    @torch.no_grad()
    def score(self, rows: Sequence[Row]) -> Tensor:
        """[R] scores of token rows; each distinct row passes once."""
        distinct = list(dict.fromkeys(rows))
        place = {row: i for i, row in enumerate(distinct)}
        out = torch.zeros(len(distinct), dtype=self.module.score.weight.dtype, device=self.model.device)
        with self.entered():
            for cut in self._cuts(distinct):
                out[cut] = self._forward([distinct[i] for i in cut])
        return out[[place[r] for r in rows]]

    def loss(self, score_R: Tensor, pairs: Pairs, objective: Objective, total_weight: Tensor) -> Tensor:
        """The objective in nats: a weighted mean over pairs, plus `score_l2` times the mean square score."""
        good_P, bad_P = score_R[pairs.good_P], score_R[pairs.bad_P]
        if objective.kind == "bradley_terry":
            value_P = -F.logsigmoid(good_P - bad_P)
        else:
            value_P = -F.logsigmoid(good_P) - F.logsigmoid(-bad_P)
        share_P = (pairs.weight_P.to(score_R) / total_weight).detach()
        return (share_P * (value_P + self.score_l2 * (good_P.square() + bad_P.square()) / 2)).sum()

    def update(
        self,
        fresh: Pairs,
        objective: Objective,
        lr: float,
        total: Total | None = None,
        earlier: Pairs | None = None,
    ) -> dict[str, float]:
        """One step, on fresh pairs and `earlier` ones alike. Returns the loss, and accuracy and margin of the fresh,
        *before* it: what the critic knew of texts it had not yet seen.

        Pairs couple rows of different micro-batches, so where there are several the gradient with respect to the
        scores is taken first, and each micro-batch then pulls its part of it through the backbone: the same gradient.
        """
        pairs = fresh if earlier is None else join((fresh, earlier))
        if not pairs.count and total is None:
            return {}
        weight = (total or (lambda x: x))(pairs.weight_P.sum()).clamp_min(1e-30)
        with self.entered():
            learner, cuts = self.learner, self._cuts(pairs.rows)
            self.optimizer.zero_grad(set_to_none=True)
            if len(cuts) == 1:
                scored = self._forward(pairs.rows)
                loss = self.loss(scored, pairs, objective, weight)
                torch.autograd.backward(loss)
            else:
                scored = self.score(pairs.rows).requires_grad_()
                loss = self.loss(scored, pairs, objective, weight)
                (g_R,) = torch.autograd.grad(loss, scored)
                for cut in cuts:
                    torch.autograd.backward(self._forward([pairs.rows[i] for i in cut]), g_R[cut])
            stats = {"critic/loss": float(loss.detach()), **self.ranks(scored.detach(), fresh)}
            if total is not None and not pairs.count:
                for _, p in trained(learner):
                    p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            stats["critic/grad_norm"] = guarded_step(learner, self.optimizer, self.optim.clip, lr, stats, total)
        self.steps += 1
        return stats

    @staticmethod
    def ranks(score_R: Tensor, pairs: Pairs) -> dict[str, float]:
        """Accuracy (ties count a half), margin and mean scores over pairs, weighted as the loss is."""
        if not pairs.count:
            return {}
        good_P, bad_P = score_R[pairs.good_P], score_R[pairs.bad_P]
        share_P = (pairs.weight_P / pairs.weight_P.sum()).to(score_R)
        won_P = (good_P > bad_P).to(score_R) + 0.5 * (good_P == bad_P).to(score_R)
        shown = {"accuracy": won_P, "margin": good_P - bad_P, "score_teacher": good_P, "score_student": bad_P}
        return {f"critic/{name}": float((share_P * x_P).sum()) for name, x_P in shown.items()}


@dataclass(frozen=True)
class Critics:
    """One critic, or several that learn from the same pairs apart: bodies, heads and optimizers of their own."""

    members: tuple[Critic, ...]

    @property
    def optim(self) -> Optim:
        return self.members[0].optim

    @property
    def models(self) -> tuple[CausalModel, ...]:
        return tuple(member.model for member in self.members)

    @property
    def steps(self) -> int:
        return self.members[0].steps

    def each(self, rows: Sequence[Row]) -> Tensor:
        """[K, R] every critic's scores of token rows."""
        return torch.stack([member.score(rows) for member in self.members])

    def score(self, rows: Sequence[Row]) -> Tensor:
        """[R] their mean score: what people are shown, and what ranks."""
        return self.each(rows).mean(0)

    ranks = staticmethod(Critic.ranks)

    def update(self, pairs: Pairs, objective: Objective, lr: float, **more: Any) -> dict[str, float]:
        """One step of each (see `Critic.update`); returns the means of what they say."""
        said = [member.update(pairs, objective, lr, **more) for member in self.members]
        return {name: sum(each[name] for each in said) / len(said) for name in said[0]}


def critics(
    number: int,
    student: CausalModel,
    optim: Optim,
    *,
    seed: int,
    score_l2: float = 0.0,
    start: CausalModel | None = None,
) -> Critics:
    """So many critics beside a student; they differ in the seeds of their heads, and so in what they learn."""
    make = partial(beside, student, optim, score_l2=score_l2, start=start)
    return Critics(tuple(make(seed=seed + k, name=f"critic_{k}" if k else "critic") for k in range(number)))


def beside(
    student: CausalModel,
    optim: Optim,
    *,
    seed: int,
    score_l2: float = 0.0,
    start: CausalModel | None = None,
    name: str = "critic",
) -> Critic:
    """A critic that starts as the student (or `start`): a copy of it, or of its adapter, on the same frozen base."""
    source = start or student
    if source.adapter is not None and start is None:
        model = replace(source, adapter=copy_adapter(source.module, source.adapter, name), name=name, extra={})
    else:
        module = copy.deepcopy(source.module).requires_grad_(True)
        model = replace(source, module=_headless(module), name=name, adapter=None, extra={})
    return Critic(model, optim, seed=seed, score_l2=score_l2)


def _headless(module: nn.Module) -> nn.Module:
    """The module with its output layer frozen: the critic never reads it, so it must not count among what learns."""
    head = module.get_output_embeddings()  # type: ignore[operator]
    embeddings = module.get_input_embeddings()  # type: ignore[operator]
    if head is not None and head.weight is not embeddings.weight:
        head.requires_grad_(False)
    return module
