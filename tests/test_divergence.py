"""Divergences: golden values and gradients, limits, bounds, and -inf on either side."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.loss import Divergence
from opd.math import divergence as D

ZS = [2.0, 1.0, 0.5, -1.0, 0.0]
ZT = [0.5, 2.5, 1.0, -2.0, 0.3]
EVERY = {
    "forward_kl": Divergence("forward_kl"),
    "reverse_kl": Divergence("reverse_kl"),
    "jsd": Divergence("jsd", (("beta", 0.3),)),
    "skew_forward_kl": Divergence("skew_forward_kl", (("alpha", 0.1),)),
    "skew_reverse_kl": Divergence("skew_reverse_kl", (("alpha", 0.1),)),
    "tvd": Divergence("tvd"),
}


def f64(x):
    return torch.tensor(x, dtype=torch.float64)


def logp(z):
    return f64(z).log_softmax(-1)


def sums(name, s, t, **args):
    return getattr(D, name)(s, t, **args).sum(-1)


def slope(name, zs, t, **args):
    z = zs.clone().requires_grad_()
    sums(name, z.log_softmax(-1), t, **args).sum().backward()
    return z.grad


@pytest.mark.parametrize(
    ("name", "args", "golden"),
    [
        ("forward_kl", {}, 0.64857939),
        ("reverse_kl", {}, 0.79406387),
        ("jsd", {"beta": 0.1}, 0.05778668),
        ("jsd", {"beta": 0.5}, 0.16365654),
        ("jsd", {"beta": 0.9}, 0.06697725),
        ("tvd", {}, 0.49347754),
        ("skew_forward_kl", {"alpha": 0.1}, 0.51658577),
        ("skew_reverse_kl", {"alpha": 0.1}, 0.56993245),
    ],
)
def test_golden_values(name, args, golden):
    assert float(sums(name, logp(ZS), logp(ZT), **args)) == pytest.approx(golden, abs=1e-8)


@pytest.mark.parametrize(
    ("name", "args", "golden"),
    [
        ("forward_kl", {}, [0.471602, -0.468379, -0.025098, 0.020527, 0.001349]),
        ("reverse_kl", {}, [0.576419, -0.409319, -0.122638, 0.014683, -0.059144]),
        ("jsd", {"beta": 0.5}, [0.110443, -0.093910, -0.015425, 0.004283, -0.005390]),
        ("skew_reverse_kl", {"alpha": 0.1}, [0.387269, -0.300533, -0.070082, 0.013315, -0.029969]),
    ],
)
def test_golden_gradients(name, args, golden):
    torch.testing.assert_close(slope(name, f64(ZS), logp(ZT), **args), f64(golden), atol=1e-6, rtol=0)


def test_closed_form_gradients():
    """The gradients by hand, written from p and q alone."""
    s, t = logp(ZS), logp(ZT)
    q, p = s.exp(), t.exp()
    centred = lambda c: q * (c - (q * c).sum())
    alpha, beta, sign = 0.2, 0.7, torch.sign(q - p)
    mixed = alpha * p + (1 - alpha) * q
    other = (1 - alpha) * p + alpha * q
    m = beta * p + (1 - beta) * q
    expected = {
        ("forward_kl", ()): q - p,
        ("reverse_kl", ()): centred(s - t),
        ("jsd", (("beta", beta),)): centred((1 - beta) * (q / m).log()),
        ("skew_forward_kl", (("alpha", alpha),)): centred(-(1 - alpha) * p / mixed),
        ("skew_reverse_kl", (("alpha", alpha),)): centred((q / other).log() + 1 - alpha * q / other),
        ("tvd", ()): q * (sign - (q * sign).sum()) / 2,
    }
    for (name, args), want in expected.items():
        torch.testing.assert_close(slope(name, f64(ZS), t, **dict(args)), want, atol=1e-12, rtol=0, msg=name)


@pytest.mark.parametrize("name", EVERY)
def test_gradient_is_the_slope(name):
    """Central differences in every logit; and no other gradient than the student's is asked of the caller."""
    g = torch.Generator().manual_seed(3)
    z, t = torch.randn(4, 7, generator=g, dtype=torch.float64), torch.randn(4, 7, generator=g, dtype=torch.float64)
    t = t.log_softmax(-1)
    value = lambda x: EVERY[name].entries(x.log_softmax(-1), t).sum(-1)
    assert torch.autograd.gradcheck(value, z.clone().requires_grad_(), eps=1e-6, atol=1e-7)


def test_jsd_limits():
    """jsd / beta and jsd / (1 - beta) tend to the two KLs; jsd itself does not (TRL's special cases jump)."""
    s, t = logp(ZS), logp(ZT)
    assert float(sums("jsd", s, t, beta=1e-5)) == pytest.approx(6.486e-6, rel=1e-4)
    assert float(sums("jsd", s, t, beta=1e-5)) / 1e-5 == pytest.approx(0.64857201, abs=1e-7)
    assert float(sums("jsd", s, t, beta=1 - 1e-5)) / 1e-5 == pytest.approx(0.79404978, abs=1e-7)


