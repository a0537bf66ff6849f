"""Recipes: what they become, what is refused, and in which words."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from annotated_types import Ge, Interval
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from opd.errors import UsageError
from opd.method import catalogue
from opd.recipe import Recipe, Resolved, arguments, build, dump, load, places
from opd.recipe.layers import shaped
from opd.recipe.tree import Origin, from_plain
from opd.recipe.yaml12 import write
from opd.schedule import Coefficient, Schedule

Share = Annotated[float, Interval(ge=0, le=1)]


def pull(*, beta: Share = 0.5, kind: Literal["near", "far"] = "near", kl: Coefficient = 0.001) -> object:
    """Pull the student."""
    if kind == "far" and beta == 1:
        raise ValueError("far with beta = 1 is zero everywhere")
    return object()


def shove(*, group: Annotated[int, Ge(2)] = 8, clip: tuple[float, float] | None = (0.2, 0.2)) -> object:
    """Push the student."""
    return object()


def short(*, limit: int, copy: bool = False) -> object:
    """Reward short answers."""
    return object()


METHODS: dict[str, Callable[..., Any]] = {"pull": pull, "shove": shove}
REWARDS: dict[str, Callable[..., Any]] = {"short": short}

RECIPE = """\
student: {model: some/model}
teachers: {teacher: {model: some/teacher}}
data:
  train: a.jsonl
method: {name: pull, beta: 0.25}
train:
  lr: 1e-5
  epochs: 2
"""
STAGES = """\
student: {model: some/model, lora: 16}
teachers: {teacher: {answers: a.jsonl}, math: {model: m/m, licence: MIT}}
critic: {lr: 2e-6, accuracy_band: [0.6, 0.95]}
data:
  train: [{path: a.jsonl, domain: chat, weight: 2}, b.jsonl]
  dev: a.jsonl
  think: strip
reward: [{use: short, limit: 5}, {use: short, limit: 7, weight: -0.5}]
stages:
  - {name: warm-up, method: pull, critic: {learn: true, alone_steps: 10}, steps: 30}
  - {method: {name: shove, group: 4}, train: {lr: 2e-6, clip: null}, speak: {temperature: 0.8}}
speak: {temperature: 0.9, max_tokens: 64}
train: {prompts: 16, epochs: 0.5, betas: [0.9, 0.95]}
eval: {every: 5, length_band: [0.8, 1.2]}
run: {seed: 3, name: try}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"prompt": "x"}\n')
    return tmp_path


def read(folder: Path, text: str, *overrides: str, name: str = "r.yaml", **kw: Any) -> Resolved:
    (folder / name).write_text(text)
    return load(folder / name, overrides, **{"methods": METHODS, "rewards": REWARDS} | kw)


def refused(folder: Path, text: str, *overrides: str, **kw: Any) -> list[str]:
    """The problems, without the folder."""
    with pytest.raises(UsageError) as caught:
        read(folder, text, *overrides, **kw)
    return [problem.replace(f"{folder}/", "") for problem in caught.value.problems]


# --- what a recipe becomes -------------------------------------------------------------------------------------------


def test_a_method_without_stages_is_one_stage(folder: Path) -> None:
    recipe = read(folder, RECIPE).recipe
    (stage,) = recipe.stages
    assert (stage.name, stage.method.name, stage.epochs, stage.steps) == ("pull", "pull", 2.0, None)
    assert stage.method.args == {"beta": 0.25, "kind": "near", "kl": 0.001}
    assert stage.train.lr == recipe.train.lr == 1e-5
    assert recipe.data.train[0].path == str(folder / "a.jsonl") and recipe.data.dev == ()


