"""Several critics: each learns as it would alone, their scores become one number, and a run with them resumes."""

import math
from dataclasses import replace

import driven
import pytest
import torch
from driven import at_step, crash, differences, metrics, run, small
from hypothesis import given, settings
from hypothesis import strategies as st
from tabled import F64, gradient, packed, random_rollouts, random_table
from test_critic import BT, GOOD, GROUP, OTHER, backbone, row

from opd.anchors import old
from opd.credits import reward
from opd.critic import Critics, beside, critics, pair_up
from opd.errors import UsageError
from opd.loss import push
from opd.math.credit import combined, disagreement
from opd.method import CRITIC, build
from opd.model import trained
from opd.signals import Score
from opd.student import Optim
from opd.teachers import Teachers

HOW = ("mean", "minimum", "lower_bound")
TOLD = torch.tensor([[1.0, 3, 2, 5, 6], [10, 14, 12, 1, 0]], dtype=F64)  # two critics, groups of three and of two
GROUPS = torch.tensor([4, 4, 4, 9, 9])


# --- one number out of several ---------------------------------------------------------------------------------------


def test_by_hand():
    """Beside their groups the first says -1, 1, 0, -1/2, 1/2 and the second -2, 2, 0, 1/2, -1/2."""
    assert combined(TOLD, GROUPS, "mean").tolist() == [5.5, 8.5, 7, 3, 3]
    assert combined(TOLD, GROUPS, "minimum").tolist() == [-2, 1, 0, -0.5, -0.5]
    assert combined(TOLD, GROUPS, "lower_bound", 2.0).tolist() == [-2.5, 0.5, 0, -1, -1]
    assert float(disagreement(TOLD, GROUPS)) == pytest.approx((0.5 + 0.5 + 0 + 0.5 + 0.5) / 5)


@pytest.mark.parametrize("how", HOW)
@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-50, 50), min_size=4, max_size=4))
def test_what_a_critic_adds_to_a_whole_group_says_nothing(how, shifts):
    """It is known from pairs alone, so the credit may not move by a number per critic and prompt."""
    moved = TOLD + torch.tensor(shifts, dtype=F64).view(2, 2)[:, [0, 0, 0, 1, 1]]
    credit = {}
    for name, told in (("as it is", TOLD), ("moved", moved)):
        value = combined(told, GROUPS, how)
        credit[name] = torch.cat([value[:3] - value[:3].mean(), value[3:] - value[3:].mean()])
    torch.testing.assert_close(credit["moved"], credit["as it is"], rtol=0, atol=1e-11)


def test_bounds_lie_below_and_meet_where_critics_agree():
    one, twice = TOLD[:1], TOLD[:1].expand(2, 5)
    for how in HOW:
        assert torch.equal(combined(one, GROUPS, how), one[0])
    centred = torch.tensor([-1, 1, 0, -0.5, 0.5], dtype=F64)
    assert torch.equal(combined(twice, GROUPS, "minimum"), centred) and float(disagreement(twice, GROUPS)) == 0
    assert torch.equal(combined(twice, GROUPS, "lower_bound", 5.0), centred)
    apart = torch.tensor([0.5, 0.5, 0, 0.5, 0.5], dtype=F64)
    for width in (0.0, 1.0):  # of two, a deviation below their mean is the lower
        above = combined(TOLD, GROUPS, "lower_bound", width) - combined(TOLD, GROUPS, "minimum")
        torch.testing.assert_close(above, (1 - width) * apart)


@pytest.mark.parametrize("how", HOW)
def test_the_credit_is_that_of_one_critic_who_says_it(how):
    model, rows = random_table(1), random_rollouts(("student",))
    batch = packed(rows)
    told = torch.randn(3, len(rows), generator=torch.Generator().manual_seed(0), dtype=F64)
    loss = push(reward(CRITIC, std=True, combine=how, width=0.7), anchor=old())
    got = gradient(model, replace(batch, signals={CRITIC: Score(told)}), loss, tile=2, micro=9)[0]
    said = Score(combined(told, batch.group_B, how, 0.7))
    want = gradient(model, replace(batch, signals={CRITIC: said}), push(reward(CRITIC, std=True), anchor=old()))[0]
    assert float((got - want).norm() / want.norm()) < 1e-12
    order = list(reversed(range(len(rows))))
    part = Score(told).rows(batch.row_N, torch.tensor(order))
    assert torch.equal(part.value_KB, told[:, order]) and torch.equal(part.value_B, told[:, order].mean(0))


def test_a_missing_score_of_one_critic_is_missing():
    told = TOLD.clone()
    told[1, 3] = math.nan
    for how in HOW:
        assert combined(told, GROUPS, how).isnan().any() and not combined(told, GROUPS, how)[:3].isnan().any()


