"""The local engine: exact in distribution, the same whatever decodes beside a row, faithful about what it drew."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.generation import logits_process

from opd.engines import local
from opd.engines import sample as sample_module
from opd.engines.base import Sampling, Spoken
from opd.engines.fused import Fused, fused, refusal
from opd.engines.local import generate, path
from opd.engines.noise import key, uniform
from opd.engines.plain import Plain
from opd.engines.sample import draw, kept
from opd.errors import OpdError, UsageError

VOCAB = 24
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.25,  # far from uniform
}
HEADS: dict[str, Any] = {**SIZES, "head_dim": 8}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, attention_bias=True),
    "llama3-rope": lambda: transformers.LlamaConfig(
        **SIZES,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=None),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**HEADS, tie_word_embeddings=True),
    "llama-dynamic-rope": lambda: transformers.LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    ),
    "mistral-window": lambda: transformers.MistralConfig(**SIZES, sliding_window=6),
    "gemma": lambda: transformers.GemmaConfig(**HEADS),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **HEADS, sliding_window=6, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.25, eos_token_id=2
    ),
    "lfm2": lambda: transformers.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]),
}
FAST = {"llama", "llama3-rope", "mistral", "qwen2", "qwen3"}
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [4], [5, 9, 3, 20], [8, 9, 10, 11, 12, 13, 15]]
IDS = [f"{0x9E3779B97F4A7C15 * (i + 1) % 2**64:016x}" for i in range(len(PROMPTS))]


def tiny(kind: str, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]()).to(dtype).eval()
    for name, weight in model.named_parameters():  # norms and biases that do something
        if weight.dim() == 1:
            nn.init.normal_(weight, 0.0 if "bias" in name else 1.0, 0.2)
    return model


def speak(model: Any, prompts: list[list[int]] = PROMPTS, ids: list[str] = IDS, **changes: Any) -> list[list[Spoken]]:
    call: dict[str, Any] = {
        "samples": 3,
        "sampling": Sampling(max_tokens=12),
        "stop_ids": (2,),
        "pad_id": 0,
        "seed": 7,
        "step": 5,
        **changes,
    }
    return generate(model, prompts, ids=ids, **call)


def flat(said: list[list[Spoken]]) -> list[tuple[int, ...]]:
    return [spoken.tokens for group in said for spoken in group]


@torch.no_grad()
def forced(model: Any, prompt: list[int], spoken: tuple[int, ...]) -> Tensor:
    """Logits [tokens, V] that the model gives to a whole row at once, before each spoken token."""
    row = torch.tensor([[*prompt, *spoken]])
    logits: Tensor = model(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 : -1].double()
    return logits


@pytest.fixture
def plain_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_decoder", lambda model, length, pad_id: Plain(model, pad_id))


@pytest.fixture(params=["fused", "plain"])
def loop(request: pytest.FixtureRequest) -> str:
    if request.param == "plain":
        request.getfixturevalue("plain_only")
    return str(request.param)


# --- every architecture -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_tokens_and_probabilities_are_those_of_the_model(kind: str) -> None:
    """Row by row, from one whole forward: the token is the one its noise selects, logp its log-probability."""
    model = tiny(kind)
    sampling = Sampling(max_tokens=12, temperature=0.7)
    said = speak(model, rows=4, sampling=sampling)
    assert len({spoken.tokens for group in said for spoken in group}) > 10
    for prompt, name, group in zip(PROMPTS, IDS, said, strict=True):
        for sample, spoken in enumerate(group):
            logp = (forced(model, prompt, spoken.tokens) / 0.7).log_softmax(-1)
            own = logp.gather(-1, torch.tensor(spoken.tokens)[:, None])[:, 0]
            assert np.allclose(spoken.logp, own.numpy(), atol=2e-5)
            n = len(spoken.tokens)
            u = uniform(7, 5, np.array([key(name)], np.uint64), np.array([sample]), np.arange(n))
            edges = logp.exp().cumsum(-1)
            assert tuple(torch.searchsorted(edges, torch.from_numpy(u)[:, None])[:, 0].tolist()) == spoken.tokens


@pytest.mark.parametrize("kind", CONFIGS)
def test_greedy_is_generate_without_sampling(kind: str) -> None:
    model = tiny(kind)
    said = speak(model, samples=1, sampling=Sampling(max_tokens=20, temperature=0), rows=2)
    for prompt, (spoken,) in zip(PROMPTS, said, strict=True):
        row = torch.tensor([prompt])
        out = model.generate(
            row, attention_mask=torch.ones_like(row), max_new_tokens=20, do_sample=False, eos_token_id=2, pad_token_id=0
        )
        assert tuple(out[0, len(prompt) :].tolist()) == spoken.tokens
        logits = forced(model, prompt, spoken.tokens)
        assert tuple(logits.argmax(-1).tolist()) == spoken.tokens
        assert np.allclose(spoken.logp, logits.log_softmax(-1).amax(-1).numpy(), atol=2e-5)  # at temperature 1


@pytest.mark.parametrize("kind", CONFIGS)
def test_which_loop_decodes(kind: str) -> None:
    model = tiny(kind)
    assert isinstance(fused(model, 30), Fused) == (kind in FAST)
    assert path(model).startswith("fused" if kind in FAST else "plain")
    assert (refusal(model) is None) == (kind in FAST)


# --- distribution -----------------------------------------------------------------------------------------------------


def exact(model: Any, prompt: list[int], steps: int, stop: int) -> dict[tuple[int, ...], float]:
    """Probability of every answer, enumerated."""
    answers, open_ = {}, {(): 1.0}
    for step in range(steps):
        grown: dict[tuple[int, ...], float] = {}
        for said, probability in open_.items():
            row = torch.tensor([[*prompt, *said]])
            with torch.no_grad():
                next_V = model(input_ids=row, use_cache=False).logits[0, -1].double().softmax(-1)
            for token, p in enumerate(next_V.tolist()):
                whole = (*said, token)
                (answers if token == stop or step == steps - 1 else grown)[whole] = probability * p
        open_ = grown
    return answers


def test_answers_come_with_their_exact_probabilities(loop: str) -> None:
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": 5, "hidden_size": 8, "intermediate_size": 8, "initializer_range": 0.5}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).double()
    expected = exact(model, [3, 1], 3, stop=2)
    assert len(expected) == 1 + 4 + 4 * 4 * 5 and abs(sum(expected.values()) - 1) < 1e-9
    draws = 20000
    said = speak(model, [[3, 1]], IDS[:1], samples=draws, sampling=Sampling(max_tokens=3), rows=8192)
    counts = Counter(spoken.tokens for spoken in said[0])
    assert set(counts) <= set(expected)
    big = {answer: p * draws for answer, p in expected.items() if p * draws >= 5}
    small = draws - sum(big.values())
    cells = [(counts[answer], mean) for answer, mean in big.items()]
    cells.append((draws - sum(counts[answer] for answer in big), small))
    chi_square = sum((n - mean) ** 2 / mean for n, mean in cells)
    degrees = len(cells) - 1
    assert degrees > 40
    assert abs(chi_square - degrees) < 4 * (2 * degrees) ** 0.5
    assert {spoken.finish for spoken in said[0] if spoken.tokens[-1] == 2} == {"stop"}


class Bigram(nn.Module):
    """The least that can speak: no config, no cache, the next token depends on the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64))

    def forward(self, input_ids: Tensor, logits_to_keep: int = 0, **_: Any) -> Any:
        return SimpleNamespace(logits=self.table[input_ids[:, -logits_to_keep:]])


