"""Prompts from files, folders, Hugging Face data sets and the built-in world; recorded answers; content hashes.

Nothing is dropped in silence: a `ReadReport` counts what was read, merged, skipped and empty. What a row may say is in
`rows.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NamedTuple

from opd.errors import UsageError
from opd.lock import hash_file, hash_files
from opd.rows import Parsed, RowError, parse, responses
from opd.types import Prompt

OnBad = Literal["stop", "skip"]
SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
WORLD = "world:"
WORLD_PROMPTS = {"train": 1024, "dev": 256, "test": 256}  # how many `world:NAME` is, where no number is given
SHOWN = 5  # problems that are spelled out; the others are counted

Row = tuple[str, Any]  # its place, and the row or the `RowError` it was read as


@dataclass(frozen=True, slots=True)
class ReadReport:
    """What became of a source's rows. rows = prompts + duplicates + skipped."""

    source: str
    rows: int
    prompts: int
    duplicates: int  # rows whose prompt was there already; their answers were added to it
    skipped: int  # rows that could not be read
    empty_responses: int  # recorded answers without a character; they are no answers
    problems: tuple[str, ...] = ()  # the first few reasons for skipping

    def __str__(self) -> str:
        parts = [f"{self.prompts} prompts from {self.rows} rows of {self.source}"]
        parts += [f"{self.duplicates} repeated a prompt and were merged"] * bool(self.duplicates)
        parts += [f"{self.empty_responses} recorded answers were empty"] * bool(self.empty_responses)
        parts += [f"{self.skipped} could not be read ({'; '.join(self.problems)})"] * bool(self.skipped)
        return ", ".join(parts)


class Reading(NamedTuple):
    """The prompts of a source, in its order, and what became of its rows."""

    prompts: list[Prompt]
    report: ReadReport


def read(source: str | Path, **choices: Any) -> list[Prompt]:
    """The prompts of a source; see `reading` for the choices."""
    return reading(source, **choices).prompts


def reading(
    source: str | Path,
    *,
    split: str | None = None,
    domain: str = "",
    prompt_key: str | None = None,
    response_key: str | None = None,
    on_bad_row: OnBad = "stop",
) -> Reading:
    """The distinct prompts of a source and a report.

    Args:
        source: a JSONL, JSON or parquet file; a folder of those, or one that `datasets` saved; `world:NAME` or
            `world:NAME:COUNT`; else a Hugging Face data set, `owner/name` or `owner/name:configuration`.
        split: of a data set or of the world; by default "train".
        domain: of rows that name none.
        prompt_key, response_key: columns, where they have names of their own.
        on_bad_row: "stop" raises `UsageError` with the first problems and their number; "skip" counts them.

    Rows with the same messages are one prompt with all their recorded answers, for sampling noise is told apart by
    prompt. Two different truths for one prompt are a bad row.
    """
    if str(source).startswith(WORLD):
        found = _world(str(source), split or "train", domain)
        return Reading(found, ReadReport(str(source), len(found), len(found), 0, 0, 0))

    def one(row: Any, where: str) -> Parsed:
        return parse(row, where, domain=domain, prompt_key=prompt_key, response_key=response_key)

    return _collect(str(source), _rows(source, split), one, on_bad_row)


def answers(source: str | Path, *, response_key: str | None = None) -> dict[str, tuple[str, ...]]:
    """Recorded answers by prompt id, from rows of any form that `reading` takes or of `prompt_id` and `response`.

    Raises `UsageError` for rows that cannot be read, and when there is not one answer.
    """
    found: dict[str, list[str]] = {}
    problems: list[str] = []
    for where, row in _rows(source, None):
        try:
            if isinstance(row, RowError):
                raise row
            if isinstance(row, Mapping) and isinstance(row.get("prompt_id"), str):
                key, said = row["prompt_id"], responses(row, response_key)
            else:
                prompt = parse(row, where, response_key=response_key).prompt
                key, said = prompt.id, prompt.responses
        except RowError as error:
            problems.append(f"{where} {error}")
            continue
        found.setdefault(key, []).extend(said)
    if problems:
        raise _bad_rows(str(source), problems, None)
    kept = {key: tuple(dict.fromkeys(said)) for key, said in found.items() if said}
    if not kept:
        raise UsageError(f"{source}: none of its {len(found)} prompts has an answer: give rows a `response`")
    return kept