def test_stages_take_what_they_do_not_say_from_the_recipe(folder: Path) -> None:
    first, second = read(folder, STAGES).recipe.stages
    assert (first.name, first.steps, first.epochs) == ("warm-up", 30, None)
    assert (second.name, second.steps, second.epochs) == ("shove", None, 0.5)
    assert (first.train.lr, first.train.clip, first.train.prompts) == (1e-6, 1.0, 16)
    assert (second.train.lr, second.train.clip, second.train.prompts) == (2e-6, None, 16)
    assert (first.speak.temperature, second.speak.temperature, second.speak.max_tokens) == (0.9, 0.8, 64)
    assert first.critic.learn and first.critic.alone_steps == 10 and not second.critic.learn


def test_arguments_arrive_as_the_function_wants_them(folder: Path) -> None:
    recipe = read(folder, STAGES, "stages.0.method={name: pull, kl: 'linear(0.123456789, 0, 20)'}").recipe
    assert recipe.stages[0].method.args["kl"] == Schedule("linear", 0.123456789, 0.0, 20)
    assert recipe.stages[1].method.args == {"group": 4, "clip": (0.2, 0.2)}
    assert [(r.use, r.weight, dict(r.args)) for r in recipe.reward] == [
        ("short", 1.0, {"limit": 5, "copy": False}),
        ("short", -0.5, {"limit": 7, "copy": False}),
    ]


@pytest.mark.parametrize("text", [RECIPE, STAGES])
def test_a_dump_loads_back_equal_and_dumps_the_same(folder: Path, text: str) -> None:
    first = read(folder, text, "train.clip=null", "speak.max_tokens=77")
    (folder / "elsewhere").mkdir()
    again = read(folder / "elsewhere", first.text)
    assert again.recipe == first.recipe and again.text == first.text == dump(first.recipe)
    assert read(folder, text).recipe != first.recipe


def test_a_schedule_survives_the_dump_to_the_last_digit(folder: Path) -> None:
    first = read(folder, RECIPE, "method.kl=linear(0.1234567891, 1e-9, 20)")
    assert read(folder, first.text).recipe.stages[0].method.args["kl"] == Schedule("linear", 0.1234567891, 1e-9, 20)


def test_a_recipe_cannot_change_and_can_travel(folder: Path) -> None:
    recipe = read(folder, STAGES).recipe
    with pytest.raises(ValidationError):
        recipe.train.lr = 1.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        recipe.teachers["other"] = recipe.teachers["teacher"]  # type: ignore[index]
    with pytest.raises(TypeError):
        recipe.stages[1].method.args["group"] = 3  # type: ignore[index]
    assert pickle.loads(pickle.dumps(recipe)) == recipe


def test_python_data_has_the_same_shape_and_checks(folder: Path) -> None:
    data = {"student": {"model": "m/m"}, "data": {"train": folder / "a.jsonl"}, "method": "pull", "train": {"steps": 1}}
    assert isinstance(build(data, methods=METHODS, rewards=REWARDS), Recipe)
    with pytest.raises(UsageError, match=r"recipe: `train.stps` is not a key .* `train.steps`"):
        build(data | {"train": {"stps": 1}}, methods=METHODS)


def test_every_value_has_an_origin(folder: Path) -> None:
    found = read(folder, RECIPE, "speak.max_tokens=9", name="x.yaml")
    at = lambda line: f"{folder}/x.yaml:{line}"
    expected = {
        "student.model": at(1),
        "data.train.0.path": at(4),
        "data.train.0.weight": "default",
        "stages.0.method.beta": at(5),
        "stages.0.method.kind": "default",
        "stages.0.epochs": at(8),
        "train.lr": at(7),
        "train.betas": "default",
        "speak.max_tokens": "override speak.max_tokens=9",
    }
    assert {key: found.origins[key] for key in expected} == expected
    leaves = lambda x, p="": (
        [q for k, v in x.items() for q in leaves(v, f"{p}{k}.")] if isinstance(x, dict) and x else [p[:-1]]
    )
    data = yaml.safe_load(found.text)
    assert {key.partition(".")[0] for key in found.origins} == set(data)
    assert set(leaves(data["train"], "train.")) <= set(found.origins)


# --- layers ----------------------------------------------------------------------------------------------------------


