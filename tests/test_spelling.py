"""What tokens spell, and how two real tokenizers meet on the same text: every family against every other."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from required import WORLD, needs_world
from tokenized import CORPUS, FAMILIES, byte_level, characters, sentencepiece, voice
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from opd import world
from opd.chat import renderer
from opd.errors import UsageError
from opd.retokenize import crossing, legible
from opd.spelling import shared, shared_after, spelling

KNOWN = "".join(c for c in sorted({c for line in CORPUS for c in line}))
# "▁" is how SentencePiece writes a space: to such a tokenizer the two are one, and what it reads is in no span.
texts = st.one_of(
    st.text(st.sampled_from(KNOWN + "é中🙂  "), max_size=24),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs"], exclude_characters="▁"), max_size=12),
    st.lists(
        st.sampled_from([*CORPUS[0].split(), " ", "\n", "👩‍👩‍👧", "e\u0301", "日本語", "12", "1234"]), max_size=8
    ).map(" ".join),
)


# --- spelling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_add_up_to_the_text(family: str) -> None:
    tokenizer = FAMILIES[family]()
    own = spelling(tokenizer, family)
    for text in (*CORPUS[:2], "the e"):
        spelled = own.of(tuple(tokenizer(text, add_special_tokens=False)["input_ids"]))
        assert None not in spelled
        assert b"".join(p for p in spelled if p) in (text.encode(), b" " + text.encode())
    assert own.pieces[tokenizer.eos_token_id] is None and own.control[tokenizer.eos_token_id] == tokenizer.eos_token


def test_bytes_of_every_kind_are_known() -> None:
    """A byte-level vocabulary and byte fallback both have all 256 single bytes; characters have whole ones alone."""
    every = {bytes([b]) for b in range(256)}
    assert every <= set(spelling(byte_level(), "x").pieces)
    pieces = spelling(sentencepiece(), "x")
    assert every <= {pieces.pieces[i] for i in pieces.raw} and len(pieces.raw) == 256
    assert {len(p.decode()) for p in spelling(characters(), "x").pieces if p} == {1}


def test_an_added_token_that_is_text_spells_its_text() -> None:
    core = Backend.from_str(byte_level().backend_tokenizer.to_str())
    core.add_tokens(["<think> "])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")
    assert spelling(tokenizer, "x").pieces[len(tokenizer) - 1] == b"<think> "


def spaced() -> Any:
    """Words, which a decoder joins by spaces that no token has."""
    core = Backend(
        models.WordLevel({w: i for i, w in enumerate(["<unk>", "a", "the", "dog", "ran"])}, unk_token="<unk>")
    )
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


def pieces_of_words() -> Any:
    core = Backend(
        models.WordPiece({w: i for i, w in enumerate(["[UNK]", "a", "the", "##m", "##re", "##n"])}, unk_token="[UNK]")
    )
    core.normalizer, core.decoder = normalizers.Lowercase(), decoders.WordPiece()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")


@pytest.mark.parametrize("made", [spaced, pieces_of_words])
def test_a_tokenizer_whose_tokens_do_not_add_up_is_refused(made: Any) -> None:
    with pytest.raises(UsageError, match="of the odd one decode to something else than they are written as"):
        spelling(made(), "the odd one")


# --- what two vocabularies share -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tokenizer_is_wholly_shared_with_itself(family: str) -> None:
    own = spelling(FAMILIES[family](), family)
    stop = FAMILIES[family]().eos_token_id
    assert shared(own, own, (stop, stop)) == [(i, i) for i in range(len(own.pieces))]


@pytest.mark.parametrize(("a", "b"), itertools.permutations(FAMILIES, 2))
def test_shared_tokens_spell_the_same_and_are_one_to_one(a: str, b: str) -> None:
    mine, theirs = (FAMILIES[x]() for x in (a, b))
    left, right = spelling(mine, a), spelling(theirs, b)
    pairs = shared(left, right, (mine.eos_token_id, theirs.eos_token_id))
    assert (mine.eos_token_id, theirs.eos_token_id) in pairs
    for i, j in pairs:
        control = left.control.get(i) == right.control.get(j) is not None
        assert i == mine.eos_token_id or control or left.pieces[i] == right.pieces[j] is not None
    assert len({i for i, _ in pairs}) == len({j for _, j in pairs}) == len(pairs)
    assert {b"t", b"e", b" "} <= {left.pieces[i] for i, _ in pairs}


def test_where_one_side_is_ahead_the_others_token_begins_with_that() -> None:
    left, right = spelling(byte_level(), "x"), spelling(characters(), "x")
    pairs = {(left.pieces[i], right.pieces[j]) for i, j in shared_after(left, right, b" th")}
    assert pairs == {(b" the", b"e"), (b" tha", b"a")} & pairs | {(b" the", b"e")}
    every = {(p, p[3:]) for p in left.pieces if p and p.startswith(b" th") and p[3:] in right.pieces}
    assert pairs == every


# --- two tokenizers on one text --------------------------------------------------------------------------------------


def check(a: Any, b: Any, text: str) -> None:
    """The student says `text`; every span is the same bytes on both sides, in order, and the rest is not guessed."""
    student, judge = voice(a), voice(b)
    cross = crossing(student, judge)
    ids = (*student.verbatim_ids(text), student.stop_ids[0])
    read = cross.read(ids, True)
    stop = read.spans[-1]
    assert [*stop[0]] == [len(ids) - 1] and [*stop[1]] == [len(read.tokens) - 1]
    assert read.tokens[-1] == judge.stop_ids[0]
    mine, theirs = cross.mine.of(ids), cross.theirs.of(read.tokens)
    last = (-1, -1)
    for left, right in read.spans[:-1]:
        sides = ((mine, left), (theirs, right))
        spelled = [b"".join(piece or b"?" for piece in own[r.start : r.stop]) for own, r in sides]
        if last == (-1, -1):  # a tokenizer may put a space before a text
            first, second = ({x, x.removeprefix(lead)} for x, lead in zip(spelled, cross.leads, strict=True))
            assert first & second
        else:
            assert spelled[0] == spelled[1]
        assert left.start > last[0] and right.start > last[1]
        last = (left[-1], right[-1])
    missing = set(range(len(ids))) - {i for left, _ in read.spans for i in left}
    clean = None not in mine[:-1] and None not in theirs[:-1]
    if clean and not text.startswith(" "):
        assert not missing, (text, mine, theirs)


@pytest.mark.parametrize(("a", "b"), itertools.product(FAMILIES, repeat=2))
@given(text=texts)
@settings(max_examples=60, deadline=None)
def test_every_family_meets_every_other(a: str, b: str, text: str) -> None:
    check(FAMILIES[a](), FAMILIES[b](), text)


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece", "characters", "unigram"])
@given(text=texts)
@settings(max_examples=60, deadline=None)
def test_one_tokenizer_meets_itself_token_by_token(name: str, text: str) -> None:
    speaker = voice(FAMILIES[name]())
    cross = crossing(speaker, speaker)
    ids = speaker.verbatim_ids(text)
    twofold = name == "unigram" and text.startswith(" ")  # it writes " " and no space before a text alike
    if None in cross.mine.of(ids) or twofold:
        return
    read = cross.read((*ids, speaker.stop_ids[0]), True)
    assert read.tokens[:-1] == ids and read.spans == tuple((range(k, k + 1),) * 2 for k in range(len(ids) + 1))
    assert set(read.ahead) <= {(False, b"")}


def test_spans_end_where_both_do() -> None:
    student, judge = voice(byte_level()), voice(characters())
    ids = student.verbatim_ids("the dog")
    cross = crossing(student, judge)
    assert cross.mine.of(ids) == [b"the", b" dog"]
    read = cross.read(ids, False)
    assert [len(theirs) for _, theirs in read.spans] == [3, 4] and len(read.tokens) == 7
    assert read.ahead == ((False, b"th"), (False, b" do"))
    assert cross.entry((False, b"th")).T.tolist() == [[i, j] for i, j in shared_after(cross.mine, cross.theirs, b"th")]


def test_the_side_that_is_ahead_may_be_the_students() -> None:
    student, judge = voice(characters()), voice(byte_level())
    cross = crossing(student, judge)
    read = cross.read(student.verbatim_ids("the dog"), False)
    assert read.ahead == ((True, b"th"), (True, b" do"))
    ends = [(cross.mine.pieces[i], cross.theirs.pieces[j]) for i, j in cross.entry((True, b" do")).T.tolist()]
    assert (b"g", b" dog") in ends and all(t == b" do" + s for s, t in ends if s and t)


def test_the_space_before_a_text_is_the_tokenizers_own() -> None:
    """SentencePiece's first token has a space that the text has not: it meets the other's token without one."""
    student, judge = voice(sentencepiece()), voice(characters())
    cross = crossing(student, judge)
    read = cross.read(student.verbatim_ids("the dog"), False)
    assert [len(theirs) for _, theirs in read.spans] == [3, 4]
    assert read.ahead == ((False, b" th"), (False, b" do"))
    alone = cross.read(student.verbatim_ids("1"), False)  # the mark, and a byte
    assert alone.spans == ((range(2), range(1)),) and alone.ahead == ((False, b""),)
    both = crossing(student, student).read(student.verbatim_ids("1"), False)
    assert both.spans == ((range(1), range(1)), (range(1, 2), range(1, 2)))


def test_a_character_that_never_became_whole_is_in_no_span() -> None:
    student, judge = voice(sentencepiece()), voice(byte_level())
    cross = crossing(student, judge)
    torn = (*student.verbatim_ids("the 中")[:-1], *student.verbatim_ids("dog")[-3:])
    assert cross.mine.of(torn)[-4:-2] != [None, None]
    read = cross.read(torn, False)
    broken = [k for k, piece in enumerate(cross.mine.of(torn)) if piece in (b"\xe4", b"\xb8")]
    assert len(broken) == 2 and not set(broken) & {i for mine, _ in read.spans for i in mine}
    assert {0} <= {i for mine, _ in read.spans for i in mine}


def test_a_control_token_in_the_middle_is_in_no_span() -> None:
    student, judge = voice(sentencepiece()), voice(characters())
    cross = crossing(student, judge)
    one, two = student.verbatim_ids("the dog"), student.verbatim_ids("and the")
    ids = (*one, 1, *two)  # <s>
    read = cross.read(ids, False)
    assert {i for mine, _ in read.spans for i in mine} == set(range(len(ids))) - {len(one)}
    assert judge.text(read.tokens) == "the dog and the"


def test_what_the_judge_cannot_write_is_in_no_span() -> None:
    student, judge = voice(byte_level()), voice(characters())
    ids = student.verbatim_ids("the Z dog")
    read = crossing(student, judge).read(ids, False)
    missing = set(range(len(ids))) - {i for mine, _ in read.spans for i in mine}
    assert [crossing(student, judge).mine.of(ids)[i] for i in missing] in ([b" Z"], [b"Z"])


def test_unknown_characters_do_not_hide_what_is_between_them() -> None:
    """As many runs of them in the text as of unknown tokens: each known run is certain, and checked byte by byte."""
    student, judge = voice(byte_level()), voice(characters())
    ids = student.verbatim_ids("a ZZ the Q dog Ω")
    cross = crossing(student, judge)
    read = cross.read(ids, False)
    lost = [cross.mine.of(ids)[i] for i in sorted(set(range(len(ids))) - {i for mine, _ in read.spans for i in mine})]
    assert b"".join(p for p in lost if p).replace(b" ", b"").decode() == "ZZQΩ"


def test_legible_text_is_what_whole_characters_spell() -> None:
    assert legible([b"a", b"\xf0\x9f", b"b"], b"") == ([(0, 1), None, (1, 2)], "ab")
    assert legible([b" a", b"b"], b" ") == ([(-1, 1), (1, 2)], "ab")
    assert legible([b" ", b"ab"], b" ") == ([(-1, 0), (0, 2)], "ab")
    assert legible([b"\xc3", b"\xa9\xff"], b"") == ([None, None], "")  # the half before a broken token is broken too
    assert legible([], b" ") == ([], "")


# --- tokenizers of real models ----------------------------------------------------------------------------------------


def test_the_built_in_worlds_two_tokenizers() -> None:
    merged, plain = (AutoTokenizer.from_pretrained(str(world.path(name))) for name in ("student-merged", "teacher"))
    cross = crossing(voice(merged), voice(plain))
    assert len(cross.shared) == len(plain) < len(merged)
    for text in ("10+34=44", "abcder", "in;th"):
        check(merged, plain, text)
        check(plain, merged, text)
        ids = voice(merged).verbatim_ids(text)
        assert len(cross.read(ids, False).spans) == len(ids)


@needs_world
def test_two_real_models() -> None:
    pieces, letters = (
        AutoTokenizer.from_pretrained(str(WORLD / "models" / n)) for n in ("stories260K", "babyllama105")
    )
    student, judge = (renderer(t, stop_ids=(1,)) for t in (pieces, letters))
    cross = crossing(student, judge)
    story = (WORLD / "text" / "tinystories_test.jsonl").read_text()[:3000]
    for line in ("Once upon a time, there was a little girl named Lily.", 'She said, "Hi!"\nTom ran.', story):
        ids = (*student.verbatim_ids(line), 1)
        read = cross.read(ids, True)
        lost = set(range(len(ids))) - {i for mine, _ in read.spans for i in mine}
        unknown = [cross.mine.of(ids)[i] for i in lost]
        assert all(
            piece and not set(piece.decode("utf-8", "replace")) <= set("abcdefghijklmnopqrstuvwxyz ")
            for piece in unknown
        )
        if "\n" not in line and "\\" not in line:
            assert not lost
        back = crossing(judge, student).read((*judge.verbatim_ids(line), 1), True)
        assert back.spans[-1][0].stop == len(judge.verbatim_ids(line)) + 1
    assert len(cross.shared) == len(letters)
