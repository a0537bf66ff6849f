"""What every engine is asked and answers. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from opd.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn from the logits, applied in this order: temperature, top-k, top-p, min-p.

    `temperature` divides the logits; 0 takes the likeliest token. `top_k` keeps the k likeliest tokens (and those
    tied with the last; 0 keeps all). `top_p` keeps the fewest likeliest tokens whose probabilities reach it (1 keeps
    all). `min_p` keeps tokens at least that fraction as likely as the likeliest (0 keeps all). What is kept is
    renormalised. `max_tokens` bounds the tokens spoken, the stop token included.

    Raises UsageError naming every value out of range.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        rules = (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", 0.0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1 (1 keeps every token)"),
            ("top_k", self.top_k >= 0, "0 (keeps every token) or more"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "between 0 (keeps every token) and 1"),
        )
        problems = [f"speak.{name} is {getattr(self, name)}; it must be {rule}" for name, ok, rule in rules if not ok]
        if problems:
            raise UsageError(*problems)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def truncated(self) -> bool:
        """Some tokens may be excluded although the model gives them probability."""
        return self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0


@dataclass(frozen=True, slots=True)
class Spoken:
    """One answer. `tokens` include the stop token; `logp` has one natural-log probability per token, under the
    distribution it was drawn from (greedy: under the model at temperature 1)."""

    tokens: tuple[int, ...]
    logp: tuple[float, ...]
    finish: Literal["stop", "length"]


class Decoder(Protocol):
    """Holds the rows that decode together and knows their past."""

    refills: bool  # rows may be admitted while others decode
    drops: bool  # rows may leave before the others

    def admit(self, prompts: Sequence[Sequence[int]], copies: Sequence[int]) -> Tensor:
        """Prefill each prompt once and append a row for each of `copies` (indices of prompts); their logits [R, V]."""
        ...

    def step(self, token_R: Tensor) -> Tensor:
        """The rows' next tokens in, their next logits [R, V] out."""
        ...

    def keep(self, index_R: Tensor) -> None:
        """Only these rows stay, in this order."""
        ...