def test_later_files_and_overrides_win(folder: Path) -> None:
    (folder / "base.yaml").write_text(RECIPE)
    (folder / "sub").mkdir()
    (folder / "sub" / "b.jsonl").write_text("{}")
    more = folder / "sub" / "more.yaml"
    more.write_text("train: {prompts: 4}\ndata: {train: [b.jsonl, b.jsonl]}\nspeak:\nmethod: {name: shove}\n")
    found = load([folder / "base.yaml", more], ["train.lr=3e-5", "method.group=2"], methods=METHODS)
    recipe = found.recipe
    assert (recipe.train.lr, recipe.train.prompts, recipe.train.epochs) == (3e-5, 4, 2.0)
    assert [source.path for source in recipe.data.train] == [str(folder / "sub" / "b.jsonl")] * 2
    assert recipe.stages[0].method.args["group"] == 2  # and not pull's beta: arguments go with their method
    assert found.origins["train.prompts"] == f"{more}:1" and found.origins["train.epochs"].endswith("base.yaml:8")


def test_overrides_reach_into_lists(folder: Path) -> None:
    recipe = read(folder, STAGES, "stages.1.method.group=3", "data.train.1.weight=4", "data.dev.domain=x").recipe
    assert recipe.stages[1].method.args["group"] == 3
    assert (recipe.data.train[1].weight, recipe.data.dev[0].domain) == (4.0, "x")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lr", "Not of the form key=value"),
        ("=3", "Not of the form"),
        ("train..lr=3", "Not of the form"),
        ("stages.2.steps=3", "`stages` (r.yaml:9) has the items 0 to 1, no `2`"),
        ("stages.-1.steps=3", "no `-1`"),
        ("train.lr=[1", "bracket"),
        ("student.model.name=x", "`student.model` is 'some/model' (r.yaml:1), which has no key `name` to set"),
        ("trian.lr=1", "`trian` is not a key. Did you mean `train`?"),
        ("lr=1", "That key lives at `critic.lr` and `train.lr`"),
        ("method.group=4", "`method` and `stages` exclude each other"),
        ("train.lr=fast", "`train.lr` is 'fast'; it must be a number"),
    ],
)
def test_an_override_that_means_nothing_is_named(folder: Path, override: str, words: str) -> None:
    (problem,) = refused(folder, STAGES, override)
    assert problem.startswith(f"override {override}: ") and words in problem


# --- what is refused -------------------------------------------------------------------------------------------------


def test_all_problems_of_all_layers_come_at_once_in_order(folder: Path) -> None:
    text = """\
student: {modle: x, lora: yes}
teachers: {teacher: {model: a, answers: a.jsonl}, critic: {model: c}, t: {url: "http://x"}}
data: {train: [{path: a.jsonl, weight: -1}, {path: lost.jsonl}]}
stages:
  - {method: {name: pull, bta: 1, beta: 2}}
  - {name: pull, method: shov, steps: 1, epochs: 1, critic: {learn: on}}
train: {lr: 1e-6, betas: [0.9], lr: 2e-6}
eval: {length_band: [2, 1]}
run: {seed: null, threads: 0}
"""
    found = refused(folder, text, "speak.engine=vllm", "train.clip=-1")
    expected = [
        "r.yaml:1: `student.lora` is 'yes'; it must be a whole number",
        "r.yaml:1: `student.modle` is not a key (set to 'x'). Did you mean `student.model`?",
        "r.yaml:2: `teachers.teacher` lives in one place: one of model, answers, url, cache. Found model and answers.",
        "r.yaml:2: `teachers.critic` cannot be configured: the critic learns",
        "r.yaml:2: `teachers.t.url` is an endpoint, and teachers are not asked over the network yet.",
        "r.yaml:3: `data.train.0.weight` is -1; it must be above 0 (how often",
        "r.yaml:3: `data.train.1.path` is 'lost.jsonl': lost.jsonl not found.",
        "r.yaml:5: `stages.0` has no length. Set `train.epochs` or `train.steps`",
        "r.yaml:5: `stages.0.method.bta` is not a key (set to 1). Did you mean `stages.0.method.beta`?",
        "r.yaml:5: `stages.0.method.beta` is 2; it must be at most 1.",
        "r.yaml:6: `stages.1.epochs` and `stages.1.steps` exclude each other. Keep one.",
        "r.yaml:6: `stages.1.name` is 'pull', as at r.yaml:5.",
        "r.yaml:6: `stages.1.method` is 'shov': there is no such method. Did you mean shove?",
        "r.yaml:6: `stages.1.critic.learn` is 'on'; it must be true or false",
        "r.yaml:7: `train.lr` is set a second time; the first is at r.yaml:7. Keep one.",
        "r.yaml:7: `train.betas` is [0.9]; more items are needed.",
        "r.yaml:8: `eval.length_band` is [2, 1]; it must be two rising numbers, [low, high]",
        "r.yaml:9: `run.seed` is null; it must be a whole number",
        "r.yaml:9: `run.threads` is 0; it must be at least 1",
        "override speak.engine=vllm: `speak.engine` is vllm, which opd does not talk to yet.",
        "override train.clip=-1: `train.clip` is -1; it must be above 0",
    ]
    missed = [want for want in expected if not any(problem.startswith(want) for problem in found)]
    assert not missed, (missed, found)
    assert len(found) == len(expected), [p for p in found if not any(p.startswith(want) for want in expected)]
    lines = [int(p.split(":")[1]) for p in found if p.startswith("r.yaml")]
    assert lines == sorted(lines) and found[-1].startswith("override")


