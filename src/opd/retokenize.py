"""A judge with another tokenizer reads what the student said: its own rendering of the prompt, its own tokens.

The judge is shown the very text that the student's tokens spell, outer whitespace and all, behind the prompt in its own
template; and its own stop token where the student stopped. Both sides' tokens are then laid over the bytes of the text.
Not in any span, and so masked and counted, are: tokens that spell nothing known (control tokens in the middle of an
answer, unknown characters), tokens that are parts of a character that never became whole, and tokens without a partner.
The last span of a truncated answer is read as if the text ended there.

Shapes: N loss tokens of the student, M tokens of the judge, G spans.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import groupby

import torch
from torch import Tensor

from opd.aligned import Alignment, Shared, SpanDense, SpanToken
from opd.batch import Batch, pack
from opd.chat import Renderer
from opd.errors import OpdError
from opd.head import token_logp
from opd.math.align import Interval, placed, spans
from opd.model import CausalModel
from opd.spelling import Spelling, shared, shared_after, spelling
from opd.types import Rollout, Says, Turn


@dataclass(frozen=True)
class Answer:
    """An answer in the judge's tokens, the stop token included, and its spans: the student's tokens and the judge's."""

    tokens: tuple[int, ...]
    spans: tuple[tuple[range, range], ...]
    ahead: tuple[tuple[bool, bytes], ...]  # for each span: by what one side's tokens but the last spell more, and whose


@dataclass(frozen=True, eq=False)
class Crossing:
    """Two ways to write the same text. Made by `crossing`."""

    student: Renderer
    judge: Renderer
    mine: Spelling
    theirs: Spelling

    @cached_property
    def shared(self) -> list[tuple[int, int]]:
        """Ids of the student's and of the judge's that mean the same."""
        return shared(self.mine, self.theirs, (self.student.stop_ids[0], self.judge.stop_ids[0]))

    def note(self, role: str) -> str:
        """One sentence on how far the two vocabularies agree."""
        return (
            f"`{role}` reads answers in tokens of its own: {len(self.shared)} of its {len(self.theirs.pieces)} mean "
            f"the same as one of the student's {len(self.mine.pieces)}"
        )

    def read(self, tokens: Sequence[int], stopped: bool) -> Answer:
        """How the judge reads the student's tokens of an answer; `stopped` says that the last one is a stop token."""
        body = tuple(tokens[: len(tokens) - stopped])
        lead = self.leads[0]
        at, text = legible(self.mine.of(body), lead)
        ids = self.judge.verbatim_ids(text)
        places, space = self._places(ids, text)
        found = spans(_clipped(at), _clipped(places))
        sides = (at, lead + text.encode(), len(lead)), (places, space + text.encode(), len(space))
        ahead = [_ahead(sides, mine[-1], theirs[-1]) for mine, theirs in found]
        if stopped:
            found.append((range(len(body), len(body) + 1), range(len(ids), len(ids) + 1)))
            ahead.append((False, b""))
            ids += self.judge.stop_ids[:1]
        return Answer(ids, tuple(found), tuple(ahead))

    @cached_property
    def _entries(self) -> dict[tuple[bool, bytes], Tensor]:
        return {}

    def entry(self, ahead: tuple[bool, bytes]) -> Tensor:
        """[2, pairs] ids of student and judge that end a span in the same text, one side being so far ahead."""
        if ahead not in self._entries:
            later, what = ahead
            if not what:
                pairs = self.shared
            elif later:
                pairs = [(i, j) for j, i in shared_after(self.theirs, self.mine, what)]
            else:
                pairs = shared_after(self.mine, self.theirs, what)
            self._entries[ahead] = torch.tensor(pairs, dtype=torch.long).view(-1, 2).T
        return self._entries[ahead]

    def _places(self, ids: tuple[int, ...], text: str) -> tuple[list[Interval | None], bytes]:
        """Where the judge's tokens stand in the text, and what its tokenizer put before that: a space, or nothing."""
        pieces = self.theirs.of(ids)
        filled = self._filled(pieces, text)
        ways = []
        for space in dict.fromkeys([self.leads[1], b""]):
            at = _shifted(placed(filled, space + text.encode()), len(space))
            ways.append(([None if p is None else x for p, x in zip(pieces, at, strict=True)], space))
        return max(ways, key=lambda way: sum(x is not None for x in way[0]))

    def _filled(self, pieces: Sequence[bytes | None], text: str) -> Sequence[bytes | None]:
        """Tokens for unknown characters with the characters that they stand for, where it is plain which these are: the
        text has as many runs of characters that the judge cannot write as there are runs of such tokens."""
        runs = [b"".join(c.encode() for c in run) for strange, run in groupby(text, self._strange) if strange]
        holes = [list(run) for hole, run in groupby(pieces, lambda piece: piece is None) if hole]
        if None not in pieces or len(runs) != len(holes):
            return pieces
        stand = iter(
            [piece for run, hole in zip(runs, holes, strict=True) for piece in (run, *[b""] * (len(hole) - 1))]
        )
        return [next(stand) if piece is None else piece for piece in pieces]

    def _strange(self, character: str) -> bool:
        """Whether the judge has no way to write a character."""
        if character not in self._known:
            self._known[character] = None not in self.theirs.of(self.judge.verbatim_ids(character))
        return not self._known[character]

    @cached_property
    def _known(self) -> dict[str, bool]:
        return {}

    @cached_property
    def leads(self) -> tuple[bytes, bytes]:
        """What the tokens of an answer spell before its first letter: a space, for SentencePiece-like tokenizers."""
        mine, theirs = (
            b"".join(piece or b"" for piece in own.of(renderer.verbatim_ids("a")))
            for renderer, own in ((self.student, self.mine), (self.judge, self.theirs))
        )
        return mine.removesuffix(b"a") * mine.endswith(b"a"), theirs.removesuffix(b"a") * theirs.endswith(b"a")


