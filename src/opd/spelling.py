"""What a token spells: the bytes of text that each id of a tokenizer stands for, and which ids of two spell the same.

Three families are known, by what the tokenizer's own decoder does: byte-level (GPT-2's table of one character a byte),
SentencePiece-like (a mark for the space, perhaps tokens of single bytes), and plain characters. What a decoder does is
not believed but tried: every token is decoded behind an anchor, and one that decodes to anything else spells nothing
known. Nothing is guessed: what is not known is None, and masked and counted by whoever aligns texts.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import islice, takewhile
from typing import Any

from opd.errors import UsageError
from opd.vocabulary import PROBES, Tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ANCHOR = "a"  # in front of a token while it is decoded: decoders treat the first token of a text specially


@dataclass(frozen=True, eq=False)
class Spelling:
    """For every id the bytes it stands for (None: not known), and the names of control tokens. Made by `spelling`."""

    pieces: tuple[bytes | None, ...]
    control: Mapping[int, str]  # special tokens by id: they spell nothing, and mean what their name says
    raw: frozenset[int] = frozenset()  # tokens of one byte, which a tokenizer uses only where it has nothing better

    def of(self, ids: tuple[int, ...]) -> list[bytes | None]:
        """What each of these tokens spells."""
        return [self.pieces[i] if 0 <= i < len(self.pieces) else None for i in ids]

    @cached_property
    def meanings(self) -> dict[tuple[str, bytes], list[int]]:
        """Ids by what they mean, bytes or a control token's name; the one that the tokenizer itself uses first."""
        found: dict[tuple[str, bytes], list[int]] = {}
        for i, piece in sorted(enumerate(self.pieces), key=lambda x: (x[0] in self.raw, x[0])):
            if i in self.control:
                found.setdefault(("control", self.control[i].encode()), []).append(i)
            elif piece is not None:
                found.setdefault(("text", piece), []).append(i)
        return found

    @cached_property
    def _sorted(self) -> list[bytes]:
        return sorted(piece for kind, piece in self.meanings if kind == "text")

    def starting(self, ahead: bytes) -> list[bytes]:
        """What tokens spell that begins with these bytes."""
        low = bisect_left(self._sorted, ahead)
        return [*takewhile(lambda piece: piece.startswith(ahead), islice(self._sorted, low, None))]


def shared(a: Spelling, b: Spelling, stops: tuple[int, int]) -> list[tuple[int, int]]:
    """Pairs of ids, one of each, that mean the same: the same bytes, the same control token, or the models' stops.

    Each id is in one pair at most. Where several ids of one tokenizer spell the same, the first of either are a pair,
    then the second, so that a tokenizer is wholly shared with itself.
    """
    pairs = [stops]
    for meaning, mine in a.meanings.items():
        rest = [i for i in mine if i != stops[0]]
        pairs += zip(rest, (j for j in b.meanings.get(meaning, []) if j != stops[1]), strict=False)
    return sorted(pairs)


def shared_after(longer: Spelling, shorter: Spelling, ahead: bytes) -> list[tuple[int, int]]:
    """Pairs of ids where the first spells `ahead` and then what the second spells."""
    pairs: list[tuple[int, int]] = []
    for piece in longer.starting(ahead):
        rest = shorter.meanings.get(("text", piece[len(ahead) :]), [])
        pairs += zip(longer.meanings["text", piece], rest, strict=False)
    return pairs


