"""What a recipe may not say, in which words it is refused, and that a misspelt key never passes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from recipe_examples import METHODS, RECIPE, REWARDS, STAGES, pull, read, refused

from opd.errors import UsageError
from opd.method import catalogue
from opd.recipe import arguments, build, dump, load, places
from opd.recipe.yaml12 import write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"prompt": "x"}\n')
    return tmp_path


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
        "r.yaml:2: `teachers.teacher` lives in one place: one of model, stage, answers, url, cache.",
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


def test_settings_without_effect_are_refused(folder: Path) -> None:
    (problem,) = refused(folder, RECIPE, "student.lora_alpha=32")
    assert "has no effect: there is no adapter. Set `student.lora`" in problem
    (problem,) = refused(folder, STAGES, "teachers.teacher.beams=5")
    assert "`teachers.teacher.beams` has no effect: recorded answers are not searched for" in problem
    (problem,) = refused(folder, RECIPE, "teachers.teacher.beams=5", "teachers.teacher.samples=6")
    assert "`teachers.teacher.samples` is 6, and 5 beams find 5 answers at most." in problem


def test_secrets_are_refused_and_not_repeated(folder: Path) -> None:
    secret = "sk-" + "abcd1234" * 4
    found = refused(folder, RECIPE + f"run: {{name: {secret}, api_key: {secret}}}\n")
    assert len([p for p in found if "looks like a secret key" in p]) == 2
    assert not any(secret in problem for problem in found)


# --- a misspelt key never passes -------------------------------------------------------------------------------------

FULL: dict[str, Any] = yaml.safe_load(
    dump(build(yaml.safe_load(STAGES.replace("2e-6", "2.0e-6")), look=False, methods=METHODS, rewards=REWARDS))
)
KEYS = ["method", "name", "stages", "steps", "epochs", "train", "path", "use", "args", "x"]
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


@settings(max_examples=150, deadline=None)
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


@settings(max_examples=150, deadline=None)
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


def everywhere(data: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a recipe."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [at, *(found for key, entry in inner for found in everywhere(entry, (*at, key)))]


def replaced(data: Any, at: tuple[Any, ...], value: Any) -> Any:
    if not at:
        return value
    if isinstance(data, list):
        return [replaced(v, at[1:], value) if i == at[0] else v for i, v in enumerate(data)]
    return {k: replaced(v, at[1:], value) if k == at[0] else v for k, v in data.items()}


junk = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
junk = st.recursive(junk, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(KEYS), x, max_size=3))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(everywhere(FULL)), junk)
def test_no_value_anywhere_makes_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, at: tuple[Any, ...], value: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "junk.yaml"
    path.write_text(write(replaced(FULL, at, value)))
    try:
        found = load(path, methods=METHODS, rewards=REWARDS, look=False)
    except UsageError as error:
        assert all(problem.startswith(f"{path}:") for problem in error.problems), error.problems
    else:
        assert load(path, methods=METHODS, rewards=REWARDS, look=False).text == found.text


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
