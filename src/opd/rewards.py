"""Rewards: what says how good an answer is. No torch at import.

    exact_match    the answer equals the truth
    regex          a pattern is found in it, or what the pattern captures equals the truth
    math_verify    its final expression equals the truth, as mathematics
    task           the verifier of the built-in world's task that the prompt's domain names
    reward_model   a Hugging Face sequence-classification model
    ./file.py:fn   a function of yours, fn(prompt: Prompt, text: str) -> float

A score that is missing or no finite number is an error that names the prompt, never 0.0. A verifier may decline where
its documentation says so (`math_verify`, `on_timeout: mask`): then the rollout has no reward at all, to be masked and
counted.
"""

from __future__ import annotations

import inspect
import math
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Literal

from opd.errors import OpdError, UsageError
from opd.method import function
from opd.types import Prompt, Rollout

Said = Sequence[tuple[Prompt, str]]  # prompts, each with an answer
Scores = Sequence[float | None]
Batch = Callable[[Said], Scores]
Normal = Literal["loose", "exact"]
_NOTHING: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Reward:
    """A named, weighted reward. Calling it scores one answer; `batch` scores many in one go."""

    name: str
    batch: Batch
    weight: float = 1.0
    needs_answer: bool = False  # it compares with `Prompt.answer`
    may_decline: bool = False  # None is among its scores

    def __call__(self, prompt: Prompt, text: str) -> float | None:
        return self.scores([(prompt, text)])[0]

    def scores(self, said: Said) -> list[float | None]:
        """A finite score each, or None where the reward may decline. Raises `OpdError` for anything else."""
        if self.needs_answer:
            for prompt, _ in said:
                if prompt.answer is None:
                    raise OpdError(f"reward {self.name} compares with the prompt's answer, and {_at(prompt)} has none")
        found = list(self.batch(said))
        if len(found) != len(said):
            raise OpdError(f"reward {self.name} gave {len(found)} scores for {len(said)} answers")
        return [self._checked(score, prompt) for score, (prompt, _) in zip(found, said, strict=True)]

    def _checked(self, score: Any, prompt: Prompt) -> float | None:
        if score is None and self.may_decline:
            return None
        try:
            number = math.nan if score is None or isinstance(score, str) else float(score)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise OpdError(
                f"reward {self.name} gave {score!r} for an answer to {_at(prompt)}: every answer needs a finite "
                "number, for a missing score that passes as some number would be learned from"
            )
        return number


def score(rewards: Sequence[Reward], rollouts: Sequence[Rollout]) -> list[Rollout]:
    """The rollouts with `rewards` by name, unweighted, and `reward`, the weighted sum.

    Where a reward declined, its name is missing from `rewards` and `reward` is None.
    """
    said = [(rollout.prompt, rollout.text) for rollout in rollouts]
    columns = [reward.scores(said) for reward in rewards]
    scored = []
    for rollout, row in zip(rollouts, zip(*columns, strict=True), strict=True):
        named = {reward.name: value for reward, value in zip(rewards, row, strict=True) if value is not None}
        whole = len(named) == len(rewards)
        total = sum(reward.weight * named[reward.name] for reward in rewards) if whole else None
        scored.append(replace(rollout, rewards=named, reward=total))
    return scored


def load(spec: str | Mapping[str, Any], folder: Path | None = None) -> Reward:
    """A reward from a recipe: a name, or `{use: name, args: {...}, weight: 1.0}`. Loads no model until it is used.

    `folder` is what `./file.py:fn` is relative to. Raises `UsageError` for an unknown name, arguments that the reward
    does not take, a pattern or a file that cannot be read.
    """
    spec = {"use": spec} if isinstance(spec, str) else spec
    use, args = str(spec["use"]), dict(spec.get("args") or {})
    weight = float(spec.get("weight", 1.0))
    if ".py:" in use:
        return Reward(use.rpartition(":")[2], _own(use, args, folder), weight)
    if use not in KINDS:
        near = get_close_matches(use, KINDS, n=1)
        raise UsageError(
            f"there is no reward '{use}'{f'; did you mean {near[0]}?' if near else ''} "
            f"There are {', '.join(KINDS)}, or your own as ./file.py:name"
        )
    try:
        inspect.signature(KINDS[use]).bind(**args)
    except TypeError as error:
        raise UsageError(f"reward {use}: {error}; it takes {_arguments(KINDS[use])}") from None
    return replace(KINDS[use](**args), weight=weight)


def load_all(specs: Sequence[str | Mapping[str, Any]], folder: Path | None = None) -> tuple[Reward, ...]:
    """Several rewards, a number added to names that repeat."""
    found: list[Reward] = []
    for reward in (load(spec, folder) for spec in specs):
        same = sum(other.name.rpartition("-")[0] == reward.name or other.name == reward.name for other in found)
        found.append(replace(reward, name=f"{reward.name}-{same + 1}") if same else reward)
    return tuple(found)


# -- the kinds: functions whose arguments are what a recipe may set


