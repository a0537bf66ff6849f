"""The frozen data that everything else passes around. No torch here: the command line starts without it.

Vocabulary: a *prompt* is what is asked; a *rollout* is what one speaker said to it; a *judge* is a role (who)
with a view (what it sees); a judge *says* text, a token's log-probability, its likeliest tokens, a distribution, the
states of its layers, or a score.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import Any, Literal

Finish = Literal["stop", "length", "given"]


class Says(IntEnum):
    """What a loss needs from a judge. TEXT < TOKEN < TOP < DENSE < LAYERS, each weakens to the one before; SCORE stands
    apart."""

    TEXT = 0  # it speaks: an answer to the prompt
    TOKEN = 1  # natural-log probability of the sampled token
    TOP = 2  # those of its k likeliest tokens too
    DENSE = 3  # the whole next-token distribution, however it travels
    LAYERS = 4  # the hidden states of its layers too
    SCORE = 10  # one number per rollout, from a critic that learns

    @property
    def by_token(self) -> bool:
        """Whether it is said of each token, so that tokenizers must agree."""
        return Says.TEXT < self < Says.SCORE


RETOKENIZED = "retokenized"  # a view: the same text in the judge's own tokens, behind its own rendering of the prompt


@dataclass(frozen=True, slots=True)
class Judge:
    """A reference by role: who judges, and what the judge sees. Holds no weights; hashable and printable."""

    role: str
    view: str = "same"

    def __str__(self) -> str:
        return self.role if self.view == "same" else f"{self.role}[{self.view}]"


Needs = Mapping[Judge, Says]


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


@dataclass(frozen=True)
class Prompt:
    """What is asked. `responses` are recorded answers ("data" speaks them); `answer` is for verifiers.

    `id` is a pure function of the messages, so the same question read from two files is the same prompt.
    """

    messages: tuple[Message, ...]
    responses: tuple[str, ...] = ()
    answer: str | None = None
    domain: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict, hash=False, compare=False)
    where: str = field(default="", hash=False, compare=False)  # file:line it was read from

    @cached_property
    def id(self) -> str:
        text = json.dumps([[m.role, m.content] for m in self.messages], ensure_ascii=False)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    @property
    def text(self) -> str:
        """The messages as plain text: for people, for verifiers, and for models without a chat template."""
        return "\n\n".join(m.content for m in self.messages)


@dataclass(frozen=True, slots=True)
class Turn:
    """`tokens[start:end]` of a rollout were spoken in one go and ended for this reason."""

    start: int
    end: int
    finish: Finish


@dataclass(frozen=True, slots=True)
class Rollout:
    """What one speaker said to one prompt: turns over one token row.

    Per token of the row: `mask` (it was spoken and may carry loss), `behaviour` (natural-log probability under the
    distribution it was sampled from; nan where it was not sampled), `version` (of the speaker's weights; -1 where
    given). `text` is the decoded last turn without its stop token.
    """

    prompt: Prompt
    speaker: str
    tokens: tuple[int, ...]
    mask: tuple[bool, ...]
    behaviour: tuple[float, ...]
    version: tuple[int, ...]
    turns: tuple[Turn, ...]
    text: str
    sample: int = 0  # which of the prompt's samples this is
    rewards: Mapping[str, float] = field(default_factory=dict, hash=False, compare=False)
    reward: float | None = None
    hint: str | None = None  # drawn from what followed the answer, for judges that look back

    @property
    def finish(self) -> Finish:
        return self.turns[-1].finish

    @property
    def spoken(self) -> int:
        """Number of tokens that carry loss."""
        return sum(self.mask)
