"""What a judge says of texts that do not change, written once to a folder and heard from it later.

    index.json               whose words, of what kind, at which temperatures
    head.safetensors         the judge's output head, where its hidden states are kept
    00000.safetensors ...    some rows each: their tensors end to end, and in the metadata which rows they are
    answers.jsonl            texts that were sampled on the way, so that the same are learned from

A row is found by what it is, never by where it stood: the prompt, the tokens as the judge read them, the view, the
temperature, and who judged. What is not found is an error with the prompt's name. No torch at import: what a folder can
give is known before anything loads.

Shapes: N loss tokens, n of a row, K likeliest tokens, H width.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from opd.errors import OpdError, UsageError
from opd.log import full_disk, json_line, read_json, replace_file, sync_folder
from opd.types import Rollout, Says

if TYPE_CHECKING:
    from torch import Tensor

    from opd.batch import Batch
    from opd.head import Head
    from opd.signals import Dense, Signal

Keep = Literal["token", "top_k", "hidden"]
Dtype = Literal["float64", "float32", "bfloat16", "float16"]
GIVES: dict[Keep, Says] = {"token": Says.TOKEN, "top_k": Says.TOP, "hidden": Says.DENSE}
TENSORS = {"token": ("logp",), "top_k": ("logp", "ids", "top"), "hidden": ("hidden",)}
FORMAT = 1


@dataclass(frozen=True)
class Index:
    """Whose words a folder holds, and of what kind. Two folders with the same index could be one."""

    role: str
    model: str  # as the recipe names it
    teacher: str  # fingerprints: of the judge's weights,
    tokenizer: str  # of what turns text into ids,
    student: str  # of the model whose samples were judged; "" where the texts were given
    keep: Keep
    dtype: Dtype  # of the hidden states
    temperature: float | None  # of the sampled tokens' log-probabilities; None where hidden states give any
    k: int  # likeliest tokens, or all of a smaller vocabulary
    top_temperature: float
    vocab: int
    width: int
    scale: float  # of the head
    softcap: float | None
    format: int = FORMAT

    @property
    def says(self) -> Says:
        return GIVES[self.keep]

    @property
    def bytes_per_token(self) -> int:
        """On disk, of one loss token."""
        logp = 8 if self.dtype == "float64" else 4
        wide = {"float64": 8, "float32": 4}.get(self.dtype, 2)
        kept = min(self.k, self.vocab)
        return {"token": logp, "top_k": logp + (logp + 4) * kept, "hidden": wide * self.width}[self.keep]

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits of all of it: rows that are found by it say the same."""
        return hashlib.blake2b(json_line(asdict(self)), digest_size=8).hexdigest()


def read_index(folder: Path) -> Index:
    """The index of a folder. Raises `UsageError` where there is none, or one that this version cannot read."""
    found = read_json(folder / "index.json")
    if found is None:
        raise UsageError(f"{folder} holds no recorded signals: make them with `opd signals RECIPE --out {folder}`")
    if found.get("format") != FORMAT or found.keys() != {f.name for f in fields(Index)}:
        raise UsageError(
            f"{folder} was recorded in format {found.get('format')}, and this version reads {FORMAT}: record it anew"
        )
    return Index(**found)


def key(rollout: Rollout, view: str, index: Index) -> str:
    """What a row is, in 32 hex digits: whoever says the same to the same prompt is heard in the same way."""
    spoken = [i for i, mask in enumerate(rollout.mask) if mask]
    judged = [index.teacher, index.tokenizer, index.temperature, view]
    everything = json.dumps([*judged, rollout.prompt.id, list(rollout.tokens), spoken])
    return hashlib.blake2b(everything.encode(), digest_size=16).hexdigest()