def exact_match(normal: Normal = "loose") -> Reward:
    """1 where the whole answer is the truth.

    "loose" ignores case, spacing and a final full stop; "exact" ignores outer space only.
    """
    form = _normal(normal)
    return Reward("exact_match", _each(lambda p, text: form(text) == form(p.answer or "")), needs_answer=True)


def regex(
    pattern: str,
    compare: Literal["answer", "present", "absent"] = "answer",
    take: Literal["last", "first"] = "last",
    normal: Normal = "loose",
) -> Reward:
    """1 where what the pattern captures is the truth, or where the pattern is present or absent.

    It captures its first group, or all that it matches when it has none.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"reward regex: the pattern {pattern!r} cannot be read: {error}") from None
    if compare not in ("answer", "present", "absent") or take not in ("last", "first"):
        raise UsageError(
            f"reward regex: compare is answer, present or absent, take is last or first; not {compare}, {take}"
        )
    form = _normal(normal)
    group = 1 if compiled.groups else 0

    def captured(prompt: Prompt, text: str) -> bool:
        found = [match.group(group) for match in compiled.finditer(text)]
        return bool(found) and form(found[-1 if take == "last" else 0] or "") == form(prompt.answer or "")

    def seen(_: Prompt, text: str) -> bool:
        return (compiled.search(text) is not None) == (compare == "present")

    return Reward("regex", _each(captured if compare == "answer" else seen), needs_answer=compare == "answer")


def math_verify(seconds: float = 5.0, on_timeout: Literal["mask", "wrong"] = "mask") -> Reward:
    """1 where the answer's final expression equals the truth.

    After `seconds` of wall-clock time the comparison is given up: with "mask" the answer then has no score, with
    "wrong" it scores 0.
    """
    from opd.verify_math import BadTruth, MathVerifier

    if on_timeout not in ("mask", "wrong") or not 0 < seconds < math.inf:
        raise UsageError(
            f"reward math_verify: on_timeout is mask or wrong, seconds above 0; not {on_timeout}, {seconds}"
        )
    verifier = MathVerifier(seconds)

    def one(prompt: Prompt, text: str) -> float | None:
        try:
            right = verifier.right(prompt.answer or "", text)
        except BadTruth as error:
            raise OpdError(f"reward math_verify: the answer of {_at(prompt)}, {error}") from None
        return (0.0 if on_timeout == "wrong" else None) if right is None else float(right)

    return Reward("math_verify", _each(one), needs_answer=True, may_decline=on_timeout == "mask")


def task() -> Reward:
    """1 where the task of the built-in world that the prompt belongs to, by its marker, calls the answer right."""
    from opd import tasks

    return Reward("task", _each(lambda p, text: tasks.check(p.text, text)))


def reward_model(
    model: str,
    batch: int = 8,
    max_tokens: int | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> Reward:
    """What a Hugging Face sequence-classification model with one output says; see `RewardModel`."""

    @cache
    def loaded() -> Batch:
        from opd.reward_model import RewardModel

        return RewardModel(model, batch, max_tokens, dtype, trust_remote_code)

    return Reward("reward_model", lambda said: loaded()(said))


KINDS: dict[str, Callable[..., Reward]] = {f.__name__: f for f in (exact_match, regex, math_verify, task, reward_model)}


# -- a user's own


def _own(spec: str, args: Mapping[str, Any], folder: Path | None) -> Batch:
    try:
        fn = function(spec, folder)
    except OpdError:
        raise
    except Exception as error:
        raise UsageError(f"{spec} cannot be read: {_cause(error, spec)}") from error
    try:
        inspect.signature(fn).bind("prompt", "text", **args)
    except TypeError as error:
        raise UsageError(
            f"{spec} cannot be called as a reward: {error}; it should take (prompt, text) and what `args` gives"
        ) from None

    def one(prompt: Prompt, text: str) -> Any:
        try:
            return fn(prompt, text, **args)
        except Exception as error:
            raise OpdError(
                f"reward {spec} failed on an answer to {_at(prompt)}: {_cause(error, spec)}; "
                f"the answer was {_quote(text)}"
            ) from error

    return _each(one)


def _cause(error: Exception, spec: str) -> str:
    """What happened, and the last line of the user's own file that it passed through."""
    what = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError):
        return f"{what} at {error.filename}:{error.lineno}"
    name = Path(spec.rpartition(":")[0]).name
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if Path(frame.filename).name == name] or list(frames)
    return f"{what} at {theirs[-1].filename}:{theirs[-1].lineno}" if theirs else what


# -- small parts


def _each(one: Callable[[Prompt, str], Any]) -> Batch:
    return lambda said: [one(prompt, text) for prompt, text in said]


def _normal(normal: str) -> Callable[[str], str]:
    if normal == "exact":
        return str.strip
    if normal == "loose":
        return lambda text: " ".join(text.casefold().split()).removesuffix(".").rstrip()
    raise UsageError(f"normal is loose or exact, not {normal}")


def _arguments(fn: Callable[..., Any]) -> str:
    return ", ".join(inspect.signature(fn).parameters) or "no arguments"


def _at(prompt: Prompt) -> str:
    place = f" ({prompt.where})" if prompt.where else ""
    return f"prompt {prompt.id}{place} {_quote(prompt.text)}"


def _quote(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