Side = tuple[list[Interval | None], bytes, int]  # places of tokens, the text behind its lead, how long that is


def _ahead(sides: tuple[Side, Side], mine: int, theirs: int) -> tuple[bool, bytes]:
    """Whether the student's last token of a span begins later than the judge's, and the bytes by which either does."""
    starts = [_start(at[k]) for (at, _, _), k in zip(sides, (mine, theirs), strict=True)]
    earlier = 1 if starts[0] > starts[1] else 0
    _, text, lead = sides[earlier]
    return bool(earlier), text[lead + starts[earlier] : lead + starts[1 - earlier]]


def _start(place: Interval | None) -> int:
    assert place is not None
    return place[0]


@lru_cache(maxsize=64)
def crossing(student: Renderer, judge: Renderer) -> Crossing:
    """Both renderers with what their tokens spell. Raises `UsageError` where that cannot be found out."""
    return Crossing(
        student, judge, spelling(student.tokenizer, "the student"), spelling(judge.tokenizer, "the teacher")
    )


def legible(pieces: Sequence[bytes | None], lead: bytes) -> tuple[list[Interval | None], str]:
    """The text that tokens spell, without `lead`, and where each token stands in it.

    Tokens that spell nothing known, and those of a character that never became whole, have no place.
    """
    known = list(pieces)
    while True:
        raw = b"".join(piece or b"" for piece in known)
        at = _laid(known)
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            for i, place in enumerate(at):
                if place is not None and place[0] < error.end and place[1] > error.start:
                    known[i] = None
            continue
        if not raw.startswith(lead):
            return at, text
        return _shifted(at, len(lead)), raw.removeprefix(lead).decode()


def _laid(pieces: Sequence[bytes | None]) -> list[Interval | None]:
    at: list[Interval | None] = []
    end = 0
    for piece in pieces:
        at.append(None if piece is None else (end, end + len(piece)))
        end += len(piece or b"")
    return at


def _shifted(at: Sequence[Interval | None], lead: int) -> list[Interval | None]:
    """Places counted from the end of the lead; what belongs to the lead begins before 0."""
    return [None if x is None else (x[0] - lead, x[1] - lead) for x in at]


def _clipped(at: Sequence[Interval | None]) -> list[Interval | None]:
    """Places without the lead: a token of the lead alone is empty, and so goes with the token after it."""
    return [None if x is None else (max(0, x[0]), max(0, x[1])) for x in at]


# --- the signal ------------------------------------------------------------------------------------------------------


