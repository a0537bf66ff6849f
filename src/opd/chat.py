"""Text to token ids and back: the only module that touches tokenizers and chat templates.

Every speaker's answer is rendered, terminated and masked by the same functions, so that a critic cannot tell
teacher from student by anything but what they say.

The rules, for every speaker alike:

- An answer is *normalised* before it is encoded: line ends become "\\n", outer whitespace goes, and with
  ``think="strip"`` so do ``<think>...</think>`` blocks.
- It is encoded as the *continuation* of the prompt: no BOS, no space that a SentencePiece-like tokenizer would put
  before a text of its own, unless the chat template (or a plain text) has one there. `lead` says what stands there.
- A finished answer ends with ``stop_ids[0]``, the model's own stop token, exactly once; a truncated one has none.
- Control tokens come from the template and the stop id, never from anybody's text: "</s>" in a prompt or an answer
  is four characters. (Added tokens that the tokenizer does not call special, such as Qwen's ``<think>``, are text
  with an id of their own and stay so.)
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

from opd.errors import UsageError
from opd.types import Finish, Message, Prompt, Rollout, Turn
from opd.vocabulary import Tokenizer, content, same_tokenizer

__all__ = ["Renderer", "Think", "Tokenizer", "normalise", "renderer", "same_tokenizer"]

Think = Literal["keep", "strip"]

_THINK = re.compile(r"<think>.*?</think>", re.DOTALL)
_ANCHORS = (
    "\n",
    ":",
    "0",
    "a",
)  # texts to encode in front of an answer where a tokenizer treats a text's start specially
MEMORY = 8192  # prompts, and answers, whose ids are remembered
_ANSWER = "ANSWER"  # stands for an answer where a template is asked what it writes before one


def normalise(text: str, think: Think = "keep") -> str:
    """The form in which answers are encoded and compared. See the module's rules."""
    if think == "strip":
        text = _THINK.sub("", text)
        text = text.rpartition("</think>")[2]  # the opening tag may stand in the prompt
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