def test_problems_of_every_file_come_together(folder: Path) -> None:
    (folder / "bad.yaml").write_text("train:\n\tlr: 1")
    with pytest.raises(UsageError) as caught:
        load([folder / "bad.yaml", folder / "bda.yaml", folder], ["train.lr"])
    text = str(caught.value).replace(f"{folder}/", "")
    assert "bad.yaml:2: A tab" in text and "bda.yaml: Not found. Did you mean bad.yaml?" in text
    assert f"{folder}: A folder, not a recipe. In it: bad.yaml." in text and "override train.lr: Not of" in text


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "Nothing in this file"), ("- a", "No mapping in this file"), ("\xff", "No mapping"), ("a: 'x", "quote")],
)
def test_a_file_that_is_no_recipe(folder: Path, text: str, words: str) -> None:
    (problem,) = refused(folder, text)
    assert problem.startswith("r.yaml:1: ") and words in problem


def test_what_is_missing_says_what_it_is_for(folder: Path) -> None:
    found = refused(folder, "student: {lora: 3}")
    assert sorted(found) == [
        "r.yaml:1: `data` is missing: what is asked.",
        "r.yaml:1: `stages` is missing: one method after another; a recipe of one has `method: NAME` instead.",
        "r.yaml:1: `student.model` is missing: the model that learns: a Hugging Face id, a folder, or world:NAME.",
    ]


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ("train: {learning_rate: 1}", "Here it is `train.lr`."),
        ("train: {num_train_epochs: 1}", "Here it is `train.epochs`."),
        ("train: {per_device_train_batch_size: 1}", "Here it is `train.prompts`."),
        ("speak: {max_new_tokens: 1}", "Here it is `speak.max_tokens`."),
        ("train: {max_completion_length: 1}", "Here it is `speak.max_tokens`."),
        ("max_steps: 5", "Here it is `train.steps`."),
        ("critic: {learning_rate: 5}", "Here it is `critic.lr`."),
        ("output_dir: x", "Here it is `run.dir`."),
        ("rollout: {n: 8}", "Here it is `speak`."),
        ("num_generations: 8", "`group` is an argument of a method: shove takes `group`."),
        ("speak: {kl_coef: 8}", "That is an argument of the method pull: `method.kl`."),
        ("temperature: 1", "That key lives at `speak.temperature`."),
        ("train: {max_tokens: 1}", "That key lives at `speak.max_tokens`."),
        ("train: {tokens-per-micro: 1}", "Did you mean `train.tokens_per_micro`?"),
        ("train.lr: 1", "Dots are for overrides"),
        ("speak: {xyzzy: 1}", "Keys here: engine, temperature"),
        ("betas: 1", "That key lives at `train.betas`."),
        ("run: {beta: 1}", "That is an argument of the method pull: `method.beta`."),
        (
            "run: {group: 1}",
            "That key lives at `stages.N.critic.group`. `group` is an argument of a method: shove takes",
        ),
    ],
)
def test_an_unknown_key_says_where_to_write_it(folder: Path, given: str, advice: str) -> None:
    (problem,) = refused(folder, RECIPE.partition("train:\n  lr")[0] + given, "train.steps=1")
    assert " is not a key" in problem and advice in problem