def test_any_module_with_the_same_call_can_speak() -> None:
    model = Bigram()
    said = speak(model, [[3], [0, 4]], IDS[:2], samples=3000, stop_ids=(5,), rows=1024)
    pairs = np.zeros((6, 6))
    for prompt, group in zip([[3], [0, 4]], said, strict=True):
        for spoken in group:
            np.add.at(pairs, ([prompt[-1], *spoken.tokens[:-1]], list(spoken.tokens)), 1)
    share = pairs[:5] / pairs[:5].sum(1, keepdims=True)
    error = np.sqrt(share * (1 - share) / pairs[:5].sum(1, keepdims=True))
    assert (np.abs(share - model.table[:5].softmax(-1).detach().numpy()) < 4.5 * error).all()
    assert not pairs[5].any()


def test_a_draw_at_the_edges_has_probability() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf, -200.0, -torch.inf]]).repeat(4, 1)
    noise = torch.tensor([2.0**-53, 1 - 2.0**-53, 0.2689, 0.2690], dtype=torch.float64)
    token, logp = draw(logits, noise, Sampling(max_tokens=1))
    assert token.tolist() == [1, 3, 1, 3]  # softmax(0, 1) = 0.26894, 0.73106; -200 underflows
    assert logp.tolist() == pytest.approx([-1.313262, -0.313262, -1.313262, -0.313262], abs=1e-5)


