"""The record of a run: a folder of JSONL, JSON and YAML that survives kill -9, a full disk and a move elsewhere.

Streams (`metrics`, `perf`, `samples`, `answers`, `events`) grow by one line a write, so a killed process leaves at most
one torn last line, which readers ignore and the next writer cuts. Documents (`recipe.yaml`, `plan.json`) are replaced
whole. `metrics`, `samples` and `answers` hold nothing but what follows from recipe, data, seed and code.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import date
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from opd.errors import OpdError, UsageError

STREAMS = ("metrics", "perf", "samples", "answers", "events")
Kind = Literal["warning", "stage", "checkpoint", "best", "stop", "resume", "note"]
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room on the disk, in the quota, below the file size limit
_LEADING = ("step", "stage", "event")  # what a person looks for first in a line


class RunFolder:
    """One run on disk. Reading needs no lock; the first write takes one, so two processes cannot write one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._streams: dict[str, FileIO] = {}
        self._writer: FileIO | None = None

    @classmethod
    def create(cls, parent: Path, name: str = "", method: str = "run") -> RunFolder:
        """A new, empty run below `parent`: `name`, or else method-date-number. Never one that exists (UsageError)."""
        parent.mkdir(parents=True, exist_ok=True)
        if name:
            return cls._claim_named(parent, name)
        stem = f"{_slug(method)}-{date.today().isoformat()}"
        number = 1
        while True:
            path = parent / f"{stem}-{number:02d}"
            try:
                path.mkdir()
            except FileExistsError:
                number += 1
                continue
            return cls(path)

    @classmethod
    def _claim_named(cls, parent: Path, name: str) -> RunFolder:
        if _slug(name) != name:
            raise UsageError(
                f"run name {name!r} is not a plain folder name: use letters, digits, '.', '_' and '-', "
                f"for example {_slug(name)!r}"
            )
        path = parent / name
        try:
            path.mkdir()
        except FileExistsError:
            raise UsageError(
                f"the run {path} exists and is never overwritten: continue it with `opd train --resume {path}`, "
                f"branch off it with `--fork {path}@STEP`, or choose another run.name"
            ) from None
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run. Raises UsageError where there is none."""
        if not path.is_dir():
            near = sorted(p.name for p in path.parent.iterdir() if p.is_dir())[-5:] if path.parent.is_dir() else []
            found = f"; {path.parent} has {', '.join(near)}" if near else ""
            raise UsageError(f"there is no run at {path}{found}")
        return cls(path)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    # Streams ------------------------------------------------------------------------------------------------------

    def metrics(self, record: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl; keys sorted, so that equal numbers are equal bytes.

        Raises OpdError when a value is nan or infinite: such a step must stop the run, not decorate its curve.
        """
        bad = [f"{key} is {value}" for key, value in _leaves(record) if not math.isfinite(value)]
        if bad:
            raise OpdError(
                f"step {record.get('step', '?')}: {', '.join(sorted(bad))}. The update of this step cannot be trusted, "
                f"so the run stops here and keeps its checkpoints in {self.checkpoints}. A resume would meet it again: "
                "begin a new run from one with --fork RUN@STEP and a lower train.lr or a tighter train.clip"
            )
        rest = sorted(key for key in record if key not in _LEADING)
        self._append("metrics", {key: record[key] for key in (*_LEADING, *rest) if key in record})

    def perf(self, record: Mapping[str, Any]) -> None:
        """One line of perf.jsonl: times, rates, memory; nothing that a resume must reproduce."""
        self._append("perf", record)

    def sample(self, record: Mapping[str, Any]) -> None:
        """One line of samples.jsonl."""
        self._append("samples", record)

    def answer(self, role: str, prompt_id: str, response: str, finished: bool) -> None:
        """One line of answers.jsonl: what a teacher in this process said, in the form of recorded answers."""
        self._append("answers", {"role": role, "prompt_id": prompt_id, "response": response, "finished": finished})

    def event(self, step: int, kind: Kind, message: str, remedy: str = "") -> None:
        """One line of events.jsonl: something that happened, and for a warning what to do about it."""
        self._append("events", {"step": step, "kind": kind, "message": message, "remedy": remedy})

    def _append(self, stream: str, record: Mapping[str, Any]) -> None:
        file = self._stream(stream)
        whole = file.seek(0, os.SEEK_END)
        kept = f"Its first {whole} bytes, all whole lines, and the checkpoints are kept"
        with full_disk(f"{self.path / stream}.jsonl could not grow", kept, self.path):
            try:
                _write_all(file, json_line(record))
            except OSError:
                with suppress(OSError):
                    file.truncate(whole)
                raise

    def _stream(self, stream: str) -> FileIO:
        file = self._streams.get(stream)
        if file is None:
            self.hold()
            path = self.path / f"{stream}.jsonl"
            file = self._streams[stream] = FileIO(path, "a+")
            whole = _whole_bytes(path)
            if whole < path.stat().st_size:
                file.truncate(whole)
        return file

    def offsets(self) -> dict[str, int]:
        """Bytes of each stream so far, on disk before this returns: what a checkpoint records for `rewind`."""
        found = {}
        with full_disk(f"{self.path}: the record could not reach the disk", "Earlier checkpoints are kept", self.path):
            for stream in STREAMS:
                file = self._stream(stream)
                os.fsync(file.fileno())
                found[stream] = file.seek(0, os.SEEK_END)
        return found

    def rewind(self, offsets: Mapping[str, int]) -> None:
        """Cut each named stream to what a checkpoint recorded; streams not named are left alone.

        Raises OpdError, before anything is cut, when a stream is shorter than the checkpoint says.
        """
        files = {stream: self._stream(stream) for stream in offsets}
        short = [
            f"{stream}.jsonl has {files[stream].seek(0, os.SEEK_END)} bytes, the checkpoint was written at {size}"
            for stream, size in offsets.items()
            if files[stream].seek(0, os.SEEK_END) < size
        ]
        if short:
            raise OpdError(
                f"{self.path}: {'; '.join(short)}. The record was cut after the checkpoint, so a resume cannot "
                "continue it exactly; restore the file, or fork the checkpoint into a new run with --fork"
            )
        for stream, size in offsets.items():
            files[stream].truncate(size)
            os.fsync(files[stream].fileno())

    # Documents ----------------------------------------------------------------------------------------------------

    def write_json(self, name: str, value: Any) -> None:
        """Replace plan.json, lock.json, ... whole: readers see the old one or the new one, never half of one."""
        text = json.dumps(clean(value), indent=2, ensure_ascii=False) + "\n"
        self.write_text(name, text)

    def write_text(self, name: str, text: str) -> None:
        """Replace a text document whole (recipe.yaml)."""
        self.hold()
        path = self.path / name
        with full_disk(f"{path} could not be written", "Its earlier version is kept", self.path):
            replace_file(path, text.encode("utf-8", "backslashreplace"))

    def read_json(self, name: str) -> Any:
        """The document, or None where it was not written yet."""
        return read_json(self.path / name)

    # Lifetime -----------------------------------------------------------------------------------------------------

    def hold(self) -> None:
        """Hold the folder for writing until this process ends or `close`; file systems without locks are let through.

        Raises UsageError when another process writes it.
        """
        if self._writer is not None:
            return
        writer = FileIO(self.path / ".writer", "a+")
        try:
            fcntl.lockf(writer, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                writer.close()
                raise UsageError(
                    f"another process is writing {self.path}; wait for it, stop it, or start a run of another name"
                ) from None
        self._writer = writer

    def discard(self, unless: str) -> None:
        """Remove a run that came to nothing, unless this document was written."""
        self.close()
        if not (self.path / unless).exists():
            shutil.rmtree(self.path, ignore_errors=True)

    def close(self) -> None:
        for file in (*self._streams.values(), self._writer):
            if file is not None:
                file.close()
        self._streams, self._writer = {}, None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


# Reading ----------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL stream; [] where there is no file. A torn last line is ignored.

    Raises OpdError with file:line for a broken line anywhere else, or one that is not an object.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            raise OpdError(f"{path}:{number}: not JSON: {line[:60]!r}; the lines around it are intact") from None
        if not isinstance(record, dict):
            raise OpdError(f"{path}:{number}: expected one JSON object a line, found {line[:60]!r}")
        records.append(record)
    return records


def said_before(folder: Path) -> dict[tuple[str, str], list[tuple[str, bool]]]:
    """What models answered to prompts, by (role, prompt id): text and whether it ended. They are not asked again."""
    said: dict[tuple[str, str], list[tuple[str, bool]]] = {}
    for row in read(folder / "answers.jsonl"):
        said.setdefault((row["role"], row["prompt_id"]), []).append((row["response"], row["finished"]))
    return said


def read_json(path: Path) -> Any:
    """A JSON document, or None where there is none. Raises OpdError when it is broken."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise OpdError(f"{path}: not JSON: {error}") from None


# Writing ----------------------------------------------------------------------------------------------------------


def json_line(record: Mapping[str, Any]) -> bytes:
    """One record as one line of bytes; floats in their shortest exact form, nan and infinity as null."""
    text = json.dumps(clean(record), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"  # a lone surrogate becomes \udxxx, which is JSON again


def replace_file(path: Path, content: bytes) -> None:
    """Put `content` at `path` durably and at once; on any failure the old file stands and nothing else is left."""
    half = path.with_name(f".{path.name}.tmp")
    try:
        with FileIO(half, "w") as file:
            _write_all(file, content)
            os.fsync(file.fileno())
        half.replace(path)
    except OSError:
        half.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make names created, renamed or removed in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_full(error: BaseException) -> bool:
    """Whether this is the disk (or the quota) being full; the safetensors writer says it only in words."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    return type(error).__name__ == "SafetensorError" and any(f"os error {number})" in str(error) for number in _FULL)


