"""A method says who speaks and what the loss is. The rest is derived: what is asked of whom, and whether it can be.

A method is one file in `opd/methods/`, a function of the file's name whose keyword-only arguments *are* its
configuration. The command line, the recipe schema, the docs and the contract test find it by themselves.
"""

from __future__ import annotations

import inspect
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module, util
from math import floor
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval

from opd.errors import UsageError
from opd.loss import Learn, Loss, Objective, Push, learn
from opd.schedule import Coefficient, Schedule, value
from opd.spans import refusals
from opd.types import RETOKENIZED, Judge, Says

Share = Annotated[float, Interval(ge=0, le=1)]
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Group = Annotated[int, Ge(1)]
Count = Annotated[int, Ge(0)]
Clip = tuple[NotNegative, NotNegative] | None

VIEWS = ("same", "answer", "demonstration", "context", "hint", RETOKENIZED)  # what a judge may see: `opd.views`

__all__ = ["Clip", "Coefficient", "Count", "Group", "Method", "NotNegative", "Positive", "Share", "Speakers"]

CRITIC = Judge("critic")
EXPERT = "expert"  # the role of the teacher that is named after the domain of the prompt
REFERENCE = Judge("reference")
TEACHER = Judge("teacher")
RETOKENIZED_TEACHER = Judge("teacher", RETOKENIZED)


@dataclass(frozen=True)
class Speakers:
    """Who samples the tokens: one speaker, a mixture by row, or both (rows of each for one prompt).

    With `blend`, a role and a share, every token of the student's rows is drawn from a blend of the student's and that
    role's distributions: the rows count as the student's, and `behaviour` is the blend's.
    """

    kind: Literal["one", "mixture", "both"]
    shares: tuple[tuple[str, Coefficient], ...]
    blend: tuple[str, float] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, share in self.shares if share != 0)

    def of(self, index: int, step: int = 0) -> tuple[str, ...]:
        """Who speaks to the prompt with this running number: exact shares over the run, without a coin.

        Shares that follow a schedule are those of this step of the stage, exact within it.
        """
        if self.kind != "mixture":
            return self.names
        shares = [(name, value(share, step)) for name, share in self.shares]
        left = sum(share for _, share in shares)
        for name, share in shares[:-1]:  # of `index` prompts so far this speaker has had round(index * share)
            if left <= 0:
                break
            before = round_half_up(index * share / left)
            if round_half_up((index + 1) * share / left) > before:
                return (name,)
            index, left = index - before, left - share  # the others share the rest among themselves
        return (self.shares[-1][0],)

    def blended(self, role: str, share: float) -> Speakers:
        """The same, the student's tokens drawn from share * role + (1 - share) * student; a share of 0 is no blend."""
        return replace(self, blend=(role, share) if share else None)

    def __str__(self) -> str:
        if self.kind == "mixture":
            said = " + ".join(
                f"{share if isinstance(share, Schedule) else f'{share:g}'} {n}" for n, share in self.shares
            )
        else:
            said = " and ".join(self.names)
        if self.blend is None:
            return said
        role, share = self.blend
        return said.replace("student", f"student (each token {share:g} {role} + {1 - share:g} student)")


def round_half_up(x: float) -> int:
    """Nearest integer, halves upward and rounding noise forgiven, so that shares like 1/3 count exactly."""
    return floor(x + 0.5 + 1e-9)


def one(name: str) -> Speakers:
    """A single speaker."""
    return Speakers("one", ((name, 1.0),))


def mixture(**shares: Coefficient) -> Speakers:
    """A mixture by prompt: `mixture(student=0.5, data=0.5)`; a share of 0 is left out, a schedule never is."""
    kept = tuple((name, share) for name, share in shares.items() if share != 0)
    return Speakers("mixture", kept) if len(kept) > 1 else one(kept[0][0])


