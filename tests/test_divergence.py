"""Divergences: golden values and gradients, limits, bounds, and -inf on either side."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.divergences import Divergence, Support
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
    "alpha_divergence": Divergence("alpha_divergence", (("alpha", 0.3),)),
    "soft_cross_entropy": Divergence("soft_cross_entropy"),
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
        ("adaptive_kl", {"mu": 0.5}, 0.72502128),
        ("soft_cross_entropy", {}, 0.64857939 + 0.99965793),
        ("weighed_reverse_kl", {}, 0.79406387),
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
        ("soft_cross_entropy", {}, [0.471602, -0.468379, -0.025098, 0.020527, 0.001349]),
        ("weighed_reverse_kl", {}, [0.576419, -0.409319, -0.122638, 0.014683, -0.059144]),
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
        "alpha_divergence": (1 - (p**0.3 * q**0.7).sum()) / 0.21,
        "soft_cross_entropy": -(p * q.log()).sum(),
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


# --- more of the family -----------------------------------------------------------------------------------------------


def test_scaled_jsd_goes_from_one_kl_to_the_other_without_a_jump():
    s, t = logp(ZS), logp(ZT)
    scaled = lambda beta: sums("jsd", s, t, beta=beta, scaled=True)
    torch.testing.assert_close(scaled(0.0), sums("forward_kl", s, t))
    torch.testing.assert_close(scaled(1.0), sums("reverse_kl", s, t))
    assert float(scaled(1e-5)) == pytest.approx(0.64857201 / (1 - 1e-5), abs=1e-7)
    assert float(scaled(1 - 1e-5)) == pytest.approx(0.79404978 / (1 - 1e-5), abs=1e-7)
    assert float(scaled(0.5)) == pytest.approx(4 * 0.16365654, abs=1e-7)
    for end, name in ((1e-7, "forward_kl"), (1 - 1e-7, "reverse_kl")):
        got = slope("jsd", f64(ZS), t, beta=end, scaled=True)
        torch.testing.assert_close(got, slope(name, f64(ZS), t), atol=1e-6, rtol=0)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_scaled_jsd_has_the_size_of_a_kl_near_agreement(beta):
    q = logp(ZS)
    p = (f64(ZS) + 1e-4 * f64(ZT)).log_softmax(-1)
    near = float(((p.exp() - q.exp()).square() / q.exp()).sum() / 2)
    assert float(sums("jsd", q, p, beta=beta, scaled=True)) == pytest.approx(near, rel=1e-3)


def test_adaptive_kl_by_hand():
    """Head {1} of mass .68 at mu = .5, {1, 2} at .7; weights are the shares of |p - q|, and carry no gradient."""
    s, t = logp(ZS), logp(ZT)
    q, p = s.exp(), t.exp()
    for mu, head in ((0.5, [1]), (0.6755, [1]), (0.7, [1, 2]), (0.99, [0, 1, 2, 4]), (1.0, [0, 1, 2, 3, 4])):
        first = float((p - q).abs()[head].sum() / (p - q).abs().sum())
        want = first * sums("forward_kl", s, t) + (1 - first) * sums("reverse_kl", s, t)
        torch.testing.assert_close(sums("adaptive_kl", s, t, mu=mu), want)
        slopes = first * slope("forward_kl", f64(ZS), t) + (1 - first) * slope("reverse_kl", f64(ZS), t)
        torch.testing.assert_close(slope("adaptive_kl", f64(ZS), t, mu=mu), slopes)
    assert float((p - q).abs()[1] / (p - q).abs().sum()) == pytest.approx(0.47457012, abs=1e-8)


def test_adaptive_kl_of_equals_is_zero_not_nan():
    for dtype in (torch.float64, torch.float32):
        z = f64(ZT).to(dtype).requires_grad_()
        value = D.adaptive_kl(z.log_softmax(-1), z.detach().log_softmax(-1), mu=0.5).sum()
        value.backward()
        assert value == 0 and z.grad.abs().max() < 1e-6


TEXTBOOK = {  # f(u), u = p / q
    "forward_kl": lambda u: u * u.log(),
    "reverse_kl": lambda u: -u.log(),
    "jeffreys": lambda u: (u - 1) * u.log(),
    "jsd": lambda u: 0.3 * u * (u / (0.3 * u + 0.7)).log() + 0.7 * (1 / (0.3 * u + 0.7)).log(),
    "tvd": lambda u: (u - 1).abs() / 2,
    "alpha": lambda u: (u**0.3 - 0.3 * u - 0.7) / (0.3 * (0.3 - 1)),
    "hellinger": lambda u: (u.sqrt() - 1).square() / 2,
    "pearson": lambda u: (u - 1).square(),
    "neyman": lambda u: (u - 1).square() / u,
}


@pytest.mark.parametrize("name", D.GENERATORS)
def test_a_generator_is_the_textbooks(name):
    """Entries and gradients against E_q f(p / q) by autograd; and it vanishes, with its slope, where the two agree."""
    g = torch.Generator().manual_seed(5)
    z, t = torch.randn(20, 6, generator=g, dtype=torch.float64), torch.randn(20, 6, generator=g, dtype=torch.float64)
    t = (2 * t).log_softmax(-1)
    ours, book = z.clone().requires_grad_(), z.clone().requires_grad_()
    f = lambda x: D.f_divergence(x.log_softmax(-1), t, generator=name, parameter=0.3).sum(-1)
    q = book.softmax(-1)
    want = (q * TEXTBOOK[name](t.exp() / q)).sum(-1)
    torch.testing.assert_close(f(ours), want, rtol=1e-12, atol=1e-12)
    (f(ours).sum() + want.sum()).backward()
    torch.testing.assert_close(ours.grad, book.grad, rtol=1e-10, atol=1e-10)
    same = D.f_divergence(t, t, generator=name, parameter=0.3)
    assert float(same.abs().max()) == 0


@pytest.mark.parametrize(
    ("generator", "direct", "args"),
    [
        ("forward_kl", "forward_kl", {}),
        ("reverse_kl", "reverse_kl", {}),
        ("jsd", "jsd", {"beta": 0.3}),
        ("tvd", "tvd", {}),
        ("alpha", "alpha_divergence", {"alpha": 0.3}),
        ("alpha", "alpha_divergence", {"alpha": 0.0}),
        ("alpha", "alpha_divergence", {"alpha": 1.0}),
        ("alpha", "alpha_divergence", {"alpha": 2.0}),
    ],
)
def test_a_generator_is_the_direct_form(generator, direct, args):
    """Value and gradient, also far apart (a ratio of e^60) and where one side excludes a token."""
    parameter = next(iter(args.values()), 0.5)
    for zs, zt in ((ZS, ZT), ([0.0, 30.0, -30.0], [0.0, -30.0, 30.0]), ([0.0, 1.0, 0.3], [0.5, -math.inf, 0.0])):
        if -math.inf in zt and (generator == "reverse_kl" or args == {"alpha": 0.0}):
            continue  # infinite in both forms
        t = logp(zt)
        a = sums("f_divergence", logp(zs), t, generator=generator, parameter=parameter)
        torch.testing.assert_close(a, sums(direct, logp(zs), t, **args), rtol=1e-9, atol=1e-12)
        a = slope("f_divergence", f64(zs), t, generator=generator, parameter=parameter)
        torch.testing.assert_close(a, slope(direct, f64(zs), t, **args), rtol=1e-9, atol=1e-12)


def test_a_generator_in_float32_does_not_overflow():
    z = torch.tensor([0.0, 50.0, -60.0], requires_grad=True)
    t = torch.tensor([0.0, -60.0, 50.0]).log_softmax(-1)
    for name in set(D.GENERATORS) - {"pearson", "neyman"}:  # these two are of the order e^110 there
        value = D.f_divergence(z.log_softmax(-1), t, generator=name).sum()
        (grad,) = torch.autograd.grad(value, z)
        assert value.isfinite() and value >= 0 and grad.isfinite().all(), name


def test_alpha_is_a_family():
    """Both KLs at its ends, with a limit and not a jump; four Hellingers, half a chi-square; mirrored at 1 / 2."""
    s, t = logp(ZS), logp(ZT)
    alpha = lambda a: float(sums("alpha_divergence", s, t, alpha=a))
    other = lambda name: float(sums("f_divergence", s, t, generator=name))
    assert alpha(1.0) == pytest.approx(0.64857939, abs=1e-8) == pytest.approx(alpha(1 - 1e-7), abs=1e-6)
    assert alpha(0.0) == pytest.approx(0.79406387, abs=1e-8) == pytest.approx(alpha(1e-7), abs=1e-6)
    assert alpha(0.5) == pytest.approx(4 * other("hellinger")) and alpha(2.0) == pytest.approx(other("pearson") / 2)
    assert alpha(-1.0) == pytest.approx(other("neyman") / 2)
    assert alpha(0.2) == pytest.approx(float(sums("alpha_divergence", t, s, alpha=0.8)))
    assert other("jeffreys") == pytest.approx(0.64857939 + 0.79406387, abs=1e-8)


# --- temperature, and a bound on each entry ---------------------------------------------------------------------------


def tempered(divergence, zs, zt):
    """(value, gradient in the student's logits), both sides divided by its temperature as the tile does."""
    z, tau = f64(zs).requires_grad_(), divergence.temperature
    value = divergence.entries((z / tau).log_softmax(-1), (f64(zt) / tau).log_softmax(-1)).sum()
    value.backward()
    return float(value.detach()), z.grad


@pytest.mark.parametrize(("tau", "golden"), [(1.0, 0.64857939), (2.0, 0.66880777), (4.0, 0.64029776)])
def test_tau_squared(tau, golden):
    value, grad = tempered(Divergence("forward_kl", temperature=tau, tau_squared=True), ZS, ZT)
    assert value == pytest.approx(golden, abs=1e-8)
    torch.testing.assert_close(grad, tau * ((f64(ZS) / tau).softmax(-1) - (f64(ZT) / tau).softmax(-1)))
    plain, _ = tempered(Divergence("forward_kl", temperature=tau), ZS, ZT)
    assert value == pytest.approx(tau**2 * plain)


def test_hot_distillation_matches_centred_logits():
    """tau -> inf: the gradient is the difference of the logits, each centred, over |V|; uncentred it is not."""
    _, grad = tempered(Divergence("forward_kl", temperature=1e4, tau_squared=True), ZS, ZT)
    s, t = f64(ZS), f64(ZT)
    torch.testing.assert_close(grad, ((s - s.mean()) - (t - t.mean())) / 5, atol=1e-4, rtol=0)
    assert (grad - (s - t) / 5).abs().max() > 0.005


def test_a_cap_bounds_every_entry():
    """OPSD: its printed value and gradient; none of the capped entries pulls; from above alone; far away it is gone."""
    capped = Divergence("forward_kl", cap=0.05)
    value, grad = tempered(capped, ZS, ZT)
    assert value == pytest.approx(-0.09996063, abs=1e-8)
    torch.testing.assert_close(grad, f64([0.091279, 0.067211, -0.109960, 0.001592, -0.050122]), atol=1e-6, rtol=0)
    s, t = logp(ZS), logp(ZT)
    free = D.forward_kl(s, t) <= 0.05
    torch.testing.assert_close(grad, s.exp() * t.exp()[free].sum() - t.exp() * free)
    assert tempered(Divergence("forward_kl", cap=1e9), ZS, ZT)[0] == pytest.approx(0.64857939, abs=1e-8)


def test_divergences_print():
    assert str(Divergence("jsd", (("beta", 0.5), ("scaled", True)))) == "jsd(beta=0.5, scaled)"
    assert str(Divergence("f_divergence", (("generator", "pearson"),))) == "f_divergence(generator=pearson)"
    assert str(Divergence("forward_kl", temperature=2.0, tau_squared=True)) == "2^2 forward_kl(temperature=2)"
    assert str(Divergence("forward_kl", cap=0.05)) == "forward_kl(entries <= 0.05)"
    assert str(Divergence("reverse_kl", support=Support("student", 256, "dropped"))) == (
        "reverse_kl(student's top 256, the rest dropped)"
    )
    assert hash(Divergence("reverse_kl", support=Support("student", 256))) is not None
