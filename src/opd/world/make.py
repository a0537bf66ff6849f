"""Train the built-in world from nothing: `python -m opd.world.make --seed 0 --out DIR [--quick]`.

Writes a teacher, two students and an expert for each domain as Hugging Face folders, and `world.json` with how well
each answers. All budgets are in steps, on one thread, so that one seed gives one world on one machine.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from opd.tasks import DOMAINS, TASKS, Task, prompts, split_of, task
from opd.world.speech import PAIRS, accuracy, lesson, new_model, tokenizer

BATCH = 64
WARM_UP = 20
IGNORED = -100


class Size(NamedTuple):
    """How wide the stream, how many heads, how wide the feed-forward layer."""

    width: int
    heads: int
    mlp: int


SMALL, MIDDLE, LARGE = Size(64, 2, 176), Size(80, 2, 216), Size(96, 3, 256)


@dataclass(frozen=True)
class Plan:
    """One model to train: its size, what it is shown, and for how many steps."""

    name: str
    steps: int
    shares: tuple[float, ...]  # of the domains in a batch, in the order of `DOMAINS`
    size: Size = SMALL
    habits: bool = False  # shown the untaught student's habits, not right answers
    lr: float = 3e-3
    pairs: Sequence[str] = ()
    ceiling: float = 1.0  # a domain is shown a tenth as often while the model gets more of its samples right


PLANS = (
    Plan("teacher", 3600, (0.5, 0.33, 0.17), LARGE),
    Plan("student", 3000, (0.16, 0.62, 0.22), habits=True, ceiling=0.4),
    Plan("student-merged", 3600, (0.2, 0.58, 0.22), MIDDLE, habits=True, ceiling=0.4, pairs=PAIRS),
    Plan("expert-group", 2000, (1, 0, 0), LARGE),
    Plan("expert-sort", 1200, (0, 1, 0), LARGE),
    Plan("expert-record", 800, (0, 0, 1), LARGE),
)


def pack(tok: PreTrainedTokenizerFast, lessons: Sequence[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, both B x T and padded on the right; only the answer and its end carry a label."""
    asked = [tok(prompt)["input_ids"] for prompt, _ in lessons]
    said = [[*tok(answer)["input_ids"], tok.eos_token_id] for _, answer in lessons]
    longest = max(len(a) + len(s) for a, s in zip(asked, said, strict=True))
    ids, labels = [], []
    for a, s in zip(asked, said, strict=True):
        rest = longest - len(a) - len(s)
        ids.append([*a, *s, *[tok.pad_token_id] * rest])
        labels.append([*[IGNORED] * len(a), *s, *[IGNORED] * rest])
    return torch.tensor(ids), torch.tensor(labels)


def lessons(shares: Sequence[float], habits: bool, rng: random.Random, n: int) -> list[tuple[str, str]]:
    """`n` lessons, of the domains by their shares; none whose bare prompt is in a dev or test split."""
    drawn: list[tuple[str, str]] = []
    while len(drawn) < n:
        prompt, answer = lesson(task(rng.choices(DOMAINS, shares)[0]), rng, habits)
        if split_of(prompt.split(";")[-1]) == "train":
            drawn.append((prompt, answer))
    return drawn


def held_back(plan: Plan, model: LlamaForCausalLM, tok: PreTrainedTokenizerFast, step: int) -> tuple[float, ...]:
    """The plan's shares, a tenth where the sampled model is above the plan's ceiling on 100 train prompts."""
    asked = {d: [p.text for p in prompts(d, 100, seed=step)] for d in DOMAINS}
    over = [accuracy(model, tok, task(d), texts, 1.0, seed=step) > plan.ceiling for d, texts in asked.items()]
    return tuple(share / 10 if high else share for share, high in zip(plan.shares, over, strict=True))


