"""How `bench/real.py` cuts stories into prompts and short answers, on stories made here."""

import json
import sys
from pathlib import Path

import pytest
from tabled import V, knowing, random_table, rollout, table

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import real
import real_measure

LONG = "She had a red ball that she loved. " * 8


def world(folder: Path, train: list[tuple[str, str]], test: list[tuple[str, str]]) -> Path:
    (folder / "text").mkdir()
    for name, rows in (("train", train), ("test", test)):
        lines = (json.dumps({"prompt": prompt, "response": response}) for prompt, response in rows)
        (folder / "text" / f"tinystories_{name}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize(
    ("story", "expected"),
    [
        ("He ran. He fell. He cried.", "He ran. He fell."),
        ('She said, "Look!" He did.', 'She said, "Look!"'),
        ("One\nline. And more words", "One line."),
        ("A sentence without any end for long", ""),
    ],
)
def test_an_answer_is_whole_sentences_on_one_line(story, expected):
    assert real.shortened(story, limit=20) == expected


def test_no_prompt_stands_in_two_splits_and_none_has_more_answers_than_allowed(tmp_path):
    train = [(f"Story {k} began.", LONG) for k in range(90)] + [("Again.", LONG + str(k)) for k in range(9)]
    test = [("Story 3 began.", LONG), ("A new one.", LONG), ("A short one.", "No."), ("P" * 80, LONG)]
    rows = real.split(world(tmp_path, train, test))
    asked = {name: [row["prompt"] for row in each] for name, each in rows.items()}
    assert asked["test"] == ["A new one."]
    assert not set(asked["train"]) & set(asked["dev"]) and 2 < len(asked["dev"]) < 30
    assert (asked["train"] + asked["dev"]).count("Again.") == real.ANSWERS
    assert all(row["response"].endswith(".") and len(row["response"]) <= real.ANSWER for row in rows["train"])


def test_the_answers_file_holds_nothing_of_the_test_split(tmp_path):
    place = world(tmp_path, [(f"Story {k} began.", LONG) for k in range(30)], [("A new one.", LONG)])
    sizes = real.prepare(place, tmp_path / "data")
    answers = (tmp_path / "data" / "answers.jsonl").read_text()
    assert sizes["test"] == 1 and sizes["train"] + sizes["dev"] == 30 == answers.count("\n")
    assert "A new one." not in answers


def test_repeated_runs_of_words_are_counted():
    assert real_measure.repeated("a b c d e f g h") == 0.0
    assert real_measure.repeated("a b c d a b c d") == pytest.approx(1 / 5)
    assert real_measure.repeated("one two") == 0.0


def test_the_distance_to_a_teacher_is_the_sum_over_its_vocabulary():
    uniform, sharp = random_table(None), knowing(3)
    rows = [rollout(k, "student", (1,), [(k % V, 0.0), (2, 0.0)]) for k in range(4)]
    s, t = table(sharp).detach(), table(uniform).detach()
    per_state = (s.exp() * (s - t)).sum(-1)
    expected = sum(float(per_state[1] + per_state[V + k % V]) for k in range(4)) / 8
    voices = [real_measure.Voice(model, None, 2) for model in (uniform, sharp)]
    found = real_measure.kl_to(*voices, rows)
    assert found["kl/reverse_nats"] == pytest.approx(expected)
    assert found["kl/forward_nats"] > 0 and real_measure.kl_to(voices[1], voices[1], rows)["kl/reverse_nats"] == 0


def test_a_finished_measurement_is_not_made_again(tmp_path):
    calls = []
    work = lambda: calls.append(1) or {"value": 2.0}
    first, again = (real_measure.kept(tmp_path / "deep" / "one.json", work) for _ in range(2))
    assert first == again and first["value"] == 2.0 and calls == [1]


def test_results_of_parts_and_seeds_that_were_not_run_are_kept():
    one = lambda value: {"start": {"x": value}}
    before = {
        "versions": {"torch": "1"},
        "runs": {"gad-gad-17": {"seconds": 1}, "white-jsd-17": {"seconds": 2}},
        "numbers": {"white": {"17": one(1)}, "gad": {"18": one(2), "17": one(3)}},
        "contests": {"gad": {"17": {"wins": {}}}},
        "written_by_hand": {},
    }
    now = {
        "versions": {"torch": "2"},
        "runs": {"gad-gad-17": {"seconds": 9}, "char-gad-17": {"seconds": 8}},
        "numbers": {"char": {"17": one(4)}, "gad": {"17": one(5)}},
        "contests": {"char": {"17": {"wins": {"gad": 0}}}},
    }
    found = real.merged(before, now)
    assert set(found) == set(now) and found["versions"] == {"torch": "2"}
    assert {name: run["seconds"] for name, run in found["runs"].items()} == {
        "gad-gad-17": 9,
        "white-jsd-17": 2,
        "char-gad-17": 8,
    }
    assert found["numbers"] == {
        "gad": {"17": one(5), "18": one(2)},
        "white": {"17": one(1)},
        "char": {"17": one(4)},
    }
    assert list(found["numbers"]) == ["gad", "white", "char"] and list(found["numbers"]["gad"]) == ["17", "18"]
    assert set(found["contests"]) == {"gad", "char"}
    assert real.merged({}, now) == now


def test_a_folder_without_a_recipe_is_begun_anew_and_one_with_it_goes_on(tmp_path, monkeypatch):
    asked = []

    def train(arguments, **_):
        asked.append(arguments[3:])
        run.mkdir(exist_ok=True)

    monkeypatch.setattr(real.subprocess, "run", train)
    arm = real.ARMS[0]
    run = tmp_path / real.folder_of(arm, 17)
    run.mkdir()
    (run / "metrics.jsonl").write_text("half a line")
    real.trained(arm, 17, tmp_path, tmp_path, [])
    assert not (run / "metrics.jsonl").exists()
    (run / "recipe.yaml").write_text("")
    real.trained(arm, 17, tmp_path, tmp_path, [])
    assert asked == [real.command(arm, 17, tmp_path, tmp_path, []), ["train", "--resume", str(run), "--quiet"]]
