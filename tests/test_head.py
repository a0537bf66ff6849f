"""The tiled loss against autograd on whole logits, and the promise that those never exist."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opd.head import Head, tiled_loss, tiles, token_logp

N, H, V = 13, 8, 20
F64 = torch.float64


def parts(padded: int, bias: bool, dtype=F64, n: int = N, vocab: int = V):
    """Hidden states, weight and bias that learn, a target and a token for each row."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=F64).to(dtype)
    h = draw(n, H).requires_grad_()
    weight = nn.Parameter(draw(vocab + padded, H))
    b = nn.Parameter(draw(vocab + padded)) if bias else None
    return h, weight, b, draw(n, vocab).log_softmax(-1), torch.randint(vocab, (n,), generator=g)


def value(z_nV, target_nV, token_n):
    """A divergence and the sampled token's log-probability at a temperature: what losses are made of."""
    s = (z_nV / 0.7).log_softmax(-1)
    return (s.exp() * (s - target_nV)).sum() + s.gather(-1, token_n[:, None]).sum().square() * 0.01 / len(token_n)


def by_tile(target, token, tile):
    """The same on tiles: a sum of scalars."""
    return lambda at, z_nV: value(z_nV, target[at], token[at])


def whole(head: Head, h, target, token, tile):
    """Plain autograd on all logits at once, summed over the same tiles."""
    z = h @ head.weight[: head.vocab].T
    z = z if head.bias is None else z + head.bias[: head.vocab]
    z = z * head.scale
    z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
    return sum(value(z[at], target[at], token[at]) for at in tiles(len(h), tile))


CASES = list(itertools.product((0, 7), (False, True), (1.0, 0.25), (None, 3.0)))


@pytest.mark.parametrize(("padded", "bias", "scale", "softcap"), CASES)
@pytest.mark.parametrize("tile", [1, 4, 100])
def test_tiles_give_the_gradient_of_whole_logits(padded, bias, scale, softcap, tile):
    h, weight, b, target, token = parts(padded, bias)
    head = Head(weight, V, b, scale, softcap)
    leaves = [x for x in (h, weight, b) if x is not None]
    want = whole(head, h, target, token, tile)
    wants = torch.autograd.grad(want, leaves)
    got = tiled_loss(head, h, by_tile(target, token, tile), tile)
    gots = torch.autograd.grad(3 * got, leaves)  # what comes from above is passed on
    assert float((got - want).detach().abs()) < 1e-12 * float(want.detach().abs())
    for a, w in zip(gots, wants, strict=True):
        assert float((a - 3 * w).norm()) < 1e-12 * float(w.norm())
    if padded:
        assert gots[1][V:].abs().max() == 0 and (b is None or gots[2][V:].abs().max() == 0)


def test_tied_weights_get_both_gradients():
    """The matrix is embedding and head: its gradient is the sum, as it is for the model's own logits."""
    _, weight, _, target, token = parts(3, False)
    ids = torch.arange(N) % V
    hidden = lambda: torch.tanh(weight[ids] * 1.3)
    head = Head(weight, V)
    (want,) = torch.autograd.grad(whole(head, hidden(), target, token, 4), weight)
    (got,) = torch.autograd.grad(tiled_loss(head, hidden(), by_tile(target, token, 4), 4), weight)
    assert float((got - want).norm()) < 1e-12 * float(want.norm())


def test_a_frozen_head_or_backbone_gets_none():
    h, weight, _, target, token = parts(0, False)
    for learns, frozen in ((h, weight), (weight, h)):
        frozen.requires_grad_(False)
        learns.grad = frozen.grad = None
        tiled_loss(Head(weight, V), h, by_tile(target, token, 4), 4).backward()
        assert frozen.grad is None and learns.grad is not None and learns.grad.norm() > 0
        frozen.requires_grad_()


def test_no_rows_and_a_constant_loss():
    h, weight, _, target, token = parts(0, False)
    head = Head(weight, V)
    tiled_loss(head, h[:0], by_tile(target, token, 4), 4).backward()
    assert weight.grad.norm() == 0
    assert tiled_loss(head, h, lambda at, z: torch.ones((), dtype=F64), 4).item() == 4  # tiles of 13 rows


def test_token_logp():
    h, weight, b, _, token = parts(5, True)
    head = Head(weight, V, b, 0.5, 4.0)
    want = (head.logits(h) / 0.7).log_softmax(-1).gather(-1, token[:, None])[:, 0]
    for tile in (1, 5, 100):
        got = token_logp(head, h, token, 0.7, tile)
        torch.testing.assert_close(got, want.detach(), atol=1e-14, rtol=0)
        assert not got.requires_grad
    assert token_logp(head, h[:0], token[:0], 1.0).shape == (0,)


def test_low_precision_is_raised_before_the_softmax():
    """bfloat16 products, float32 logits, gradients in the type of what they belong to."""
    h, weight, _, target, token = parts(0, False, torch.bfloat16)
    seen = []
    look = lambda at, z: seen.append(z.dtype) or value(z, target[at].float(), token[at])
    loss = tiled_loss(Head(weight, V, softcap=5.0), h, look, 4)
    loss.backward()
    assert set(seen) == {torch.float32} and loss.dtype == torch.float32
    assert h.grad.dtype == weight.grad.dtype == torch.bfloat16


class Largest(TorchDispatchMode):
    """Remembers the most elements that any one result of an operation had."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


def test_the_whole_of_the_logits_never_exists():
    n, vocab, tile = 96, 200, 6
    h, weight, b, target, token = parts(0, True, n=n, vocab=vocab)
    head = Head(weight, vocab, b, softcap=9.0)
    with Largest() as mode:
        tiled_loss(head, h, by_tile(target, token, tile), tile).backward()
        token_logp(head, h, token, 0.8, tile)
    assert mode.elements == max(vocab * H, tile * vocab) < n * vocab / 10
    with Largest() as plain:
        whole(head, h, target, token, tile).backward()
    assert plain.elements == n * vocab  # which the measure would have seen
