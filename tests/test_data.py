"""Readers count what they do; a mixture is exact at every position and a function of its position alone."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from required import WORLD, needs_world

from opd.data import answers, content, fingerprint, join, read, reading
from opd.errors import UsageError
from opd.mixture import Mixture
from opd.rows import RowError, parse
from opd.types import Message, Prompt


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def ask(text: str) -> Prompt:
    return Prompt((Message("user", text),))


# -- one row

USER = (Message("user", "q"),)


@pytest.mark.parametrize(
    ("row", "messages", "said", "answer"),
    [
        ({"prompt": "q"}, USER, (), None),
        ({"prompt": "q", "response": "r", "answer": 18}, USER, ("r",), "18"),
        ({"prompt": "q", "responses": ["r", "s", "r"]}, USER, ("r", "s"), None),
        ({"prompt": "q", "completion": "r", "system": "be"}, (Message("system", "be"), *USER), ("r",), None),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]},
            USER,
            ("r",),
            None,
        ),
        ({"messages": [{"role": "user", "content": "q", "tool_calls": None}], "response": "r"}, USER, ("r",), None),
        (
            {
                "conversations": [
                    {"from": "system", "value": "be"},
                    {"from": "human", "value": "q"},
                    {"from": "gpt", "value": "r"},
                ]
            },
            (Message("system", "be"), *USER),
            ("r",),
            None,
        ),
        (
            {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "r"}]},
            USER,
            ("r",),
            None,
        ),
        ({"instruction": "do", "input": "this", "output": "r"}, (Message("user", "do\n\nthis"),), ("r",), None),
        ({"instruction": "q", "input": "", "output": "r"}, USER, ("r",), None),
        ({"question": "q", "answer": "yes"}, USER, (), "yes"),
        ({"question": "q", "answer": "2+2=<<2+2=4>>4\n#### 4"}, USER, ("2+2=<<2+2=4>>4\n#### 4",), "4"),
        ({"problem": "q", "solution": "long", "answer": 0.5}, USER, (), "0.5"),
        ({"prompt": "q", "answer": True, "response": None}, USER, (), "true"),
        ({"prompt": "q", "reward_model": {"ground_truth": "7", "style": "rule"}}, USER, (), "7"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}]}, USER, (), None),
    ],
)
def test_what_a_row_may_say(row: dict[str, Any], messages: Any, said: Any, answer: Any) -> None:
    prompt, empty = parse(row)
    assert (prompt.messages, prompt.responses, prompt.answer, empty) == (messages, said, answer, 0)


def test_rows_keep_domain_place_and_the_rest() -> None:
    prompt, empty = parse({"prompt": "q", "response": " ", "domain": "d", "id": 7, "kind": ["a"]}, "f:1", domain="e")
    assert (prompt.domain, prompt.where, dict(prompt.meta), empty) == ("d", "f:1", {"id": 7, "kind": ["a"]}, 1)
    assert prompt.responses == ()
    assert parse({"prompt": "q"}, domain="e").prompt.domain == "e"
    named, _ = parse({"ask": "q", "answer": "r"}, prompt_key="ask", response_key="answer")
    assert (named.text, named.responses, named.answer) == ("q", ("r",), None)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ([1], "is a list"),
        ({"text": "q", "label": 1}, "has no messages, .* or problem; it has text, label"),
        ({"prompt": ""}, "empty prompt"),
        ({"prompt": " \n"}, "empty prompt"),
        ({"prompt": 5}, "has 5 as 'prompt'"),
        ({"prompt": "q", "response": 5}, "has 5 as 'response'"),
        ({"prompt": "q", "response": "r", "output": "s"}, "more than one answer: response, output"),
        ({"messages": []}, r"has \[\] as 'messages'"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "from 'bot'"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "nothing that was asked"),
        ({"messages": [{"role": "system", "content": "x"}]}, "last message is from system"),
        ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\].content"),
        ({"messages": [{"role": "user", "content": {"answer": "x"}}]}, r"messages\[0\].content"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "tool calls"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "not text"),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}], "response": "s"},
            "more",
        ),
        ({"prompt": "half \ud83d"}, "lone surrogate"),
        ({"prompt": "q", "domain": 3}, "'domain'"),
    ],
)
def test_bad_rows_say_why(row: Any, why: str) -> None:
    with pytest.raises(RowError, match=why):
        parse(row)


# -- sources


def test_jsonl_counts_everything(tmp_path: Path) -> None:
    file = lines(
        tmp_path / "a.jsonl",
        {"prompt": "a", "response": "1"},
        "",
        {"prompt": "b", "response": ""},
        "{broken",
        {"prompt": "a", "response": "2", "answer": "x"},
        {"prompt": "a", "answer": "y"},
        {"other": 1},
    )
    prompts, report = reading(file, on_bad_row="skip", domain="d")
    assert [(p.text, p.responses, p.answer, p.domain) for p in prompts] == [
        ("a", ("1", "2"), "x", "d"),
        ("b", (), None, "d"),
    ]
    assert (report.rows, report.prompts, report.duplicates, report.skipped, report.empty_responses) == (6, 2, 1, 3, 1)
    assert report.rows == report.prompts + report.duplicates + report.skipped
    assert f"{file}:4 is not JSON" in report.problems[0]
    assert f"{file}:6 asks what {file}:1 asks, with another answer: 'y', not 'x'" in report.problems[1]
    assert "2 prompts from 6 rows" in str(report) and "3 could not be read" in str(report)


def test_all_bad_rows_are_counted_and_five_shown(tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", {"prompt": "a"}, *["nonsense"] * 7)
    with pytest.raises(UsageError) as caught:
        read(file)
    assert "7 of 8 rows cannot be read" in caught.value.problems[0]
    assert len(caught.value.problems) == 7 and caught.value.problems[-1] == "... and 2 more"
    assert f"{file}:2 " in caught.value.problems[1]


def test_bytes_that_are_not_text_are_a_bad_row(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(UsageError, match=r"a\.jsonl:2 is not UTF-8"):
        read(file)


def test_json_parquet_and_folders(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "response": "1"}, {"prompt": "b", "response": None}]
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    lines(tmp_path / "lines.json", *rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    one, two, three = (read(tmp_path / name) for name in ("list.json", "lines.json", "t.parquet"))
    assert one == two == three and [p.text for p in one] == ["a", "b"]
    assert one[1].where.endswith("list.json row 2") and three[1].where.endswith("t.parquet row 2")
    (tmp_path / "notes.txt").write_text("not data")
    (tmp_path / "deeper").mkdir()
    lines(tmp_path / "deeper" / "c.jsonl", {"prompt": "c"})
    prompts, report = reading(tmp_path)
    assert [p.text for p in prompts] == ["c", "a", "b"] and report.duplicates == 4


def test_saved_data_sets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{"messages": [{"role": "user", "content": "q"}], "answer": "7"}])
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "hard": data}).save_to_disk(tmp_path / "many")
    assert read(tmp_path / "one") == read(tmp_path / "many", split="hard") == [Prompt(USER, answer="7")]
    with pytest.raises(UsageError, match="no split 'dev'; it has train, hard"):
        read(tmp_path / "many", split="dev")


@pytest.mark.parametrize("name", ["tranin.jsonl", "none/at/all", "./train"])
def test_missing_files_are_not_looked_for_elsewhere(name: str, tmp_path: Path) -> None:
    lines(tmp_path / "train.jsonl", {"prompt": "a"})
    hint = r".*there is .*train\.jsonl" if name.endswith("jsonl") else ""
    with pytest.raises(UsageError, match="no such file" + hint):
        read(tmp_path / name if hint else name)


def test_unknown_formats_and_empty_sources(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt\na")
    (tmp_path / "b.jsonl").write_text("\n")
    (tmp_path / "c").mkdir()
    (tmp_path / "d.parquet").write_text("no")
    (tmp_path / "e.json").write_text("[1,\n")
    for name, why in (
        ("a.csv", "csv"),
        ("b.jsonl", "no rows"),
        ("c", "has no .jsonl"),
        ("d.parquet", "as parquet"),
        ("e.json", "not JSON"),
    ):
        with pytest.raises(UsageError, match=why):
            read(tmp_path / name)


def test_the_built_in_world() -> None:
    train, dev = read("world:sort:20"), read("world:sort:20", split="dev", domain="mine")
    assert len(train) == 20 and all(p.answer and p.domain == "sort" for p in train)
    assert {p.domain for p in dev} == {"mine"} and not {p.id for p in train} & {p.id for p in dev}
    assert read("world:sort:5") == train[:5]
    for bad in ("world:sort:0", "world:sort:many", "world:srot"):
        with pytest.raises(UsageError):
            read(bad)
    with pytest.raises(UsageError, match="split"):
        read("world:sort", split="validation")


# -- recorded answers


def test_answers_are_joined_by_prompt(tmp_path: Path) -> None:
    prompts = [ask(t) for t in "abc"]
    file = lines(
        tmp_path / "gpt.jsonl",
        {"prompt": "a", "response": "1"},
        {"prompt_id": prompts[0].id, "responses": ["2", "1", ""]},
        {"prompt": "b", "response": ""},
        {"prompt": "z", "response": "9"},
    )
    found = answers(file)
    assert found == {prompts[0].id: ("1", "2"), ask("z").id: ("9",)}
    with pytest.raises(
        UsageError, match=r"no answer for 2 of 3 prompts, such as 'b', 'c'; it has answers for 2 prompts"
    ):
        join(prompts, found, file)
    assert join(prompts, found, file, missing="skip") == [Prompt(prompts[0].messages, ("1", "2"))]
    with pytest.raises(UsageError, match="1 of 1"):
        join(prompts[1:2], found, file, missing="skip")


def test_answer_files_are_checked(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"bad\.jsonl:1 has no answer"):
        answers(lines(tmp_path / "bad.jsonl", {"prompt_id": "1234"}))
    with pytest.raises(UsageError, match="none of its 1 prompts has an answer"):
        answers(lines(tmp_path / "none.jsonl", {"prompt": "a"}))


# -- hashes


def test_hashes_are_of_content(tmp_path: Path) -> None:
    a, b = (tmp_path / n for n in ("a", "b"))
    for folder in (a, b):
        folder.mkdir()
        lines(folder / "x.jsonl", {"prompt": "a"})
    assert fingerprint(a) == fingerprint(b) and fingerprint(a / "x.jsonl") == fingerprint(b / "x.jsonl")
    before = fingerprint(b)
    (b / "x.jsonl").rename(b / "y.jsonl")
    assert fingerprint(b) != before
    assert content(read(a)) == content(read(b)) != content([ask("b")])
    assert content([Prompt(USER, ("r",))]) != content([Prompt(USER)]) != content([Prompt(USER, answer="r")])
    with pytest.raises(UsageError):
        fingerprint(tmp_path / "none")


# -- mixtures


def mixture(sizes: list[int], weights: list[float], seed: int = 0) -> tuple[Mixture, list[list[Prompt]]]:
    sources = [[ask(f"{s} {k}") for k in range(n)] for s, n in enumerate(sizes)]
    return Mixture(sources, weights, seed), sources


weighted = st.lists(
    st.tuples(st.integers(1, 12), st.one_of(st.integers(0, 9), st.floats(0.01, 10).map(lambda w: round(w, 2)))),
    min_size=1,
    max_size=6,
).filter(lambda pairs: any(w for _, w in pairs))


@given(pairs=weighted, n=st.integers(1, 300))
@settings(max_examples=150, deadline=None)
def test_every_stretch_is_mixed_exactly(pairs: list[tuple[int, float]], n: int) -> None:
    mix, sources = mixture([s for s, _ in pairs], [w for _, w in pairs])
    total = sum(w for _, w in pairs)
    owner = {p.id: s for s, source in enumerate(sources) for p in source}
    counts = [0] * len(pairs)
    for k, prompt in enumerate(mix.prompts(0, n), 1):
        counts[owner[prompt.id]] += 1
        assert all(abs(c - k * w / total) < 1 + 1e-9 for c, (_, w) in zip(counts, pairs, strict=True))
    assert mix.counts(n) == tuple(counts)
    assert mix.epochs(n) == tuple(c / s for c, (s, _) in zip(counts, pairs, strict=True))


@given(pairs=weighted, cuts=st.lists(st.integers(0, 40), min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_resuming_anywhere_changes_nothing(pairs: list[tuple[int, float]], cuts: list[int]) -> None:
    sizes, weights = [s for s, _ in pairs], [w for _, w in pairs]
    unbroken = mixture(sizes, weights)[0].prompts(0, sum(cuts))
    cursor, parts = 0, []
    for cut in cuts:
        parts += mixture(sizes, weights)[0].prompts(cursor, cut)  # a new process each time
        cursor += cut
    assert parts == unbroken


@given(size=st.integers(1, 40), seed=st.integers(0, 5), epochs=st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_each_epoch_has_every_prompt_once(size: int, seed: int, epochs: int) -> None:
    mix, (source,) = mixture([size], [0.3], seed)
    assert mix.size == size
    for e in range(epochs):
        assert Counter(p.id for p in mix.prompts(e * size, size)) == Counter(p.id for p in source)


def test_orders_depend_on_seed_epoch_and_source() -> None:
    mix, _ = mixture([50, 50], [1, 1])
    texts = [p.text for p in mix.prompts(0, 200)]
    firsts = [t.split()[1] for t in texts if t[0] == "0"]
    seconds = [t.split()[1] for t in texts if t[0] == "1"]
    other = [p.text.split()[1] for p in mixture([50, 50], [1, 1], seed=1)[0].prompts(0, 100) if p.text[0] == "0"]
    assert len({tuple(o) for o in (firsts[:50], firsts[50:], seconds[:50], seconds[50:], other)}) == 5
    assert firsts[:50] != [str(k) for k in range(50)]


def test_the_order_is_fixed_for_good() -> None:
    """A resumed run must see the order that a run of an older version saw."""
    assert [p.text for p in mixture([4, 3], [2, 1], seed=17)[0].prompts(5, 6)] == GOLDEN


GOLDEN = ["0 1", "0 3", "1 2", "0 1", "0 2", "1 0"]


def test_far_positions_cost_little() -> None:
    mix, _ = mixture([7, 5, 3], [2, 1, 1])
    far = 10**15 + 1
    assert sum(mix.counts(far)) == far and len(mix.prompts(far, 3)) == 3
    awkward, _ = mixture([7, 5], [1 / 3, 0.7])
    rng = random.Random(0)
    for k in (rng.randrange(5000) for _ in range(20)):
        assert abs(awkward.counts(k)[0] - k * (1 / 3) / (1 / 3 + 0.7)) < 1


def test_mixtures_that_cannot_be() -> None:
    with pytest.raises(UsageError, match="weight -1"):
        Mixture([[ask("a")]], [-1])
    with pytest.raises(UsageError, match="source 2 of the mixture has no prompts"):
        Mixture([[ask("a")], []], [1, 1])
    with pytest.raises(UsageError, match="no source"):
        Mixture([[ask("a")]], [0])
    with pytest.raises(ValueError, match="cursor"):
        Mixture([[ask("a")]]).prompts(-1, 2)
    assert Mixture([[ask("a")], []], [1, 0]).prompts(0, 2) == [ask("a")] * 2


# -- real text


@needs_world
def test_real_files() -> None:
    stories, report = reading(WORLD / "text" / "tinystories_train.jsonl")
    assert report.skipped == 0 and all(p.responses and p.meta["id"] for p in stories)
    tasks = read(WORLD / "tasks" / "gsm8k_test.jsonl")
    assert tasks[0].answer == "18" and tasks[0].responses[0].endswith("#### 18")
    assert all(p.answer and "#" not in p.answer and p.responses for p in tasks)
    puzzles = read(
        WORLD / "tasks" / "knights_knaves" / "3ppl_test.parquet", prompt_key="quiz", response_key="solution_text"
    )
    assert len(puzzles) == 100 and puzzles[0].responses[0].startswith("Amelia is a knight")
    _, report = reading(WORLD / "text" / "roleplay_gpt4.json")
    assert report.rows == 1923 == report.prompts + report.duplicates
    with pytest.raises(UsageError, match="80 of 80 rows"):
        read(WORLD / "text" / "mt_bench_questions.jsonl")