def test_many_rows_of_random_logits_never_get_an_impossible_id() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2000, 50, generator=generator) * 60
    ends = torch.tensor([2.0**-53, 1 - 2.0**-53], dtype=torch.float64).repeat(1000)
    token, logp = draw(logits, ends, Sampling(max_tokens=1))
    assert (logits.softmax(-1).gather(-1, token[:, None]) > 0).all()
    assert torch.isfinite(logp).all()


def test_a_wide_vocabulary_is_drawn_from_in_two_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Same token as from one long sum, also in the last, shorter block and beside empty blocks."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 1003, generator=generator, dtype=torch.float64) * 5
    logits[:, 64:400] = -torch.inf
    noise = torch.rand(4000, generator=generator, dtype=torch.float64)
    noise[:4] = torch.tensor([2.0**-53, 1 - 2.0**-53, 2.0**-53, 1 - 2.0**-53], dtype=torch.float64)
    narrow = draw(logits, noise, Sampling(max_tokens=1))
    monkeypatch.setattr(sample_module, "WIDE", 100)
    monkeypatch.setattr(sample_module, "BLOCK", 64)
    wide = draw(logits, noise, Sampling(max_tokens=1))
    assert torch.equal(wide[0], narrow[0])
    assert torch.allclose(wide[1], narrow[1], atol=1e-12)
    assert (wide[0] >= 960).any()


WARPERS = {
    "top_k": ({"top_k": 5}, [logits_process.TopKLogitsWarper(5)]),
    "top_p": ({"top_p": 0.7}, [logits_process.TopPLogitsWarper(0.7)]),
    "min_p": ({"min_p": 0.2}, [logits_process.MinPLogitsWarper(0.2)]),
    "all": (
        {"top_k": 6, "top_p": 0.8, "min_p": 0.1},
        [
            logits_process.TopKLogitsWarper(6),
            logits_process.TopPLogitsWarper(0.8),
            logits_process.MinPLogitsWarper(0.1),
        ],
    ),
}


