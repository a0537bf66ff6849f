"""The critic's memory: which pairs it keeps, which it draws, and that a resumed run draws the same."""

from collections import Counter
from itertools import combinations

import driven
import pytest
import torch
from driven import at_step, crash, differences, metrics, run, small

from opd import checkpoint
from opd.critic import Pairs, join
from opd.replay import Replay, from_tensors, tensors

NONE = join(())


def pairs(step: int, count: int) -> Pairs:
    """Pairs that can be told apart: teacher's row (step, 0), student's rows (step, k, 9...)."""
    rows = ((step, 0), *((step, k, *[9] * k) for k in range(1, count + 1)))
    weight_P = 1 / torch.arange(1, count + 1, dtype=torch.float64)
    return Pairs(rows, torch.zeros(count, dtype=torch.long), torch.arange(1, count + 1), weight_P)


def told(found: Pairs) -> list[tuple[tuple[int, ...], tuple[int, ...], float]]:
    """Each pair as its two rows and its weight."""
    places = zip(found.good_P.tolist(), found.bad_P.tolist(), found.weight_P.tolist(), strict=True)
    return [(found.rows[good], found.rows[bad], weight) for good, bad, weight in places]


def memory(span: int, *counts: int) -> Replay:
    """What is kept after a step for each count."""
    kept = Replay(span)
    for step, count in enumerate(counts):
        kept = kept.after(step, pairs(step, count))
    return kept


@pytest.mark.parametrize("span", [0, 1, 2, 5])
def test_the_last_steps_are_kept_and_no_others(span):
    kept = memory(span, 2, 3, 1)
    assert [step for step, _ in kept.steps] == [0, 1, 2][max(0, 3 - span) :]
    assert told(kept.draw(99, seed=0, step=3)) == [t for s, p in kept.steps for t in told(p)]


def test_steps_without_pairs_and_steps_elsewhere_make_the_memory_older():
    assert [step for step, _ in memory(3, 2, 0, 1).steps] == [0, 2]
    assert told(memory(2, 2, 2).draw(99, seed=0, step=3)) == told(pairs(1, 2))
    assert memory(2, 2, 2).draw(99, seed=0, step=9).count == 0
    assert memory(2, 2, 2).draw(0, seed=0, step=2).rows == ()


def test_a_draw_takes_each_pair_once_with_its_rows_and_weight():
    kept = memory(3, 2, 3, 1)
    everything = told(kept.draw(99, seed=0, step=3))
    for step in range(3, 5):
        found = kept.draw(2, seed=7, step=step)
        assert found.count == 2 == len(set(told(found))) and set(told(found)) <= set(everything)
        assert {r for t in told(found) for r in t[:2]} == set(found.rows), "no row that no pair reads"


def test_every_choice_is_as_likely_and_follows_from_seed_and_step():
    kept = memory(2, 3, 2)
    named = told(kept.draw(99, seed=0, step=2))
    choice = lambda seed: tuple(sorted(named.index(t) for t in told(kept.draw(2, seed=seed, step=2))))
    count = Counter(choice(seed) for seed in range(1000))
    assert set(count) == set(combinations(range(5), 2))
    assert all(60 < n < 140 for n in count.values())  # of 10 choices; four standard deviations
    assert told(kept.draw(2, seed=1, step=2)) == told(memory(2, 3, 2).draw(2, seed=1, step=2))


def test_a_memory_comes_back_from_its_tensors():
    kept = memory(3, 2, 0, 3)
    back = from_tensors(3, {name: t.clone() for name, t in tensors(kept).items()})
    assert [(s, told(p), p.rows) for s, p in back.steps] == [(s, told(p), p.rows) for s, p in kept.steps]
    assert told(back.draw(2, 5, 3)) == told(kept.draw(2, 5, 3))
    assert tensors(Replay(3)) == {} and from_tensors(3, {}) == Replay(3)


def test_joined_pairs_share_equal_rows_and_the_first_keep_their_numbers():
    first, again = pairs(0, 2), pairs(0, 3)
    both = join((first, again))
    assert told(both) == told(first) + told(again) and len(both.rows) == len(again.rows)
    assert both.rows[: len(first.rows)] == first.rows
    assert told(join((first, NONE))) == told(first)


def test_a_resumed_run_meets_the_same_old_pairs(tmp_path):
    how = {"critic": {"lr": 1e-3, "steps": 2, "replay": 2}}
    whole = run(small(tmp_path, "whole", **how))[1]
    with pytest.raises(driven.CrashError):
        run(small(tmp_path, **how), watch=at_step(5, crash))
    kept = checkpoint.load(checkpoint.latest(tmp_path / "run" / "checkpoints"))[0]["replay"]
    assert {int(name.split("/")[0]) for name in kept} == {2, 3}, "of the checkpoint of step 4: the third and fourth"
    driven.resume(tmp_path / "run")
    assert not differences(whole, tmp_path / "run")

    plain = run(small(tmp_path, "plain", critic={"lr": 1e-3, "steps": 2}))[1]
    assert "replay" not in driven.saved(plain)[0]
    (one, two, *_), (same, other, *_) = metrics(whole), metrics(plain)
    assert one == same and two["critic/accuracy"] == other["critic/accuracy"], "fresh pairs are what is measured"
    assert two["critic/loss"] != other["critic/loss"]