def student_or_data(on_policy: Coefficient) -> Speakers:
    """The student speaks to this share of the prompts and the data to the rest; the share may be a schedule."""
    ends = (on_policy.start, on_policy.end) if isinstance(on_policy, Schedule) else (on_policy,)
    if any(not 0 <= end <= 1 for end in ends):
        raise ValueError(f"on_policy = {on_policy} is a share of the prompts, and shares lie between 0 and 1")
    if isinstance(on_policy, Schedule):
        rest: Coefficient = replace(on_policy, start=1 - on_policy.start, end=1 - on_policy.end)
    else:
        rest = 1 - on_policy
    return mixture(student=on_policy, data=rest)


def both(*names: str) -> Speakers:
    """Rows of each speaker for every prompt."""
    return Speakers("both", tuple((name, 1.0) for name in names))


@dataclass(frozen=True)
class Method:
    """Who speaks, the loss, how many samples a prompt gets, and what tells that it works (for the contract test)."""

    speaks: Speakers
    loss: Loss
    group: int = 1
    goal: Literal["teacher", "reward", "text"] = "teacher"
    name: str = ""
    ema: float | None = None  # how much of the judge `ema`, a running mean of the student, stays at each step

    @property
    def needs(self) -> dict[Judge, Says]:
        """What has to be heard of whom: the loss's needs, text of whoever else speaks, distributions of a blend."""
        needs = dict(self.loss.needs)
        if self.speaks.blend is not None:
            needs[Judge(self.speaks.blend[0])] = Says.DENSE
        for name in self.speaks.names:
            if name not in ("student", "data"):
                needs.setdefault(Judge(name), Says.TEXT)
        return needs

    @property
    def taught_by(self) -> str | None:
        """The role whose text is an example to the student: not its own past self."""
        return next((j.role for j, s in self.needs.items() if s is Says.TEXT and j != REFERENCE), None)

    @property
    def on_policy(self) -> bool:
        return "student" in self.speaks.names

    def with_critic(self, objective: Objective, group: int) -> Method:
        """The same, while a critic learns from the student's samples beside it: GAD's warm-up."""
        if self.loss.learned:
            return self
        if self.on_policy:
            return replace(self, loss=self.loss + learn(CRITIC, objective))
        names = tuple(dict.fromkeys(["student", *self.speaks.names]))
        rows = [replace(t, source=t.source or self.speaks.names[0]) for t in self.loss.terms]
        return replace(self, speaks=both(*names), loss=Loss(tuple(rows)) + learn(CRITIC, objective), group=group)

    def with_fixed_critic(self) -> Method:
        """The same, while the critic stays as it is: its score is still the reward, its objective is only measured."""
        fixed = [
            replace(t, head=replace(t.head, fixed=True)) if isinstance(t.head, Learn) else t for t in self.loss.terms
        ]
        return replace(self, loss=Loss(tuple(fixed)))


# --- finding and building methods ------------------------------------------------------------------------------------


def catalogue() -> dict[str, Callable[..., Method]]:
    """Every method by name, alphabetically: the function of the file's name in each file of `opd/methods/`."""
    from opd import methods

    names = sorted(m.name for m in pkgutil.iter_modules(methods.__path__))
    return {name: getattr(import_module(f"opd.methods.{name}"), name) for name in names}


def find(name: str, folder: Path | None = None) -> Callable[..., Method]:
    """A method by name, or a user's own as `./file.py:function` (relative to `folder`)."""
    if is_function(name):
        return function(name, folder)
    known = catalogue()
    if name not in known:
        raise UsageError(f"there is no method `{name}`; there are {', '.join(known)}, or your own as `./file.py:name`")
    return known[name]


def is_function(text: str) -> bool:
    """Whether a text names a function in a file, as `./file.py:name` does."""
    return re.fullmatch(r"[^{}\n]+\.py:[A-Za-z_]\w*", text) is not None