@pytest.mark.parametrize("name", WARPERS)
def test_what_truncation_keeps(name: str) -> None:
    settings, warpers = WARPERS[name]
    logits = torch.randn(300, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
    expected = logits
    for warper in warpers:
        expected = warper(None, expected)
    keep = kept(logits, Sampling(max_tokens=1, **settings))
    assert torch.equal(keep, torch.isfinite(expected))
    assert 0 < keep.sum() < keep.numel() / 2


def test_truncated_sampling_records_the_renormalised_probability(loop: str) -> None:
    model = tiny("llama")
    sampling = Sampling(max_tokens=8, temperature=1.3, top_p=0.8, top_k=9)
    for prompt, group in zip(PROMPTS, speak(model, sampling=sampling), strict=True):
        for spoken in group:
            logits = forced(model, prompt, spoken.tokens) / 1.3
            logits = logits.masked_fill(~kept(logits, sampling), -torch.inf)
            own = logits.log_softmax(-1).gather(-1, torch.tensor(spoken.tokens)[:, None])[:, 0]
            assert np.allclose(spoken.logp, own.numpy(), atol=2e-5)


def test_ids_above_the_vocabulary_are_never_spoken(loop: str) -> None:
    model = tiny("llama")
    said = speak(model, vocab=VOCAB - 8, samples=20)
    assert max(max(tokens) for tokens in flat(said)) < VOCAB - 8
    spoken = said[1][0]
    own = forced(model, PROMPTS[1], spoken.tokens)[:, : VOCAB - 8].log_softmax(-1)
    assert np.allclose(spoken.logp, own.gather(-1, torch.tensor(spoken.tokens)[:, None])[:, 0].numpy(), atol=2e-5)


# --- what must not matter ---------------------------------------------------------------------------------------------


def test_no_answer_depends_on_the_rows_beside_it(loop: str) -> None:
    model = tiny("llama")
    whole = speak(model)
    assert {spoken.finish for group in whole for spoken in group} == {"stop", "length"}
    for rows in (1, 2, 5, 100):
        assert flat(speak(model, rows=rows)) == flat(whole)
    order = [3, 0, 4, 2, 1]
    permuted = speak(model, [PROMPTS[i] for i in order], [IDS[i] for i in order], rows=4)
    assert flat(permuted) == flat([whole[i] for i in order])
    alone = [speak(model, [prompt], [name])[0] for prompt, name in zip(PROMPTS, IDS, strict=True)]
    assert flat(alone) == flat(whole)
    more = speak(model, samples=5)
    assert flat([group[:3] for group in more]) == flat(whole)
    longer = speak(model, sampling=Sampling(max_tokens=20))
    assert [tokens[:12] for tokens in flat(longer)] == flat(whole)


def test_both_loops_say_the_same(plain_only: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in sorted(FAST):
        model = tiny(kind)
        plain = speak(model, rows=4)
        with monkeypatch.context() as patch:
            patch.setattr(local, "_decoder", lambda model, length, pad_id: fused(model, length))
            fast = speak(model, rows=4)
        assert flat(fast) == flat(plain)


@pytest.mark.parametrize("change", [{"seed": 8}, {"step": 6}])
def test_seed_and_step_change_every_group(change: dict[str, int]) -> None:
    model = tiny("llama")
    assert all(a != b for a, b in zip(speak(model), speak(model, **change), strict=True))


def test_prompts_over_the_prefill_budget_come_in_turns(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    whole = speak(model)
    monkeypatch.setattr(local, "PREFILL_TOKENS", 8)
    assert flat(speak(model)) == flat(whole)


def test_noise_is_made_in_blocks_without_a_seam(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    whole = speak(model)
    monkeypatch.setattr(local, "NOISE_POSITIONS", 3)
    assert flat(speak(model, rows=4)) == flat(whole)


# --- stopping ---------------------------------------------------------------------------------------------------------


def test_stop_tokens_end_an_answer_and_belong_to_it(loop: str) -> None:
    free = speak(tiny("llama"), stop_ids=(), samples=4)
    stops = {2, 5, 11}
    cut = speak(tiny("llama"), stop_ids=stops, samples=4)
    for whole, part in zip((s for g in free for s in g), (s for g in cut for s in g), strict=True):
        assert whole.finish == "length" and len(whole.tokens) == len(whole.logp) == 12
        ends = [i for i, token in enumerate(whole.tokens) if token in stops]
        length = ends[0] + 1 if ends else 12
        assert part.tokens == whole.tokens[:length]
        assert len(part.logp) == length
        assert part.finish == ("stop" if ends else "length")
    assert len({len(s.tokens) for g in cut for s in g}) > 5


def test_one_token_answers(loop: str) -> None:
    said = speak(tiny("llama"), sampling=Sampling(max_tokens=1), stop_ids=range(12), rows=2)
    for group in said:
        for spoken in group:
            assert len(spoken.tokens) == 1
            assert spoken.finish == ("stop" if spoken.tokens[0] < 12 else "length")


def test_progress_counts_finished_rows_to_the_end(loop: str) -> None:
    seen: list[tuple[int, int]] = []
    speak(tiny("llama"), rows=4, on_progress=lambda done, whole: seen.append((done, whole)))
    assert seen == sorted(seen) and len(set(seen)) > 3
    assert seen[-1] == (15, 15)


# --- modes, precision, adapters ---------------------------------------------------------------------------------------


def test_no_prompts_give_no_answers() -> None:
    assert speak(tiny("llama"), [], []) == []


def test_modes_gradients_and_random_state_are_left_alone(loop: str) -> None:
    model = tiny("llama").train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    speak(model)
    assert [module.training for module in model.modules()] == before and any(before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    model(input_ids=torch.tensor([[3, 4]]), labels=torch.tensor([[3, 4]])).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_sixteen_bits(loop: str) -> None:
    """Weights in bfloat16, and float32 weights under autocast: near the float32 model, and gradients still flow."""
    model = tiny("llama", torch.float32)
    said = {"weights": speak(copy.deepcopy(model).to(torch.bfloat16), samples=8)}
    with torch.autocast("cpu", torch.bfloat16):
        said["autocast"] = speak(model, samples=8)
        model(input_ids=torch.tensor([[3, 4]])).logits.float().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    for groups in said.values():
        gaps = []
        for prompt, group in zip(PROMPTS, groups, strict=True):
            for spoken in group:
                own = forced(model, prompt, spoken.tokens).log_softmax(-1)
                gaps += (
                    own.gather(-1, torch.tensor(spoken.tokens)[:, None])[:, 0] - torch.tensor(spoken.logp)
                ).tolist()
        assert 1e-5 < np.abs(gaps).mean() < 0.05


def test_the_active_adapter_speaks(loop: str) -> None:
    import peft

    model = tiny("llama", torch.float32)
    base = speak(model, samples=1)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    )
    said = speak(wrapped, samples=1)
    assert flat(said) != flat(base)
    for prompt, (spoken,) in zip(PROMPTS, said, strict=True):
        own = forced(wrapped.eval(), prompt, spoken.tokens).log_softmax(-1)
        assert np.allclose(spoken.logp, own.gather(-1, torch.tensor(spoken.tokens)[:, None])[:, 0].numpy(), atol=1e-4)
    with wrapped.disable_adapter():
        assert flat(speak(wrapped, samples=1)) == flat(base)
    assert path(wrapped).startswith("fused")


def test_a_model_that_the_fused_loop_misreads_is_decoded_by_the_plain_one() -> None:
    model = tiny("llama")
    model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: output * 1.5)
    assert "differ" in path(model)
    spoken = speak(model)[1][0]
    own = forced(model, PROMPTS[1], spoken.tokens).log_softmax(-1)
    assert np.allclose(spoken.logp, own.gather(-1, torch.tensor(spoken.tokens)[:, None])[:, 0].numpy(), atol=2e-5)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_prompts_that_cannot_be_answered_are_refused_all_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        speak(tiny("llama"), [[], [3] * 60], IDS[:2])
    assert len(caught.value.problems) == 2
    assert IDS[0] in caught.value.problems[0]
    assert "60" in caught.value.problems[1] and "72" in caught.value.problems[1] and "64" in caught.value.problems[1]


def test_sampling_out_of_range_is_refused_all_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        Sampling(max_tokens=0, temperature=-1, top_p=0, top_k=-1, min_p=2)
    assert len(caught.value.problems) == 5
    with pytest.raises(UsageError, match="temperature"):
        Sampling(max_tokens=1, temperature=float("nan"))


def test_logits_that_are_not_finite_stop_the_run(loop: str) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(OpdError, match="not finite in 15 of 15 answers"):
        speak(model)
