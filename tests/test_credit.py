"""Credits: group advantages and rewards-to-go, their degenerate cases, and what is missing staying missing."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.math.credit import degenerate_groups, discounted, group_advantage

NAN = float("nan")


def f64(*x):
    return torch.tensor(x, dtype=torch.float64)


def ids(*x):
    return torch.tensor(x)


def test_group_advantage_by_hand():
    value, group = f64(1, 0, 0, 5, 7), ids(3, 3, 3, 1, 1)
    plain = group_advantage(value, group, std=False)
    torch.testing.assert_close(plain, f64(2 / 3, -1 / 3, -1 / 3, -1, 1))
    scaled = group_advantage(value, group, std=True)
    dev = math.sqrt((4 / 9 + 1 / 9 + 1 / 9) / 2)  # n - 1
    torch.testing.assert_close(scaled, plain / (f64(dev, dev, dev, math.sqrt(2), math.sqrt(2)) + 1e-6))


def test_rows_may_come_in_any_order():
    value, group = f64(1, 0, 3, 5, 7, 2), ids(0, 1, 0, 1, 0, 1)
    order = torch.tensor([5, 2, 0, 4, 1, 3])
    for std in (False, True):
        ordered = group_advantage(value, group, std=std)[order]
        torch.testing.assert_close(group_advantage(value[order], group[order], std=std), ordered, atol=1e-15, rtol=0)


@pytest.mark.parametrize("std", [False, True])
def test_degenerate_groups_get_exactly_nothing(std):
    value, group = f64(1, 1, 1, 4, 0, 1), ids(0, 0, 0, 1, 2, 2)
    advantage = group_advantage(value, group, std=std)
    assert advantage[:4].tolist() == [0, 0, 0, 0] and (advantage[4:] != 0).all()
    assert degenerate_groups(value, group).tolist() == [True, True, True, True, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [2, 3, 7, 8, 64])
def test_equal_rewards_are_equal_whatever_the_mean_rounds_to(dtype, size):
    """0.1 eight times has a mean that is not 0.1; divided by its own deviation that would be a full credit."""
    for x in (0.1, 1 / 3, 0.7, 1e6 + 0.1, -123.4):
        value = torch.full((size,), x, dtype=dtype)
        assert (group_advantage(value, torch.zeros(size, dtype=torch.long), std=True) == 0).all(), (x, size)
    twice = torch.tensor([0.1 + 0.2, 0.3], dtype=dtype)  # equal on paper
    assert (group_advantage(twice, ids(0, 0), std=True) == 0).all()


def test_min_std():
    value, group = f64(0, 0.01, 0, 1), ids(0, 0, 1, 1)
    advantage = group_advantage(value, group, std=True, min_std=0.05)
    assert advantage[:2].tolist() == [0, 0] and advantage[3] > 0.7
    assert degenerate_groups(value, group, min_std=0.05).tolist() == [True, True, False, False]


@pytest.mark.parametrize("std", [False, True])
def test_a_missing_value_is_missing_in_its_group_alone(std):
    """It must reach the check that refuses it: not become 0, and not reach into other groups."""
    value, group = f64(NAN, 1, 0, 1), ids(0, 0, 1, 1)
    advantage = group_advantage(value, group, std=std)
    assert advantage[:2].isnan().all()
    torch.testing.assert_close(advantage[2:], group_advantage(value[2:], group[2:], std=std), atol=0, rtol=0)
    assert degenerate_groups(value, group).tolist() == [False] * 4


def test_a_group_does_not_depend_on_the_others():
    """Whatever stands in the rest of the batch, or on another rank: even a reward of another magnitude."""
    small = f64(1e-9, 3e-9)
    alone = group_advantage(small, ids(0, 0), std=True)
    beside = group_advantage(torch.cat([small, f64(1e9, -1e9)]), ids(0, 0, 1, 1), std=True)
    assert alone[1] > 0 and torch.equal(beside[:2], alone)


def test_nothing():
    assert group_advantage(f64(), ids().long(), std=True).shape == (0,)
    assert degenerate_groups(f64(), ids().long()).shape == (0,)
    assert discounted(f64(), ids().long(), 0.5).shape == (0,)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.floats(-5, 5, width=16)), min_size=1, max_size=12), st.booleans())
def test_advantages_are_centred_and_scale_free(rows, std):
    group, value = ids(*(g for g, _ in rows)), f64(*(v for _, v in rows))
    advantage = group_advantage(value, group, std=std)
    for g in group.unique():
        mine = advantage[group == g]
        assert abs(float(mine.sum())) < 1e-9
        if std and (mine != 0).any():
            assert float(mine.std()) == pytest.approx(1, rel=1e-2, abs=0) or float(value[group == g].std()) < 1e-3
    assert torch.equal(advantage != 0, group_advantage(value + 8, group, std=std) != 0)


def test_discounted_golden():
    credit, row = f64(0.5, -1, 0.2, -0.3), ids(0, 0, 0, 0)
    torch.testing.assert_close(discounted(credit, row, 0.5), f64(0.0125, -0.975, 0.05, -0.3))
    torch.testing.assert_close(discounted(credit, row, 1.0), f64(-0.6, -1.1, -0.1, -0.3))
    assert torch.equal(discounted(credit, row, 0.0), credit)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.floats(-3, 3), min_size=1, max_size=6), min_size=1, max_size=5), st.floats(0.0, 1.0))
def test_discounted_is_the_double_loop(rows, gamma):
    """Rows of several lengths; nothing leaks from one row into the next."""
    credit = f64(*(x for row in rows for x in row))
    row = ids(*(7 * i for i, r in enumerate(rows) for _ in r))
    want = [sum(gamma**k * x for k, x in enumerate(r[t:])) for r in rows for t in range(len(r))]
    torch.testing.assert_close(discounted(credit, row, gamma), f64(*want), atol=1e-12, rtol=1e-12)


def test_a_missing_credit_is_missing_before_it_and_not_after():
    got = discounted(f64(1, NAN, 1, 1), ids(0, 0, 0, 1), 0.5)
    assert got.isnan().tolist() == [True, True, False, False]
