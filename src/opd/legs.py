"""A recipe's stages with their methods, bound to what the recipe offers: all that is known before anything loads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from opd import method
from opd.cache import Index, read_index
from opd.engines.base import Sampling
from opd.errors import UsageError
from opd.loss import Objective
from opd.method import EXPERT, VIEWS, Method, Recorded, Setting, bind
from opd.mixture import Mixture
from opd.recipe import Recipe, Stage
from opd.types import Says


@dataclass(frozen=True)
class Leg:
    """A stage that is ready to run: its method is bound."""

    stage: Stage
    method: Method
    sampling: Sampling

    @property
    def name(self) -> str:
        return self.stage.name or self.method.name

    @property
    def learns(self) -> bool:
        """Whether the critic learns in this stage."""
        return any(not learned.fixed for learned in self.method.loss.learned)

    @property
    def looks_back(self) -> bool:
        """Whether a judge sees hints."""
        return any(judge.view == "hint" for judge in self.method.needs)

    @property
    def domains(self) -> frozenset[str] | None:
        """What its prompts are about; None is everything."""
        return None if self.stage.domains is None else frozenset(self.stage.domains)

    def steps(self, prompts: int) -> int:
        """Length in steps, for this many prompts to draw from."""
        if self.stage.steps is not None:
            return self.stage.steps
        return max(1, ceil((self.stage.epochs or 1.0) * prompts / self.stage.train.prompts - 1e-9))


# --- what can be said without loading anything -----------------------------------------------------------------------


def legs(recipe: Recipe, folder: Path | None = None) -> tuple[Leg, ...]:
    """Every stage with its method built and bound to what the recipe offers. Loads no model; all problems at once."""
    found: list[Leg] = []
    problems: list[str] = []
    methods: list[tuple[Stage, Method]] = []
    caches = recorded(recipe, folder or Path.cwd())
    roles = {role: Says.LAYERS if t.model or t.stage else Says.TEXT for role, t in recipe.teachers.items()}
    if roles:
        # Whether each domain has its own is known with the data; several widths are no layer, no cache is of several.
        roles[EXPERT] = min(Says.DENSE, max(roles.values()))
    roles |= {role: index.says for role, index in caches.items()}
    for stage in recipe.stages:
        try:
            methods.append((stage, method.build(stage.method.name, stage.method.args, folder)))
        except UsageError as error:
            problems += error.problems
    for place, (stage, built) in enumerate(methods):
        if stage.critic.learn:
            group = built.group if built.group > 1 else stage.critic.group
            built = built.with_critic(_objective([m for _, m in methods], place), group)
        elif stage.critic.learn is False:
            built = built.with_fixed_critic()
            if built.loss.learned and not any(leg.learns for leg in found):
                problems.append(
                    f"stage `{stage.name}` leaves the critic as it is (critic.learn: false), and no stage before it "
                    "teaches one: its scores would be those of a random head. Teach it in an earlier stage"
                )
        speak = stage.speak
        sampling = Sampling(speak.max_tokens, speak.temperature, speak.top_p, speak.top_k, speak.min_p)
        whole = Sampling(max_tokens=1)
        kept = ("top_p", "top_k", "min_p")
        cut = [f"{k} = {getattr(sampling, k)}" for k in kept if getattr(sampling, k) != getattr(whole, k)]
        views = dict.fromkeys(VIEWS, "")
        if recipe.hint is None:
            views["hint"] = "the recipe does not say where hints come from: add `hint: {use: world}` or your own"
        setting = Setting(
            roles,
            bool(recipe.reward),
            responses=True,
            views=views,
            truncated_sampling=", ".join(cut),
            recorded={r: Recorded(c.k, c.top_temperature, c.temperature) for r, c in caches.items()},
            temperature=speak.temperature,
        )
        try:
            bind(built, setting)
        except UsageError as error:
            problems += [f"stage `{stage.name or built.name}`: {p}" for p in error.problems]
        leg = Leg(stage, built, sampling)
        problems += _too_early(recipe, leg, {"initial", *(other.name for other in found)})
        found.append(leg)
    if problems:
        raise UsageError(*problems)
    return tuple(found)


def _objective(methods: Sequence[Method], place: int) -> Objective:
    """What a critic minimises beside a method that has none: as in the next stage that teaches one, or an earlier."""
    near = [*methods[place:], *reversed(methods[:place])]
    return next(
        (learned.objective for each in near for learned in each.loss.learned),
        Objective("bradley_terry", good="teacher", bad="student"),
    )


def _too_early(recipe: Recipe, leg: Leg, ended: set[str]) -> list[str]:
    """Teachers that the leg asks and that are the student at the end of a stage which has not ended then."""
    asked = {j.role for j in leg.method.needs}
    if EXPERT in asked:
        asked |= set(recipe.teachers if leg.stage.domains is None else leg.stage.domains)
    if recipe.hint is not None and recipe.hint.judge and leg.looks_back:
        asked.add(recipe.hint.judge)
    return [
        f"stage `{leg.name}` asks `{role}`, the student at the end of stage `{teacher.stage}`, which has not ended "
        "then: put that stage before it"
        for role, teacher in recipe.teachers.items()
        if teacher.stage and role in asked and teacher.stage not in ended
    ]


def first_cursor(found: Sequence[Leg], index: int, mixture: Mixture) -> int:
    """Where a stage's sequence of prompts goes on: as many as earlier stages of the same domains drew from it."""
    own = found[index].domains
    earlier = [leg for leg in found[:index] if leg.domains == own]
    return sum(leg.steps(mixture.of(leg.stage.domains).size) * leg.stage.train.prompts for leg in earlier)


