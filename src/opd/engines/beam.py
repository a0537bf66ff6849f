"""The likeliest answers that a beam search finds: what sequence-level distillation asks of its teacher.

transformers searches; here is what it is asked, and what comes back.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from opd.engines.base import Spoken
from opd.engines.local import refuse_lengths
from opd.errors import UsageError


def search(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    ids: Sequence[str],
    beams: int,
    answers: int = 1,
    max_tokens: int,
    stop_ids: Collection[int],
    pad_id: int,
    vocab: int,
    rows: int = 256,
) -> list[list[Spoken]]:
    """The `answers` likeliest of what `beams` beams find for each prompt, the likeliest first.

    Likely is the whole answer's log-probability at temperature 1, its stop token included, without a reward or penalty
    for length: the mode that Kim and Rush (arXiv 1606.07947, section 3.2) approximate. `stop_ids` end an answer; what
    has not ended after `max_tokens` competes as it is. Ids from `vocab` on are never spoken, and what a model's own
    generation settings say (penalties, other stops) does not count. At most `rows` beams go through the model at once.
    Tokens carry nan for a log-probability: they were not sampled. `ids` name the prompts where one is refused.
    """
    if not hasattr(model, "generate"):
        raise UsageError(f"`beams: {beams}` searches with transformers' `generate`, which {type(model).__name__} lacks")
    if answers > beams:
        raise UsageError(f"{answers} answers a prompt are asked of {beams} beams, which find {beams} at most")
    refuse_lengths(model, prompts, ids, max_tokens)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    together = max(1, rows // beams)
    said: dict[int, list[Spoken]] = {}
    with _neutral(model) as settings, torch.no_grad():
        padded = model.get_input_embeddings().weight.shape[0]
        for first in range(0, len(by_length), together):
            chosen = by_length[first : first + together]
            tokens_PS, mask_PS = _padded([prompts[i] for i in chosen], pad_id, next(model.parameters()).device)
            found = model.generate(
                input_ids=tokens_PS,
                attention_mask=mask_PS,
                generation_config=settings(
                    num_beams=beams,
                    num_return_sequences=answers,
                    do_sample=False,
                    length_penalty=0.0,
                    max_new_tokens=max_tokens,
                    eos_token_id=sorted(stop_ids),
                    pad_token_id=pad_id,
                    suppress_tokens=list(range(vocab, padded)) or None,
                    renormalize_logits=vocab < padded,
                ),
            )
            spoken = [_spoken(row, stop_ids, max_tokens) for row in found[:, tokens_PS.shape[1] :].tolist()]
            said |= {i: spoken[k * answers : (k + 1) * answers] for k, i in enumerate(chosen)}
    return [said[i] for i in range(len(prompts))]


@contextmanager
def _neutral(model: Any) -> Iterator[Any]:
    """Eval mode, and settings of which the model's folder has written none; afterwards all is as it was."""
    from transformers import GenerationConfig

    own, training = model.generation_config, [module for module in model.modules() if module.training]
    model.eval()
    model.generation_config = GenerationConfig()
    try:
        yield GenerationConfig
    finally:
        model.generation_config = own
        for module in training:
            module.training = True
        torch.clear_autocast_cache()  # casts made without gradient must not reach a training forward


def _padded(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(map(len, prompts))
    tokens = [[pad_id] * (longest - len(p)) + list(p) for p in prompts]
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(tokens, device=device), torch.tensor(mask, device=device)


def _spoken(tokens: Sequence[int], stop_ids: Collection[int], max_tokens: int) -> Spoken:
    """What stands before the padding: up to the first stop token, or everything."""
    end = next((k + 1 for k, token in enumerate(tokens) if token in stop_ids), None)
    kept = tuple(tokens[: end or max_tokens])
    return Spoken(kept, (float("nan"),) * len(kept), "length" if end is None else "stop")
