"""Whole runs of several stages: where each begins, what it draws from, earlier selves as teachers, killed anywhere."""

from __future__ import annotations

import random
import time
from functools import partial
from itertools import accumulate

import driven
import pytest
from driven import differences, events, kill, metrics, run, small, wait_for
from safetensors.torch import load_file

from opd import checkpoint, snapshot
from opd.errors import UsageError
from opd.legs import first_cursor, legs
from opd.log import read, read_json
from opd.mixture import Mixture
from opd.runs import measure
from opd.types import Message, Prompt

ODD = "RL: ../sort"
CHAIN = [
    {"name": ODD, "domains": ["sort"], "method": {"name": "grpo", "group": 2}, "steps": 3},
    {"name": "facts", "start": "initial", "domains": ["group"], "method": "sft", "epochs": 1},
    {"name": "back", "start": ODD, "domains": ["sort"], "method": "token_opd", "steps": 2},
    {"name": "merge", "start": "initial", "method": "full_vocab", "steps": 2},
]
HOMES = {
    "teacher": {"stage": "facts"},
    "sort": {"stage": ODD},
    "group": {"stage": "facts", "resident": False},
}


def chain(parent, name="run", **changes):
    own = {
        "teachers": HOMES,
        "data": {"train": ["world:sort:14", "world:group:10"], "dev": ["world:sort:4", "world:group:4"]},
        "stages": CHAIN,
        "eval": {"every": 0, "length_band": None, "keep": "last"},
        "run": {"save_every": 2, "keep": 9, "sample_rows": 99},
    } | changes
    return small(parent, name, **own)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(chain(tmp_path_factory.mktemp("whole"), "whole"))[1]


# --- what each stage draws ----------------------------------------------------------------------------------------


def test_stages_draw_from_their_domains_and_go_on_where_they_stopped(whole):
    """4 prompts a step: sort 12, then all 10 of group in 3 steps, then sort from its 13th on, then both."""
    from opd.data import read as prompts

    mixture = Mixture([prompts("world:sort:14"), prompts("world:group:10")], seed=17)
    lengths, cursors = (3, 3, 2, 2), (0, 0, 12, 0)
    asked = {}
    for row in read(whole / "samples.jsonl"):
        asked.setdefault(row["step"], set()).add(row["prompt_id"])
    step = 0
    for stage, length, cursor in zip(CHAIN, lengths, cursors, strict=True):
        own = mixture.of(stage.get("domains"))
        for k in range(length):
            step += 1
            assert asked[step] == {p.id for p in own.prompts(cursor + 4 * k, 4)}, (stage["name"], k)
    assert [row["stage"] for row in metrics(whole)] == [
        s["name"] for s, n in zip(CHAIN, lengths, strict=True) for _ in range(n)
    ]


def test_a_part_of_a_mixture_keeps_weights_and_is_exact():
    make = lambda domain, n: [Prompt((Message("user", f"{domain}{k}"),), domain=domain) for k in range(n)]
    mixture = Mixture([make("a", 5), make("b", 4), [*make("c", 3), *make("d", 3)]], [1, 2, 1], seed=3)
    part = mixture.of(["b", "d"])
    assert part is mixture.of(("d", "b")) and mixture.of(None) is mixture and part.size == 7
    drawn = part.prompts(0, 30)
    assert {p.domain for p in drawn} == {"b", "d"}
    counts = list(accumulate((p.domain == "b" for p in drawn), initial=0))
    assert all(abs(c - 2 / 3 * k) < 1 for k, c in enumerate(counts))
    assert {p.id for p in drawn if p.domain == "d"} == {p.id for p in mixture.sources[2] if p.domain == "d"}
    assert part.prompts(7, 9) == drawn[7:16]
    with pytest.raises(UsageError, match=r"no prompt of data.train is of the domain 'x'; there are 'a', 'b', 'c', 'd'"):
        mixture.of(["a", "x"])


def test_where_a_stage_goes_on_is_a_matter_of_the_recipe_alone(tmp_path):
    chosen = chain(tmp_path)
    make = lambda domain, n: [Prompt((Message("user", f"{domain}{k}"),), domain=domain) for k in range(n)]
    mixture = Mixture([make("sort", 14), make("group", 10)])
    assert [first_cursor(legs(chosen), i, mixture) for i in range(4)] == [0, 0, 12, 0]


# --- where each stage begins ------------------------------------------------------------------------------------------


def test_each_stage_begins_where_it_says(tmp_path, monkeypatch, whole):
    runs, at_stage = driven.opened(monkeypatch), []

    def watch(kind, _numbers):
        if kind == "stage":
            at_stage.append({k: v.detach().clone() for k, v in runs[0].student.model.module.named_parameters()})

    folder = run(chain(tmp_path), watch=watch)[1]
    assert not differences(whole, folder)
    same = lambda a, b: all(a[k].equal(b[k]) for k in a)
    sort, facts, back, merge = at_stage
    assert same(sort, facts) and same(sort, merge) and not same(sort, back)
    assert same(load_file(snapshot.place(folder, ODD)), back)
    assert sorted(p.name.split("-")[0] for p in (folder / "stages").iterdir()) == ["RL_____sort", "facts", "initial"]