def join(
    prompts: Iterable[Prompt],
    recorded: Mapping[str, tuple[str, ...]],
    source: str | Path,
    *,
    missing: OnBad = "stop",
) -> list[Prompt]:
    """The prompts with the recorded answers as their responses.

    Raises `UsageError` when prompts have none, saying how many and which; with `missing="skip"` they are left out.
    """
    prompts = list(prompts)
    without = [prompt for prompt in prompts if prompt.id not in recorded]
    if without and (missing == "stop" or len(without) == len(prompts)):
        shown = ", ".join(f"{_quote(p.text)} ({p.where})" if p.where else _quote(p.text) for p in without[:3])
        raise UsageError(
            f"{source} has no answer for {len(without)} of {len(prompts)} prompts, such as {shown}; it has answers for "
            f"{len(recorded)} prompts. A teacher's answer is found by the whole prompt, system message included: "
            "record the rest, or leave these prompts out"
        )
    return [replace(p, responses=recorded[p.id]) for p in prompts if p.id in recorded]


def fingerprint(source: str | Path) -> str:
    """sha256 of a file's bytes, or of names and bytes of a folder's files. For other sources, hash the prompts."""
    path = Path(source)
    if path.is_dir():
        return hash_files(sorted(file for file in path.rglob("*") if file.is_file()), path)
    if not path.is_file():
        raise UsageError(f"{source}: there is no such file")
    return hash_file(path)


def content(prompts: Iterable[Prompt]) -> str:
    """sha256 of what prompts ask, their answers, truths and domains, in order, wherever they were read from."""
    total = hashlib.sha256()
    for p in prompts:
        total.update(json.dumps([p.id, p.responses, p.answer, p.domain], ensure_ascii=False).encode())
    return total.hexdigest()


# -- rows


def _collect(source: str, rows: Iterator[Row], one: Callable[[Any, str], Parsed], on_bad_row: OnBad) -> Reading:
    found: dict[str, Prompt] = {}
    problems: list[str] = []
    count = empty = duplicates = 0
    for where, row in rows:
        count += 1
        try:
            if isinstance(row, RowError):
                raise row
            prompt, none = one(row, where)
            first = found.get(prompt.id)
            found[prompt.id] = prompt if first is None else _merged(first, prompt)
        except RowError as error:
            problems.append(f"{where} {error}")
            continue
        duplicates += first is not None
        empty += none
    if problems and on_bad_row == "stop":
        raise _bad_rows(source, problems, count)
    if not found:
        why = f"none of its {count} rows could be read: {'; '.join(problems[:SHOWN])}" if count else "it has no rows"
        raise UsageError(f"{source}: {why}")
    report = ReadReport(source, count, len(found), duplicates, len(problems), empty, tuple(problems[:SHOWN]))
    return Reading(list(found.values()), report)


def _merged(first: Prompt, again: Prompt) -> Prompt:
    for name in ("answer", "domain"):
        a, b = getattr(first, name), getattr(again, name)
        if a and b and a != b:
            raise RowError(f"asks what {first.where} asks, with another {name}: {_quote(b)}, not {_quote(a)}")
    both = tuple(dict.fromkeys((*first.responses, *again.responses)))
    answer = again.answer if first.answer is None else first.answer
    return replace(first, responses=both, answer=answer, domain=first.domain or again.domain)


def _bad_rows(source: str, problems: Sequence[str], count: int | None) -> UsageError:
    of = "" if count is None else f" of {count}"
    rest = [f"... and {len(problems) - SHOWN} more"] * (len(problems) > SHOWN)
    head = f"{source}: {len(problems)}{of} rows cannot be read; correct them, or set data.on_bad_row: skip"
    return UsageError(head, *problems[:SHOWN], *rest)


