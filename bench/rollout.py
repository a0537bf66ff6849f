"""Tokens a second of opd's local engine against `model.generate`, interleaved in one process.

    python bench/rollout.py [--rounds 5] [--threads 2] [--rows 64] [--cpu]

A Llama of about 1.4 million parameters with random weights. Four cases: every answer runs to the limit; answers of
mixed lengths (three tokens in a hundred stop one); prompts of mixed lengths too; eight answers to one prompt.
`generate` takes the rows in batches of the size that opd decodes together. Only answered tokens count, up to the stop
token.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from opd.engines import local
from opd.engines.base import Sampling
from opd.engines.plain import Plain

VOCAB, PAD, LIMIT = 512, 0, 128


@dataclass(frozen=True)
class Case:
    name: str
    prompts: list[list[int]]
    samples: int
    stop_ids: list[int]


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, tie_word_embeddings=True, **shape)).eval()


def cases() -> list[Case]:
    generator = torch.Generator().manual_seed(1)

    def prompts(count: int, low: int, high: int) -> list[list[int]]:
        lengths = torch.randint(low, high + 1, (count,), generator=generator).tolist()
        return [torch.randint(32, VOCAB, (n,), generator=generator).tolist() for n in lengths]

    stops = list(range(1, 17))
    return [
        Case("equal lengths", prompts(128, 16, 16), 1, []),
        Case("mixed answers", prompts(256, 16, 16), 1, stops),
        Case("mixed prompts and answers", prompts(256, 8, 64), 1, stops),
        Case("groups of eight", prompts(16, 64, 64), 8, []),
    ]


def by_generate(llama: LlamaForCausalLM, case: Case, rows: int) -> int:
    """Tokens answered by `generate`, in batches padded left."""
    config = GenerationConfig(
        max_new_tokens=LIMIT, do_sample=True, pad_token_id=PAD, eos_token_id=case.stop_ids or None
    )
    repeated = [prompt for prompt in case.prompts for _ in range(case.samples)]
    stops = torch.tensor(case.stop_ids, dtype=torch.long)
    count = 0
    for at in range(0, len(repeated), rows):
        batch = repeated[at : at + rows]
        longest = max(map(len, batch))
        ids = torch.tensor([[PAD] * (longest - len(p)) + p for p in batch])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch])
        answers = llama.generate(ids, attention_mask=mask, generation_config=config)[:, longest:]
        before = torch.isin(answers, stops).cumsum(1) - torch.isin(answers, stops).long()
        count += int((before == 0).sum())
    return count


def by_opd(llama: LlamaForCausalLM, case: Case, rows: int) -> int:
    ids = [f"{i:016x}" for i in range(len(case.prompts))]
    said = local.generate(
        llama,
        case.prompts,
        ids=ids,
        samples=case.samples,
        sampling=Sampling(max_tokens=LIMIT),
        stop_ids=case.stop_ids,
        pad_id=PAD,
        seed=1,
        step=0,
        rows=rows,
    )
    return sum(len(spoken.tokens) for group in said for spoken in group)


def by_opd_plain(llama: LlamaForCausalLM, case: Case, rows: int) -> int:
    """The loop that other architectures get."""
    usual = local._decoder
    local._decoder = lambda model, length, pad_id: Plain(model, pad_id)
    try:
        return by_opd(llama, case, rows)
    finally:
        local._decoder = usual


def rate(speak: Callable[[], int], clock: Callable[[], float]) -> float:
    begin = clock()
    count = speak()
    return count / (clock() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--cpu", action="store_true", help="one thread, in its own seconds: steadier on a busy machine")
    args = parser.parse_args()
    clock = time.process_time if args.cpu else time.perf_counter
    args.threads = 1 if args.cpu else args.threads
    torch.set_num_threads(args.threads)
    logging.disable(logging.WARNING)
    llama = model()
    size = sum(p.numel() for p in llama.parameters())
    print(
        f"{size:,} parameters, {args.rows} rows x {LIMIT} tokens, {args.threads} threads, {args.rounds} rounds: medians"
    )
    print(f"{'':26}{'tokens/s: generate':>20}{'plain':>8}{'opd':>8}{'plain/generate':>17}{'opd/generate':>14}  (range)")
    ways = (by_generate, by_opd_plain, by_opd)
    for case in cases():
        rates = [[rate(partial(way, llama, case, args.rows), clock) for way in ways] for _ in range(args.rounds)]
        medians = [statistics.median(column) for column in zip(*rates, strict=True)]
        plain, ours = ([row[column] / row[0] for row in rates] for column in (1, 2))
        ratios = f"{statistics.median(plain):17.2f}{statistics.median(ours):14.2f}"
        print(f"{case.name:26}{medians[0]:20,.0f}{medians[1]:8,.0f}{medians[2]:8,.0f}{ratios}", end="")
        print(f"  ({min(ours):.2f}-{max(ours):.2f})", flush=True)


if __name__ == "__main__":
    main()
