"""Speak with a causal language model in this process: prefill each prompt once, decode its samples together.

Shapes: R rows (one sample of one prompt each) that decode together, N rows of the whole call, T spoken positions,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from opd.engines.base import Decoder, Sampling, Spoken
from opd.engines.blend import Blend, Blended
from opd.engines.fused import fused
from opd.engines.noise import key, uniform
from opd.engines.plain import Plain
from opd.engines.sample import draw
from opd.errors import OpdError, UsageError

__all__ = ["Sampling", "Spoken", "generate"]

PREFILL_TOKENS = 65536  # prompt tokens, padding included, that go through the model at once
NOISE_POSITIONS = 64  # positions whose noise is made at once
Progress = Callable[[int, int], None]


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    ids: Sequence[str],
    samples: int,
    sampling: Sampling,
    stop_ids: Collection[int],
    pad_id: int,
    seed: int,
    step: int,
    vocab: int | None = None,
    rows: int = 256,
    blend: Blend | None = None,
    on_progress: Progress | None = None,
) -> list[list[Spoken]]:
    """`samples` answers to each of `prompts` (token ids); result[i][j] is sample j of prompt i.

    `ids` are the prompts' `Prompt.id`: with `seed`, `step`, the sample number and the position they fix the noise, so
    the answer of a row depends neither on the other rows nor on `rows`, the most that decode together. Equal ids get
    equal noise. `stop_ids` end an answer and belong to it. Ids from `vocab` on (padding of the embedding) are never
    spoken. With `blend`, tokens are drawn from a mixture of the model's distribution and another model's, both at the
    sampling temperature, and `logp` is the mixture's. `on_progress(finished, all)` counts rows.

    The model is called as `model(input_ids=, attention_mask=, position_ids=, past_key_values=, use_cache=True,
    logits_to_keep=1)`, without gradient and in eval mode, which is undone afterwards.

    Raises UsageError for an empty prompt or one that leaves no room for `max_tokens`, OpdError for logits that are
    not finite.
    """
    if len(ids) != len(prompts) or samples < 1 or rows < 1:
        raise ValueError(f"{len(prompts)} prompts, {len(ids)} ids, samples={samples}, rows={rows}")
    speakers = [model] if blend is None else [model, blend.model]
    for speaker in speakers:
        refuse_lengths(speaker, prompts, ids, sampling.max_tokens)
    if blend is not None and sampling.greedy:
        raise UsageError("speak.temperature is 0, and a blend of two models is sampled from: set it above 0")
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    jobs = [(prompt, sample) for prompt in by_length for sample in range(samples)]
    ids_N = np.array([key(ids[prompt]) for prompt, _ in jobs], dtype=np.uint64)
    samples_N = np.array([sample for _, sample in jobs], dtype=np.int64)

    def noise(row_R: Tensor, position_TR: Tensor) -> Tensor:
        row = row_R.cpu().numpy()
        noise_TR = uniform(seed, step, ids_N[row], samples_N[row], position_TR.cpu().numpy())
        return torch.from_numpy(noise_TR).to(row_R.device)

    with ExitStack() as stack, torch.no_grad():
        for speaker in speakers:
            stack.enter_context(_speaking(speaker))
        device = next(model.parameters()).device
        longest = max(map(len, prompts), default=0) + sampling.max_tokens
        decoder = _decoder(model, longest, pad_id)
        if blend is not None:
            with blend.entered():
                other = _decoder(blend.model, longest, pad_id)
            decoder = Blended(decoder, other, blend, sampling.temperature, vocab)
        speech = _Speech(decoder, noise, sampling, stop_ids, vocab, len(jobs), device)
        begun = 0
        while begun < len(jobs) or speech.live:
            if begun < len(jobs) and (decoder.refills or not speech.live) and speech.live < rows:
                cohort = _cohort(prompts, jobs, begun, rows - speech.live)
                speech.admit(cohort)
                begun += len(cohort.copies)
            speech.decode()
            if on_progress is not None:
                on_progress(begun - speech.live, len(jobs))
    said = dict(zip(jobs, speech.answers(), strict=True))
    return [[said[prompt, sample] for sample in range(samples)] for prompt in range(len(prompts))]


def path(model: nn.Module) -> str:
    """Which decode loop `generate` uses for the model, and why: a line to print."""
    with _speaking(model), torch.no_grad():
        decoder = fused(model, 8)
    return (
        f"plain loop, because {decoder}" if isinstance(decoder, str) else "fused loop, equal to the model when probed"
    )


def _decoder(model: nn.Module, length: int, pad_id: int) -> Decoder:
    decoder = fused(model, length)
    return Plain(model, pad_id) if isinstance(decoder, str) else decoder


@contextmanager
def _speaking(model: nn.Module) -> Iterator[None]:
    """Eval mode, and afterwards the mode that each module was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
        torch.clear_autocast_cache()  # casts made without gradient must not reach a training forward


