"""Recipes: what they become, and how files, overrides and paths compose."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError
from recipe_examples import METHODS, RECIPE, REWARDS, STAGES, read, refused

from opd.errors import UsageError
from opd.recipe import Recipe, build, dump, load
from opd.recipe.layers import shaped
from opd.recipe.tree import Origin, from_plain
from opd.schedule import Schedule


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"prompt": "x"}\n')
    return tmp_path


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
    assert first.critic.learn and first.critic.alone_steps == 10 and second.critic.learn is None


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


def test_shorthands_are_written_out_once() -> None:
    tree = shaped(from_plain(yaml.safe_load(STAGES), Origin("x", Path())))
    assert shaped(tree) == tree


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


def test_stages_are_changed_and_taken_out_by_name(folder: Path) -> None:
    (folder / "base.yaml").write_text(STAGES)
    (folder / "ablation.yaml").write_text("stages: {shove: {method: {group: 2}, steps: 7, epochs: null}}\n")
    files = [folder / "base.yaml", folder / "ablation.yaml"]
    both = load(files, methods=METHODS, rewards=REWARDS)
    second = both.recipe.stages[1]
    assert (second.method.args["group"], second.steps, second.epochs, second.train.clip) == (2, 7, None, None)
    assert both.origins["stages.1.method.group"].endswith("ablation.yaml:1")
    one = load(files, ["stages.shove.method.group=3", "stages.warm-up=null"], methods=METHODS, rewards=REWARDS)
    assert [(s.name, s.method.args["group"]) for s in one.recipe.stages] == [("shove", 3)]
    (folder / "ablation.yaml").write_text("stages: {warmup: null}\n")
    with pytest.raises(UsageError, match=r"ablation.yaml:1: `stages` names no stage `warmup` .* warm-up, shove"):
        load(files, methods=METHODS, rewards=REWARDS)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lr", "Not of the form key=value"),
        ("=3", "Not of the form"),
        ("train..lr=3", "Not of the form"),
        ("stages.2.steps=3", "`stages` (r.yaml:9) has the items 0 to 1, no `2`"),
        ("stages.-1.steps=3", "no `-1`"),
        ("stages.shov.steps=3", "no `shov`"),
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
    assert "not a model of the built-in world" in refused(folder, RECIPE, "student.model=world:studnet")[0]
    assert "not a task of the built-in world" in refused(folder, RECIPE, "data.train=world:srot:20")[0]
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
