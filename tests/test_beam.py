"""Beam search against all answers there are: a model so small that every one of them can be written down."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import transformers

from opd.engines.beam import search
from opd.errors import UsageError

VOCAB, STOP, LONGEST = 5, 2, 4
PROMPTS = [[3, 4, 1], [4], [1, 1, 3, 4, 0], [0, 3]]


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(5)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(
        vocab_size=VOCAB + 3, num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.4, **sizes
    )
    model = transformers.AutoModelForCausalLM.from_config(config).double()
    with torch.no_grad():
        model.lm_head.weight[VOCAB:] += 5.0  # padding of the vocabulary would win if it were let
    return model.eval()


def everything(model: Any, prompt: list[int], stops: tuple[int, ...] = (STOP,)) -> list[tuple[float, tuple[int, ...]]]:
    """Every answer with its log-probability over the real vocabulary, likeliest first: ended, or as long as may be."""
    plain = [v for v in range(VOCAB) if v not in stops]
    heads = [(*h, s) for n in range(LONGEST) for h in itertools.product(plain, repeat=n) for s in stops]
    heads += list(itertools.product(plain, repeat=LONGEST))
    rows = [prompt + list(h) for h in heads]
    longest = max(map(len, rows))
    with torch.no_grad():
        logits = model(torch.tensor([r + [0] * (longest - len(r)) for r in rows])).logits[..., :VOCAB]
    logp, first = logits.log_softmax(-1), len(prompt)
    total = [float(sum(logp[i, first + k - 1, v] for k, v in enumerate(h))) for i, h in enumerate(heads)]
    assert sum(map(torch.tensor(total).exp().__getitem__, range(len(total)))) == pytest.approx(1.0, abs=1e-5)
    return sorted(zip(total, heads, strict=True), reverse=True)


def found(model: Any, prompts: list[list[int]], beams: int, **changes: Any) -> Any:
    settings: dict[str, Any] = {"max_tokens": LONGEST, "stop_ids": (STOP,), "pad_id": 0, "vocab": VOCAB} | changes
    return search(model, prompts, ids=[str(i) for i in range(len(prompts))], beams=beams, **settings)


def test_wide_beams_find_the_likeliest_answers(model: Any) -> None:
    """As wide as there are answers, nothing is missed: the best three of each prompt, in order, ended and not."""
    finishes = set()
    for prompt, said in zip(PROMPTS, found(model, PROMPTS, 64, answers=3), strict=True):
        assert [s.tokens for s in said] == [answer for _, answer in everything(model, prompt)[:3]]
        assert [s.finish for s in said] == ["stop" if s.tokens[-1] == STOP else "length" for s in said]
        assert all(x != x for s in said for x in s.logp) and all(len(s.logp) == len(s.tokens) for s in said)
        finishes |= {s.finish for s in said}
    assert finishes == {"stop", "length"}


def test_several_stop_tokens_end_an_answer(model: Any) -> None:
    for prompt in PROMPTS:
        (said,) = found(model, [prompt], 64, stop_ids=(STOP, 3))[0]
        assert said.tokens == everything(model, prompt, (STOP, 3))[0][1]


def test_a_longer_answer_is_not_rewarded(model: Any) -> None:
    """By mean log-probability, transformers' own default, another answer would win somewhere."""
    ranked = [everything(model, prompt) for prompt in PROMPTS]
    by_mean = [max(answers, key=lambda x: x[0] / len(x[1]))[1] for answers in ranked]
    assert any(best != answers[0][1] for best, answers in zip(by_mean, ranked, strict=True))


def narrow(model: Any, prompt: list[int], beams: int) -> tuple[int, ...]:
    """Beam search in its textbook form: of every prefix's next tokens the best `beams` that go on, and the ended."""
    running: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    ended: list[tuple[float, tuple[int, ...]]] = []
    for _ in range(LONGEST):
        grown = []
        for score, said in running:
            with torch.no_grad():
                logp = model(torch.tensor([prompt + list(said)])).logits[0, -1, :VOCAB].log_softmax(-1).tolist()
            grown += [(score + logp[v], (*said, v)) for v in range(VOCAB)]
        grown.sort(reverse=True)
        ended += [x for x in grown[:beams] if x[1][-1] == STOP]
        running = [x for x in grown if x[1][-1] != STOP][:beams]
    return max(ended + running)[1]


@pytest.mark.parametrize("beams", [2, 3, 5])
def test_narrow_beams_search_as_the_textbook_says(model: Any, beams: int) -> None:
    for prompt in PROMPTS:
        assert found(model, [prompt], beams)[0][0].tokens == narrow(model, prompt, beams)


def test_neither_company_nor_the_models_own_settings_change_an_answer(model: Any) -> None:
    alone = [found(model, [prompt], 3)[0] for prompt in PROMPTS]
    tokens = lambda many: [[s.tokens for s in each] for each in many]
    for rows in (3, 6, 100):
        assert tokens(found(model, PROMPTS, 3, rows=rows)) == tokens(alone)
    own = model.generation_config
    strange = transformers.GenerationConfig(repetition_penalty=5.0, eos_token_id=1, length_penalty=9.0, max_length=2)
    model.generation_config = strange
    model.train()
    try:
        assert tokens(found(model, PROMPTS, 3)) == tokens(alone)
        assert model.generation_config is strange and model.training
    finally:
        model.generation_config = own
        model.eval()


def test_what_cannot_be_searched_is_refused(model: Any) -> None:
    with pytest.raises(UsageError, match="4 answers a prompt are asked of 3 beams"):
        found(model, PROMPTS, 3, answers=4)
    with pytest.raises(UsageError, match="which Linear lacks"):
        found(torch.nn.Linear(2, 2), PROMPTS, 3)
    with pytest.raises(UsageError, match=r"a prompt of 5 tokens and speak\.max_tokens 30 need 35 positions"):
        found(model, PROMPTS, 3, max_tokens=30)
