"""The documents: links resolve, Python runs, tables are those of the code, every metric is explained."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import test_contract

import opd
from opd.recipe.places import every

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "recipes").rglob("*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXAMPLE = ROOT / "docs" / "examples" / "coached.py"


def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(page.read_text()) if kind == language]


# --- every page ------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head).lower().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    text = BLOCK.sub("", page.read_text())
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_that_are_named_are_there(page: Path) -> None:
    named = re.findall(r"`((?:tests|recipes|docs|src|bench)/[a-z0-9_./-]+\.\w+)`", page.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "recipe.md"], ids=lambda p: str(p.relative_to(ROOT)))
def test_keys_that_are_named_are_keys(page: Path) -> None:
    """`train.lr`, `eval.length_band` and the like, wherever they stand in backticks."""
    known = {key.dotted for key in every()} | {key.within[0] for key in every() if key.within}
    sections = "student|critic|data|speak|train|eval|run"
    named = re.findall(rf"`((?:{sections})\.[a-z_0-9]+)(?:[:=][^`]*)?`", page.read_text())
    modules = {path.stem for path in (ROOT / "src" / "opd").iterdir()}
    wrong = {n for n in named if n not in known and not (n.split(".")[0] in modules and defined(n))}
    assert not wrong


def defined(dotted: str) -> bool:
    module, _, name = dotted.partition(".")
    path = ROOT / "src" / "opd" / f"{module}.py"
    return path.is_file() and re.search(rf"def {name}\b|class {name}\b", path.read_text()) is not None


def test_commands_that_are_named_are_commands() -> None:
    """In the documents, and in what the program says to people."""
    from typer.main import get_command

    from opd.cli import app

    known = set(getattr(get_command(app), "commands", {}))
    sources = [*PAGES, *(ROOT / "recipes").rglob("*.yaml"), *(ROOT / "src" / "opd").rglob("*.py")]
    named = {word for path in sources for word in re.findall(r"(?:`|^    |next: )opd ([a-z]+)", path.read_text(), re.M)}
    assert "train" in named and named <= known


# --- what the code says itself ---------------------------------------------------------------------------------------


def test_the_pages_that_are_made_are_up_to_date() -> None:
    old = [str(p.relative_to(ROOT)) for p, text in generate().pages().items() if p.read_text() != text]
    assert not old, "run `python docs/generate.py`"


AREAS = """loss grad kl entropy ratio reward score group length critic tokens lr time rate memory eval
overlap position leak clip gate mismatch text"""
METRIC = re.compile(rf"(?:{'|'.join(AREAS.split())})/[a-z0-9_<>{{}}/]+")


def emitted() -> set[str]:
    """Every `area/name` that stands in the code, the parts that are filled in as {}."""
    found: set[str] = set()
    for path in (ROOT / "src" / "opd").rglob("*.py"):
        tree = ast.parse(path.read_text())
        parts = {id(v) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for v in n.values}
        for node in ast.walk(tree):
            text = ""
            if isinstance(node, ast.JoinedStr):
                text = "".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
                text = node.value
            if METRIC.fullmatch(text) or text in ("{}/mean", "{}/std"):
                found.add(text)
    return found


def documented() -> set[str]:
    text = (ROOT / "docs" / "reading-the-metrics.md").read_text()
    return {found for code in re.findall(r"`([^`]+)`", text) for found in METRIC.findall(code)}


def test_every_metric_of_the_code_is_explained() -> None:
    plain = {name for name in emitted() if "{" not in name}
    assert len(plain) > 30, "the search finds metrics"
    assert sorted(plain - documented()) == []


def test_every_metric_that_is_explained_exists() -> None:
    """A name in the document is a name in the code, or fits one that is filled in."""
    patterns = [re.compile(re.escape(name).replace(r"\{\}", "[a-z0-9_<>]+")) for name in emitted()]
    families = {name for name in documented() if name.endswith(("/", "/X_low", "/X_high"))}
    unknown = [name for name in documented() - families if not any(p.fullmatch(name) for p in patterns)]
    assert unknown == []


# --- Python that stands in the documents -----------------------------------------------------------------------------


def test_the_readmes_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks(ROOT / "README.md", "python")
    assert len(code.strip().splitlines()) <= 10
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(code, "README.md", "exec"), {})
    report = Path(said.getvalue().strip().splitlines()[-1])
    assert report.name == "report.html" and report.is_file()


def test_python_resumes_and_opens_runs(tmp_path: Path) -> None:
    loaded = opd.load(
        {
            "student": {"model": "world:student"},
            "data": {"train": "world:sort:8", "dev": "world:sort:4"},
            "reward": "task",
            "method": "sft",
            "train": {"steps": 2, "prompts": 4},
            "speak": {"max_tokens": 12},
            "run": {"dir": str(tmp_path), "name": "one", "threads": 1},
        }
    )
    seen: list[str] = []
    run = opd.run(loaded, watch=lambda kind, _numbers: seen.append(kind))
    assert {"stage", "step", "eval"} <= set(seen)
    assert opd.open_run(run.path).summary == run.summary == opd.resume(run.path).summary
    assert [row["step"] for row in run.metrics() if "event" not in row] == [1, 2]
    with pytest.raises(opd.errors.UsageError, match="there is no run"):
        opd.open_run(tmp_path / "two")
    with pytest.raises(opd.errors.UsageError, match="change plain data itself"):
        opd.load({"student": {}}, "train.lr=1")
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = opd.lod


# --- the example of a method of one's own ----------------------------------------------------------------------------


def test_the_example_is_the_file() -> None:
    assert EXAMPLE.read_text() in blocks(ROOT / "docs" / "adding-a-method.md", "python")


def test_the_examples_recipe_says_what_the_page_says(tmp_path: Path) -> None:
    page = ROOT / "docs" / "adding-a-method.md"
    (recipe,) = blocks(page, "yaml")
    (printed,) = blocks(page, "text")
    (tmp_path / "r.yaml").write_text(recipe)
    (tmp_path / "coached.py").write_text(EXAMPLE.read_text())
    (equation,) = opd.load(tmp_path / "r.yaml").equations.values()
    assert printed.splitlines()[1] == f"  minimises {equation}"
    with pytest.raises(opd.errors.UsageError, match="reads the task's reward, and the recipe has none"):
        _ = opd.load(tmp_path / "r.yaml", "reward=[]").equations


def over_methods(test: Any) -> bool:
    marks = getattr(test, "pytestmark", [])
    return any(mark.name == "parametrize" and mark.args[0] == "name" for mark in marks)


CONTRACT = [n for n, test in vars(test_contract).items() if n.startswith("test_") and over_methods(test)]


@pytest.mark.parametrize("promise", [name for name in CONTRACT if "ranks" not in name])
def test_the_example_keeps_the_contract(promise: str, request: pytest.FixtureRequest) -> None:
    test: Any = getattr(test_contract, promise)
    wanted = test.__code__.co_varnames[: test.__code__.co_argcount]
    given = {name: request.getfixturevalue(name) for name in wanted if name != "name"}
    test(f"{EXAMPLE}:coached", **given)


def test_the_contract_was_found() -> None:
    assert len(CONTRACT) >= 10


def test_the_method_list_is_json() -> None:
    """What the table is made of is what the command prints."""
    from opd.method import catalogue, describe

    rows = [describe(name, fn) for name, fn in catalogue().items()]
    readme = (ROOT / "README.md").read_text()
    assert json.loads(json.dumps(rows)) == rows and all(f"[`{row['name']}`]" in readme for row in rows)
