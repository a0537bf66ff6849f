"""The command line. Every command reads the same YAML, prints what to do next, and takes `--json`.

Exit codes: 0 ok, 1 the run failed, 2 bad recipe or usage, 3 a check failed, 4 out of budget, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from opd import __version__
from opd.errors import OpdError

app = typer.Typer(
    name="opd",
    help="On-policy distillation: any teacher, white-box or black-box, into your model on the model's own samples.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
DTYPES = ("float32", "bfloat16", "float16")
out = Console()
err = Console(stderr=True)

Recipes = Annotated[list[str], typer.Argument(help="YAML files, later over earlier, and `key=value` overrides.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def main() -> None:
    """The entry point: errors of opd's own become a sentence and an exit code, anything else keeps its traceback."""
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except OpdError as error:
        _complain(error)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "show"):  # a usage error of the command line itself
            error.show()
            sys.exit(2)
        raise
    sys.exit(code if isinstance(code, int) else 0)


def _say(text: str) -> None:
    """A line as it is: no markup, no colours, no breaks of rich's own."""
    out.print(text, markup=False, highlight=False, soft_wrap=True)


def _json(value: Any) -> None:
    from opd.log import clean

    _say(json.dumps(clean(value), indent=2, ensure_ascii=False, allow_nan=False))


def _complain(error: OpdError) -> None:
    problems = getattr(error, "problems", (str(error),))
    if len(problems) > 1:
        err.print(f"[bold red]error:[/] {len(problems)} problems", highlight=False)
    for problem in problems:
        head = "  " if len(problems) > 1 else "[bold red]error:[/] "
        err.print(head, end="", highlight=False)
        err.print(problem, markup=False, highlight=False, soft_wrap=True)