def test_arguments_of_another_method_are_named_with_it(folder: Path) -> None:
    (problem,) = refused(folder, RECIPE, "method.group=4")
    assert problem.endswith("is not a key (set to 4). pull does not take it: shove takes `group`.")
    (problem,) = refused(folder, RECIPE, "method.lmbda=4", methods={"pull": pull, "mix": lambda *, on_policy=1.0: None})
    assert "mix takes `on_policy`" in problem


def test_arguments_that_cannot_go_together_are_said_by_the_method(folder: Path) -> None:
    (problem,) = refused(folder, RECIPE, "method.kind=far", "method.beta=1")
    assert problem == "r.yaml:5: `method` cannot be built: far with beta = 1 is zero everywhere."


def test_a_number_in_quotes_and_a_word_for_a_number(folder: Path) -> None:
    assert "It is text: remove the quotes." in refused(folder, RECIPE.replace("1e-5", "'1e-5'"))[0]
    assert "Quote it." in refused(folder, RECIPE, "run.name=2024")[0]
    assert "Did you mean bfloat16?" in refused(folder, RECIPE, "student.dtype=bfloat")[0]
    assert "it must be a number, `linear(start" in refused(folder, RECIPE, "method.kl=linaer(1, 2, 3)")[0]


def test_roles_have_rules(folder: Path) -> None:
    for role in ("student", "reference", "critic", "data"):
        assert f"`teachers.{role}` cannot be configured" in refused(folder, RECIPE, f"teachers.{role}.model=a/b")[0]
    assert "is no role" in refused(folder, RECIPE, "teachers.Big.model=a/b")[0]
    assert "Found none" in refused(folder, RECIPE, "teachers.big={}")[0]
    assert "recorded scores are not read yet" in refused(folder, RECIPE, "teachers.big.cache=x")[0]


def test_settings_without_effect_are_refused(folder: Path) -> None:
    (problem,) = refused(folder, RECIPE, "student.lora_alpha=32")
    assert "has no effect: there is no adapter. Set `student.lora`" in problem


def test_secrets_are_refused_and_not_repeated(folder: Path) -> None:
    secret = "sk-" + "abcd1234" * 4
    found = refused(folder, RECIPE + f"run: {{name: {secret}, api_key: {secret}}}\n")
    assert len([p for p in found if "looks like a secret key" in p]) == 2
    assert not any(secret in problem for problem in found)


# --- files -----------------------------------------------------------------------------------------------------------


def test_paths_are_relative_to_the_file_that_names_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = folder / "here"
    here.mkdir()
    (here / "c.jsonl").write_text("")
    (here / "a.jsonl").write_text("")
    (folder / "small").mkdir()
    monkeypatch.chdir(here)
    text = "{train: [a.jsonl, c.jsonl, 'world:sort', org/set, 'org/set:main'], dev: ./b.jsonl}"
    recipe = read(folder, RECIPE.replace("some/model", "small"), "run.dir=out").recipe
    assert recipe.student.model == str(folder / "small") and recipe.run.dir == "out"
    recipe = read(folder, RECIPE.replace("\n  train: a.jsonl", " " + text)).recipe
    assert [s.path for s in recipe.data.train] == [
        str(folder / "a.jsonl"),  # not the one in the working directory
        str(here / "c.jsonl"),
        "world:sort",
        "org/set",
        "org/set:main",
    ]
    assert recipe.data.dev[0].path == str(folder / "b.jsonl")
    assert read(folder, RECIPE, "data.train=a.jsonl").recipe.data.train[0].path == str(here / "a.jsonl")