def train(plan: Plan, seed: int, steps: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Train one model by next-token prediction; the learning rate warms up, then falls by a cosine to a twentieth."""
    tok = tokenizer(plan.pairs)
    model = new_model(len(tok), *plan.size, seed)
    rng = random.Random(f"{plan.name} {seed}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.lr, weight_decay=0.01)
    shares = plan.shares
    began = time.process_time()
    for step in range(1, steps + 1):
        decay = 0.05 + 0.475 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = plan.lr * min(1.0, step / WARM_UP) * decay
        ids_BT, labels_BT = pack(tok, lessons(shares, plan.habits, rng, BATCH))
        carries_BT = labels_BT[:, 1:] != IGNORED
        logits = model(ids_BT[:, :-1], use_cache=False).logits[carries_BT]
        loss = F.cross_entropy(logits, labels_BT[:, 1:][carries_BT])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if plan.ceiling < 1 and step % 50 == 0:
            shares = held_back(plan, model, tok, step)
        if step % 200 == 0 or step == steps:
            spent = time.process_time() - began
            print(f"{plan.name:15} step {step:5}/{steps}  loss {loss.item():.3f}  {spent:6.1f} CPU-s", flush=True)
    return model, tok


def measure(model: LlamaForCausalLM, tok: PreTrainedTokenizerFast, n: int) -> dict[str, dict[str, float]]:
    """Accuracy on `n` test prompts of every task: greedy and sampled at temperature 1; and, greedy, with a rule or with
    the right answer in front."""
    model.eval()

    def row(chosen: Task) -> dict[str, float]:
        given = prompts(chosen.name, n, split="test")
        bare = [p.text for p in given]
        ruled = [chosen.with_rule(p) for p in bare]
        told = [chosen.with_start(p.text, p.answer or "") for p in given]
        return {
            "greedy": accuracy(model, tok, chosen, bare, 0.0),
            "sampled": accuracy(model, tok, chosen, bare, 1.0),
            "with_rule": accuracy(model, tok, chosen, ruled, 0.0),
            "with_answer": accuracy(model, tok, chosen, told, 0.0),
        }

    return {name: {k: round(v, 4) for k, v in row(t).items()} for name, t in TASKS.items()}


def save(model: LlamaForCausalLM, tok: PreTrainedTokenizerFast, folder: Path) -> LlamaForCausalLM:
    """Write a Hugging Face folder with float16 weights that load as float32, and return the model as it will load."""
    model.half().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n")
    tok.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def make(seed: int, out: Path, quick: bool, only: Sequence[str] = ()) -> dict[str, Any]:
    """Train, save and measure the models, all of them or `only` some; returns what `world.json` says."""
    record = out / "world.json"
    report: dict[str, Any] = json.loads(record.read_text())["models"] if only and record.is_file() else {}
    n = 2 if quick else 500
    for plan in PLANS:
        if only and plan.name not in only:
            continue
        steps = 4 if quick else plan.steps
        model, tok = train(plan, seed, steps)
        model = save(model, tok, out / plan.name)
        report[plan.name] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "vocabulary": len(tok),
            "steps": steps,
            "accuracy": measure(model, tok, n),
        }
        for name, row in report[plan.name]["accuracy"].items():
            print(f"{plan.name:15} {name:12}" + "".join(f"  {k} {v:6.1%}" for k, v in row.items()), flush=True)
    command = f"python -m opd.world.make --seed {seed} --out DIR" + (" --quick" if quick else "")
    world = {"seed": seed, "command": command, "prompts_per_accuracy": n, "models": report}
    record.write_text(json.dumps(world, indent=2) + "\n")
    return world


def main() -> None:
    """The command line: make the world anew in a folder."""
    parser = argparse.ArgumentParser(description="Train the built-in world from nothing.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "assets", help="default: the package's own")
    parser.add_argument("--quick", action="store_true", help="a few steps: shows that it runs, teaches nothing")
    parser.add_argument("--only", nargs="+", default=[], choices=[p.name for p in PLANS])
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    args.out.mkdir(parents=True, exist_ok=True)
    make(args.seed, args.out, args.quick, args.only)


if __name__ == "__main__":
    main()