def refuse_lengths(model: nn.Module, prompts: Sequence[Sequence[int]], ids: Sequence[str], max_tokens: int) -> None:
    """Raises `UsageError` for a prompt without tokens, and where the longest leaves no room for `max_tokens`."""
    room = getattr(getattr(model, "config", None), "max_position_embeddings", None) or float("inf")
    problems = [
        f"prompt {i} has no tokens, and a model cannot begin without one"
        for i, p in zip(ids, prompts, strict=True)
        if not p
    ]
    longest = max(map(len, prompts), default=0)
    if longest + max_tokens > room:
        problems.append(
            f"a prompt of {longest} tokens and speak.max_tokens {max_tokens} need "
            f"{longest + max_tokens} positions, but the model has {room}: lower speak.max_tokens or drop the "
            "long prompts"
        )
    if problems:
        raise UsageError(*problems)


@dataclass(frozen=True)
class _Cohort:
    """Rows that are admitted together: numbers first..first+len(copies) of the call, copies of these prompts."""

    first: int
    prompts: list[Sequence[int]]
    copies: list[int]


def _cohort(prompts: Sequence[Sequence[int]], jobs: Sequence[tuple[int, int]], first: int, room: int) -> _Cohort:
    """The next rows, at most `room` and at most PREFILL_TOKENS prompt tokens (but never none)."""
    heads: list[int] = []
    copies: list[int] = []
    longest = len(prompts[jobs[first][0]])  # jobs come by falling length
    for prompt, _ in jobs[first : first + room]:
        if not heads or heads[-1] != prompt:
            if heads and (len(heads) + 1) * longest > PREFILL_TOKENS:
                break
            heads.append(prompt)
        copies.append(len(heads) - 1)
    return _Cohort(first, [prompts[head] for head in heads], copies)


