"""From the tree a user wrote to the one that is validated, and the checks that look at more than one key.

`method:` without `stages:` becomes one stage. Every stage gets the recipe's `train` and `speak` with its own changes on
top, and its length. Values keep the origin and the key of where they were written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from opd.recipe.layers import merge
from opd.recipe.tree import Node, Problem, under

_LENGTHS: Final = ("steps", "epochs")
_ROLE: Final = re.compile(r"[a-z][a-z0-9_-]*")
_TAKEN: Final = {
    "student": "the student is the model under `student`",
    "reference": "the reference is the student as it was when the stage began",
    "ema": "it is a running mean of the student",
    "expert": "it stands for the teacher that is named after the domain of the prompt",
    "critic": "the critic learns, so it is configured in the section `critic`",
    "data": "`data` speaks what the prompts' files record",
}
_STARTS: Final = ("previous", "initial")
_HOMES: Final = ("model", "stage", "answers", "url", "cache")
_LATER: Final = {
    "url": "is an endpoint, and teachers are not asked over the network yet. Record answers in a file: `answers`.",
}


def settle(tree: Node) -> tuple[Node, list[Problem]]:
    """The canonical tree. Problems of shape are returned here; wrong types and unknown keys are left to the schema."""
    root, problems = tree.given, list[Problem]()
    train, speak = (root.get(name, Node({}, tree.origin)) for name in ("train", "speak"))
    method = root.pop("method", None)
    if method is not None and "stages" in root:
        problems.append(
            Problem(method.origin, "and `stages` exclude each other. Keep one; in a stage it is `stages.N.method`.")
        )
    elif method is not None:
        root["stages"] = Node([Node({"method": method}, method.origin)], method.origin)
    stages = root.get("stages")
    if stages is not None and isinstance(stages.value, list):
        root["stages"] = replace(stages, value=[_stage(stage, train, speak, problems) for stage in stages.value])
        problems += _same_names(root["stages"])
        problems += _engines(root["stages"])
        problems += _beginnings(root["stages"], root.get("teachers", Node({}, tree.origin)))
    if "data" in root and isinstance(root["data"].value, dict):
        kept = {k: v for k, v in root["data"].items.items() if k != "dev" or v.value is not None}
        root["data"] = replace(root["data"], value=kept)
    empty = Node({}, tree.origin)
    teachers = root.get("teachers", empty)
    problems += [*_adapter(root.get("student", empty)), *_teachers(teachers)]
    problems += _views(root.get("views", empty), root.get("hint", empty), teachers)
    return Node(root, tree.origin), problems


def _stage(stage: Node, train: Node, speak: Node, problems: list[Problem]) -> Node:
    """A stage with everything that it takes from the recipe."""
    if not isinstance(stage.value, dict):
        return stage
    own = stage.given
    name = own["method"].items.get("name") if "method" in own else None
    if "name" not in own and name is not None and isinstance(name.value, str):
        own["name"] = replace(name, value=name.value.rpartition(":")[2])  # ./mine.py:brevity makes a stage `brevity`
    shared = replace(train, value={k: v for k, v in train.items.items() if k not in _LENGTHS})
    for key, below in (("train", shared), ("speak", speak)):
        below = below if isinstance(below.value, dict) else replace(below, value={})
        own[key] = merge(below, own[key]) if key in own else below
    lengths: dict[str, Node] = {k: own[k] for k in _LENGTHS if k in own} or {
        k: v for k, v in train.given.items() if k in _LENGTHS
    }
    if not lengths:
        where = Problem(stage.origin, "has no length. Set `train.epochs` or `train.steps`, or either in the stage.")
        problems.append(where)
    elif len(lengths) > 1:
        where = Problem(lengths["epochs"].origin, f"and `{lengths['steps'].origin.key}` exclude each other. Keep one.")
        problems.extend([] if where in problems else [where])
    return replace(stage, value=own | lengths)


def _same_names(stages: Node) -> Iterator[Problem]:
    seen: dict[str, Node] = {}
    for stage in stages.value if isinstance(stages.value, list) else ():
        name = stage.items.get("name")
        if name is None or not isinstance(name.value, str):
            continue
        if name.value in _STARTS:
            yield Problem(name.origin, f"is {name.value!r}, which `start` has a meaning for. Choose another name.")
        if name.value in seen:
            first = seen[name.value].origin.label
            yield Problem(
                under(stage.origin, "name") if name.origin.key.endswith("method.name") else name.origin,
                f"is {name.value!r}, as at {first}. Give each stage a `name` of its own: metrics go by it.",
            )
        seen.setdefault(name.value, name)


def _beginnings(stages: Node, teachers: Node) -> Iterator[Problem]:
    """A stage begins with the student of an earlier one, and a teacher is the student at the end of some stage."""
    known = [*_STARTS]
    for stage in stages.value if isinstance(stages.value, list) else ():
        start = stage.items.get("start")
        if start is not None and start.value not in known:
            yield Problem(start.origin, f"is {start.value!r}, and no earlier stage is called so: {', '.join(known)}.")
        known += [node.value for key, node in stage.items.items() if key == "name" and isinstance(node.value, str)]
    for teacher in teachers.items.values():
        home = teacher.items.get("stage")
        if home is not None and home.value is not None and home.value not in known[1:]:
            yield Problem(home.origin, f"is {home.value!r}, and no stage is called so: {', '.join(known[1:])}.")


def _engines(stages: Node) -> Iterator[Problem]:
    for stage in stages.value if isinstance(stages.value, list) else ():
        engine = stage.items["speak"].items.get("engine") if "speak" in stage.items else None
        if engine is not None and engine.value == "vllm":
            yield Problem(
                engine.origin,
                "is vllm, which opd does not talk to yet. Use local: the student samples in this process.",
            )


def _teachers(teachers: Node) -> Iterator[Problem]:
    """Roles that can be configured, each with exactly one home that can be read."""
    for role, teacher in teachers.items.items():
        if role in _TAKEN:
            yield Problem(teacher.origin, f"cannot be configured: {_TAKEN[role]}. Choose another role.")
        elif not _ROLE.fullmatch(role):
            yield Problem(teacher.origin, "is no role. Begin with a letter and use a to z, 0 to 9, - and _.")
        homes = [home for home in _HOMES if home in teacher.given]
        listed = ", ".join(_HOMES)
        if isinstance(teacher.value, dict) and len(homes) != 1:
            found = " and ".join(homes) or "none"
            yield Problem(teacher.origin, f"lives in one place: one of {listed}. Found {found}.")
        for home in homes:
            if home in _LATER:
                yield Problem(teacher.items[home].origin, _LATER[home])
        yield from _beams(teacher)


def _beams(teacher: Node) -> Iterator[Problem]:
    """Only a model searches, and it finds as many answers as it has beams."""
    beams, samples = (teacher.items.get(key) for key in ("beams", "samples"))
    if beams is None or not isinstance(beams.value, int) or beams.value <= 1:
        return
    if "answers" in teacher.given:
        yield Problem(beams.origin, "has no effect: recorded answers are not searched for. Remove it, or give a model.")
    if samples is not None and isinstance(samples.value, int) and samples.value > beams.value:
        yield Problem(
            samples.origin, f"is {samples.value}, and {beams.value} beams find {beams.value} answers at most."
        )


def _views(views: Node, hint: Node, teachers: Node) -> Iterator[Problem]:
    """Hints are for the view `hint` alone, and a judge of them is a teacher that can speak."""
    for name, view in views.items.items():
        if name != "hint" and isinstance(view.value, str) and "{hint}" in view.value:
            yield Problem(view.origin, "shows {hint}, which only `views.hint` can: its judges look back.")
    judge = hint.items.get("judge")
    if judge is None or not isinstance(judge.value, str):
        return
    speakers = [role for role, t in teachers.items.items() if {"model", "stage"} & t.given.keys()]
    if judge.value not in speakers:
        found = ", ".join(speakers) or "none"
        yield Problem(judge.origin, f"is {judge.value!r}, and no teacher with a `model` is called so. Found {found}.")


def _adapter(student: Node) -> Iterator[Problem]:
    for key in ("lora_alpha", "lora_targets"):
        if key in student.given and "lora" not in student.given:
            remedy = "Set `student.lora` to the adapter's rank, or remove it."
            yield Problem(student.items[key].origin, f"has no effect: there is no adapter. {remedy}")