def spelling(tokenizer: Tokenizer, name: str) -> Spelling:
    """What every token of a tokenizer spells. Raises `UsageError` for one whose tokens do not add up to its texts."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UsageError(f"the tokenizer of {name} has no fast form, so that its tokens cannot be taken apart as bytes")
    decoder = list(_parts(json.loads(backend.to_str()).get("decoder")))
    pieces: list[bytes | None] = [None] * len(tokenizer)
    raw = set()
    for piece, i in tokenizer.get_vocab().items():
        if i < len(pieces):
            pieces[i] = _spelled(piece, decoder)
            if _BYTE.fullmatch(piece) and len(pieces[i] or b"") == 1:
                raw.add(i)
    control = _added(tokenizer, pieces)
    _tried(tokenizer, pieces, name)
    return Spelling(tuple(piece or None for piece in pieces), control, frozenset(raw))


def _spelled(piece: str, decoder: list[dict[str, Any]]) -> bytes | None:
    """What a decoder of these parts makes of a token."""
    kinds, byte = {part["type"] for part in decoder}, _BYTE.fullmatch(piece)
    if "ByteLevel" in kinds:
        return _byte_level(piece)
    if byte and "ByteFallback" in kinds:
        return bytes([int(byte[1], 16)])
    for part in decoder:
        mark = part.get("replacement") or (part.get("pattern") or {}).get("String")
        if part["type"] in ("Metaspace", "Replace") and mark:
            piece = piece.replace(mark, part.get("content", " "))
    return piece.encode()


def _parts(decoder: Any) -> Iterator[dict[str, Any]]:
    if decoder is not None:
        yield decoder
        for part in decoder.get("decoders", []):
            yield from _parts(part)


def _added(tokenizer: Tokenizer, pieces: list[bytes | None]) -> dict[int, str]:
    """Added tokens are their text as it stands, or control tokens; returns the latter."""
    special = set(tokenizer.all_special_ids)
    control = {i: tokenizer.convert_ids_to_tokens(i) for i in special if i < len(pieces)}
    for i, token in tokenizer.added_tokens_decoder.items():
        if token.special:
            control[i] = token.content
        elif i not in special:
            pieces[i] = token.content.encode()
    for i in control:
        pieces[i] = None
    return control


def _byte_level(piece: str) -> bytes | None:
    table = _byte_table()
    return bytes(table[c] for c in piece) if all(c in table for c in piece) else None


@cache
def _byte_table() -> dict[str, int]:
    """GPT-2's character for every byte: itself where it is printable, the next one above 255 where not."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(b): b for b in printable} | {chr(0x100 + k): b for k, b in enumerate(others)}


def _tried(tokenizer: Tokenizer, pieces: list[bytes | None], name: str) -> None:
    """Forget the tokens that decode to something else than they should spell; refuse where whole texts do."""
    known = [i for i, piece in enumerate(pieces) if piece]
    anchor = [i for i in _ids(tokenizer, _ANCHOR) if pieces[i]] or [i for i in known if pieces[i].isalnum()][:1]  # type: ignore[union-attr]
    bare, *both = _decoded(tokenizer, [anchor, *([*anchor, i] for i in known)])
    for i, decoded in zip(known, both, strict=True):
        alone = _text(pieces[i] or b"")
        if alone is not None and decoded != bare + alone:
            pieces[i] = None
    lost = sum(pieces[i] is None for i in known)
    if 2 * lost > len(known):
        raise UsageError(
            f"{lost} of {len(known)} tokens of {name} decode to something else than they are written as: its family is "
            "not byte-level, SentencePiece-like or plain, and its answers cannot be aligned with another tokenizer's"
        )
    for probe in PROBES:
        row = _ids(tokenizer, probe)
        spelled = [pieces[i] for i in row]
        said, text = b"".join(p or b"" for p in spelled), _decoded(tokenizer, [row])[0].encode()
        if all(spelled) and said not in (text, b" " + text):
            raise UsageError(
                f"the tokens of {name} do not add up to its texts: {probe!r} is tokens that spell {said!r} and decode "
                f"to {text!r}. Its answers cannot be aligned with another tokenizer's"
            )


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def _decoded(tokenizer: Tokenizer, rows: list[list[int]]) -> list[str]:
    return list(tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _text(piece: bytes) -> str | None:
    """The text that these bytes are, or None where they are a part of a character."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None