def hear(batch: Batch, model: CausalModel, student: Renderer, judge: Renderer, says: Says) -> SpanToken | SpanDense:
    """What a judge says about every answer of a batch in tokens of its own. No gradient.

    Raises `OpdError` for answers of several turns, for rows that do not fit into the judge's window, and where no token
    of the whole batch could be aligned.
    """
    cross = crossing(student, judge)
    read = [_answer(cross, rollout) for rollout in batch.rollouts]
    rows = [_row(judge, rollout, answer) for rollout, answer in zip(batch.rollouts, read, strict=True)]
    room = getattr(getattr(model.module, "config", None), "max_position_embeddings", None)
    longest = max((len(row.tokens) for row in rows), default=0)
    if room is not None and longest > room:
        raise OpdError(
            f"a prompt and its answer are {longest} tokens to {model.name}, which holds {room}: lower speak.max_tokens "
            "or data.max_prompt_tokens, or take a teacher with a longer window"
        )
    alignment = align(batch, read)
    if len(batch.row_N) and not bool(alignment.inside_N.any()):
        raise OpdError(
            f"none of the {len(batch.row_N)} tokens of this batch's answers could be aligned with the tokens of "
            f"{model.name}: there would be nothing to learn from it"
        )
    device = batch.row_N.device
    theirs = pack(rows, temperature=batch.temperature, device=device, dtype=batch.behaviour_N.dtype)
    h_MH = model.all_hidden(theirs)
    if says is Says.TOKEN:
        with model.autocast():
            logp_M = token_logp(model.head, h_MH, theirs.token_N, batch.temperature)
        return SpanToken(alignment.spoken(logp_M), alignment)
    return SpanDense(h_MH, model.head, theirs.token_N, alignment, share(cross, read, device))


def _answer(cross: Crossing, rollout: Rollout) -> Answer:
    if len(rollout.turns) != 1:
        raise OpdError(
            f"prompt {rollout.prompt.id}: an answer of {len(rollout.turns)} turns, and a judge with another tokenizer "
            "reads answers of one turn, so far"
        )
    turn = rollout.turns[0]
    return cross.read(rollout.tokens[turn.start : turn.end], turn.finish != "length")


def _row(judge: Renderer, rollout: Rollout, answer: Answer) -> Rollout:
    """The rollout as the judge reads it."""
    prompt = judge.prompt_ids(rollout.prompt)
    n, m = len(prompt), len(answer.tokens)
    return replace(
        rollout,
        tokens=(*prompt, *answer.tokens),
        mask=(False,) * n + (True,) * m,
        behaviour=(math.nan,) * (n + m),
        version=(-1,) * (n + m),
        turns=(Turn(n, n + m, rollout.finish),),
    )


def share(cross: Crossing, read: Sequence[Answer], device: torch.device) -> Shared:
    """The tokens that end spans of these answers in the same text."""
    numbers = {(False, b""): 0}
    entry = [numbers.setdefault(ahead, len(numbers)) for answer in read for ahead in answer.ahead]
    pairs = [cross.entry(ahead) for ahead in numbers]
    count = torch.tensor([p.shape[1] for p in pairs])
    mine, theirs = torch.cat(pairs, 1)
    parts = (mine, theirs, count.cumsum(0) - count, count, torch.tensor(entry, dtype=torch.long))
    return Shared(*(part.to(device) for part in parts))


def align(batch: Batch, read: Sequence[Answer]) -> Alignment:
    """The spans of all rows, in numbers that run through the batch."""
    length = batch.length_B.tolist()
    span, same, stop = [-1] * sum(length), [-1] * sum(length), [False] * sum(length)
    first: list[int] = []
    count: list[int] = []
    n = m = 0
    for rollout, answer, size in zip(batch.rollouts, read, length, strict=True):
        turn = rollout.turns[0]
        for mine, theirs in answer.spans if size == turn.end - turn.start else ():
            for k in mine:
                span[n + k] = len(first)
            first.append(m + theirs.start)
            count.append(len(theirs))
        same[n : n + size] = [m + k if k < len(answer.tokens) else -1 for k in range(size)]
        if size:
            stop[n + size - 1] = rollout.finish != "length"
        n, m = n + size, m + len(answer.tokens)
    long: Callable[[list[int]], Tensor] = lambda x: torch.tensor(x, dtype=torch.long, device=batch.row_N.device)
    return Alignment(long(span), long(first), long(count), long(same), torch.tensor(stop, device=batch.row_N.device))