def function(spec: str, folder: Path | None = None) -> Callable[..., Any]:
    """The function that `./file.py:name` names; `UsageError` if there is none."""
    file, _, name = spec.rpartition(":")
    path = (folder or Path.cwd()) / file
    if not path.is_file():
        raise UsageError(f"`{spec}`: there is no file {path}")
    module_spec = util.spec_from_file_location(path.stem, path)
    assert module_spec is not None and module_spec.loader is not None
    module = util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise UsageError(f"`{spec}`: {path.name} has no function `{name}`")
    found: Callable[..., Any] = getattr(module, name)
    return found


def build(name: str, args: Mapping[str, Any] | None = None, folder: Path | None = None) -> Method:
    """The method with these arguments; they were checked against its signature when the recipe was read."""
    try:
        return replace(find(name, folder)(**(args or {})), name=name)
    except ValueError as error:  # a method's own refusal of arguments that do not go together
        raise UsageError(f"method {name}: {error}") from error


def describe(name: str, fn: Callable[..., Method]) -> dict[str, Any]:
    """One row of the table of methods, from the code alone."""
    method = fn()
    return {
        "name": name,
        "speaks": str(method.speaks),
        "judge": sorted({str(j) for j in method.needs}) or ["none"],
        "needs": {str(j): s.name for j, s in sorted(method.needs.items(), key=lambda x: str(x[0]))},
        "loss": str(method.loss),
        "about": (inspect.getdoc(fn) or "").splitlines()[0],
        "arguments": {k: str(p.default) for k, p in inspect.signature(fn).parameters.items()},
    }


# --- can it be done? -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recorded:
    """What a judge said once, of texts that do not change: how many likeliest tokens, and at what temperatures."""

    k: int
    top_temperature: float
    temperature: float | None  # of the sampled tokens' log-probabilities; None: any


@dataclass(frozen=True)
class Setting:
    """What a recipe offers a method: what each role can say, and what else the loss may read."""

    roles: Mapping[str, Says]
    reward: bool = False
    responses: bool = False
    views: Mapping[str, str] = field(default_factory=lambda: dict.fromkeys(VIEWS, ""))  # name: what it still lacks
    truncated_sampling: str = ""  # e.g. "top_p = 0.9", when the sampled distribution is not the whole one
    recorded: Mapping[str, Recorded] = field(default_factory=dict)  # roles that are not here to be asked again
    temperature: float = 1.0  # that the student samples at


def bind(method: Method, setting: Setting) -> None:
    """Refuse in a sentence each what cannot work, before any model loads. Raises `UsageError` with all problems."""
    name, problems = method.name or "this method", []
    own = dict.fromkeys(("student", "reference", "ema"), Says.LAYERS)
    gives = {**own, "critic": Says.SCORE, **setting.roles}
    for judge, says in method.needs.items():
        if judge.view not in setting.views:
            problems.append(f"{name} lets `{judge.role}` see `{judge.view}`; views are {', '.join(setting.views)}")
        elif lacks := setting.views[judge.view]:
            problems.append(f"{name} lets `{judge.role}` see `{judge.view}`, and {lacks}")
        if judge == Judge(EXPERT, RETOKENIZED):
            problems.append(
                f"{name} lets `{EXPERT}` see `{RETOKENIZED}`: experts share the student's tokenizer, so far"
            )
        if judge.role not in gives:
            problems.append(
                f"{name} needs a judge `{judge.role}`, and the recipe has none: add it under `teachers:` "
                f"(there: {', '.join(setting.roles) or 'nothing'})"
            )
        elif not _suffices(gives[judge.role], says):
            blends = method.speaks.blend is not None and method.speaks.blend[0] == judge.role
            problems.append(_too_weak(name, judge.role, gives[judge.role], says, blends))
        elif says.by_token and judge.role in setting.recorded:
            problems += _beyond_record(method, judge, says, setting)
    if "reward" in method.loss.reads and not setting.reward:
        problems.append(f"{name} reads the task's reward, and the recipe has none: add `reward: {{use: ...}}`")
    if "data" in method.speaks.names and not setting.responses:
        problems.append(
            f"{name} learns from recorded answers, and the training data has none: give rows a `response`, or "
            "`messages` that end with the assistant's"
        )
    problems += _pushes_given_text(method, setting)
    problems += refusals(method.loss, name)
    weighs = [t for t in method.loss.terms if isinstance(t.head, Push) or "behaviour" in t.reads]
    if setting.truncated_sampling and weighs:
        problems.append(
            f"{name} pushes sampled tokens by their probabilities, and speak.{setting.truncated_sampling} samples from "
            "another distribution than the one it would be scored under: set it back to its full value"
        )
    if problems:
        raise UsageError(*dict.fromkeys(problems))