def test_a_file_that_is_not_there_names_its_neighbours(folder: Path) -> None:
    (problem,) = refused(folder, RECIPE.replace("a.jsonl", "c.jsonl"))
    assert problem.startswith("r.yaml:4: `data.train` is 'c.jsonl': c.jsonl not found. Did you mean ")
    (problem,) = refused(folder, RECIPE, "student.model=./nowhere/model")
    assert "There is no folder" in problem
    lost = read(folder, RECIPE.replace("a.jsonl", "c.jsonl"), look=False)
    assert lost.recipe.data.train[0].path == str(folder / "c.jsonl")


def test_own_functions_have_the_same_checks(folder: Path) -> None:
    (folder / "mine.py").write_text(
        "from opd.method import Share\n"
        "def tug(*, share: Share = 0.5): return None\n"
        "def brevity(prompt, text, *, limit: int = 10): return 0.0\n"
        "def loose(**anything): return None\n"
    )
    text = RECIPE.replace("{name: pull, beta: 0.25}", "{name: ./mine.py:tug, share: 0.1}")
    recipe = read(folder, text, f"reward={{use: '{folder}/mine.py:brevity', limit: 3}}").recipe
    assert (recipe.stages[0].name, recipe.stages[0].method.name) == ("tug", f"{folder}/mine.py:tug")
    assert recipe.stages[0].method.args == {"share": 0.1} and recipe.reward[0].args == {"limit": 3}
    assert "`method.shrae` is not a key" in refused(folder, text.replace("share:", "shrae:"))[0]
    assert "it must be at most 1" in refused(folder, text.replace("0.1", "7"))[0]
    assert "has no function `tugs`" in refused(folder, text.replace(":tug", ":tugs"))[0]
    assert "so a misspelt key would pass" in refused(folder, text.replace(":tug, share: 0.1", ":loose"))[0]
    (folder / "mine.py").write_text("import nothing_of_this_name\n")
    assert "stops with ModuleNotFoundError" in refused(folder, text)[0] and "(line 1)" in refused(folder, text)[0]
    assert "mine2.py not found. Did you mean" in refused(folder, text.replace("mine.py", "mine2.py"))[0]


# --- a misspelt key never passes -------------------------------------------------------------------------------------

FULL: dict[str, Any] = yaml.safe_load(
    dump(build(yaml.safe_load(STAGES.replace("2e-6", "2.0e-6")), look=False, methods=METHODS, rewards=REWARDS))
)
LETTERS = "abcdefghijklmnopqrstuvwxyz_-0123456789ABCDEFG"


