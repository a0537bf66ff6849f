"""Divergences on part of the vocabulary: the published ones' numbers, and what each of them converges to.

The fixed points of docs/sparse.md are found here by minimising, in float64, over a student that is free to be anything.
"""

import inspect
import itertools
import math
from pathlib import Path

import pytest
import torch

from opd import divergences as named
from opd.divergences import Divergence, Support
from opd.math import divergence as D
from opd.math.support import cut

ZS = [2.0, 1.0, 0.5, -1.0, 0.0]
ZT = [0.5, 2.5, 1.0, -2.0, 0.3]
WHOSE = ("teacher", "student", "union")
RESTS = ("dropped", "renormalised", "teacher_renormalised", "tail")
FULL = {
    "forward_kl": (),
    "reverse_kl": (),
    "jsd": (("beta", 0.3),),
    "skew_forward_kl": (("alpha", 0.1),),
    "skew_reverse_kl": (("alpha", 0.1),),
    "tvd": (),
    "alpha_divergence": (("alpha", 0.3),),
    "adaptive_kl": (("mu", 0.5),),
    "weighed_reverse_kl": (),
    "f_divergence": (("generator", "hellinger"),),
}
PUBLISHED = {
    "verl": named.verl,
    "eopd": named.eopd,
    "opcd": named.opcd,
    "nemo": named.nemo,
    "lsm": named.lsm,
    "rethinking": named.rethinking,
    "thunlp": named.thunlp,
    "openclaw": named.openclaw,
    "sdft": lambda k: named.sdft(k=k),
    "sdft without tail": lambda k: named.sdft(k=k, tail=False),
    "trl": lambda k: named.trl(k=k),
    "trl forward": lambda k: named.trl(0.0, k),
    "trl reverse": lambda k: named.trl(1.0, k),
    "trl without tail": lambda k: named.trl(k=k, tail=False),
    "opsd_top_k": named.opsd_top_k,
}


def f64(x):
    return torch.tensor(x, dtype=torch.float64)


def logp(z):
    return f64(z).log_softmax(-1)


def apart(seed=3, n=6, v=9):
    g = torch.Generator().manual_seed(seed)
    s, t = torch.randn(n, v, generator=g, dtype=torch.float64), torch.randn(n, v, generator=g, dtype=torch.float64)
    return 1.5 * s, (1.5 * t).log_softmax(-1)


def both(divergence, z, t):
    """(value at each token, gradient in the logits)."""
    z = z.clone().requires_grad_()
    value = divergence.entries(z.log_softmax(-1), t).sum(-1)
    value.sum().backward()
    return value.detach(), z.grad


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("divergence", "golden"),
    [
        (named.opcd(2), 0.77864371),
        (named.lsm(2), 0.10487696),
        (named.verl(2), 0.82599321),
        (named.eopd(2), 1.19059914),
        (named.openclaw(2), 0.63000019),
        (Divergence("reverse_kl", support=Support("student", 2, "tail")), 0.77544369),
    ],
)
def test_golden_values(divergence, golden):
    assert float(both(divergence, f64([ZS]), logp([ZT]))[0]) == pytest.approx(golden, abs=1e-8)


def test_golden_gradient():
    _, grad = both(named.opcd(2), f64([ZS]), logp([ZT]))
    want = f64([[0.714514, -0.358517, -0.194570, -0.043414, -0.118013]])
    torch.testing.assert_close(grad, want, atol=1e-6, rtol=0)


def naive(fn, z, p, kept, rest):
    """One token's divergence on a set of ids, by hand: renormalise or sum up what is left, then the textbook form."""
    q = z.softmax(-1)
    a, b = p[kept], q[kept]
    if rest == "tail":
        a, b = torch.cat([a, 1 - a.sum()[None]]), torch.cat([b, 1 - b.sum()[None]])
    if rest in ("renormalised", "teacher_renormalised"):
        a = a / a.sum()
    if rest == "renormalised":
        b = b / b.sum()
    return fn(a, b)


TEXTBOOK = {
    "forward_kl": lambda p, q: (p * (p / q).log()).sum(),
    "reverse_kl": lambda p, q: (q * (q / p).log()).sum(),
    "tvd": lambda p, q: (p - q).abs().sum() / 2,
}