class _Speech:
    """What the rows have said so far, and the rows that still speak."""

    def __init__(
        self,
        decoder: Decoder,
        noise: Callable[[Tensor, Tensor], Tensor],
        sampling: Sampling,
        stop_ids: Collection[int],
        vocab: int | None,
        rows: int,
        device: torch.device,
    ) -> None:
        self.decoder, self.noise, self.sampling, self.vocab = decoder, noise, sampling, vocab
        self.stop_S = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
        self.token_NT = torch.zeros(rows, sampling.max_tokens, dtype=torch.long, device=device)
        self.logp_NT = torch.zeros(rows, sampling.max_tokens, dtype=torch.float64, device=device)
        self.row_R = torch.zeros(0, dtype=torch.long, device=device)  # which row of the call
        self.position_R = self.row_R  # where its next token goes
        self.token_R = self.row_R  # its last token
        self.done_R = torch.zeros(0, dtype=torch.bool, device=device)
        self.often = (
            1 if device.type == "cpu" else 8
        )  # steps between looks at who has finished: a look waits for the device

    @property
    def live(self) -> int:
        return len(self.row_R)

    def admit(self, cohort: _Cohort) -> None:
        """Prefill the rows and speak their first token."""
        logits_RV = self.decoder.admit(cohort.prompts, cohort.copies)
        row_R = torch.arange(cohort.first, cohort.first + len(cohort.copies), device=self.row_R.device)
        position_R = torch.zeros_like(row_R)
        token_R, done_R = self._draw(logits_RV, self.noise(row_R, position_R[None])[0], row_R, position_R)
        self.row_R = torch.cat([self.row_R, row_R])
        self.position_R = torch.cat([self.position_R, position_R + 1])
        self.token_R = torch.cat([self.token_R, token_R])
        self.done_R = torch.cat([self.done_R, done_R])

    def decode(self) -> None:
        """Speak on until enough rows have finished to be worth a smaller batch; they leave."""
        enough = max(1, self.live // 8) if self.decoder.drops else self.live
        left = self.sampling.max_tokens - int(self.position_R.max())
        for n in range(left + 1):
            if n == left or (n % self.often == 0 and int(self.done_R.sum()) >= enough):
                break
            if n % NOISE_POSITIONS == 0:
                ahead_T1 = torch.arange(NOISE_POSITIONS, device=self.row_R.device)[:, None]
                noise_TR = self.noise(self.row_R, self.position_R + ahead_T1)
            logits_RV = self.decoder.step(self.token_R)
            self.token_R, stopped_R = self._draw(logits_RV, noise_TR[n % NOISE_POSITIONS], self.row_R, self.position_R)
            self.done_R |= stopped_R
            self.position_R += 1
        self._leave()

    def _draw(self, logits_RV: Tensor, uniform_R: Tensor, row_R: Tensor, position_R: Tensor) -> tuple[Tensor, Tensor]:
        """Draw, write down, and tell who has stopped."""
        logits_RV = logits_RV[:, : self.vocab]
        logits_RV = logits_RV if logits_RV.dtype == torch.float64 else logits_RV.float()
        token_R, logp_R = draw(logits_RV, uniform_R, self.sampling)
        self.token_NT[row_R, position_R] = token_R
        self.logp_NT[row_R, position_R] = logp_R
        return token_R, (token_R[:, None] == self.stop_S).any(-1)

    def _leave(self) -> None:
        """Finished rows leave; the last rows take their places, so that few pasts move."""
        goes_R = self.done_R | (self.position_R >= self.sampling.max_tokens)
        stay = self.live - int(goes_R.sum())
        if stay == self.live:
            return
        index_R = torch.arange(stay, device=goes_R.device)
        index_R[goes_R[:stay]] = (~goes_R[stay:]).nonzero()[:, 0] + stay
        if self.decoder.drops:
            self.decoder.keep(index_R)
        self.row_R, self.position_R, self.token_R, self.done_R = (
            held_R[index_R] for held_R in (self.row_R, self.position_R, self.token_R, self.done_R)
        )

    def answers(self) -> list[Spoken]:
        """One answer a row, in order. Raises OpdError where a probability is not a number."""
        token_NT, logp_NT = self.token_NT.cpu().numpy(), self.logp_NT.cpu().numpy()
        stops_NT = np.isin(token_NT, self.stop_S.cpu().numpy())
        stopped_N = np.asarray(stops_NT.any(axis=1))
        length_N = np.where(stopped_N, stops_NT.argmax(axis=1) + 1, self.sampling.max_tokens)
        broken = [n for n, length in enumerate(length_N) if np.isnan(logp_NT[n, :length]).any()]
        if broken:
            raise OpdError(
                f"the speaker's logits were not finite in {len(broken)} of {len(length_N)} answers: the weights have "
                "diverged. Go back to an earlier checkpoint and lower the learning rate, or train in float32"
            )
        return [
            Spoken(tuple(tokens[:n].tolist()), tuple(logp[:n].tolist()), "stop" if stopped else "length")
            for tokens, logp, n, stopped in zip(token_NT, logp_NT, length_N, stopped_N, strict=True)
        ]
