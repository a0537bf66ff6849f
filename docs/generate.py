"""Write the parts of the documentation that the code says itself: run `python docs/generate.py` after changing it.

README.md's table of methods, docs/methods.md and docs/recipe.md. A test holds the files to what this makes.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from opd.method import catalogue, describe
from opd.recipe.sections import Recipe, Section, Speak, Update

ROOT = Path(__file__).parent.parent
START, END = "<!-- methods: made by docs/generate.py -->", "<!-- /methods -->"
HEADS = "Speaks|Judges?|Loss|Gradient|Source|Differs"  # lines of a method's docstring that begin a paragraph
SAYS = {
    "TEXT": "text",
    "TOKEN": "probability of each sampled token",
    "TOP": "likeliest tokens at each token",
    "DENSE": "whole distribution at each token",
    "LAYERS": "whole distribution and layers' states at each token",
    "SCORE": "score of each answer",
}


def pages() -> dict[Path, str]:
    """Every file that is made, with what it should say."""
    readme = (ROOT / "README.md").read_text()
    before, _, rest = readme.partition(START)
    after = rest.partition(END)[2]
    return {
        ROOT / "README.md": f"{before}{START}\n{table()}{END}{after}",
        ROOT / "docs" / "methods.md": methods(),
        ROOT / "docs" / "recipe.md": recipe(),
    }


def table() -> str:
    """The methods as a Markdown table, a row each."""
    lines = ["| method | who speaks | who is asked, for what | what it does | recipes |", "|---|---|---|---|---|"]
    for name, fn in catalogue().items():
        row = describe(name, fn)
        cells = [f"[`{name}`](docs/methods.md#{name})", row["speaks"], asked(row["needs"]), row["about"].rstrip(".")]
        found = [(machine, f"recipes/{name}.{machine}.yaml") for machine in ("cpu", "1gpu", "paper")]
        links = [f"[{machine}]({path})" for machine, path in found if (ROOT / path).is_file()]
        lines.append(f"| {' | '.join([*cells, ' '.join(links)])} |")
    return "\n".join(lines) + "\n"


def asked(needs: dict[str, str]) -> str:
    """Whom a method asks, for what, in words."""
    return "; ".join(f"{judge}: {SAYS[says]}" for judge, says in needs.items()) or "nobody"


def methods() -> str:
    """docs/methods.md: what every method's own file says."""
    out = [
        "# Methods",
        "",
        "Made from the code by `python docs/generate.py`. `opd methods` prints the same in short.",
        "",
    ]
    for name, fn in catalogue().items():
        row = describe(name, fn)
        said = re.sub(rf"\n(?=(?:{HEADS})\b)", "\n\n", inspect.getdoc(fn) or "")
        out += [f"## {name}", "", re.sub(r"\n{3,}", "\n\n", said), ""]
        out += [f"Asked: {asked(row['needs'])}. With its defaults it minimises", "", f"    {row['loss']}", ""]
        if row["arguments"]:
            out += ["| argument | default |", "|---|---|"]
            defaults = {k: p.default for k, p in inspect.signature(fn).parameters.items()}
            out += [f"| `{argument}` | `{plain(default)}` |" for argument, default in defaults.items()]
            out += [""]
    return "\n".join(out)


def recipe() -> str:
    """docs/recipe.md: every key of a recipe."""
    out = [
        "# Every key of a recipe",
        "",
        "Made from the code by `python docs/generate.py`. `opd check --schema` prints the same for editors. Scalars",
        "are YAML 1.2; `key=value` on the command line overrides; several files compose left to right. A stage takes",
        "`train` and `speak` from the recipe, with its own changes on top; over a list of stages, a mapping changes",
        "them by name, and null takes one out.",
        "",
    ]
    for key, field in Recipe.model_fields.items():
        inner, said = _section(field.annotation), field.description or ""
        out += [f"## {key}", "", f"{said[:1].upper()}{said[1:]}.", ""]
        if inner is not None:
            out += ["| key | default | what it is |", "|---|---|---|", *_rows(inner, ""), ""]
    return "\n".join(out)


def _section(annotation: Any) -> type[Section] | None:
    """The section that a field's type holds, if any."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    inner = [_section(each) for each in getattr(annotation, "__args__", ())]
    return next((each for each in inner if each is not None), None)


def _rows(section: type[Section], prefix: str) -> list[str]:
    rows = []
    for name, field in section.model_fields.items():
        inner = _section(field.annotation)
        if name == "args":
            rows.append(f"| `{prefix}ARGUMENT` | | the arguments of the function that is named |")
        elif inner is not None and not prefix and inner not in (Update, Speak):  # those have tables of their own
            rows += _rows(inner, f"{name}.")
        else:
            rows.append(f"| `{prefix}{name}` | {_default(field)} | {field.description} |".replace("  ", " "))
    return rows


def _default(field: Any) -> str:
    if field.default is PydanticUndefined:
        return "required" if field.default_factory is None else ""
    value = field.default
    if isinstance(value, Section) or value == "":
        return ""
    return f"`{plain(value)}`"


def plain(value: Any) -> str:
    """A default as YAML writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return f"[{', '.join(map(plain, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def main() -> None:
    """Write what changed."""
    for path, text in pages().items():
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)
            print(f"wrote {re.sub(f'^{re.escape(str(ROOT))}/', '', str(path))}")


if __name__ == "__main__":
    main()