def test_jsd_is_two_skews():
    s, t, beta = logp(ZS), logp(ZT), 0.3
    skews = beta * sums("skew_forward_kl", s, t, alpha=beta)
    skews = skews + (1 - beta) * sums("skew_reverse_kl", s, t, alpha=1 - beta)
    torch.testing.assert_close(sums("jsd", s, t, beta=beta), skews, atol=1e-14, rtol=0)


def test_skew_of_zero_is_the_plain_kl():
    s, t = logp(ZS), logp(ZT)
    for skewed, plain in (("skew_forward_kl", "forward_kl"), ("skew_reverse_kl", "reverse_kl")):
        torch.testing.assert_close(sums(skewed, s, t, alpha=0.0), sums(plain, s, t))
        torch.testing.assert_close(sums(skewed, s, t, alpha=1e-9), sums(plain, s, t), atol=1e-6, rtol=0)


def test_entropy():
    assert float(D.entropy(logp(ZS))) == pytest.approx(1.20648921, abs=1e-8)
    assert float(D.entropy(logp(ZT))) == pytest.approx(0.99965793, abs=1e-8)
    assert float(D.entropy(logp([0.0, -math.inf, 0.0]))) == pytest.approx(math.log(2))


SUPPORT = [0.3, -math.inf, 1.0, 0.2]  # a teacher that excludes a token


@pytest.mark.parametrize("name", [n for n in EVERY if n != "reverse_kl"])
def test_a_token_the_teacher_excludes(name):
    """0 in the teacher: everything but the reverse KL stays finite, equal to its value by hand, gradient included."""
    s, t = logp([0.1, 0.5, -1.0, 0.0]), logp(SUPPORT)
    q, p = s.exp(), t.exp()
    kl = lambda a, b: torch.where(a > 0, a * (a.clamp_min(1e-300) / b).log(), 0.0).sum()
    by_hand = {
        "forward_kl": kl(p, q),
        "jsd": 0.3 * kl(p, 0.3 * p + 0.7 * q) + 0.7 * kl(q, 0.3 * p + 0.7 * q),
        "skew_forward_kl": kl(p, 0.1 * p + 0.9 * q),
        "skew_reverse_kl": kl(q, 0.9 * p + 0.1 * q),
        "tvd": (q - p).abs().sum() / 2,
    }
    torch.testing.assert_close(EVERY[name].entries(s, t).sum(), by_hand[name], atol=1e-12, rtol=0)
    g = slope(EVERY[name].name, f64([0.1, 0.5, -1.0, 0.0]), t, **dict(EVERY[name].args))
    assert g.isfinite().all() and g[1] > 0  # what the teacher excludes goes down


def test_reverse_kl_is_infinite_where_only_the_student_speaks():
    t = logp(SUPPORT)
    assert sums("reverse_kl", logp([0.1, 0.5, -1.0, 0.0]), t) == math.inf
    both = f64([0.1, -math.inf, -1.0, 0.0])  # unless the student excludes it too
    assert sums("reverse_kl", both.log_softmax(-1), t).isfinite()
    assert slope("reverse_kl", both, t).isfinite().all()


def test_probability_that_underflows_is_zero_not_nan():
    """float32: exp(-200) is 0, and 0 * inf must not appear, neither in value nor in gradient."""
    t = torch.tensor([[0.0, -math.inf]])
    z = torch.tensor([[0.0, -200.0]], requires_grad=True)
    value = D.reverse_kl(z.log_softmax(-1), t).sum()
    value.backward()
    assert value == 0 and z.grad.isfinite().all()


logits = st.lists(st.floats(-30, 30, allow_nan=False, width=32), min_size=2, max_size=9)
pairs = logits.flatmap(lambda a: st.tuples(st.just(a), st.lists(st.floats(-30, 30), min_size=len(a), max_size=len(a))))


@settings(max_examples=60, deadline=None)
@given(pairs, st.floats(0.01, 0.99))
def test_properties(pair, share):
    """Non-negative, zero at equality with zero gradient, and bounded where they should be."""
    s, t = logp(pair[0]), logp(pair[1])
    bounds = {
        ("forward_kl", ()): math.inf,
        ("reverse_kl", ()): math.inf,
        ("jsd", (("beta", share),)): -share * math.log(share) - (1 - share) * math.log(1 - share),
        ("skew_forward_kl", (("alpha", share),)): -math.log(share),
        ("skew_reverse_kl", (("alpha", share),)): -math.log(share),
        ("tvd", ()): 1.0,
    }
    for (name, args), most in bounds.items():
        value = float(sums(name, s, t, **dict(args)))
        assert -1e-12 <= value <= most + 1e-9, name
        assert abs(float(sums(name, t, t, **dict(args)))) < 1e-12, name
        assert slope(name, f64(pair[1]), t, **dict(args)).abs().max() < 1e-9, name
    assert float(sums("jsd", s, t, beta=share)) == pytest.approx(float(sums("jsd", t, s, beta=1 - share)), abs=1e-12)
    assert float(sums("tvd", s, t)) == pytest.approx(float(sums("tvd", t, s)), abs=1e-15)


def test_pinsker():
    g = torch.Generator().manual_seed(0)
    s, t = (torch.randn(200, 6, generator=g, dtype=torch.float64).mul(3).log_softmax(-1) for _ in range(2))
    assert (2 * sums("tvd", s, t).square() <= sums("forward_kl", s, t) + 1e-12).all()