@dataclass(frozen=True, eq=False)
class Renderer:
    """A tokenizer with the choices that turn text into one model's token rows. Made by `renderer`."""

    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]
    template: str | None  # Jinja text; None = the model continues plain text
    lead: str | None  # what stands between prompt and answer; None = what the tokenizer itself puts before a text
    think: Think = "keep"
    options: Mapping[str, Any] = field(default_factory=dict)

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """Ids of the prompt up to where the answer starts.

        With a template: the messages and the generation prompt. Without: the text after the tokenizer's own BOS.
        Raises `UsageError` where the template refuses the messages.
        """
        return self._memory_of_prompts(prompt)

    def answer_ids(self, text: str, *, finished: bool = True) -> tuple[int, ...]:
        """Canonical ids of an answer as continued after any prompt; the stop token is appended when `finished`."""
        ids = self._memory_of_answers(text)
        return ids + self.stop_ids[:1] if finished else ids

    # A critic reads every text of a step twice and a prompt comes back every epoch: encoding is paid once.
    @cached_property
    def _memory_of_prompts(self) -> Callable[[Prompt], tuple[int, ...]]:
        return lru_cache(MEMORY)(self._prompt_ids)

    @cached_property
    def _memory_of_answers(self) -> Callable[[str], tuple[int, ...]]:
        return lru_cache(MEMORY)(self._answer_ids)

    def _prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        if self.template is None:
            return self._bos + self._literal(prompt.text)
        return self._chat([*prompt.messages], prompt.where)

    def whole_ids(self, prompt: Prompt, text: str) -> tuple[int, ...]:
        """Ids of prompt and answer with all that the template writes after an answer: what reward models read."""
        if self.template is None:
            return self.prompt_ids(prompt) + self.answer_ids(text)
        answer = Message("assistant", normalise(text, self.think))
        return self._chat([*prompt.messages, answer], prompt.where, generate=False)

    def _answer_ids(self, text: str) -> tuple[int, ...]:
        return self.verbatim_ids(normalise(text, self.think))

    def verbatim_ids(self, text: str) -> tuple[int, ...]:
        """Ids of an answer as it stands, outer whitespace and all: to be aligned with another tokenizer's."""
        if not text:
            return ()
        return self._literal(text) if self.lead is None else self._continued(self.lead + text)

    def text(self, ids: Iterable[int]) -> str:
        """Decoded text without stop, pad and other special tokens, and without outer whitespace."""
        kept = [i for i in ids if i not in self.stop_ids]
        decoded: str = self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return decoded.strip()

    def pieces(self, ids: Iterable[int]) -> tuple[str, ...]:
        """Each token as people read it, spaces and control tokens included; part of a character is "\\ufffd"."""
        return tuple(self._piece(i) for i in ids)

    def given(
        self,
        prompt: Prompt,
        text: str,
        speaker: str,
        sample: int = 0,
        *,
        finished: bool = True,
        max_tokens: int | None = None,
    ) -> Rollout:
        """A rollout of a text that was not sampled here.

        Its finish is "given". It is "length", without a stop token, when the text is known to be unfinished or
        when answer and stop token together exceed `max_tokens`. The rollout's text is what its tokens decode to.
        """
        answer = self.answer_ids(text, finished=finished)
        finish: Finish = "given" if finished else "length"
        if max_tokens is not None and len(answer) > max_tokens:
            answer, finish = answer[:max_tokens], "length"
        logp = (math.nan,) * len(answer)
        return self.spoken(prompt, self.prompt_ids(prompt), answer, logp, finish, speaker, sample, -1)

    def spoken(
        self,
        prompt: Prompt,
        prompt_ids: Sequence[int],
        tokens: Sequence[int],
        logp: Sequence[float],
        finish: Finish,
        speaker: str,
        sample: int,
        version: int | Sequence[int],
    ) -> Rollout:
        """A rollout of sampled tokens.

        `tokens` includes the stop token when `finish` is "stop"; `logp` and `version` (of the speaker's weights)
        are per token of `tokens`, or one version for all. Raises `ValueError` where their lengths differ.
        """
        n, m = len(prompt_ids), len(tokens)
        versions = (version,) * m if isinstance(version, int) else tuple(version)
        if not m == len(logp) == len(versions):
            raise ValueError(f"{m} tokens with {len(logp)} log-probabilities and {len(versions)} versions")
        return Rollout(
            prompt=prompt,
            speaker=speaker,
            tokens=(*prompt_ids, *tokens),
            mask=(False,) * n + (True,) * m,
            behaviour=(math.nan,) * n + tuple(logp),
            version=(-1,) * n + versions,
            turns=(Turn(n, n + m, finish),),
            text=self.text(tokens),
            sample=sample,
        )

    def canonical(self, rollout: Rollout) -> Rollout:
        """What a critic reads: every turn's text, normalised and encoded again, whoever spoke it.

        Identical texts give identical token rows. Finish, reward and what stands between turns are kept; log-
        probabilities are not, for these are not the sampled tokens. A rollout of one turn may come from another
        tokenizer: its text is all that is read.
        """
        parts: tuple[tuple[str, Turn], ...]
        if len(rollout.turns) == 1:
            context, parts = self.prompt_ids(rollout.prompt), ((rollout.text, rollout.turns[0]),)
        else:
            context = rollout.tokens[: rollout.turns[0].start]
            parts = tuple((self.text(rollout.tokens[turn.start : turn.end]), turn) for turn in rollout.turns)
        tokens, mask, turns = list(context), [False] * len(context), list[Turn]()
        last = rollout.turns[0].start
        for text, turn in parts:
            between = rollout.tokens[last : turn.start]
            answer = self.answer_ids(text, finished=turn.finish != "length")
            tokens += [*between, *answer]
            mask += [False] * len(between) + [True] * len(answer)
            turns.append(Turn(len(tokens) - len(answer), len(tokens), turn.finish))
            last = turn.end
        return replace(
            rollout,
            tokens=tuple(tokens),
            mask=tuple(mask),
            behaviour=(math.nan,) * len(tokens),
            version=(-1,) * len(tokens),
            turns=tuple(turns),
            text=self.text(tokens[turns[-1].start :]),
        )

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits of everything here that decides ids: tokenizer content, template, stop ids, choices."""
        choices = [self.template, self.lead, self.think, list(self.stop_ids), dict(self.options)]
        everything = json.dumps([choices, content(self.tokenizer)], sort_keys=True, default=str)
        return hashlib.blake2b(everything.encode(), digest_size=8).hexdigest()

    # -- encoding

    def _parsed(self, text: str) -> tuple[int, ...]:
        """Ids of text in which control tokens may be written."""
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _literal(self, text: str) -> tuple[int, ...]:
        """Ids of text in which nothing is a control token."""
        return tuple(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def _continued(self, text: str) -> tuple[int, ...]:
        """Ids of text that follows other text: the tokenizer's treatment of a text's start is kept out."""
        if self._anchors is None:
            return self._literal(text)
        for anchor, anchor_ids in self._anchors:
            ids = self._literal(anchor + text)
            if ids[: len(anchor_ids)] == anchor_ids:
                return ids[len(anchor_ids) :]
        return self._literal(text)

    @cached_property
    def _anchors(self) -> tuple[tuple[str, tuple[int, ...]], ...] | None:
        """Anchors that never merge with an unknown character; None where a text's start is nothing special."""
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        known = [(a, ids) for a in _ANCHORS if unknown not in (ids := self._literal(a))]
        if all(self._literal(a + "Xx") == ids + self._literal("Xx") for a, ids in known):
            return None
        return tuple(known)

    @cached_property
    def _bos(self) -> tuple[int, ...]:
        """What the tokenizer itself puts before a text (what it puts after one is not wanted before an answer)."""
        bare = self._parsed("a")
        own = tuple(self.tokenizer("a")["input_ids"])
        starts = (k for k in range(len(own)) if own[k : k + len(bare)] == bare)
        return own[: next(starts, 0)]

    @cached_property
    def _specials(self) -> re.Pattern[str] | None:
        added = self.tokenizer.added_tokens_decoder.values()
        names = {token.content for token in added if token.special} | set(self.tokenizer.all_special_tokens)
        longest_first = sorted(names - {""}, key=lambda name: (-len(name), name))
        return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def _chat(self, messages: list[Message], where: str, *, generate: bool = True) -> tuple[int, ...]:
        """Ids of messages under the template.

        Names of control tokens in them are carried through the template as marks and encoded as characters.
        """
        assert self.template is not None
        chat = [{"role": message.role, "content": message.content} for message in messages]
        everything = "\n".join(message.content for message in messages)
        found = sorted(set(self._specials.findall(everything))) if self._specials else []
        if not found:
            return self._parsed(_render(self.tokenizer, self.template, chat, self.options, where, generate))
        mark = next(c for c in map(chr, range(0xE000, 0xF8FF)) if c not in everything)
        swap = {name: f"{mark}{k}{mark}" for k, name in enumerate(found)}
        assert self._specials is not None
        for message in chat:
            message["content"] = self._specials.sub(lambda m: swap[m.group()], message["content"])
        text = _render(self.tokenizer, self.template, chat, self.options, where, generate)
        ids: tuple[int, ...] = ()
        for k, part in enumerate(re.split(f"{mark}(\\d+){mark}", text)):
            if k % 2:
                ids += self._continued(found[int(part)])
            elif k == 0:
                ids += self._parsed(part)
            else:
                ids += self._parsed_on(part)
        return ids

    def _parsed_on(self, text: str) -> tuple[int, ...]:
        """As `_parsed`, for a text that goes on: up to its first control token it is a continuation."""
        control = self._specials.search(text) if self._specials else None
        cut = control.start() if control else len(text)
        head = self._continued(text[:cut]) if cut else ()
        return head + (self._parsed(text[cut:]) if cut < len(text) else ())

    @cached_property
    def _pieces(self) -> dict[int, str]:
        return {}

    def _piece(self, token: int) -> str:
        if token not in self._pieces:
            anchor = self._literal("a")
            both: str = self.tokenizer.decode([*anchor, token], clean_up_tokenization_spaces=False)
            alone: str = self.tokenizer.decode(list(anchor), clean_up_tokenization_spaces=False)
            self._pieces[token] = both[len(alone) :]
        return self._pieces[token]