def text_role(recipe: Recipe, found: Sequence[Leg]) -> str | None:
    """Whose text evaluations compare with, if anybody's: a teacher that is there from the start to the end."""
    roles = [leg.method.taught_by for leg in found if leg.method.taught_by]
    return next((r for r in roles if r not in recipe.teachers or not recipe.teachers[r].stage), None)


def recorded(recipe: Recipe, folder: Path) -> dict[str, Index]:
    """What the teachers that are folders of recorded signals hold, by role. `UsageError` where one cannot be read."""
    return {role: read_index(Path(local(t.cache, folder))) for role, t in recipe.teachers.items() if t.cache}


def local(path: str, folder: Path) -> str:
    """A path relative to the recipe's folder, if it is there; else as it is (a hub id, or relative to here)."""
    beside = folder / path
    return str(beside) if beside.exists() else path


def plan(recipe: Recipe, found: Sequence[Leg]) -> dict[str, Any]:
    """plan.json: what will be optimised, in words and as the equation, per stage."""
    needs = {str(j): s.name for leg in found for j, s in leg.method.needs.items()}
    return {
        "method": found[-1].method.name,
        "objective_words": words(found[-1].method),
        "equation": str(found[-1].method.loss),
        "speaks": str(found[-1].method.speaks),
        "student": recipe.student.model,
        "teachers": {
            role: (t.model or t.stage or t.answers or t.url or t.cache) for role, t in recipe.teachers.items()
        },
        "needs": needs,
        "stages": [
            {
                "name": leg.name,
                "method": leg.method.name,
                "equation": str(leg.method.loss),
                "words": words(leg.method),
                "speaks": str(leg.method.speaks),
                "group": leg.method.group,
            }
            for leg in found
        ],
        "reads": [],
    }


def words(built: Method) -> str:
    """One sentence that says who speaks, who judges and what is learned."""
    hears = {
        Says.TEXT: "its text",
        Says.TOKEN: "its log-probability of each token",
        Says.TOP: "the log-probabilities of its likeliest tokens",
        Says.DENSE: "its whole distribution at each token",
        Says.LAYERS: "its whole distribution and its layers' states at each token",
        Says.SCORE: "its score of each answer",
    }
    judges = ", ".join(f"{judge} gives {hears[says]}" for judge, says in built.needs.items()) or "nobody judges"
    reward = "; the task's reward is read" if "reward" in built.loss.reads else ""
    return f"{built.speaks} speaks ({built.group} a prompt); {judges}{reward}."
