"""Ratios, clips, bands and k3: values by hand, and gradients that are zero exactly where they should be."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.math.divergence import forward_kl, reverse_kl
from opd.math.trust import band, k3, surrogate


def f64(*x):
    return torch.tensor(x, dtype=torch.float64)


def slope(fn, x):
    x = x.clone().requires_grad_()
    fn(x).sum().backward()
    return x.grad


def test_surrogate_by_hand():
    ratio, credit = f64(1.4, 1.4, 0.5, 0.5, 1.1, 1.1), f64(1, -1, 1, -1, 2, -2)
    value = surrogate(ratio.log(), credit, (0.2, 0.28))
    torch.testing.assert_close(value, -f64(1.28, -1.4, 0.5, -0.8, 2.2, -2.2))


def test_glm5_golden():
    """By hand: rho 1.1, r 1.4, A -0.3 is a token loss of 0.462."""
    value = surrogate(f64(1.4).log(), f64(-0.3), (0.2, 0.28))
    assert float(band(f64(1.1), 0.5, 2.0) * value) == pytest.approx(0.462)


@settings(max_examples=100, deadline=None)
@given(st.floats(-1, 1), st.floats(-2, 2), st.floats(0, 0.9), st.floats(0, 3))
def test_surrogate_gradient(gap, credit, low, high):
    """-r a, except exactly 0 past the clip on the side that the credit pushes to."""
    live, anchor, a = f64(gap - 1.0), f64(-1.0), f64(credit)
    ratio = math.exp(gap)
    if min(abs(ratio - 1 - high), abs(ratio - 1 + low)) < 1e-9:
        return  # at the kink either slope is one
    stopped = (credit > 0 and ratio > 1 + high) or (credit < 0 and ratio < 1 - low)
    got = float(slope(lambda x: surrogate(x - anchor, a, (low, high)), live)[0])
    assert got == pytest.approx(0.0 if stopped else -ratio * credit, abs=1e-12) and (not stopped or got == 0)
    plain = float(slope(lambda x: surrogate(x - anchor, a, None), live)[0])
    assert plain == pytest.approx(-ratio * credit, abs=1e-12)


def test_where_nothing_moved_the_clip_is_not_there():
    """r = 1, also with a clip of no width: the first update of a batch has the full gradient."""
    live, credit = f64(-1.0, -2.0), f64(0.7, -0.4)
    for clip in (None, (0.2, 0.28), (0.0, 0.0)):
        torch.testing.assert_close(slope(lambda x, c=clip: surrogate(x - live, credit, c), live), -credit)


def test_band_golden():
    """pop(.; 1/2, 2) of GLM-5: both ends belong to it."""
    assert band(f64(0.49, 0.5, 1.9, 2.0, 2.01), 0.5, 2.0).tolist() == [0, 0.5, 1.9, 2.0, 0]
    wide = f64(0.01, 1.0, 30.0)
    assert torch.equal(band(wide, 0.0, math.inf), wide)


ZS, ZT = f64(2, 1, 0.5, -1, 0), f64(0.5, 2.5, 1, -2, 0.3)


def test_k3_has_the_value_of_one_kl_and_the_gradient_of_the_other():
    """Value of one KL, gradient of the other: by exact enumeration of the sampled token."""
    t, q = ZT.log_softmax(-1), ZS.log_softmax(-1).exp()
    assert float((q * k3(ZS.log_softmax(-1), t)).sum()) == pytest.approx(0.79406387, abs=1e-8)
    grad = slope(lambda z: q * k3(z.log_softmax(-1), t), ZS)
    torch.testing.assert_close(grad, slope(lambda z: forward_kl(z.log_softmax(-1), t), ZS), atol=1e-12, rtol=0)
    assert (grad - slope(lambda z: reverse_kl(z.log_softmax(-1), t), ZS)).abs().max() > 0.05


def test_pushed_k1_has_the_reverse_gradient_and_differentiated_k1_has_none():
    """The -log ratio as a loss teaches nothing, as a detached credit it teaches the reverse KL."""
    t, s = ZT.log_softmax(-1), ZS.log_softmax(-1)
    q = s.exp()
    pushed = slope(lambda z: q * surrogate(z.log_softmax(-1) - s, t - s, None), ZS)
    torch.testing.assert_close(pushed, slope(lambda z: reverse_kl(z.log_softmax(-1), t), ZS), atol=1e-12, rtol=0)
    assert slope(lambda z: q * (z.log_softmax(-1) - t), ZS).abs().max() < 1e-12


@settings(max_examples=100, deadline=None)
@given(st.floats(-60, 0), st.floats(-60, 0))
def test_k3_is_bounded_and_zero_only_at_equality(live, other):
    value = float(k3(f64(live), f64(other)))
    assert 0 <= value <= 10
    assert float(k3(f64(live), f64(live))) == 0


def test_k3_clamps_as_the_papers_do():
    assert float(k3(f64(-30.0), f64(0.0))) == 10.0
    assert float(k3(f64(0.0), f64(-30.0))) == pytest.approx(10.0)
    assert slope(lambda x: k3(x, f64(0.0)), f64(-30.0)).tolist() == [0.0]
    assert float(k3(f64(0.0), f64(-5.0))) == pytest.approx(math.exp(-5) + 4)