def renderer(
    tokenizer: Tokenizer,
    *,
    stop_ids: Sequence[int],
    template: str = "auto",
    think: Think = "keep",
    lead: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Renderer:
    """A renderer for one model.

    Args:
        tokenizer: its transformers tokenizer.
        stop_ids: what the model really stops with (its generation config, not ``tokenizer.eos_token_id``); the
            first is appended to finished answers, all end a sampled one.
        template: "auto" (the tokenizer's chat template if it has one, else plain), "plain", or Jinja text.
        think: "strip" removes ``<think>`` blocks from answers before they are encoded.
        lead: text between prompt and answer. By default what the template writes there (whitespace only); for plain
            text what the tokenizer does: SentencePiece-like ones put a space, byte-level ones nothing.
        options: variables for the template, e.g. ``{"enable_thinking": False}``.

    Raises `UsageError` when there is no stop id, or one that the tokenizer does not have.
    """
    if not stop_ids:
        raise UsageError("the model has no stop token: answers would never end; set `stop` to the token it ends with")
    size = len(tokenizer)
    if unknown := [i for i in stop_ids if not 0 <= i < size]:
        raise UsageError(f"stop ids {unknown} are not among the tokenizer's {size} tokens: no answer could end")
    jinja = {"auto": tokenizer.chat_template, "plain": None}.get(template, template)
    if isinstance(jinja, dict):  # several templates by name
        jinja = tokenizer.get_chat_template()
    if jinja is not None and lead is None:
        lead = _lead(tokenizer, jinja, options or {})
    return Renderer(tokenizer, tuple(stop_ids), jinja, lead, think, options or {})


def _render(
    tokenizer: Tokenizer,
    template: str,
    messages: list[dict[str, str]],
    options: Mapping[str, Any],
    where: str,
    generate: bool,
) -> str:
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=generate, tokenize=False, **options
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise UsageError(
            f"{where or 'a prompt'}: the chat template refuses messages with the roles [{roles}]: {error}; change the "
            "messages (many templates take no system message, and want user and assistant in turn) or the template"
        ) from None
    return text


def _lead(tokenizer: Tokenizer, template: str, options: Mapping[str, Any]) -> str:
    """The whitespace that a template writes between its generation prompt and an answer."""
    asked = [{"role": "user", "content": "question"}]
    try:
        before = _render(tokenizer, template, asked, options, "", True)
        answer = {"role": "assistant", "content": _ANSWER}
        whole = _render(tokenizer, template, [*asked, answer], options, "", False)
    except UsageError:
        return ""
    between = whole[len(before) :].partition(_ANSWER)[0] if whole.startswith(before) else ""
    return between if between.isspace() else ""
