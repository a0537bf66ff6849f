"""Who judges: roles turned into models and texts, and what they say turned into signals.

Shapes: B rows, N loss tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from opd import retokenize
from opd.batch import Batch
from opd.cache import Cache
from opd.cast import Cast, carried, carried_head
from opd.chat import Renderer
from opd.critic import Critics, Pairs, pair_up
from opd.engines import beam
from opd.engines.base import Sampling, Spoken
from opd.engines.blend import Blend
from opd.engines.local import generate
from opd.errors import UsageError
from opd.head import Head, token_logp
from opd.hints import Next, with_hints
from opd.method import EXPERT
from opd.model import CausalModel, adapter, flat_index, parameters
from opd.signals import Dense, Experts, Layered, Score, Shelf, Signal, Token
from opd.types import RETOKENIZED, Judge, Needs, Prompt, Rollout, Says
from opd.views import SAME, View, reread

Depths = Mapping[Judge, Sequence[int]]


@dataclass
class Teachers:
    """Everybody whom a loss may ask, by role. `student` reads the live student; `reference` is set at stage start."""

    renderer: Renderer
    student: CausalModel
    models: Mapping[str, CausalModel] = field(default_factory=dict)
    answers: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    voices: Mapping[str, Renderer] = field(default_factory=dict)  # of teachers with tokenizers of their own
    reference: CausalModel | None = None
    ema: CausalModel | None = None
    views: Mapping[str, View] = field(default_factory=dict)
    came_next: Next | None = None  # what follows an answer, for the view `hint`
    hint_judge: tuple[str, int] | None = None  # who draws a hint from it, and how often it is asked
    rooms: Mapping[str, int] = field(default_factory=dict)  # tokens that a role's model can hold, where it says so
    disk: Path | None = None  # where the hidden states of judges that come in turn lie; None: in memory
    caches: Mapping[str, Cache] = field(default_factory=dict)  # of judges that said once what they say
    critic: Critics | None = None
    stage: str = ""  # the one that runs: the reference is of its start
    sampling: Sampling = field(default_factory=lambda: Sampling(max_tokens=512))
    seed: int = 0
    rows: int = 64
    answers_each: Mapping[str, int] = field(default_factory=dict)  # texts that a model gives to a prompt, if not 1
    beams: Mapping[str, int] = field(default_factory=dict)  # of models whose text is searched for, and not sampled
    heard: dict[tuple[str, str], list[tuple[str, bool]]] = field(default_factory=dict)  # of models: text, did it end
    write_down: Callable[[str, str, str, bool], None] = lambda *_: None  # told of each answer of a model
    _said: dict[tuple[str, str], tuple[Rollout, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cast = Cast.of(self.models)

    def model(self, role: str) -> CausalModel:
        """The model behind a role; `UsageError` where it is only text."""
        own = {"student": self.student, "reference": self.reference, "ema": self.ema}.get(role)
        if own is not None:
            return own
        if role in self.cast:
            return self.cast[role]
        raise UsageError(f"`{role}` is known by its text alone, and its probabilities were asked")

    def size(self, role: str) -> int:
        """Parameters of a role that work on each token, without loading a model that has left."""
        if role in self.caches:
            return 0
        return self.cast.size(role) if role in self.cast else parameters(self.model(role))

    def blend(self, chosen: tuple[str, float] | None) -> Blend | None:
        """A role and its share as the other half of a blend; nothing of nothing."""
        if chosen is None:
            return None
        role, share = chosen
        model = self.model(role)
        return Blend(model.module, share, lambda: _entered(model))

    # --- TEXT --------------------------------------------------------------------------------------------------------

    def texts(self, role: str, prompts: Iterable[Prompt]) -> dict[str, tuple[Rollout, ...]]:
        """What a role answers to each prompt, as rollouts of given text, by prompt id.

        Recorded answers are looked up. A model answers each prompt once (`answers_each`), with noise that depends on
        the prompt alone (or the likeliest text that `beams` find), so that a prompt meets the same text in every epoch
        and after every resume, as if it had been recorded. So does the reference, in every stage anew.
        """
        asked, name = {p.id: p for p in prompts}, self._name(role)
        missing = [p for i, p in asked.items() if (name, i) not in self._said]
        if self._speaks_here(role):
            self._ask(role, [p for p in missing if (name, p.id) not in self.heard])
        for prompt in missing:
            self._said[name, prompt.id] = self._given(role, prompt)
        return {i: self._said[name, i] for i in asked}

    def _name(self, role: str) -> str:
        return f"reference of {self.stage}" if role == "reference" else role

    def _speaks_here(self, role: str) -> bool:
        return role in self.cast or role == "reference"

    def _given(self, role: str, prompt: Prompt) -> tuple[Rollout, ...]:
        """Text as rollouts with canonical ids, whether it was recorded or sampled here."""
        given, limit = self.renderer.given, self.sampling.max_tokens
        recorded = [(text, True) for text in self.answers.get(role, {}).get(prompt.id, ())]
        said = self.heard.get((self._name(role), prompt.id), recorded)
        return tuple(given(prompt, text, role, k, finished=end, max_tokens=limit) for k, (text, end) in enumerate(said))

    def _ask(self, role: str, prompts: Sequence[Prompt]) -> None:
        """Let a teacher's model answer prompts that it has not answered yet."""
        if not prompts:
            return
        model, voice, name = self.model(role), self.voices.get(role, self.renderer), self._name(role)
        each, beams = self.answers_each.get(role, 1), self.beams.get(role, 1)
        if beams > 1:
            said = search_with(model, voice, prompts, each, self.sampling.max_tokens, beams, self.rows)
        else:
            said = speak_with(model, voice, prompts, each, self.sampling, self.seed, 0, self.rows)
        for prompt, answers in zip(prompts, said, strict=True):
            texts = [(voice.text(spoken.tokens), spoken.finish == "stop") for spoken in answers]
            self.heard[name, prompt.id] = texts
            for text, finished in texts:
                self.write_down(name, prompt.id, text, finished)

    def look_back(self, rollouts: Sequence[Rollout], step: int) -> list[Rollout]:
        """The rollouts with the hints that what followed them gives."""
        assert self.came_next is not None, "a view shows hints, and nothing says where they come from"
        return with_hints(rollouts, self.came_next, partial(self._votes, step=step) if self.hint_judge else None)

    def _votes(self, questions: Sequence[Prompt], step: int) -> list[list[str]]:
        """The hint judge's answers to each question; the same question twice in a step is asked once.

        One that the judge cannot hold is not answered.
        """
        assert self.hint_judge is not None
        role, votes = self.hint_judge
        voice, room = self.voices.get(role, self.renderer), self.rooms.get(role)
        longest = None if room is None else room - self.sampling.max_tokens
        once = {q.id: q for q in questions}.values()
        distinct = [q for q in once if longest is None or len(voice.prompt_ids(q)) <= longest]
        said = speak_with(self.model(role), voice, distinct, votes, self.sampling, self.seed, step, self.rows)
        text = {q.id: [voice.text(s.tokens) for s in each] for q, each in zip(distinct, said, strict=True)}
        return [text.get(q.id, []) for q in questions]

    # --- TOKEN, DENSE, SCORE -----------------------------------------------------------------------------------------

    def hear(self, batch: Batch, needs: Needs, depths: Depths = MappingProxyType({})) -> Batch:
        """The batch with a signal of every judge that is asked for more than text. No gradient anywhere.

        `depths` are the layers that are asked of judges that say LAYERS.
        """
        signals: dict[Judge, Signal] = dict(batch.signals)
        for judge, says in needs.items():
            if says is Says.SCORE:
                signals[judge] = Score(self.scores(batch))
            elif says is not Says.TEXT:
                signals[judge] = self.hear_one(judge, batch, says, depths.get(judge, ()))
        return replace(batch, signals=signals)

    def hear_one(self, judge: Judge, batch: Batch, says: Says, depths: Sequence[int] = ()) -> Signal:
        """One judge about every row that its view exists for, each row by the model that it is for."""
        if judge.view == RETOKENIZED:
            voice = self.voices.get(judge.role, self.renderer)
            return retokenize.hear(batch, self.model(judge.role), self.renderer, voice, says)
        seen, shown_B = self.seen(batch, judge)
        if judge.role in self.caches:
            return self.caches[judge.role].hear(seen, shown_B, judge.view, says)
        whose = _whose(judge, batch)
        asked = [b for b in range(len(whose)) if shown_B[b] and batch.length_B[b]]
        rows = {role: [b for b in asked if whose[b] == role] for role in dict.fromkeys(whose[b] for b in asked)}
        everything = bool(shown_B.all())
        heard_N = None if everything else shown_B.to(batch.row_N.device)[batch.row_N]
        if says is Says.TOKEN:
            logp_N = torch.full_like(batch.behaviour_N, float("nan"))
            for role, mine in self._in_turn(rows):
                part = seen if len(mine) == len(whose) else seen.rows(mine)
                logp_N[flat_index(batch, mine)] = self._token_logp(role, part).to(logp_N)
            return Token(logp_N, heard_N)
        if says is Says.LAYERS:
            model, mine = self.model(judge.role), [b for b in range(len(whose)) if shown_B[b]]
            h_MH, inner = model.all_states(seen.rows(mine), depths)
            spread: Callable[[Tensor], Tensor] = lambda x_MH: x_MH.new_zeros(len(seen.row_N), x_MH.shape[1]).index_copy(
                0, flat_index(seen, mine), x_MH
            )
            return Layered(spread(h_MH), self._head(judge.role), heard_N, {d: spread(x) for d, x in inner.items()})
        if not rows:  # nobody has this view in this step: every gate on it is shut
            own = self.student.head
            return Dense(batch.behaviour_N.new_zeros(len(batch.row_N), own.weight.shape[1]), own, heard_N)
        if judge.role != EXPERT and everything and not self._leaves(judge.role):
            return Dense(self.model(judge.role).all_hidden(seen), self._head(judge.role))
        return self._experts(seen, rows, heard_N)

    def _in_turn(self, rows: Mapping[str, list[int]]) -> list[tuple[str, list[int]]]:
        """Judges with their rows; those that are in memory first."""
        return sorted(rows.items(), key=lambda pair: pair[0] in self.cast and pair[0] not in self.cast.here)

    def _token_logp(self, role: str, part: Batch) -> Tensor:  # the model is not held on to: another may come next
        model = self.model(role)
        h_MH = model.all_hidden(part)
        with model.autocast():
            return token_logp(model.head, h_MH, part.token_N, part.temperature)

    def _head(self, role: str) -> Head:
        """A judge's output head as it is now: copied where its model leaves, or goes on learning."""
        head = self.model(role).head
        if self._leaves(role):
            return carried_head(head, self.disk)
        if not head.weight.requires_grad:
            return head
        bias = None if head.bias is None else head.bias.detach().clone()
        return replace(head, weight=head.weight.detach().clone(), bias=bias)

    def _leaves(self, role: str) -> bool:
        return role in self.cast and role not in self.cast.kept

    def _experts(self, seen: Batch, rows: Mapping[str, list[int]], heard_N: Tensor | None) -> Experts:
        """One judge after another over its own rows. A judge that is not kept leaves before the next one comes; its
        hidden states and its head stay, in memory or on disk."""
        judge_N, place_N = torch.zeros_like(seen.row_N), torch.zeros_like(seen.row_N)
        hidden: dict[str, Tensor] = {}
        heads: dict[str, Head] = {}
        numbers = {role: number for number, role in enumerate(rows)}
        for role, mine in self._in_turn(rows):
            at_M = flat_index(seen, mine)
            hidden[role] = carried(self.model(role).all_hidden(seen.rows(mine)), self.disk)
            heads[role] = self._head(role)
            judge_N[at_M] = numbers[role]
            place_N[at_M] = torch.arange(len(at_M), device=at_M.device)
        shelf = Shelf([heads[role] for role in rows], seen.row_N.device)
        return Experts(judge_N, place_N, tuple(hidden[role] for role in rows), shelf, heard_N)

    def seen(self, batch: Batch, judge: Judge) -> tuple[Batch, Tensor]:
        """The batch as a judge sees it, the same loss tokens after other prompts; and for which rows that exists [B].

        A row that its judge cannot hold is not seen either.
        """
        shown_B = torch.ones(len(batch.rollouts), dtype=torch.bool)
        if judge.view == SAME:
            return batch, shown_B
        view, rows, whose = self.views[judge.view], list(batch.rollouts), _whose(judge, batch)
        for b, rollout in enumerate(batch.rollouts):
            prompt = view.of(rollout.prompt, rollout.hint)
            row = None if prompt is None else reread(rollout, self.renderer.prompt_ids(prompt))
            if row is None or len(row.tokens) > self.rooms.get(whose[b], len(row.tokens)):
                shown_B[b] = False
            else:
                rows[b] = row
        shift_B = torch.tensor([len(new.tokens) - len(r.tokens) for new, r in zip(rows, batch.rollouts, strict=True)])
        position_N = batch.position_N + shift_B.to(batch.row_N.device)[batch.row_N]
        return replace(batch, rollouts=tuple(rows), position_N=position_N), shown_B

    def scores(self, batch: Batch) -> Tensor:
        """[K, B] each critic's score of each student row; nan for rows of other speakers.

        A truncated answer gets the lowest score of the finished ones of its group, or the same as the others where none
        finished: it is not shown to the critic, which would read "no stop token" and nothing else.
        """
        assert self.critic is not None, "a score is asked and no critic learns"
        shape = (len(self.critic.members), len(batch.rollouts))
        score_KB = torch.full(shape, float("nan"), dtype=batch.behaviour_N.dtype)
        finished = [i for i, r in enumerate(batch.rollouts) if r.speaker == "student" and r.finish != "length"]
        if finished:
            rows = [self.renderer.canonical(batch.rollouts[i]).tokens for i in finished]
            score_KB[:, finished] = self.critic.each(rows).to(score_KB)
        for i, rollout in enumerate(batch.rollouts):
            if rollout.speaker == "student" and rollout.finish == "length":
                mates_B = (batch.group_B.cpu() == batch.group_B[i].cpu()) & ~score_KB[0].isnan()
                score_KB[:, i] = score_KB[:, mates_B].amin(1) if mates_B.any() else 0.0
        return score_KB.to(batch.row_N.device)

    def pairs(self, rollouts: Sequence[Rollout], good: str) -> Pairs:
        """Student rollouts against the good speaker's text for the same prompts, as the critic reads them."""
        students = [self.renderer.canonical(r) for r in rollouts if r.speaker == "student"]
        answers = self.texts(good, (r.prompt for r in students))
        canonical = {i: [self.renderer.canonical(t) for t in texts] for i, texts in answers.items()}
        return pair_up(canonical, students)