@contextmanager
def full_disk(what: str, kept: str, folder: Path) -> Iterator[None]:
    """Turn a full disk into one sentence: what failed, what is kept, what to do. Other errors pass."""
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        free = shutil.disk_usage(folder).free / 2**20
        raise OpdError(
            f"{what}: the disk is full ({free:.1f} MiB free). {kept}. Make room (fewer or smaller checkpoints: "
            "run.keep), then continue with `opd train --resume`"
        ) from error


def _write_all(file: FileIO, content: bytes) -> None:
    """All of it, in one call where the system allows; after a short write (a nearly full disk) the next one fails."""
    view = memoryview(content)
    while view:
        view = view[os.write(file.fileno(), view) :]


def _whole_bytes(path: Path) -> int:
    """Length of the file up to and including its last newline, read from the end."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
    return 0


def clean(value: Any) -> Any:
    """The value in JSON's types: nan and infinity become null, zero-dimensional arrays and tensors their number."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        return clean(value.item())
    raise TypeError(f"{value!r} of type {type(value).__name__} has no place in a JSON record")


def _leaves(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in record.items():
        number = value.item() if hasattr(value, "item") else value
        if isinstance(number, float):
            yield key, number
        elif isinstance(number, list | tuple):
            yield from _leaves({f"{key}[{i}]": item for i, item in enumerate(number)})
        elif isinstance(number, Mapping):
            yield from _leaves({f"{key}.{inner}": item for inner, item in number.items()})


def _slug(text: str) -> str:
    """A folder name from any text: a method given as ./mine.py:brevity becomes mine.py-brevity."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:80] or "run"