@pytest.mark.parametrize("whose", WHOSE)
@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("name", TEXTBOOK)
def test_against_sets_of_ids(whose, rest, name):
    """Every choice against a set written out token by token, each id once, and plain autograd."""
    z, t = apart()
    for k in (1, 2, 4):
        values, grad = both(Divergence(name, support=Support(whose, k, rest)), z, t)
        for i in range(len(z)):
            top = {"teacher": set(t[i].topk(k).indices.tolist()), "student": set(z[i].topk(k).indices.tolist())}
            kept = sorted(top["teacher"] | top["student"] if whose == "union" else top[whose])
            free = z[i].clone().requires_grad_()
            want = naive(TEXTBOOK[name], free, t[i].exp(), kept, rest)
            want.backward()
            assert float(values[i]) == pytest.approx(float(want.detach()), abs=1e-12)
            torch.testing.assert_close(grad[i], free.grad, atol=1e-12, rtol=1e-9)


def test_a_union_counts_what_stands_in_both_once():
    s, t = logp([ZS]), logp([ZT])
    a, b = cut(
        s, t, whose="union", k=3, rest="dropped"
    )  # both hold {0, 1, 2}: the three slots of the teacher are empty
    assert a.shape == (1, 6) and (a.exp() > 0).sum() == 3 == (b.exp() > 0).sum()
    torch.testing.assert_close(a.exp().sum(), s[0, :3].exp().sum())


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("whose", WHOSE)
@pytest.mark.parametrize("rest", RESTS)
def test_all_of_the_vocabulary_is_the_full_divergence(name, whose, rest):
    z, t = apart()
    want = both(Divergence(name, FULL[name]), z, t)
    for k in (9, 100):
        got = both(Divergence(name, FULL[name], support=Support(whose, k, rest)), z, t)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_one_on_all_of_the_vocabulary_is_the_full_divergence(name):
    z, t = apart()
    made = PUBLISHED[name](9)
    for a, b in zip(both(made, z, t), both(Divergence(made.name, made.args), z, t), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("rest", RESTS)
def test_a_union_that_covers_everything_is_the_full_divergence(name, rest):
    """2k > V, and the two rankings together hold every token: empty slots count for nothing in value and gradient."""
    z = f64([[4.0, 3.0, 2.0, 0.0, 0.1]])
    t = f64([[0.0, 0.2, 2.0, 4.0, 3.0]]).log_softmax(-1)
    got, want = (
        both(Divergence(name, FULL[name], support=Support("union", 3, rest)), z, t),
        both(Divergence(name, FULL[name]), z, t),
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5 if rest == "tail" else 1e-12, rtol=0)


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("whose", WHOSE)
def test_nothing_breaks_where_all_mass_is_kept(name, rest, whose):
    """float32, both so sure that the rest rounds to nothing; and a teacher that excludes what the student likes."""
    z = torch.tensor([[60.0, 0.0, -1.0, -2.0, -3.0], [0.0, 3.0, 1.0, 0.0, 0.0]])
    t = torch.tensor([[50.0, 1.0, -1.0, -2.0, -3.0], [5.0, -math.inf, 1.0, -math.inf, 0.0]]).log_softmax(-1)
    value, grad = both(Divergence(name, FULL[name], support=Support(whose, 2, rest)), z, t)
    assert value[0].isfinite() and grad[0].isfinite().all()
    infinite = name in ("reverse_kl", "weighed_reverse_kl", "adaptive_kl")  # as on the whole vocabulary
    if not infinite:
        assert value[1].isfinite() and grad[1].isfinite().all()


def test_a_temperature_comes_before_the_support():
    z, t = apart()
    hot = Divergence("forward_kl", temperature=3.0, support=Support("teacher", 4, "tail"))
    cold = Divergence("forward_kl", support=Support("teacher", 4, "tail"))
    a = hot.entries((z / 3).log_softmax(-1), (t / 3).log_softmax(-1))
    torch.testing.assert_close(a, cold.entries((z / 3).log_softmax(-1), (t / 3).log_softmax(-1)))


# --- where they end ---------------------------------------------------------------------------------------------------

TEACHER = [0.34, 0.24, 0.16, 0.12, 0.08, 0.06]
K = 3  # the top three
HEAD = sum(TEACHER[:K])


def ends(divergence, start, teacher=TEACHER, steps=200):
    """The student's probabilities where it no longer moves, and the loss there."""
    t = f64([teacher]).log()
    z = f64([start]).log().requires_grad_()
    optimizer = torch.optim.LBFGS([z], lr=0.5, max_iter=steps, tolerance_grad=1e-13, tolerance_change=1e-16)

    def closure():
        optimizer.zero_grad()
        value = divergence.entries(z.log_softmax(-1), t).sum()
        value.backward()
        return value

    for _ in range(5):
        optimizer.step(closure)
    value = closure()
    return z.detach().softmax(-1)[0], float(value.detach()), float(z.grad.abs().max())


START = [0.27, 0.25, 0.18, 0.13, 0.12, 0.05]  # ranked as the teacher, so that both top 3 are the same and stay so
sharp = pytest.approx([p / HEAD for p in TEACHER[:K]], abs=1e-4)
conditional = pytest.approx([p / HEAD for p in TEACHER[:K]], abs=1e-6)


@pytest.mark.parametrize("name", ["verl", "eopd"])
def test_dropped_forward_kl_sharpens_the_teacher(name):
    q, _, _ = ends(PUBLISHED[name](K), START)
    assert q[:K].tolist() == sharp and float(q[K:].sum()) < 1e-4


def test_dropped_reverse_kl_pushes_mass_out():
    """The teacher's top k: p / e on it, and the loss is -P_K / e, below what agreement has."""
    q, value, slope = ends(named.nemo(K), START)
    assert slope < 1e-8 and value == pytest.approx(-HEAD / math.e, abs=1e-9)
    assert q[:K].tolist() == pytest.approx([p / math.e for p in TEACHER[:K]], abs=1e-6)


def test_dropped_reverse_kl_of_the_students_own_pushes_mass_out():
    """OPCD: the same fixed point, where the rest is spread so thin that the student's top k stays what it was."""
    rest = [(1 - HEAD) / 60] * 60
    q, value, slope = ends(named.opcd(K), [*START[:K], *[0.3 / 60] * 60], [*TEACHER[:K], *rest])
    assert slope < 1e-8 and value == pytest.approx(-HEAD / math.e, abs=1e-9)
    assert q[:K].tolist() == pytest.approx([p / math.e for p in TEACHER[:K]], abs=1e-6)
    at_agreement = both(named.opcd(K), f64([[*TEACHER[:K], *rest]]).log(), f64([[*TEACHER[:K], *rest]]).log())[1][0]
    assert (at_agreement[:K] > 0).all() and (at_agreement[K:] < 0).all()  # even there it lowers K and raises the rest


@pytest.mark.parametrize("name", ["lsm", "rethinking", "sdft without tail", "trl without tail", "opsd_top_k"])
def test_both_renormalised_teaches_the_conditionals_alone(name):
    """The mass of K ends where it began: it has no gradient."""
    divergence = PUBLISHED[name](K)
    q, value, _ = ends(divergence, START)
    assert (q[:K] / q[:K].sum()).tolist() == conditional and abs(value) < 1e-12
    assert abs(float(q[:K].sum()) - HEAD) > 0.01
    z, t = apart()
    _, grad = both(divergence, z, t)
    kept = cut(z.log_softmax(-1), t, whose=divergence.support.whose, k=K, rest="dropped")[0].exp() > 0
    if divergence.support.whose != "union":
        assert kept.all()
        ids = (z if divergence.support.whose == "student" else t).topk(K, -1).indices
        outside = grad.clone().scatter(-1, ids, 0.0)
        assert outside.abs().max() < 1e-15 and grad.sum(-1).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["openclaw", "sdft", "trl", "trl forward", "trl reverse"])
