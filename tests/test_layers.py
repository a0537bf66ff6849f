"""The shape of the code, as docs/architecture.md says it: imports go down, files and functions stay small, the command
line starts without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_runs import good_run

ROOT = Path(__file__).parent.parent
SRC = ROOT / "src" / "opd"

# From the ground up. A module may import its own layer and those below; a package's name stands for all in it.
LAYERS = {
    "ground": "errors types schedule lock log interrupt metrics vocabulary spelling",
    "algebra": "math expression divergences anchors credits gates layered loss spans method methods",
    "text": "chat views texts hints rows data mixture tasks world verify_math rewards reward_model",
    "recipe": "recipe",
    "models": "head aligned signals engines batch cache model retokenize cast tally tile compare observe projector"
    " student critic replay teachers speak contest checkpoint snapshot diagnose",
    "run": "legs assemble offline record state best eval train runs",
    "look": "samples report panel",
    "front": "demo api cli __init__",
}
LEVEL = {name: level for level, names in enumerate(LAYERS.values()) for name in names.split()}
LOOK = {"errors", "log", "panel", "samples", "report", "metrics"}  # what reads a run folder knows nothing of training
LINES, LENGTH = 400, 80


def module(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


FILES = {module(path): path for path in sorted(SRC.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}
every_module = pytest.mark.parametrize("name", FILES)


def imports(node: ast.AST, typing: bool = False, inside: bool = False) -> Iterator[tuple[str, bool, int]]:
    """Modules of opd that are imported: name, whether inside a function, line. What is for the type checker is not."""
    for child in ast.iter_child_nodes(node):
        checking = typing or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test))
        within = inside or isinstance(child, ast.FunctionDef | ast.Lambda)
        if isinstance(child, ast.ImportFrom) and (child.module or "").split(".")[0] == "opd" and not checking:
            base = (child.module or "").removeprefix("opd").lstrip(".")
            for alias in child.names:
                full = f"{base}.{alias.name}".lstrip(".")
                found = full if full in FILES else base or "__init__"
                yield found, within, child.lineno
        elif isinstance(child, ast.Import) and not checking:
            yield from ((a.name[4:], within, child.lineno) for a in child.names if a.name.startswith("opd."))
        yield from imports(child, checking, within)


def level(name: str) -> int:
    return LEVEL[name.split(".")[0]]


# --- layers ----------------------------------------------------------------------------------------------------------


@every_module
def test_every_module_has_a_layer(name: str) -> None:
    assert name.split(".")[0] in LEVEL, f"{name} stands in no layer: add it here and to docs/architecture.md"


@every_module
def test_imports_go_down(name: str) -> None:
    up = [f"line {line}: {found}" for found, _, line in imports(TREES[name]) if level(found) > level(name)]
    assert not up, f"{name} imports from above"


def test_the_layers_are_those_of_the_document() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    for layer, names in LAYERS.items():
        row = next((line for line in text.splitlines() if line.startswith(f"| {layer} |")), "")
        missing = [name for name in names.split() if f"`{name}`" not in row]
        assert row and not missing, f"docs/architecture.md, row `{layer}`: {missing}"


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {n: {f for f, inside, _ in imports(t) if not inside and f != "__init__"} for n, t in TREES.items()}
    done: set[str] = set()

    def walk(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above, name])
        if name not in done:
            for found in graph[name]:
                walk(found, (*above, name))
            done.add(name)

    for name in graph:
        walk(name, ())


@pytest.mark.parametrize("name", [n for n in FILES if n.split(".")[0] in ("samples", "report", "panel")])
def test_what_looks_at_a_run_reads_its_folder_alone(name: str) -> None:
    assert {found.split(".")[0] for found, _, _ in imports(TREES[name])} <= LOOK


@pytest.mark.parametrize("name", [n for n in FILES if n.startswith("methods.")])
def test_a_method_reaches_no_model_file_or_engine(name: str) -> None:
    algebra = {"schedule", "types", *LAYERS["algebra"].split()} - {"math"}
    assert {found.split(".")[0] for found, _, _ in imports(TREES[name])} <= algebra


# --- budgets ---------------------------------------------------------------------------------------------------------


@every_module
def test_files_and_functions_stay_small(name: str) -> None:
    assert len(FILES[name].read_text().splitlines()) <= LINES
    functions = [n for n in ast.walk(TREES[name]) if isinstance(n, ast.FunctionDef)]
    size = {f.name: (f.end_lineno or 0) - f.lineno + 1 for f in functions}
    long = {function: lines for function, lines in size.items() if lines > LENGTH}
    assert not long


@every_module
def test_public_names_have_docstrings(name: str) -> None:
    tree = TREES[name]
    assert ast.get_docstring(tree), "the module"
    tops = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]
    assert [n.name for n in tops if not ast.get_docstring(n)] == []


@every_module
def test_no_module_is_a_drawer(name: str) -> None:
    assert not {"utils", "util", "helpers", "helper", "common", "misc", "tools"} & set(name.split("."))


# --- what starts without torch ---------------------------------------------------------------------------------------


def loaded(code: str) -> set[str]:
    """Which heavy packages a fresh interpreter has after `code`."""
    heavy = ("torch", "transformers", "peft", "datasets", "numpy")
    last = f"print('HEAVY', *[m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\n{last}"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    line = next((x for x in done.stdout.splitlines() if x.startswith("HEAVY")), None)
    assert line is not None, done.stderr
    return set(line.split()[1:])


def command(*arguments: str) -> str:
    return (
        f"sys.argv = ['opd', *{list(arguments)!r}]\n"
        "import contextlib, io\nfrom opd.cli import main\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()): main()"
    )


def test_python_loads_nothing_until_it_runs() -> None:
    assert loaded("import opd\nopd.load('recipes/gad.cpu.yaml', 'train.lr=1e-5').equations") <= {"numpy"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("--version",),
        ("methods",),
        ("check", "recipes/gad.cpu.yaml"),
        ("check", "--schema"),
        ("check", "recipes/gad.cpu.yaml", "train.lerning_rate=1"),
        ("train", "recipes/gad.cpu.yaml", "train.lerning_rate=1"),
    ],
)
def test_commands_that_only_read_start_without_torch(arguments: tuple[str, ...]) -> None:
    assert loaded(command(*arguments)) <= {"numpy"}


def test_samples_and_report_start_without_torch(tmp_path: Path) -> None:
    run = good_run(tmp_path, steps=12)
    assert loaded(f"{command('samples', str(run))}\n{command('report', str(run))}") <= {"numpy"}
    assert (run / "report.html").is_file()