def _suffices(gives: Says, asked: Says) -> bool:
    """Text, tokens and distributions weaken to one another; a score comes from a critic, which gives nothing else."""
    return gives is asked if Says.SCORE in (gives, asked) else gives >= asked


_SAYS = {
    Says.TEXT: "text only",
    Says.TOKEN: "log-probabilities of given tokens",
    Says.TOP: "log-probabilities of its likeliest tokens and of given ones",
    Says.DENSE: "the whole next-token distribution",
    Says.LAYERS: "hidden states of its layers",
    Says.SCORE: "a score of each answer",
}


def _too_weak(method: str, role: str, gives: Says, says: Says, blends: bool) -> str:
    if says is Says.SCORE:
        return f"{method} needs {_SAYS[says]} of `{role}`, which gives {_SAYS[gives]}. Only a critic gives scores"
    remedy = "a teacher given as `model:`"
    if gives is Says.TEXT:
        remedy += ", or a method that learns from text alone: gad, seqkd"
    elif gives is Says.TOP and says is Says.DENSE:
        remedy += ", a record of its hidden states, or a divergence on the judge's own likeliest tokens"
    why = " to draw every token from a blend of it and the student" if blends else ""
    return f"{method} needs {_SAYS[says]} of `{role}`{why}, which gives {_SAYS[gives]}. Use {remedy}"


def _beyond_record(method: Method, judge: Judge, says: Says, setting: Setting) -> list[str]:
    """What a judge that spoke once did not say."""
    name, role, record = method.name, judge.role, setting.recorded[judge.role]
    if method.on_policy:
        return [
            f"{name} asks `{role}` of what the student says anew in every step, and the record holds what it said "
            f"of texts that were there before: give `{role}` as `model:`, or choose a method whose speakers are data, "
            "a teacher or the reference"
        ]
    if judge.view == RETOKENIZED:
        return [f"{name} lets `{role}` read its own tokens, and a record is of the student's: give it as `model:`"]
    problems = []
    if record.temperature not in (None, setting.temperature):
        problems.append(
            f"the record of `{role}` holds its log-probabilities at temperature {record.temperature:g}, and "
            f"speak.temperature is {setting.temperature:g}: record them anew, or speak at that temperature"
        )
    if says is Says.TOP and setting.roles[role] is Says.TOP:
        for k, temperature in sorted(method.loss.tops(judge)):
            if k > record.k or temperature != record.top_temperature:
                problems.append(
                    f"{name} compares the {k} likeliest tokens of `{role}` at temperature {temperature:g}, and "
                    f"the record holds {record.k} at temperature {record.top_temperature:g}: record them anew with "
                    f"`opd signals`"
                )
    return problems


def _pushes_given_text(method: Method, setting: Setting) -> list[str]:
    problems = []
    for term in method.loss.terms:
        rows = (term.source,) if term.source else method.speaks.names
        given = [r for r in rows if r != "student"]
        if "behaviour" in term.reads and given:
            problems.append(
                f"{method.name} weighs tokens by the probability they were sampled with, and rows spoken by "
                f"{' and '.join(given)} have none recorded: restrict the term with `.on('student')` or anchor it at "
                "`old()`"
            )
    return problems