def _rows(source: str | Path, split: str | None) -> Iterator[Row]:
    """Every row of a source with its place, in a fixed order."""
    path = Path(source).expanduser()
    if path.is_file():
        yield from _file(path)
    elif path.is_dir():
        yield from _folder(path, split)
    elif path.suffix in SUFFIXES or str(source).startswith((".", "/", "~")) or len(Path(source).parts) > 2:
        names = [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else []
        near = get_close_matches(path.name, names, n=1)
        hint = f"; there is {path.parent / near[0]}" if near else ""
        raise UsageError(f"{source}: there is no such file or folder{hint}")
    else:
        yield from _hub(str(source), split)


def _file(path: Path) -> Iterator[Row]:
    if path.suffix == ".parquet":
        yield from _parquet(path)
    elif path.suffix == ".json" and _first_character(path) == b"[":
        yield from _json_list(path)
    elif path.suffix in SUFFIXES:
        yield from _json_lines(path)
    else:
        raise UsageError(f"{path}: '{path.suffix}' is no format that opd reads; {', '.join(SUFFIXES)} are")


def _first_character(path: Path) -> bytes:
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                return line.strip()[:1]
    return b""


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                yield where, json.loads(line)
            except UnicodeDecodeError as error:
                yield where, RowError(f"is not UTF-8 (byte {error.start})")
            except json.JSONDecodeError as error:
                yield where, RowError(f"is not JSON: {error.msg} at character {error.pos + 1}")


def _json_list(path: Path) -> Iterator[Row]:
    try:
        rows = json.loads(path.read_bytes())
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}:{error.lineno} is not JSON: {error.msg} at character {error.colno}") from None
    for k, row in enumerate(rows, 1):
        yield f"{path} row {k}", row


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except pyarrow.ArrowException as error:
        raise UsageError(f"{path} cannot be read as parquet: {error}") from None


def _folder(path: Path, split: str | None) -> Iterator[Row]:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        yield from _saved(path, split)
        return
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix in SUFFIXES)
    if not files:
        raise UsageError(f"{path}: the folder has no {', '.join(SUFFIXES)} file")
    for file in files:
        yield from _file(file)


def _saved(path: Path, split: str | None) -> Iterator[Row]:
    import datasets

    found = datasets.load_from_disk(str(path))
    if isinstance(found, datasets.DatasetDict):
        name = split or "train"
        if name not in found:
            raise UsageError(f"{path} has no split '{name}'; it has {', '.join(found)}")
        found = found[name]
    for k, row in enumerate(found, 1):
        yield f"{path} row {k}", row


def _hub(source: str, split: str | None) -> Iterator[Row]:
    import datasets

    name, _, configuration = source.partition(":")
    try:
        found = datasets.load_dataset(name, configuration or None, split=split or "train")
    except Exception as error:  # the hub's errors have no common kind, and each is about what the user named
        first = (str(error).splitlines() or [""])[0]
        raise UsageError(
            f"{source}: neither a file here nor a data set that Hugging Face gives "
            f"(split '{split or 'train'}'): {type(error).__name__}: {first}"
        ) from error
    for k, row in enumerate(found, 1):
        yield f"{source} row {k}", row


def _world(source: str, split: str, domain: str) -> list[Prompt]:
    from opd import world

    name, _, count = source.removeprefix(WORLD).partition(":")
    if count and not (count.isdecimal() and int(count)):
        raise UsageError(f"{source}: '{count}' is no number of prompts; write {WORLD}{name}:200, say")
    n = int(count) if count else WORLD_PROMPTS.get(split, 0)
    found = world.prompts(name, n, split=split)  # type: ignore[arg-type]  # an unknown split is refused there
    return [
        replace(
            p,
            responses=() if p.answer is None else (p.answer,),  # what verifies an answer here is one itself
            domain=domain or p.domain,
            where=f"{source} row {k}",
        )
        for k, p in enumerate(found, 1)
    ]


def _quote(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