def _whose(judge: Judge, batch: Batch) -> list[str]:
    """Who judges each row."""
    return [r.prompt.domain if judge.role == EXPERT else judge.role for r in batch.rollouts]


def speak_with(
    model: CausalModel,
    renderer: Renderer,
    prompts: Sequence[Prompt],
    samples: int,
    sampling: Sampling,
    seed: int,
    step: int,
    rows: int,
    blend: Blend | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[list[Spoken]]:
    """`samples` answers a prompt from a model in this process, with the noise of (seed, step, prompt, sample).

    With `blend` each token is drawn from the mixture of the model's distribution and the other's.
    """
    with adapter(model.module, model.adapter), model.autocast():
        return generate(
            model.module,
            [renderer.prompt_ids(p) for p in prompts],
            ids=[p.id for p in prompts],
            samples=samples,
            sampling=sampling,
            stop_ids=renderer.stop_ids,
            pad_id=0,
            seed=seed,
            step=step,
            vocab=model.head.vocab,
            rows=rows,
            blend=blend,
            on_progress=on_progress,
        )


@contextmanager
def _entered(model: CausalModel) -> Iterator[None]:
    """Its adapter and its compute type, inside those of another model: what computes in float32 goes on doing so."""
    half = model.compute in (torch.bfloat16, torch.float16)
    kind, dtype = model.device.type, model.compute if half else None
    with adapter(model.module, model.adapter), torch.autocast(kind, dtype=dtype, enabled=half):
        yield


def search_with(
    model: CausalModel,
    renderer: Renderer,
    prompts: Sequence[Prompt],
    answers: int,
    max_tokens: int,
    beams: int,
    rows: int,
) -> list[list[Spoken]]:
    """The likeliest `answers` a prompt that a model in this process finds with `beams` beams."""
    with adapter(model.module, model.adapter), model.autocast():
        return beam.search(
            model.module,
            [renderer.prompt_ids(p) for p in prompts],
            ids=[p.id for p in prompts],
            beams=beams,
            answers=answers,
            max_tokens=max_tokens,
            stop_ids=renderer.stop_ids,
            pad_id=0,
            vocab=model.head.vocab,
            rows=rows,
        )