def test_a_bucket_for_the_rest_converges_to_the_teacher(name):
    q, value, _ = ends(PUBLISHED[name](K), START)
    assert q[:K].tolist() == pytest.approx(TEACHER[:K], abs=1e-6) and abs(value) < 1e-11
    assert float(q[K:].sum()) == pytest.approx(1 - HEAD, abs=1e-6)
    assert q[K:].tolist() != pytest.approx(TEACHER[K:], abs=1e-3)  # inside the bucket nothing is taught


def test_pushed_reverse_kl_converges_to_the_teacher_on_what_it_keeps():
    """No objective is descended here (its weights have no gradient), so it is followed until nothing moves."""
    t, z = f64([TEACHER]).log(), f64([START]).log()
    for _ in range(4000):
        z = z - 0.5 * both(named.thunlp(K), z, t)[1]
    q = z.softmax(-1)[0]
    assert both(named.thunlp(K), z, t)[1].abs().max() < 1e-10
    assert q[:K].tolist() == pytest.approx(TEACHER[:K], abs=1e-6)


def test_agreement_is_a_fixed_point_of_some_and_not_of_others():
    """Starting as the teacher, who is moved? With k of all but little mass, even the worst are hardly."""
    t = f64([TEACHER]).log()
    moved = {name: float(both(make(K), t, t)[1].abs().max()) for name, make in PUBLISHED.items()}
    assert {name for name, much in moved.items() if much > 1e-3} == {"verl", "eopd", "opcd", "nemo"}
    assert max(much for name, much in moved.items() if name not in ("verl", "eopd", "opcd", "nemo")) < 1e-12
    sure = f64([[0.6, 0.3, 0.099, 0.0005, 0.0003, 0.0002]]).log()
    assert all(float(both(make(K), sure, sure)[1].abs().max()) < 2e-3 for make in PUBLISHED.values())


