"""One row of anybody's data -> one `Prompt`. Pure; `data.py` finds the rows.

What a row may say, the first that is there being read:

    messages | conversations      a chat; a last assistant turn is the recorded answer
    prompt                        text, or a list of messages
    instruction [+ input]         Alpaca's form
    question | problem            a task; its `answer` is what a verifier compares with

A recorded answer is `response`, `responses` (a list), `completion` or `output`; a `system` text goes in front;
`answer`, or verl's `reward_model.ground_truth`, is the verifier's truth. GSM8K's form, an `answer` whose last line is
`#### 18`, is both: the truth is 18 and the whole text is a recorded answer. `domain` overrides the source's. Every
other key is kept in `meta`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from opd.types import Message, Prompt

HEADS = ("messages", "conversations", "prompt", "instruction", "question", "problem")
SAID = ("response", "responses", "completion", "output")
_ROLES = {"human": "user", "gpt": "assistant", "developer": "system"} | {
    role: role for role in ("system", "user", "assistant", "tool")
}
_FINAL = re.compile(r"\n####[ \t]*(\S.*?)\s*$")


class RowError(ValueError):
    """What is wrong with a row, as a phrase that follows its place."""


class Parsed(NamedTuple):
    """A row's prompt, and how many of its recorded answers were empty (and are not among its responses)."""

    prompt: Prompt
    empty: int


def parse(
    row: Any, where: str = "", *, domain: str = "", prompt_key: str | None = None, response_key: str | None = None
) -> Parsed:
    """The prompt that a row asks.

    `prompt_key` and `response_key` name the columns where they have other names. Raises `RowError`.
    """
    if not isinstance(row, Mapping):
        raise RowError(f"is a {type(row).__name__}, not an object with keys")
    row = {key: value for key, value in row.items() if value is not None}
    head = _head(row, prompt_key)
    messages = _messages(row[head], head)
    used = {head, "domain"}
    recorded: list[str] = []
    if messages[-1].role == "assistant":
        recorded, messages = [messages[-1].content], messages[:-1]
    if head == "instruction" and _text(row.get("input", ""), "input"):
        messages = (Message("user", f"{messages[0].content}\n\n{row['input']}"),)
        used.add("input")
    if messages and messages[0].role != "system" and _text(row.get("system", ""), "system"):
        messages = (Message("system", row["system"]), *messages)
        used.add("system")
    _check(messages)
    keys = [key for key in ([response_key] if response_key else SAID) if key in row and key not in used]
    if len(keys) + bool(recorded) > 1:
        raise RowError(f"has more than one answer: {', '.join(['the last message'] * bool(recorded) + keys)}")
    for key in keys:
        recorded = _responses(row[key], key)
    used |= set(keys)
    answer = _answer(row, used)
    if answer is not None and head in ("question", "problem") and not recorded and (final := _FINAL.search(answer)):
        recorded, answer = [answer], final.group(1)
    full = [text for text in recorded if text.strip()]
    prompt = Prompt(
        messages=messages,
        responses=tuple(dict.fromkeys(full)),
        answer=answer,
        domain=_text(row.get("domain", ""), "domain") or domain,
        meta={key: value for key, value in row.items() if key not in used},
        where=where,
    )
    return Parsed(prompt, len(recorded) - len(full))


def responses(row: Mapping[str, Any], response_key: str | None = None) -> tuple[str, ...]:
    """The recorded answers of a row that names its prompt by `prompt_id`. Raises `RowError`."""
    keys = [key for key in ([response_key] if response_key else SAID) if row.get(key) is not None]
    if len(keys) != 1:
        raise RowError(f"has {'no' if not keys else 'more than one'} answer: one of {', '.join(SAID)} should be there")
    return tuple(text for text in _responses(row[keys[0]], keys[0]) if text.strip())


def _head(row: Mapping[str, Any], prompt_key: str | None) -> str:
    heads = (prompt_key,) if prompt_key else HEADS
    for key in heads:
        if key in row:
            return key
    wanted = f"'{prompt_key}'" if prompt_key else ", ".join(HEADS[:-1]) + f" or {HEADS[-1]}"
    raise RowError(f"has no {wanted}; it has {', '.join(map(str, row)) or 'nothing'}")


def _messages(value: Any, key: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        return (Message("user", _text(value, key)),)
    if not isinstance(value, list) or not value:
        raise RowError(f"has {_short(value)} as '{key}', where a text or a list of messages should be")
    return tuple(_message(item, f"{key}[{k}]") for k, item in enumerate(value))


def _message(item: Any, at: str) -> Message:
    if not isinstance(item, Mapping):
        raise RowError(f"has {_short(item)} as {at}, where a message with role and content should be")
    said = item.get("role", item.get("from"))
    role = _ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise RowError(f"has {at} from {said!r}; roles are system, user, assistant and tool")
    if item.get("tool_calls"):
        raise RowError(f"has {at} with tool calls, which opd does not render; write the call as text")
    content = item.get("content", item.get("value"))
    if isinstance(content, list):  # the parts of a multimodal message
        if any(not isinstance(part, Mapping) or part.get("type") != "text" for part in content):
            raise RowError(f"has {at} with parts that are not text; opd reads text only")
        content = "".join(_text(part.get("text"), f"{at}.text") for part in content)
    return Message(role, _text(content, f"{at}.content"))  # type: ignore[arg-type]


def _check(messages: tuple[Message, ...]) -> None:
    if not messages:
        raise RowError("has an answer and nothing that was asked")
    if messages[-1].role not in ("user", "tool"):
        raise RowError(f"asks nothing: its last message is from {messages[-1].role}")
    if not any(message.content.strip() for message in messages if message.role != "system"):
        raise RowError("has an empty prompt")


def _responses(value: Any, key: str) -> list[str]:
    if isinstance(value, str):
        return [_text(value, key)]
    if not isinstance(value, list):
        raise RowError(f"has {_short(value)} as '{key}', where a text or a list should be")
    if value and isinstance(value[0], Mapping):  # TRL's form: a list of messages of which one is the answer
        said = _messages(value, key)
        if len(said) != 1 or said[0].role != "assistant":
            raise RowError(f"has {len(said)} messages as '{key}', where one from the assistant should be")
        return [said[0].content]
    return [_text(item, f"{key}[{k}]") for k, item in enumerate(value)]


def _answer(row: Mapping[str, Any], used: set[str]) -> str | None:
    if "answer" in row and "answer" not in used:
        used.add("answer")
        return _truth(row["answer"], "answer")
    model = row.get("reward_model")
    truth = model.get("ground_truth") if isinstance(model, Mapping) else None
    return _truth(truth, "reward_model.ground_truth") if isinstance(truth, str | int | float) else None


def _truth(value: Any, key: str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, int | float):
        return str(value)
    return _text(value, key)


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"has {_short(value)} as '{key}', where text should be")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"has half a character (a lone surrogate) in '{key}' at {error.start}") from None
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