@pytest.mark.parametrize("lora", [None, 4], ids=["full", "lora"])
def test_a_chain_killed_anywhere_ends_as_an_unbroken_one(tmp_path, lora, whole):
    """Inside the checkpoint that ends the first stage, at a moment of no choice, and between two stages."""
    own = {} if lora is None else {"student": {"model": "world:student", "lora": lora}}
    if lora is not None:
        whole = run(chain(tmp_path, "whole", **own))[1]
    folder = tmp_path / "run"
    process = driven.begin(chain(tmp_path, **own), folder, partial(driven.die_in_checkpoint, 2))
    process.join()
    assert process.exitcode == -9 and list(checkpoint.complete(folder / "checkpoints")) == [2]
    process, before = driven.begin(None, folder), driven.lines(folder, "events")
    wait_for(lambda: driven.lines(folder, "events") != before or not process.is_alive())
    time.sleep(random.uniform(0.0, 0.5))
    kill(process)
    for later, path in checkpoint.complete(folder / "checkpoints").items():
        if later > 6:
            path.rename(tmp_path / f"away-{later}")
    with pytest.raises(driven.CrashError):
        driven.resume(folder, watch=driven.at_step(7, driven.crash))
    driven.resume(folder)
    assert not differences(whole, folder)


def test_a_fork_begins_from_another_runs_student_and_calls_it_initial(tmp_path, whole):
    folder = run(chain(tmp_path), fork=f"{whole}@6")[1]
    begun = load_file(snapshot.place(folder, "initial"))
    saved = checkpoint.load(checkpoint.complete(whole / "checkpoints")[6])[0]["student"]
    assert all(w.equal(saved[name]) for name, w in begun.items())


# --- teachers that are stages -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        (
            [CHAIN[2] | {"start": "initial"}, CHAIN[0], CHAIN[1]],
            r"stage `back` asks `teacher`, .* stage `facts`, which",
        ),
        ([CHAIN[0], CHAIN[3], CHAIN[1]], r"stage `merge` asks `group`, the student at the end of stage `facts`, which"),
    ],
)
def test_a_stage_cannot_be_asked_before_it_ended(tmp_path, stages, said):
    with pytest.raises(UsageError, match=said):
        legs(chain(tmp_path, stages=stages))


def test_experts_of_the_stages_own_domains_are_enough(tmp_path):
    legs(chain(tmp_path, stages=[CHAIN[0], CHAIN[3] | {"domains": ["sort"]}, CHAIN[1]]))


@pytest.mark.parametrize("name", ["initial", "previous"])
def test_names_that_start_has_a_meaning_for_are_refused(tmp_path, name):
    with pytest.raises(UsageError, match=rf"is '{name}', which `start` has a meaning for"):
        chain(tmp_path, stages=[*CHAIN, {"name": name, "method": "sft", "steps": 1}])


def test_a_domain_that_no_prompt_has_is_refused_before_training(tmp_path):
    with pytest.raises(UsageError, match=r"no prompt of data.train is of the domain 'srot'; there are 'group', 'sort'"):
        run(chain(tmp_path, stages=[CHAIN[0] | {"domains": ["srot"]}, *CHAIN[1:]]))
    assert not (tmp_path / "run").exists()


def test_text_of_an_earlier_self_teaches_and_evaluations_do_not_ask_for_it_before_it_is_there(tmp_path, whole):
    """And a finished run is measured without its stages."""
    stages = [*CHAIN[:2], {"name": "said", "domains": ["sort"], "method": "seqkd", "steps": 1}]
    summary, folder = run(chain(tmp_path, stages=stages, teachers={"teacher": {"stage": ODD}}))
    assert summary["status"] == "finished" and summary["before"]["eval/prompts"] == 8
    assert {row["role"] for row in read(folder / "answers.jsonl")} == {"teacher"}
    assert read_json(folder / "plan.json")["teachers"] == {"teacher": ODD}
    again = measure(folder)
    assert again["eval/accuracy"] == pytest.approx(summary["after"]["eval/accuracy"])


def test_going_back_to_a_worse_student_is_no_collapse(tmp_path, monkeypatch):
    """Scores are given: 0.2, then 0.9 at the end of the first stage, 0.2 in the second, which begins with `initial`."""
    given = iter([0.2, 0.9, 0.2, 0.2, 0.2])
    numbers = lambda *_, **__: {"eval/dev_score": next(given), "eval/prompts": 1000.0}
    monkeypatch.setattr(driven.train_module, "evaluate", numbers)
    own = {"every": 1, "length_band": None, "keep": "last", "collapse": 0.5}
    stages = [{**CHAIN[0], "steps": 1}, {**CHAIN[1], "epochs": None, "steps": 2}]
    stages = [{k: v for k, v in stage.items() if v is not None} for stage in stages]
    summary, folder = run(chain(tmp_path, stages=stages, teachers={"teacher": {"stage": ODD}}, eval=own))
    assert summary["status"] == "finished" and not events(folder, "stop")