class Cache:
    """A folder of recorded signals: read by rows as they are needed, and grown by whole shards."""

    def __init__(self, folder: Path, device: Any = "cpu") -> None:
        self.folder, self.index, self.device = folder, read_index(folder), device
        self._where: dict[str, tuple[str, int, int]] = {}  # key: shard, first token, tokens
        self._files: dict[str, Any] = {}
        for path in sorted(folder.glob("[0-9]*.safetensors")):
            self._take_in(path.name)

    @classmethod
    def begin(cls, folder: Path, index: Index, head: Head | None, device: Any = "cpu") -> Cache:
        """A folder to write to: a new one, or one that holds the same judge's words and lacks some.

        Raises `UsageError` where it holds others.
        """
        from safetensors.torch import save_file

        if (folder / "index.json").is_file():
            there = asdict(read_index(folder))
            if changed := {k: v for k, v in asdict(index).items() if v != there[k]}:
                said = ", ".join(f"{k} is {there[k]!r} there and {v!r} now" for k, v in changed.items())
                raise UsageError(f"{folder} holds other signals: {said}. Choose another folder with --out")
        else:
            if head is not None:
                own = {"weight": head.weight[: head.vocab].detach().cpu().contiguous()}
                if head.bias is not None:
                    own["bias"] = head.bias[: head.vocab].detach().cpu().contiguous()
                with full_disk(f"{folder}: the head could not be written", "Nothing is lost", folder):
                    save_file(own, folder / "head.safetensors")
            replace_file(folder / "index.json", json_line(asdict(index)))
        return cls(folder, device)

    @property
    def rows(self) -> int:
        """How many rows are there."""
        return len(self._where)

    @property
    def tokens(self) -> int:
        """How many loss tokens are there."""
        return sum(count for _, _, count in self._where.values())

    @property
    def bytes(self) -> int:
        """On disk, the head included."""
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))

    def __contains__(self, row: object) -> bool:
        """Whether the row of this key was recorded."""
        return row in self._where

    def key(self, rollout: Rollout, view: str) -> str:
        """What a row is, as its judge reads it."""
        return key(rollout, view, self.index)

    # --- reading -----------------------------------------------------------------------------------------------------

    def hear(self, seen: Batch, shown_B: Tensor, view: str, says: Says) -> Signal:
        """What was said of every row of a batch, as the judge saw it; nothing of rows that its view has nothing of.

        Raises `OpdError` naming a prompt whose row was not recorded.
        """
        import torch

        from opd.signals import Dense, Token, TopK

        parts: dict[str, list[Tensor]] = {name: [] for name in TENSORS[self.index.keep]}
        for b, rollout in enumerate(seen.rollouts):
            n = int(seen.length_B[b])
            row = self._row(rollout, view) if shown_B[b] and n else self._nothing(n)
            for name, part in row.items():
                parts[name].append(part)
        own = {name: torch.cat(part).to(seen.row_N.device) for name, part in parts.items()}
        heard_N = None if bool(shown_B.all()) else shown_B.to(seen.row_N.device)[seen.row_N]
        if self.index.keep == "hidden":
            dense = Dense(own["hidden"].to(self.head.weight.dtype), self.head, heard_N)
            return Token(_silenced(dense, seen), heard_N) if says is Says.TOKEN else dense
        logp_N = own["logp"].to(seen.behaviour_N.dtype)
        if self.index.keep == "token" or says is Says.TOKEN:
            return Token(logp_N, heard_N)
        return TopK(logp_N, own["ids"].long(), own["top"], self.index.top_temperature, heard_N)

    @cached_property
    def head(self) -> Head:
        """The judge's output head."""
        from safetensors.torch import load_file

        from opd.head import Head

        own = load_file(self.folder / "head.safetensors", device=str(self.device))
        return Head(own["weight"], self.index.vocab, own.get("bias"), self.index.scale, self.index.softcap)

    def _row(self, rollout: Rollout, view: str) -> dict[str, Tensor]:
        found = self._where.get(self.key(rollout, view))
        if found is None:
            prompt = rollout.prompt
            raise OpdError(
                f"prompt {prompt.id} ({prompt.where or 'no file'}): {self.folder} does not hold what "
                f"`{self.index.role}` says of this answer of `{rollout.speaker}` ({rollout.text[:40]!r}, view {view}). "
                "It was recorded over other prompts, answers, templates or lengths; run `opd signals` over this recipe "
                "with the same --out: it adds what is missing"
            )
        name, start, count = found
        return {x: self._file(name).get_slice(x)[start : start + count] for x in TENSORS[self.index.keep]}

    def _nothing(self, n: int) -> dict[str, Tensor]:
        """In place of a row that is not heard: numbers that a shut gate multiplies by 0, and nan where one is read."""
        import torch

        wide, k = getattr(torch, self.index.dtype), min(self.index.k, self.index.vocab)
        exact = torch.float64 if wide == torch.float64 else torch.float32
        empty = {
            "logp": torch.full((n,), math.nan, dtype=exact),
            "ids": torch.arange(k, dtype=torch.int32).expand(n, k),
            "top": torch.full((n, k), -math.log(2 * k) if k else 0.0, dtype=exact),
            "hidden": torch.zeros(n, self.index.width, dtype=wide),
        }
        return {name: empty[name] for name in TENSORS[self.index.keep]}

    def _file(self, name: str) -> Any:
        from safetensors import safe_open

        if name not in self._files:
            self._files[name] = safe_open(self.folder / name, framework="pt")
        return self._files[name]

    def _take_in(self, name: str) -> None:
        start = 0
        for row, count in json.loads(self._file(name).metadata()["rows"]):
            self._where[row] = (name, start, count)
            start += count

    # --- writing -----------------------------------------------------------------------------------------------------

    def add(self, rows: Batch, view: str, tensors: Mapping[str, Tensor]) -> None:
        """A shard of these rows, as the judge saw them: whole on the disk, or absent."""
        import torch
        from safetensors.torch import save_file

        named = [(self.key(r, view), int(n)) for r, n in zip(rows.rollouts, rows.length_B.tolist(), strict=True)]
        if "hidden" in tensors:
            tensors = {"hidden": tensors["hidden"].to(getattr(torch, self.index.dtype))}
        name = f"{len(list(self.folder.glob('[0-9]*.safetensors'))):05d}.safetensors"
        half = self.folder / f".{name}.tmp"
        with full_disk(f"{self.folder / name} could not be written", "Earlier shards are kept", self.folder):
            try:
                whole = {x: t.detach().cpu().contiguous() for x, t in tensors.items()}
                save_file(whole, half, metadata={"format": "pt", "rows": json.dumps(named)})
                with half.open("rb") as file:
                    os.fsync(file.fileno())
                half.replace(self.folder / name)
            finally:
                half.unlink(missing_ok=True)
        sync_folder(self.folder)
        self._take_in(name)


def _silenced(dense: Dense, seen: Batch) -> Tensor:
    """[N] log-probabilities of the sampled tokens, nan where the judge saw nothing."""
    logp_N = dense.logp(seen.token_N, seen.temperature).to(seen.behaviour_N.dtype)
    return logp_N if dense.heard_N is None else logp_N.masked_fill(~dense.heard_N, math.nan)
