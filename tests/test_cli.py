"""The command line: what it says, what it returns, what it loads to say it."""

import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import driven
import pytest
from driven import at_step, run, small

from opd import cli, panel
from opd.checkpoint import complete
from opd.log import read, read_json
from opd.recipe import dump

ODD = "[red]odd [b]name [1]"  # what rich would take for markup
SHORT = {
    "stages": [{"name": "only", "method": {"name": "token_opd"}, "steps": 2}],
    "eval": {"every": 0, "length_band": None},
}


@pytest.fixture
def opd(monkeypatch, capsys):
    """`opd ...` in this process: its exit code, and what it wrote to the two streams."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["opd", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        said = capsys.readouterr()
        return stop.value.code, said.out, said.err

    return call


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run(small(tmp_path_factory.mktemp("finished"), **SHORT))[1]


@pytest.fixture
def recipe(tmp_path):
    """A recipe file in a folder with a name that is markup, and its run folder."""
    folder = tmp_path / ODD
    folder.mkdir()
    (folder / "recipe.yaml").write_text(dump(small(folder, **SHORT)))
    return folder / "recipe.yaml"


# --- what is loaded to answer ----------------------------------------------------------------------------------------

LOADED = """
import json, sys
from opd.cli import main
told = {}
for command in json.loads(sys.argv[1]):
    sys.argv = ["opd", *command]
    try:
        main()
    except SystemExit as stop:
        told[" ".join(command)] = [stop.code, sorted(m for m in ("torch", "transformers") if m in sys.modules)]