def mappings(data: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every mapping of a recipe whose keys the schema knows, by where it is."""
    if isinstance(data, list):
        return [found for i, entry in enumerate(data) for found in mappings(entry, (*at, i))]
    if not isinstance(data, dict):
        return []
    inner = [found for key, entry in data.items() for found in mappings(entry, (*at, key))]
    return inner + ([at] if at != ("teachers",) and data else [])


def inside(data: Any, at: tuple[Any, ...]) -> Any:
    for part in at:
        data = data[part]
    return data


@st.composite
def misspelt(draw: st.DrawFn) -> tuple[tuple[Any, ...], str, str]:
    """A mapping of the full recipe, one of its keys, and that key with one edit that makes it no key."""
    at = draw(st.sampled_from(mappings(FULL)))
    siblings = list(inside(FULL, at))
    key = draw(st.sampled_from(siblings))
    i, letter = draw(st.integers(0, len(key) - 1)), draw(st.sampled_from(LETTERS))
    dropped, added, changed = key[:i] + key[i + 1 :], key[:i] + letter + key[i:], key[:i] + letter + key[i + 1 :]
    edits = [dropped, added, changed, key[:i] + key[i : i + 2][::-1] + key[i + 2 :]]
    wrong = draw(st.sampled_from(edits))
    place = tuple("*" if isinstance(p, int) or (at[:1] == ("teachers",) and n == 1) else p for n, p in enumerate(at))
    assume(wrong and wrong not in {k.name for k in places.at(place)} | set(siblings))
    return at, key, wrong


def renamed(data: Any, at: tuple[Any, ...], key: str, wrong: str) -> Any:
    if not at:
        return {wrong if k == key else k: v for k, v in data.items()}
    if isinstance(data, list):
        return [renamed(v, at[1:], key, wrong) if i == at[0] else v for i, v in enumerate(data)]
    return {k: renamed(v, at[1:], key, wrong) if k == at[0] else v for k, v in data.items()}


@settings(max_examples=200, deadline=None)
@given(misspelt())
def test_a_misspelt_key_in_a_file_never_passes(
    tmp_path_factory: pytest.TempPathFactory, slip: tuple[Any, str, str]
) -> None:
    at, key, wrong = slip
    path = tmp_path_factory.getbasetemp() / "misspelt.yaml"
    path.write_text(write(renamed(FULL, at, key, wrong)))
    with pytest.raises(UsageError) as caught:
        load(path, look=False, methods=METHODS, rewards=REWARDS)
    dotted = ".".join(map(str, (*at, wrong)))
    assert any(f"`{dotted}` is not a key" in problem for problem in caught.value.problems), caught.value.problems


@settings(max_examples=200, deadline=None)
@given(misspelt())
def test_a_misspelt_override_never_passes(tmp_path_factory: pytest.TempPathFactory, slip: tuple[Any, str, str]) -> None:
    at, key, wrong = slip
    path = tmp_path_factory.getbasetemp() / "whole.yaml"
    path.write_text(write(FULL))
    value = inside(FULL, at)[key]
    override = (
        ".".join(map(str, (*at, wrong)))
        + "="
        + ("x" if isinstance(value, (dict, list)) else write(value).removesuffix("\n...\n"))
    )
    with pytest.raises(UsageError) as caught:
        load(path, [override], look=False, methods=METHODS, rewards=REWARDS)
    assert any(p.startswith(f"override {override}: ") for p in caught.value.problems), caught.value.problems


def test_the_full_recipe_itself_passes(folder: Path) -> None:
    again = read(folder, write(FULL), look=False)
    assert yaml.safe_load(again.text) == FULL


# --- names and speed -------------------------------------------------------------------------------------------------


def test_names_of_other_tools_lead_to_keys_that_exist() -> None:
    ours = {key.dotted for key in places.every()} | {
        f"method.{n}" for f in catalogue().values() for n in arguments.of(f).names
    }
    assert set(places.OTHERS.values()) <= ours
    assert not [other for other in places.OTHERS if other in ours]


def test_every_key_is_documented_in_a_line() -> None:
    assert [key.dotted for key in places.every() if not 8 <= len(key.about) <= 100] == []


def test_shorthands_are_written_out_once() -> None:
    tree = shaped(from_plain(yaml.safe_load(STAGES), Origin("x", Path())))
    assert shaped(tree) == tree


def test_a_recipe_error_loads_neither_torch_nor_transformers(folder: Path) -> None:
    (folder / "r.yaml").write_text("student: {modle: x}\nmethod: gkd\nreward: exact_mach\n")
    code = (
        "import sys\nfrom opd.errors import UsageError\nfrom opd.recipe import load\n"
        "try:\n    load(sys.argv[1])\nexcept UsageError as error:\n    print(error)\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'datasets', 'rich'} & set(sys.modules)))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(folder / "r.yaml")], capture_output=True, text=True, check=True
    )
    assert "Did you mean `student.model`?" in out.stdout and "Did you mean exact_match?" in out.stdout
    assert out.stdout.splitlines()[-1] == "[]"