def test_it_prints_and_refuses_what_it_cannot_combine():
    printed = str(build("gad", {"critics": 3, "combine": "lower_bound", "width": 0.5}).loss)
    assert "[((mean - 0.5 std of score_critic) - group mean) / group std]" in printed
    assert "learn(critic: -log σ(D(teacher) - D(student)) for each of 3)" in printed
    assert "min score_critic" in str(build("gad", {"critics": 2, "combine": "minimum"}).loss)
    with pytest.raises(UsageError, match="gad: combine: minimum is of several critics, and there is 1"):
        build("gad", {"combine": "minimum"})


# --- each learns alone -----------------------------------------------------------------------------------------------


def test_each_critic_is_the_one_it_would_be_alone():
    """Over three updates, to the bit; and they are not the same critic."""
    settings_, pairs = Optim(lr=0.01, clip=0.0), pair_up(GOOD, [*GROUP, *OTHER])
    together = critics(3, backbone(), settings_, seed=5)
    alone = [beside(backbone(), settings_, seed=5 + k) for k in range(3)]
    for _ in range(3):
        said = together.update(pairs, BT, 0.01)
        each = [one.update(pairs, BT, 0.01) for one in alone]
        assert said == {k: sum(e[k] for e in each) / 3 for k in each[0]}
    told = together.each(pairs.rows)
    assert torch.equal(told, torch.stack([one.score(pairs.rows) for one in alone]))
    assert torch.equal(together.score(pairs.rows), told.mean(0)) and together.steps == 3
    assert (told[0] - told[1]).abs().max() > 1e-3 and (told[1] - told[2]).abs().max() > 1e-3


def test_the_first_of_several_is_the_only_one_of_one():
    first = critics(1, backbone(), Optim(), seed=5).members[0]
    assert torch.equal(
        first.module.score.weight, critics(4, backbone(), Optim(), seed=5).members[0].module.score.weight
    )
    assert first.model.name == "critic"


def test_a_truncated_answer_earns_the_lowest_of_each_critic():
    judges = critics(2, backbone(), Optim(), seed=5)
    cut = row(0, "student", 4, 4, 4, finish="length")
    keeps_ids = type("Keeps", (), {"canonical": staticmethod(lambda r: r)})()
    told = Teachers(keeps_ids, judges.models[0], critic=judges).scores(packed([*GROUP[:4], cut, OTHER[0]]))
    assert told.shape == (2, 6) and torch.equal(told[:, 4], told[:, :4].amin(1)) and told[0, 4] != told[1, 4]


# --- runs ------------------------------------------------------------------------------------------------------------

WARM = {"name": "warm-up", "method": "seqkd", "critic": {"learn": True, "alone_steps": 1, "group": 2}, "steps": 2}
GAD = {"name": "gad", "method": {"name": "gad", "group": 3, "critics": 3, "combine": "lower_bound"}, "steps": 4}


@pytest.mark.parametrize("lora", [None, 4], ids=["full", "lora"])
def test_a_run_with_three_resumes_to_the_same_bytes(tmp_path, monkeypatch, lora):
    student, runs = {"model": "world:student", "lora": lora}, driven.opened(monkeypatch)
    stages = {"student": student, "stages": [WARM, GAD], "run": {"save_every": 2}}
    _, whole = run(small(tmp_path, "whole", **stages))
    judges = runs[0].critic
    assert isinstance(judges, Critics) and [m.steps for m in judges.members] == [6] * 3
    with pytest.raises(driven.CrashError):
        run(small(tmp_path, "broken", **stages), watch=at_step(5, crash))
    driven.resume(tmp_path / "broken")
    assert not differences(whole, tmp_path / "broken")
    tensors, _ = driven.saved(whole)
    names = [f"critic{k}{what}" for k in ("", "_1", "_2") for what in ("", "_optimizer")]
    assert set(names) <= set(tensors)
    moments = [next(v for k, v in tensors[f"{n}_optimizer"].items() if k.endswith("exp_avg")) for n in names[::2]]
    assert not moments[0].equal(moments[1])
    if lora:
        own = [{k for k in tensors[n] if "lora" in k} for n in names[::2]]
        assert (
            all(own)
            and not own[0] & own[1]
            and all(f".{n}." in k for n, ks in zip(names[::2], own, strict=True) for k in ks)
        )
        frozen = {n for n, _ in trained(runs[0].student.model.module)}
        assert frozen and all(".student." in n for n in frozen)


def test_how_far_critics_are_apart_is_written_down(tmp_path):
    bare = {"data": {"train": "world:sort:8"}, "eval": {"every": 0, "at_start": False, "length_band": None}}
    shown = {}
    for number in (1, 2):
        stage = {"method": {"name": "gad", "group": 3, "critics": number}, "steps": 2}
        _, folder = run(small(tmp_path, str(number), stages=[stage], **bare))
        shown[number] = [r.get("critic/disagreement") for r in metrics(folder)]
    assert shown[1] == [None, None] and all(x > 0 for x in shown[2])