def test_pushed_reverse_kl_has_the_gradient_of_its_weights_and_advantages():
    """thunlp: sum_v w_v (log q - log p) grad log q, w = q / Q_K, by hand."""
    z, t = apart()
    _, grad = both(named.thunlp(4), z, t)
    s = z.log_softmax(-1)
    q, ids = s.exp(), z.topk(4, -1).indices
    w = torch.zeros_like(q).scatter(-1, ids, q.gather(-1, ids))
    advantage = (w / w.sum(-1, keepdim=True)) * (s - t)
    torch.testing.assert_close(grad, advantage - q * advantage.sum(-1, keepdim=True))


def test_reverse_kl_of_all_is_what_is_pushed():
    z, t = apart()
    torch.testing.assert_close(both(named.thunlp(9), z, t)[1], both(Divergence("reverse_kl"), z, t)[1])
    torch.testing.assert_close(
        D.weighed_reverse_kl(z.log_softmax(-1), t).sum(-1), D.reverse_kl(z.log_softmax(-1), t).sum(-1)
    )


@pytest.mark.parametrize(
    ("start", "given_up"),
    [
        ([0.33, 0.23, 0.17, 0.13, 0.08, 0.06], []),
        ([0.1, 0.1, 0.25, 0.2, 0.2, 0.15], [0, 1]),
        ([0.05, *TEACHER[1:]], [0]),
    ],
)
def test_a_capped_forward_kl_lets_go_of_what_it_is_far_from(start, given_up):
    """OPSD's clip: near the teacher it converges to it; else q = 0 on C and p / (1 - P_C) off it, with a lower loss."""
    cap = 0.05
    q, value, _ = ends(Divergence("forward_kl", cap=cap), [x / sum(start) for x in start])
    free = 1 - sum(TEACHER[v] for v in given_up)
    want = [0.0 if v in given_up else p / free for v, p in enumerate(TEACHER)]
    assert q.tolist() == pytest.approx(want, abs=1e-3)
    assert value == pytest.approx(cap * len(given_up) + free * math.log(free), abs=1e-4)


def test_a_capped_forward_kl_is_lowest_where_the_likeliest_tokens_are_given_up():
    """The document's numbers: by every set of tokens that could be let go, and by the bound of each entry."""
    cap, sets = 0.05, [c for n in range(6) for c in itertools.combinations(range(6), n)]
    free = {c: 1 - sum(TEACHER[v] for v in c) for c in sets}
    values = {c: cap * len(c) + f * math.log(f) for c, f in free.items()}
    lowest = min(values, key=values.get)
    assert lowest == (0, 1) and round(values[lowest], 3) == -0.264
    text = (Path(__file__).parent.parent / "docs" / "sparse.md").read_text()
    row = lambda words: next(x for x in text.splitlines() if x.startswith(f"| {words}")).split("|")[2:-1]
    teacher, least = row("the teacher gives a token"), row("and the student must")
    for p, q in zip(map(float, teacher), map(float, least), strict=True):
        assert round(p * math.exp(-cap / p), 3) == q
        for slack, moves in ((1.01, True), (0.99, False)):
            student = p * math.exp(-cap / p) * slack
            s, t = f64([[student, 1 - student]]).log(), f64([[p, 1 - p]]).log()
            assert bool(D.forward_kl(s, t)[0, 0] < cap) is moves


def test_the_document_says_what_the_code_does():
    """docs/sparse.md: each function of the module has its row, with its own support and direction."""
    text = (Path(__file__).parent.parent / "docs" / "sparse.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")]
    said = {row[0].strip("`"): (row[2], row[3], row[4]) for row in rows if len(row) == 6}
    ways = {"forward_kl": "forward", "reverse_kl": "reverse", "weighed_reverse_kl": "reverse", "jsd": "between"}
    own = [(n, f) for n, f in inspect.getmembers(named, inspect.isfunction) if f.__module__ == named.__name__]
    made = {name: make(k=5) for name, make in own if not name.startswith("_")}
    assert said == {name: (d.support.whose, d.support.rest, ways[d.name]) for name, d in made.items()}
