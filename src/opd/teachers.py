"""Who judges: roles turned into models and texts, and what they say turned into signals.

Shapes: B rows, N loss tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from opd.batch import Batch, Dense, Score, Signal, Token
from opd.chat import Renderer
from opd.critic import Critic, Pairs, pair_up
from opd.engines.base import Sampling, Spoken
from opd.engines.local import generate
from opd.errors import UsageError
from opd.head import token_logp
from opd.model import CausalModel, adapter
from opd.types import Judge, Needs, Prompt, Rollout, Says


@dataclass
class Teachers:
    """Everybody whom a loss may ask, by role. `student` reads the live student; `reference` is set at stage start."""

    renderer: Renderer
    student: CausalModel
    models: Mapping[str, CausalModel] = field(default_factory=dict)
    answers: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    voices: Mapping[str, Renderer] = field(default_factory=dict)  # of teachers with tokenizers of their own
    reference: CausalModel | None = None
    critic: Critic | None = None
    sampling: Sampling = field(default_factory=lambda: Sampling(max_tokens=512))
    seed: int = 0
    rows: int = 64
    answers_each: Mapping[str, int] = field(default_factory=dict)  # texts that a model gives to a prompt, if not 1
    heard: dict[tuple[str, str], list[tuple[str, bool]]] = field(default_factory=dict)  # of models: text, did it end
    write_down: Callable[[str, str, str, bool], None] = lambda *_: None  # told of each answer of a model
    _said: dict[tuple[str, str], tuple[Rollout, ...]] = field(default_factory=dict)

    def model(self, role: str) -> CausalModel:
        """The model behind a role; `UsageError` where it is only text."""
        if role == "student":
            return self.student
        if role == "reference" and self.reference is not None:
            return self.reference
        if role in self.models:
            return self.models[role]
        raise UsageError(f"`{role}` is known by its text alone, and its probabilities were asked")

    # --- TEXT --------------------------------------------------------------------------------------------------------

    def texts(self, role: str, prompts: Iterable[Prompt]) -> dict[str, tuple[Rollout, ...]]:
        """What a role answers to each prompt, as rollouts of given text, by prompt id.

        Recorded answers are looked up. A model answers each prompt once (`answers_each`), with noise that depends on
        the prompt alone, so that a prompt meets the same text in every epoch and after every resume, as if it had been
        recorded.
        """
        asked = {p.id: p for p in prompts}
        missing = [p for i, p in asked.items() if (role, i) not in self._said]
        if role in self.models:
            self._ask(role, [p for p in missing if (role, p.id) not in self.heard])
        for prompt in missing:
            self._said[role, prompt.id] = self._given(role, prompt)
        return {i: self._said[role, i] for i in asked}

    def _given(self, role: str, prompt: Prompt) -> tuple[Rollout, ...]:
        """Text as rollouts with canonical ids, whether it was recorded or sampled here."""
        given, limit = self.renderer.given, self.sampling.max_tokens
        recorded = [(text, True) for text in self.answers.get(role, {}).get(prompt.id, ())]
        said = self.heard[role, prompt.id] if role in self.models else recorded
        return tuple(given(prompt, text, role, k, finished=end, max_tokens=limit) for k, (text, end) in enumerate(said))

    def _ask(self, role: str, prompts: Sequence[Prompt]) -> None:
        """Let a teacher's model answer prompts that it has not answered yet."""
        if not prompts:
            return
        model, voice = self.models[role], self.voices.get(role, self.renderer)
        each = self.answers_each.get(role, 1)
        said = speak_with(model, voice, prompts, each, self.sampling, self.seed, 0, self.rows)
        for prompt, answers in zip(prompts, said, strict=True):
            texts = [(voice.text(spoken.tokens), spoken.finish == "stop") for spoken in answers]
            self.heard[role, prompt.id] = texts
            for text, finished in texts:
                self.write_down(role, prompt.id, text, finished)

    # --- TOKEN, DENSE, SCORE -----------------------------------------------------------------------------------------

    def hear(self, batch: Batch, needs: Needs) -> Batch:
        """The batch with a signal of every judge that is asked for more than text. No gradient anywhere."""
        signals: dict[Judge, Signal] = dict(batch.signals)
        for judge, says in needs.items():
            if says is Says.SCORE:
                signals[judge] = Score(self.scores(batch))
            elif says is not Says.TEXT:
                model = self.model(judge.role)
                h_NH = model.all_hidden(batch)
                if says is Says.DENSE:
                    signals[judge] = Dense(h_NH, model.head)
                else:
                    with model.autocast():
                        signals[judge] = Token(token_logp(model.head, h_NH, batch.token_N, batch.temperature))
        return replace(batch, signals=signals)

    def scores(self, batch: Batch) -> Tensor:
        """[B] the critic's score of each student row; nan for rows of other speakers.

        A truncated answer gets the lowest score of the finished ones of its group, or the same as the others where none
        finished: it is not shown to the critic, which would read "no stop token" and nothing else.
        """
        assert self.critic is not None, "a score is asked and no critic learns"
        score_B = torch.full((len(batch.rollouts),), float("nan"), dtype=batch.behaviour_N.dtype)
        finished = [i for i, r in enumerate(batch.rollouts) if r.speaker == "student" and r.finish != "length"]
        if finished:
            rows = [self.renderer.canonical(batch.rollouts[i]).tokens for i in finished]
            score_B[finished] = self.critic.score(rows).to(score_B)
        for i, rollout in enumerate(batch.rollouts):
            if rollout.speaker == "student" and rollout.finish == "length":
                group = score_B[(batch.group_B.cpu() == batch.group_B[i].cpu()) & ~score_B.isnan()]
                score_B[i] = group.min() if len(group) else 0.0
        return score_B.to(batch.row_N.device)

    def pairs(self, rollouts: Sequence[Rollout], good: str) -> Pairs:
        """Student rollouts against the good speaker's text for the same prompts, as the critic reads them."""
        students = [self.renderer.canonical(r) for r in rollouts if r.speaker == "student"]
        answers = self.texts(good, (r.prompt for r in students))
        canonical = {i: [self.renderer.canonical(t) for t in texts] for i, texts in answers.items()}
        return pair_up(canonical, students)


def speak_with(
    model: CausalModel,
    renderer: Renderer,
    prompts: Sequence[Prompt],
    samples: int,
    sampling: Sampling,
    seed: int,
    step: int,
    rows: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[list[Spoken]]:
    """`samples` answers a prompt from a model in this process, with the noise of (seed, step, prompt, sample)."""
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
            on_progress=on_progress,
        )
