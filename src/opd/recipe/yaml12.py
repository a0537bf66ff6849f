"""YAML with 1.2 scalars and positions: `1e-6` is a number, `on` and `no` are words, and every value knows its line.

PyYAML parses; only its idea of what a plain scalar means (YAML 1.1) is replaced by the core schema of YAML 1.2, chapter
10.3. Tags and repeated keys are refused: a recipe is plain data.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

import yaml

from opd.recipe.tree import Node, Origin, Problem, Scalar, under

MOST_NODES: Final = 20_000
_TAG: Final = "tag:yaml.org,2002:"
_CORE: Final = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own attribute)


class _Dumper(yaml.SafeDumper):
    """Knows the scalars of both versions of YAML, so it quotes every text that either would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _pattern, _starts in _CORE:
    for _resolver in (_Loader, _Dumper):
        _resolver.add_implicit_resolver(_TAG + _name, re.compile(rf"^(?:{_pattern})$"), _starts)


def _sequence(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.Node:
    scalars = not any(isinstance(item, (list, dict)) for item in items)
    return dumper.represent_sequence(_TAG + "seq", items, flow_style=scalars)


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    """Line breaks of other alphabets survive only as escapes."""
    return dumper.represent_scalar(_TAG + "str", text, style='"' if re.search("[\x85\u2028\u2029]", text) else None)


_Dumper.add_representer(list, _sequence)
_Dumper.add_representer(str, _text)


def write(value: Any) -> str:
    """Plain data as YAML, keys in their order, a list of scalars on one line. Read back, it is the same data."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120))


def read(text: str, at: Callable[[int], Origin]) -> tuple[Node | None, list[Problem]]:
    """The one document of `text`, and what is wrong with it.

    `at` makes the origin of a line, counted from 1. The node is None when the text is no YAML at all; a document with
    nothing in it is a null. The value of a repeated key is its last one.
    """
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        line, sentence = _syntax(error, text)
        return None, [Problem(at(line), sentence)]
    except RecursionError:
        return None, [Problem(at(1), "Nested too deeply to be a recipe.")]
    if root is None:
        return Node(None, at(1)), []
    reader = _Reader(at)
    return reader.node(root, at(root.start_mark.line + 1), ()), reader.problems


class _Reader:
    """Turns PyYAML's nodes into ours and collects problems on the way."""

    def __init__(self, at: Callable[[int], Origin]) -> None:
        self.at, self.problems, self.count = at, list[Problem](), 0

    def node(self, node: yaml.Node, origin: Origin, above: tuple[yaml.Node, ...]) -> Node:
        """`origin` is that of the key or list item: a block value may begin a line later."""
        self.count += 1
        refusal = self._refusal(node, above)
        if refusal is not None:
            self.problems += [Problem(origin, refusal)] if refusal else []
            return Node(None, origin)
        above = (*above, node)
        if isinstance(node, yaml.MappingNode):
            return Node(self._mapping(node, origin, above), origin)
        if isinstance(node, yaml.SequenceNode):
            entries = [self.node(child, self._below(origin, i, child), above) for i, child in enumerate(node.value)]
            return Node(entries, origin)
        return Node(self._scalar(node, origin), origin)

    def _refusal(self, node: yaml.Node, above: tuple[yaml.Node, ...]) -> str | None:
        """Why a node is not read; "" when that has been said; None when it is."""
        if self.count > MOST_NODES:
            return (
                f"is where {MOST_NODES} values are passed. Aliases are written out."
                if self.count == MOST_NODES + 1
                else ""
            )
        if any(node is parent for parent in above):
            return "contains itself through an alias. Write the values out."
        if node.tag.removeprefix(_TAG) not in _KINDS:
            return f"has the tag {node.tag.replace(_TAG, '!!')}, and tags are not read. Remove it."
        return None

    def _below(self, origin: Origin, part: object, node: yaml.Node) -> Origin:
        line = self.at(node.start_mark.line + 1)
        return Origin(line.label, line.folder, line.order, under(origin, part).key)

    def _mapping(self, node: yaml.MappingNode, origin: Origin, above: tuple[yaml.Node, ...]) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                where = self._below(origin, "?", key)
                self.problems.append(Problem(where, "has a list or mapping as its key. A key is a word."))
                continue
            where = self._below(origin, key.value, key)
            if key.value in entries:
                first = entries[key.value].origin.label
                self.problems.append(Problem(where, f"is set a second time; the first is at {first}. Keep one."))
            entries[key.value] = self.node(value, where, above)
        return entries

    def _scalar(self, node: yaml.Node, origin: Origin) -> Scalar:
        kind, text = node.tag.removeprefix(_TAG), str(node.value)
        try:
            value: Scalar = _KINDS[kind](text)
            return value
        except ValueError:  # a tag that the text does not fit: `!!int cat`
            self.problems.append(Problem(origin, f"is {text!r}, which is no {kind}. Remove the tag."))
            return None


_KINDS: Final[dict[str, Callable[[str], Any]]] = {
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": lambda text: int(text, {"0o": 8, "0x": 16}.get(text[:2], 10)),
    "float": lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
    "str": str,
    "map": str,
    "seq": str,
}

_SYNTAX: Final = (
    (r"found character '\\t'", "A tab where only spaces can be. Indent with spaces."),
    (r"mapping values are not allowed", "A `:` where no key can be. Check the indentation, or quote the value."),
    (r"could not find expected ':'", "Neither `key: value` nor `- item`. Add the `:`, or quote the text above."),
    (
        r"expected <block end>",
        "Fits nothing above it. Keys of one mapping, and items of one list, start in one column.",
    ),
    (r"expected ',' or '[\]}]'", "A bracket is not closed before this line, or a comma is missing."),
    (r"while scanning a quoted scalar", "A quote was opened before this line and is never closed."),
    (r"found undefined alias", "`*name` refers to no `&name` before it. Quote a text that only begins with `*`."),
    (r"expected a single document", "A second document begins (`---`). A recipe is one; several files compose."),
    (r"cannot start any token", "A value cannot begin with this character. Quote it."),
)


def _syntax(error: yaml.YAMLError, text: str) -> tuple[int, str]:
    """The line and a sentence for an error of PyYAML's."""
    if isinstance(error, yaml.reader.ReaderError):
        return text[: error.position].count("\n") + 1, "A control character. Remove it, or write it as an escape."
    if not isinstance(error, yaml.MarkedYAMLError):
        return 1, f"Not YAML: {error}."
    mark = error.problem_mark or error.context_mark
    said = f"{error.context or ''} {error.problem or ''}".strip()
    sentence = next((ours for pattern, ours in _SYNTAX if re.search(pattern, said)), f"Not YAML: {said}.")
    return (mark.line + 1 if mark else 1), sentence