def _version(wanted: bool) -> None:
    if wanted:
        _say(f"opd {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None: ...


def _resolved(arguments: list[str]) -> tuple[Any, Path]:
    """The recipe that files and overrides make together, and the folder its paths are relative to."""
    from opd import recipe

    files, overrides = _split(arguments)
    if not files:
        raise typer.BadParameter("name a recipe file, such as recipes/gkd.cpu.yaml")
    return recipe.load(files, overrides), files[0].resolve().parent


def _split(arguments: list[str]) -> tuple[list[Path], list[str]]:
    """Files, and `key=value` overrides. A file may have a = in its name."""
    overrides = [a for a in arguments if "=" in a and not Path(a).is_file()]
    return [Path(a) for a in arguments if a not in overrides], overrides


@app.command()
def train(
    recipes: Annotated[list[str] | None, typer.Argument(help="YAML files and `key=value` overrides.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with this run folder.")] = None,
    fork: Annotated[str | None, typer.Option(help="Begin a new run from RUN@STEP, with the given recipe.")] = None,
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No live panel.")] = False,
) -> None:
    """Train a student, from a recipe or on from a run that was stopped."""
    from opd.panel import panel
    from opd.runs import recorded, start

    resolved = base = None
    if resume is None:
        resolved, base = _resolved(recipes or [])
    elif fork is not None:
        raise typer.BadParameter("--resume goes on with a run, --fork begins a new one: give one of them")
    elif recipes:
        recorded(resume)  # says what is wrong where it is no run
        files, overrides = _split(recipes)
        resolved, base = _resolved([*map(str, files or [resume / "recipe.yaml"]), *overrides])
    try:
        with panel(quiet or as_json) as watch:
            summary, folder = start(resolved, base, resume=resume, fork=fork, watch=watch)
    except KeyboardInterrupt:
        err.print("interrupted: the run stopped at once; `opd train --resume RUN` goes on from its last checkpoint")
        raise typer.Exit(130) from None
    from opd.report import judged

    found = judged(folder)
    if as_json:
        _json({"run": str(folder), **summary, "verdict": found.plain})
    else:
        _said(folder, summary, found.line)
    if summary["reason"] == "interrupted":
        raise typer.Exit(130)
    if summary["status"] != "finished":
        raise typer.Exit(1)


def _said(folder: Path, summary: dict[str, Any], verdict: str) -> None:
    _say(f"{summary['status']}: {summary['step']} steps, {summary['seconds']:.0f} s, in {folder}")
    if summary["reason"]:
        _say(f"  {summary['reason']}")
    for key in ("eval/accuracy", "eval/accuracy_sampled", "eval/ngram_f1"):
        if key in summary["after"]:
            before, after = summary["before"].get(key, float("nan")), summary["after"][key]
            _say(f"  {key}: {before:.3f} -> {after:.3f}")
    _say(f"  {verdict}")
    _say(f"next: opd train --resume {folder}" if summary["reason"] == "interrupted" else f"next: opd report {folder}")


@app.command()
def check(
    recipes: Annotated[list[str] | None, typer.Argument(help="YAML files and `key=value` overrides.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of recipes, for editors.")] = False,
    as_json: Json = False,
) -> None:
    """Validate a recipe and say what it will do, without loading a model."""
    from opd import recipe

    if schema:
        _json(recipe.schema())
        return
    resolved, base = _resolved(recipes or [])
    from opd.legs import legs, plan

    planned = plan(resolved.recipe, legs(resolved.recipe, base))
    if as_json:
        _json(planned)
        return
    for stage in planned["stages"]:
        _say(f"stage {stage['name']}: {stage['words']}")
        _say(f"  minimises {stage['equation']}")
    _say(f"next: opd train {' '.join(recipes or [])}")


@app.command()
def signals(
    recipes: Recipes,
    out_dir: Annotated[Path, typer.Option("--out", help="The folder to write to, or to add what is missing to.")],
    role: Annotated[str, typer.Option(help="Which teacher.")] = "teacher",
    keep: Annotated[str | None, typer.Option(help="token, top_k or hidden; what the recipe's loss needs.")] = None,
    k: Annotated[int | None, typer.Option("--k", min=1, help="How many likeliest tokens, for top_k.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Store hidden states as float32, bfloat16 or float16.")] = None,
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Write down once what a teacher says of texts that do not change, to train from later without it."""
    for name, given, known in (("keep", keep, ("token", "top_k", "hidden")), ("dtype", dtype, DTYPES)):
        if given is not None and given not in known:
            raise typer.BadParameter(f"{given!r} is none of {', '.join(known)}", param_hint=f"--{name}")
    resolved, base = _resolved(recipes)
    from opd.legs import legs

    legs(resolved.recipe, base)  # what cannot work is refused before torch is loaded
    from opd.offline import record

    choices: Any = {"keep": keep, "k": k, "dtype": dtype}
    try:
        with _counting("prompts", quiet or as_json) as progress:
            report = record(resolved.recipe, base, out_dir, role, **choices, progress=progress)
    except KeyboardInterrupt:
        err.print("interrupted: what was written stays, and the same command adds what is missing")
        raise typer.Exit(130) from None
    if as_json:
        _json(report)
        return
    _say(
        f"{report['rows']} texts, {report['tokens']} tokens, {report['bytes'] / 2**20:.1f} MiB in {out_dir}: "
        f"{report['bytes_per_token']} bytes a token ({report['keep']}; the whole distribution: "
        f"{report['bytes_per_token_whole']})"
    )
    _say(f"next: opd train {' '.join(recipes)} teachers.{role}.model=null teachers.{role}.cache={out_dir}")


@contextmanager
def _counting(what: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, a line now and then elsewhere, nothing when quiet."""
    if quiet:
        yield lambda _done, _of: None
    elif not err.is_terminal:
        yield lambda done, of: err.print(f"{done} of {of} {what}", highlight=False)
    else:
        from rich.progress import Progress

        with Progress(console=err) as bar:
            task = bar.add_task(what)
            yield lambda done, of: bar.update(task, completed=done, total=of)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One method, in full: its formula, source and arguments.")] = None,
    as_json: Json = False,
) -> None:
    """List the methods, or say all about one: who speaks, who judges, what is asked of whom."""
    from inspect import getdoc

    from opd.method import catalogue, describe, find

    named = catalogue() if name is None else {name: find(name)}
    rows = [describe(each, fn) for each, fn in named.items()]
    if as_json:
        _json(rows if name is None else rows[0])
        return
    from rich.table import Table
    from rich.text import Text

    if name is not None:
        row = rows[0]
        asks = ", ".join(f"{judge}: {says}" for judge, says in row["needs"].items()) or "nobody"
        about = re.sub(r"(?<!\n)\n(?!\n|[A-Z][\w ]+: )", " ", getdoc(named[name]) or "")  # the terminal breaks lines
        arguments = "\n".join(f"  {key} = {default}" for key, default in row["arguments"].items())
        said = f"{about}\n\nMinimises: {row['loss']}\nAsks: {asks}\nArguments:\n{arguments}"
        out.print(said, highlight=False, markup=False, soft_wrap=False)
        return
    table = Table("method", "what it does", box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(Text, (row["name"], row["about"])))
    out.print(table)
    out.print("\nopd methods NAME says all about one: formula, gradient, source, arguments", highlight=False)


@app.command()
def samples(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    step: Annotated[int | None, typer.Option(help="Which step; the newest unless given.")] = None,
    worst: Annotated[bool, typer.Option("--worst", help="Lowest scores first.")] = False,
    best: Annotated[bool, typer.Option("--best", help="Highest scores first.")] = False,
    prompt: Annotated[str | None, typer.Option(help="Only prompts that contain this text.")] = None,
    n: Annotated[int, typer.Option("-n", "--n", help="How many.")] = 8,
    as_json: Json = False,
) -> None:
    """Show what the student said, beside the teacher."""
    from opd import samples as showing

    if as_json:
        _json(showing.select(run, step=step, worst=worst, best=best, prompt=prompt, n=n))
        return
    out.print(showing.show(run, step=step, worst=worst, best=best, prompt=prompt, n=n))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; several are compared.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The file to write.")] = None,
    as_json: Json = False,
) -> None:
    """Write one self-contained HTML page about one run or several, and say of each whether it is learning."""
    from opd.report import judged, render

    place = render(runs, output or runs[-1] / "report.html")
    verdicts = {str(run): judged(run) for run in runs}
    if as_json:
        _json({"report": str(place), "verdicts": {run: found.plain for run, found in verdicts.items()}})
        return
    for run, found in verdicts.items():
        _say(f"{run}: {found.line}" if len(runs) > 1 else found.line)
    _say(str(place))


@app.command(name="eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder, or a recipe file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="`key=value` overrides.")] = None,
    as_json: Json = False,
) -> None:
    """Measure a run's student on data.dev (before training, when given a recipe)."""
    from opd.runs import measure

    numbers = measure(run, overrides or [])
    if as_json:
        _json(numbers)
        return
    for name, value in numbers.items():
        _say(f"{name:34} {value:.4f}")


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="The same in 20 seconds.")] = False,
    into: Annotated[Path, typer.Option("--dir", help="Where the run folders go.")] = Path("runs/demo"),
    as_json: Json = False,
) -> None:
    """Train one student three ways in about a minute and compare them in a report."""
    from opd.demo import show

    show(quick=quick, into=into, as_json=as_json)
