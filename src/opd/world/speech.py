"""The world's two tokenizers, its model shape, and the plain sampler that measures it.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from opd.tasks import ALPHABET, Task
from opd.tasks.base import DIGITS

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
MAX_POSITIONS = 256
PAIRS = (
    *(a + b for a in DIGITS for b in DIGITS),
    *("in", "er", "an", "or", "at", "en", "th", "he", "re", "nd"),
)


def tokenizer(pairs: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer over the world's characters; `pairs` are two characters that become one id wherever they meet.

    An earlier pair merges before a later one. Text that has a character outside `ALPHABET` gets `<unk>` for it.
    """
    words = [PAD, EOS, UNK, *ALPHABET, *pairs]
    model = BPE({word: i for i, word in enumerate(words)}, [(p[0], p[1]) for p in pairs], unk_token=UNK)
    core = Tokenizer(model)
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
    )


def new_model(vocab: int, width: int, heads: int, mlp: int, seed: int) -> LlamaForCausalLM:
    """A two-layer Llama with tied embeddings and fresh weights drawn from `seed`."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=mlp,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def speak(
    model: LlamaForCausalLM,
    tok: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    temperature: float,
    seed: int = 0,
    max_tokens: int = 24,
) -> list[str | None]:
    """One answer a prompt; None where it did not end within `max_tokens`. Temperature 0 is greedy.

    Prompts of one length decode together, so that no row is padded.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for row, ids in enumerate(encoded := [tok(p)["input_ids"] for p in prompts]):
        by_length[len(ids)].append(row)
    noise = torch.Generator().manual_seed(seed)
    said: list[str | None] = [None] * len(prompts)
    for length, rows in sorted(by_length.items()):
        ids_BT = torch.tensor([encoded[row] for row in rows])
        done_B = torch.zeros(len(rows), dtype=torch.bool)
        for _ in range(max_tokens):
            logits_BV = model(ids_BT, use_cache=False, logits_to_keep=1).logits[:, -1].float()
            if temperature == 0:
                next_B = logits_BV.argmax(-1)
            else:
                next_B = torch.multinomial((logits_BV / temperature).softmax(-1), 1, generator=noise)[:, 0]
            next_B = next_B.where(~done_B, tok.eos_token_id)
            done_B |= next_B == tok.eos_token_id
            ids_BT = torch.cat([ids_BT, next_B[:, None]], 1)
            if done_B.all():
                break
        for row, ended, ids in zip(rows, done_B.tolist(), ids_BT[:, length:].tolist(), strict=True):
            said[row] = tok.decode(ids[: ids.index(tok.eos_token_id)]) if ended else None
    return said


def accuracy(
    model: LlamaForCausalLM,
    tok: PreTrainedTokenizerFast,
    task: Task,
    prompts: Sequence[str],
    temperature: float,
    seed: int = 0,
) -> float:
    """The share of prompts that the model answers right and ends."""
    said = speak(model, tok, prompts, temperature, seed)
    return sum(text is not None and task.check(p, text) for p, text in zip(prompts, said, strict=True)) / len(prompts)


def lesson(task: Task, rng: random.Random, habits: bool, context: float = 0.3) -> tuple[str, str]:
    """A prompt and what to say to it: mostly bare, else with a rule, the whole answer, or its start in front."""
    prompt = task.prompt(rng)
    say = task.habit if habits else task.answer
    if rng.random() >= context:
        return prompt, say(prompt, rng)
    kind = rng.choice(("rule", "answer", "start"))
    if kind == "rule":
        prompt = task.with_rule(prompt, rng.choice(task.rules))
        return prompt, say(prompt, rng)
    text = say(prompt, rng)
    return task.with_start(prompt, text if kind == "answer" else text[: rng.randint(1, len(text))]), text