print("TOLD" + json.dumps(told))
"""


def test_quick_answers_load_neither_torch_nor_transformers(tmp_path, finished, recipe):
    bad = tmp_path / "bad.yaml"
    bad.write_text("student: {model: world:student}\ntrain: {learning_rate: 1}\nmethod: gdk\n")
    text = tmp_path / "text.yaml"
    answers = driven.answers(tmp_path / "gpt.jsonl", 4)
    text.write_text(dump(small(tmp_path, teachers={"teacher": {"answers": str(answers)}}, **SHORT)))
    commands = {
        ("--help",): 0,
        ("--version",): 0,
        ("train", "--help"): 0,
        ("methods",): 0,
        ("methods", "--json"): 0,
        ("samples", str(finished)): 0,
        ("report", str(finished), "-o", str(tmp_path / "report.html")): 0,
        ("check", str(recipe)): 0,
        ("check", "--schema"): 0,
        ("check", str(bad)): 2,
        ("train", str(bad)): 2,
        ("eval", str(bad)): 2,
        ("train", str(text)): 2,
        ("train", str(tmp_path / "none.yaml")): 2,
        ("train", "--resume", str(tmp_path / "none")): 2,
        ("train", str(recipe), "--fork", str(tmp_path / "none")): 2,
        ("train", "--nonsense"): 2,
        ("samples", str(tmp_path)): 2,
    }
    done = subprocess.run(
        [sys.executable, "-c", LOADED, json.dumps([list(c) for c in commands])], capture_output=True, text=True
    )
    assert "TOLD" in done.stdout, done.stderr
    told = json.loads(done.stdout.split("TOLD")[1])
    assert told == {" ".join(command): [code, []] for command, code in commands.items()}
    assert "Traceback" not in done.stderr


# --- train -----------------------------------------------------------------------------------------------------------


def test_training_prints_where_it_went_and_what_is_next(opd, recipe):
    code, said, wrong = opd("train", recipe, "run.name=again", "train.lr=0.002")
    folder = recipe.parent / "again"
    assert (code, wrong) == (0, "")
    lines = said.splitlines()
    assert lines[0].startswith("step 0: accuracy 0.")
    assert lines[1] == f"stage only, 2 steps: {read_json(folder / 'plan.json')['equation']}"
    assert any(line.startswith("step 1: loss ") for line in lines)
    assert any(line.startswith("finished: 2 steps, ") and line.endswith(f" s, in {folder}") for line in lines)
    assert lines[-1] == f"next: opd report {folder}"
    assert read_json(folder / "origins.json")["train.lr"] == "override train.lr=0.002"


def test_training_as_json_is_one_object(opd, recipe):
    code, said, _ = opd("train", recipe, "--json")
    told = json.loads(said)
    assert code == 0 and told.pop("run") == str(recipe.parent / "run")
    assert told.pop("verdict")["answer"] == "cannot tell yet"
    assert told == read_json(recipe.parent / "run" / "summary.json")


def test_the_live_panel_shows_names_as_they_are(tmp_path):
    from rich.console import Console

    console = Console(force_terminal=True, width=100, record=True, file=io.StringIO())
    stages = [{**SHORT["stages"][0], "name": ODD}]
    with panel.panel(console=console) as watch:
        run(small(tmp_path, **{**SHORT, "stages": stages}), watch=watch)
    assert f"{ODD}  step 2 of 2" in console.export_text()


def test_an_interrupted_run_exits_with_130_and_says_how_to_go_on(opd, recipe, monkeypatch):
    told = panel.View.see

    def see(self, kind, numbers):
        told(self, kind, numbers)
        at_step(1, lambda: signal.raise_signal(signal.SIGINT))(kind, numbers)

    monkeypatch.setattr(panel.View, "see", see)
    code, said, _ = opd("train", recipe)
    folder = recipe.parent / "run"
    assert code == 130 and said.splitlines()[-1] == f"next: opd train --resume {folder}"
    monkeypatch.setattr(panel.View, "see", told)
    assert opd("train", "--resume", folder)[0] == 0
    assert [row["step"] for row in read(folder / "metrics.jsonl")] == [0, 1, 2, 2]


def test_a_run_that_stops_itself_has_not_succeeded(opd, tmp_path):
    (tmp_path / "mine.py").write_text("def same(prompt, text):\n    return 1\n")
    path = tmp_path / "recipe.yaml"
    own = {
        "stages": [{"method": {"name": "grpo", "group": 2}, "steps": 5}],
        "train": {"max_empty_steps": 2, "prompts": 2},
    }
    reward = {"use": f"{tmp_path}/mine.py:same"}
    path.write_text(dump(small(tmp_path, **{**SHORT, **own}, reward=reward)))
    code, said, _ = opd("train", path, "--quiet")
    assert code == 1 and "2 steps in a row had nothing to learn from" in said


# --- resume and fork -------------------------------------------------------------------------------------------------


def test_a_resume_takes_the_same_recipe_and_no_other(opd, recipe):
    assert opd("train", recipe, "--quiet")[0] == 0
    folder = recipe.parent / "run"
    before = (folder / "metrics.jsonl").read_bytes()
    assert opd("train", recipe, "--resume", folder, "--quiet")[0] == 0
    for changed in ([recipe, "train.lr=0.5"], ["train.lr=0.5"]):
        code, _, wrong = opd("train", "--resume", folder, *changed)
        assert code == 2
        assert "was begun with another recipe: " in wrong and "train.lr is 0.001 there and 0.5 here" in wrong
        assert wrong.rstrip().endswith(f"--fork {folder}") and f"error: {folder} was" in wrong
    assert (folder / "metrics.jsonl").read_bytes() == before
    code, _, wrong = opd("train", recipe, "--resume", folder, "--fork", folder)
    assert code == 2 and "give one of them" in wrong


def test_a_fork_is_a_run_of_its_own(opd, finished, recipe):
    step = max(complete(finished / "checkpoints"))
    code, _, _ = opd("train", recipe, "--fork", f"{finished}@{step}", "--quiet")
    assert code == 0
    lock = read_json(recipe.parent / "run" / "lock.json")
    assert lock["origin"] == str(finished / "checkpoints" / f"step-{step:06d}")
    code, _, wrong = opd("train", recipe, "--fork", f"{finished}@77", "run.name=b")
    assert code == 2 and f"{finished} has no checkpoint of step 77; there are {step}" in wrong


def test_a_run_is_not_overwritten(opd, recipe):
    assert opd("train", recipe, "--quiet")[0] == 0
    code, _, wrong = opd("train", recipe)
    folder = recipe.parent / "run"
    assert code == 2 and wrong.startswith(f"error: the run {folder} exists and is never overwritten")


# --- errors ----------------------------------------------------------------------------------------------------------


def test_errors_are_sentences_with_their_brackets(opd, tmp_path):
    path = tmp_path / f"{ODD}.yaml"
    code, said, wrong = opd("train", path)
    assert (code, said, wrong) == (2, "", f"error: {path}: Not found.\n")
    path.write_text("student: {model: world:student}\ndata: {train: 'world:[b]sort'}\nmethod: gdk\ntrain: {steps: 1}\n")
    code, _, wrong = opd("check", path)
    assert code == 2 and wrong.startswith("error: 2 problems\n")
    assert f"{path}:2" in wrong and "[b]sort" in wrong
    assert f"{path}:3" in wrong and "Did you mean gkd?" in wrong


def test_a_wrong_command_is_not_a_traceback(opd, tmp_path):
    for arguments, said in (
        (["train", "--nonsense"], "--nonsense"),
        (["nonsense"], "nonsense"),
        (["train"], "name a recipe file"),
        (["samples"], "Missing argument"),
    ):
        code, _, wrong = opd(*arguments)
        assert code == 2 and said in wrong and "Traceback" not in wrong


def test_a_failed_run_exits_with_1_and_a_sentence(opd, tmp_path):
    (tmp_path / "mine.py").write_text("def none(prompt, text):\n    return float('nan')\n")
    path = tmp_path / "recipe.yaml"
    own = {"stages": [{"method": "grpo", "steps": 5}], "reward": {"use": f"{tmp_path}/mine.py:none"}}
    path.write_text(dump(small(tmp_path, **{**SHORT, **own, "eval": {"at_start": False, "length_band": None}})))
    code, _, wrong = opd("train", path, "--quiet")
    assert code == 1 and wrong.startswith("error: step 1, stage `grpo`: reward none gave nan")


# --- the other commands ----------------------------------------------------------------------------------------------


def test_every_json_parses(opd, finished, recipe, tmp_path):
    assert {row["name"] for row in json.loads(opd("methods", "--json")[1])} >= {"gad", "gkd", "seqkd", "token_opd"}
    planned = json.loads(opd("check", recipe, "--json")[1])
    assert planned["stages"][0]["name"] == "only" and planned["needs"] == {"teacher": "TOKEN"}
    assert json.loads(opd("check", "--schema")[1])["properties"]
    rows = json.loads(opd("samples", finished, "--json", "--n", 2)[1])
    assert len(rows) == 2 and {row["step"] for row in rows} == {2}
    told = json.loads(opd("report", finished, "-o", tmp_path / "r.html", "--json")[1])
    verdict = told["verdicts"][str(finished)]
    assert verdict["answer"] == "cannot tell yet" and verdict["evidence"] and verdict["remedy"]
    line, place = opd("report", finished, "-o", tmp_path / "r.html")[1].splitlines()
    assert line.startswith("cannot tell yet: ") and place == str(tmp_path / "r.html")
    assert Path(told["report"]).read_text().startswith("<!")


def test_a_run_is_measured_again(opd, finished):
    code, said, _ = opd("eval", finished, "--json")
    after = read_json(finished / "summary.json")["after"]
    assert code == 0 and json.loads(said) == pytest.approx(after, abs=1e-4)
    code, said, _ = opd("eval", finished)
    assert code == 0 and f"eval/accuracy                      {after['eval/accuracy']:.4f}" in said


def test_a_recipe_is_measured_before_training(opd, finished, recipe):
    code, said, _ = opd("eval", recipe, "--json")
    before = read_json(finished / "summary.json")["before"]
    assert code == 0 and json.loads(said) == pytest.approx(before, abs=1e-4)
    assert not (recipe.parent / "run").exists()


def test_what_cannot_be_measured(opd, tmp_path, recipe):
    code, _, wrong = opd("eval", tmp_path)
    assert code == 2 and "holds no recipe" in wrong
    code, _, wrong = opd("eval", recipe, "data.dev=null")
    assert code == 2 and "has no data.dev to measure on" in wrong


def test_samples_and_methods_for_people(opd, finished):
    code, said, _ = opd("samples", finished, "--n", 1)
    assert code == 0 and "step 2" in said
    code, said, _ = opd("methods")
    assert code == 0 and "token_opd" in said and "opd methods NAME" in said
    code, said, _ = opd("methods", "token_opd")
    assert code == 0 and "teacher: TOKEN" in said and "against = behaviour" in said and "Thinking Machines" in said
    code, _, wrong = opd("methods", "token_odp")
    assert code == 2 and "there is no method `token_odp`" in wrong
