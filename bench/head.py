"""The full-vocabulary loss, forward and backward: opd's tiled head against its floor, the plain form, and Liger.

    python bench/head.py [--rounds 5] [--threads 2] [--vocab 32768] [--tokens 1024] [--width 256] [--teacher 512]
    python bench/head.py --json bench/results/head.json

The floor is the matrix products that cannot be avoided: student logits, teacher logits, and the two of the backward
pass (three for cross entropy, which has no teacher). All forms of a case run in turn, round by round, in one process;
a number is the median of its ratio to the floor of the same round. Memory is the growth of the peak above what
inputs and gradients take, each form in a process of its own (Linux). Liger is measured where it is installed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opd.divergences import Divergence
from opd.head import Head, fitting, tiled_loss


@dataclass(frozen=True)
class Size:
    """Tokens, widths of student and teacher, vocabulary."""

    tokens: int
    width: int
    teacher: int
    vocab: int


@dataclass(frozen=True)
class Inputs:
    h_NH: Tensor
    weight: Tensor
    t_NH: Tensor
    t_weight: Tensor
    token_N: Tensor


def inputs(size: Size) -> Inputs:
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g) / shape[-1] ** 0.25
    return Inputs(
        draw(size.tokens, size.width).requires_grad_(),
        draw(size.vocab, size.width).requires_grad_(),
        draw(size.tokens, size.teacher),
        draw(size.vocab, size.teacher),
        torch.randint(size.vocab, (size.tokens,), generator=g),
    )


DIVERGENCES: dict[str, Divergence | None] = {
    "forward_kl": Divergence("forward_kl"),
    "reverse_kl": Divergence("reverse_kl"),
    "jsd": Divergence("jsd", (("beta", 0.5),)),
    "tvd": Divergence("tvd"),
    "cross_entropy": None,
}


def floor(data: Inputs, divergence: Divergence | None) -> None:
    """The products alone."""
    with torch.no_grad():
        z_NV = data.h_NH @ data.weight.T
        if divergence is not None:
            data.t_NH @ data.t_weight.T
        z_NV @ data.weight
        z_NV.T @ data.h_NH


def plain(data: Inputs, divergence: Divergence | None) -> None:
    """As one writes it first: logits whole, autograd."""
    s_NV = (data.h_NH @ data.weight.T).log_softmax(-1)
    if divergence is None:
        loss = -s_NV.gather(-1, data.token_N[:, None]).mean()
    else:
        loss = divergence.entries(s_NV, (data.t_NH @ data.t_weight.T).log_softmax(-1)).sum(-1).mean()
    loss.backward()


def tiled(data: Inputs, divergence: Divergence | None, tile: int | None = None) -> None:
    """opd's."""
    N, V = len(data.token_N), len(data.weight)
    student, judge = Head(data.weight, V), Head(data.t_weight, V)

    def value(at: slice, logits_nV: Tensor) -> Tensor:
        s_nV = logits_nV.log_softmax(-1)
        if divergence is None:
            return -s_nV.gather(-1, data.token_N[at, None]).sum() / N
        with torch.no_grad():
            t_nV = judge.logits(data.t_NH[at]).log_softmax(-1)
        return divergence.entries(s_nV, t_nV).sum() / N

    tiled_loss(student, data.h_NH, value, tile or fitting(student)).backward()


def liger(data: Inputs, divergence: Divergence | None) -> None:
    """Liger's fused linear JSD, which has the KLs as its ends."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}[divergence.name if divergence else ""]
    fused = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False)
    fused(data.h_NH, data.weight, data.t_NH, data.t_weight, data.token_N).backward()


def forms(name: str) -> dict[str, Callable[[Inputs, Divergence | None], None]]:
    out: dict[str, Callable[[Inputs, Divergence | None], None]] = {"plain": plain, "opd": tiled}
    out |= {f"opd, tile {n}": partial(tiled, tile=n) for n in (256, 1024)}
    if name in ("forward_kl", "reverse_kl", "jsd") and _has_liger():
        out["liger"] = liger
    return out


def _has_liger() -> bool:
    from importlib.util import find_spec

    return find_spec("liger_kernel") is not None


def timed(act: Callable[[], None], data: Inputs) -> float:
    data.h_NH.grad = data.weight.grad = None
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def times(size: Size, rounds: int) -> dict[str, dict[str, float]]:
    """Median ratio to the floor by case and form, and the floor in seconds."""
    data, out = inputs(size), {}
    for name, divergence in DIVERGENCES.items():
        ratios: dict[str, list[float]] = {form: [] for form in forms(name)}
        floors = []
        for turn in range(rounds + 1):  # the first is a warm-up
            base = timed(partial(floor, data, divergence), data)
            now = {form: timed(partial(act, data, divergence), data) / base for form, act in forms(name).items()}
            if turn:
                floors.append(base)
                for form, ratio in now.items():
                    ratios[form].append(ratio)
        out[name] = {form: round(statistics.median(r), 3) for form, r in ratios.items()}
        out[name]["floor_s"] = round(statistics.median(floors), 4)
    return out


def _grown(size: Size, name: str, form: str, threads: int, answer: Any) -> None:
    torch.set_num_threads(threads)
    data = inputs(size)
    small = inputs(Size(8, size.width, size.teacher, 64))
    forms(name)[form](small, DIVERGENCES[name])  # what the first call loads is not the form's
    data.h_NH.grad, data.weight.grad = torch.zeros_like(data.h_NH), torch.zeros_like(data.weight)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak begins again at what is held now
    before = _held("VmRSS")
    forms(name)[form](data, DIVERGENCES[name])
    answer.put(_held("VmHWM") - before)


def _held(what: str) -> float:
    """A figure of this process in MiB."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(what))
    return int(line.split()[1]) / 1024


def memory(size: Size, name: str, form: str, threads: int) -> float:
    """Growth of the peak in MiB, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=_grown, args=(size, name, form, threads, answer))
    process.start()
    grown = float(answer.get())
    process.join()
    return round(grown)


def show(found: Mapping[str, Any]) -> str:
    """A table of the ratios, and the memory of one case."""
    columns = list(found["times"]["forward_kl"])
    lines = [f"{'case':14}" + "".join(f"{c:>15}" for c in columns)]
    for name, row in found["times"].items():
        lines.append(f"{name:14}" + "".join(f"{row[c]:15.3f}" if c in row else f"{'':15}" for c in columns))
    lines.append("peak MiB, forward_kl: " + ", ".join(f"{form} {mib:.0f}" for form, mib in found["memory"].items()))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in (("rounds", 5), ("threads", 2), ("tokens", 1024), ("width", 256), ("teacher", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    size = Size(args.tokens, args.width, args.teacher, args.vocab)
    found = {
        "size": asdict(size),
        "threads": args.threads,
        "rounds": args.rounds,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "processor": platform.processor() or platform.machine(),
        "times": times(size, args.rounds),
        "memory": {form: memory(size, "forward_kl", form, args.threads) for form in forms("forward_kl")},
    }
    print(show(found))
    if args.json:
        known = json.loads(args.json.read_text()) if args.json.is_file() else {}
        args.json.write_text(json.dumps({**known, str(args.vocab): found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
