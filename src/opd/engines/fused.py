"""A decode loop for models laid out like Llama: its own cache, joined products, rows that come and go at any time.

Prefill and rotary tables are the model's own code; what is written out here is one decoding step. `fused` compares it
with the model before it is used.

Shapes: P prompts, R rows that decode, S padded prompt length, L cached length, H width, V vocabulary; per head D; heads
h = q + 2k (q queries, k keys, k values), G = q / k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
FIXED_ROPE = ("default", "linear", "llama3", "yarn")  # angles that do not depend on the length decoded
SPARE = 64  # positions by which a full cache grows at least
JOIN_BYTES = 1 << 28  # weights up to this size are copied side by side; above, a product is long enough alone

Linear = Callable[[Tensor], Tensor]


def refusal(model: nn.Module) -> str | None:
    """Why this loop cannot decode the model (a phrase), or None."""
    inner = _inner(model)
    kind = type(inner).__name__
    if kind not in ARCHITECTURES:
        return f"{kind} is not one of {', '.join(ARCHITECTURES)}"
    config = inner.config
    usual = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    if set(getattr(config, "layer_types", None) or [usual]) != {"full_attention"}:
        return "it attends in a sliding window"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}"
    rope = inner.model.rotary_emb.rope_type
    if rope not in FIXED_ROPE:
        return f"its rotary angles ({rope}) change with the length"
    if any(p.is_prompt_learning for p in getattr(model, "peft_config", {}).values()):
        return "its adapter puts virtual tokens before the prompt"
    return None


@torch.no_grad()
def fused(model: nn.Module, length: int) -> Fused | str:
    """The fast decoder for rows of at most `length` tokens, or why the model cannot have it.

    A short row, decoded beside a copy of its beginning, must give the logits that the model gives in one forward.
    """
    reason = refusal(model)
    if reason is not None:
        return reason
    decoder = Fused(model, max(length, 8))
    row = [i % _inner(model).config.vocab_size for i in range(3, 8)]
    own_SV = model(input_ids=torch.tensor([row], device=decoder.device), use_cache=False).logits[0].double()
    first_RV = decoder.admit([row[:4], row[:2]], [0, 1, 1]).double()
    decoder.keep(torch.tensor([0, 2], device=decoder.device))
    next_RV = decoder.step(torch.tensor([row[4], row[2]], device=decoder.device)).double()
    decoder.keep(torch.zeros(0, dtype=torch.long, device=decoder.device))
    gap = float(torch.cat([first_RV - own_SV[[3, 1, 1]], next_RV - own_SV[[4, 2]]]).abs().max())
    limit = (5e-2 if decoder.half else 1e-4) * max(1.0, float(own_SV.abs().max()))
    return decoder if gap <= limit else f"its logits differ by {gap:.2g} from the model's own (limit {limit:.2g})"


def _inner(model: nn.Module) -> Any:
    """The causal LM under a peft wrapper, or the module itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


@dataclass(frozen=True)
class _Layer:
    """What one step of a decoder layer needs."""

    before: Tensor  # RMSNorm weights
    after: Tensor
    qkv: Linear
    out: Linear
    gate_up: Linear
    down: Linear
    heads: Tensor | None  # [q + k, D] RMSNorm weights of queries and keys (Qwen3)


def _joined(parts: Sequence[nn.Module], join: bool) -> Linear:
    """One product for several linear layers on the same input. Adapters and quantised layers keep their own forward."""
    if not join or any(type(part) is not nn.Linear for part in parts):
        return lambda x: torch.cat([part(x) for part in parts], dim=-1)
    weight = torch.cat([part.weight for part in parts])  # type: ignore[misc]
    bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])  # type: ignore[misc]
    if torch.is_autocast_enabled(weight.device.type):  # else it would be cast at every step
        half = torch.get_autocast_dtype(weight.device.type)
        weight, bias = weight.to(half), None if bias is None else bias.to(half)
    return lambda x: F.linear(x, weight, bias)


def _layer(layer: Any, join: bool, queries: int, keys: int) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    heads = None
    if hasattr(attention, "q_norm"):
        heads = torch.cat([attention.q_norm.weight.expand(queries, -1), attention.k_norm.weight.expand(keys, -1)])
    return _Layer(
        before=layer.input_layernorm.weight,
        after=layer.post_attention_layernorm.weight,
        qkv=_joined((attention.q_proj, attention.k_proj, attention.v_proj), join),
        out=attention.o_proj,
        gate_up=_joined((mlp.gate_proj, mlp.up_proj), join),
        down=mlp.down_proj,
        heads=heads,
    )


class Fused:
    """The rows that decode together, each with its own length in one cache."""

    refills = True
    drops = True

    def __init__(self, model: nn.Module, length: int) -> None:
        inner = _inner(model)
        config = inner.config
        self.backbone, self.head = inner.model, inner.lm_head
        self.queries, self.keys = config.num_attention_heads, config.num_key_value_heads
        self.width = inner.model.layers[0].self_attn.head_dim
        self.eps = config.rms_norm_eps
        weight = inner.model.embed_tokens.weight
        self.device = weight.device
        join = sum(p.numel() * p.element_size() for p in inner.parameters()) <= JOIN_BYTES
        self.layers = [_layer(layer, join, self.queries, self.keys) for layer in inner.model.layers]
        cos_1LD, sin_1LD = inner.model.rotary_emb(weight[:1], torch.arange(length, device=self.device)[None])
        self.cos_L1D = cos_1LD[0, :, None]
        half = torch.ones(self.width // 2, dtype=sin_1LD.dtype, device=self.device)
        self.sin_L1D = (sin_1LD * torch.cat([-half, half]))[0, :, None]  # signed, to go with halves that swap places
        self.cache: list[tuple[Tensor, Tensor]] = []  # keys and values of each layer [rows, k, positions, D]
        self.length_R = torch.zeros(0, dtype=torch.long, device=self.device)
        self.longest = 0  # max of length_R
        self.ragged = False  # lengths differ

    @property
    def half(self) -> bool:
        """Products run in a 16-bit type."""
        kind = self.device.type
        return torch.is_autocast_enabled(kind) or self.cos_L1D.dtype in (torch.float16, torch.bfloat16)

    def admit(self, prompts: Sequence[Sequence[int]], copies: Sequence[int]) -> Tensor:
        """Prefill each prompt once and append a row for each of `copies` (indices of prompts); their logits [R, V]."""
        length_P = torch.tensor([len(prompt) for prompt in prompts])
        S = int(length_P.max())
        tokens_PS = torch.tensor([[*prompt, *[0] * (S - len(prompt))] for prompt in prompts], device=self.device)
        past = DynamicCache(config=self.backbone.config)
        # Padded right, no mask: causal attention does not look ahead, and steps write over the padding.
        h_PSH = self.backbone(input_ids=tokens_PS, past_key_values=past, use_cache=True).last_hidden_state
        h_PH = h_PSH[torch.arange(len(prompts)), (length_P - 1).to(self.device)]
        copy_R = torch.tensor(copies, device=self.device)
        new = slice(len(self.length_R), len(self.length_R) + len(copies))
        self._make_room(new.stop, S, past.layers)
        for layer, (key, value) in zip(past.layers, self.cache, strict=True):
            key[new, :, :S], value[new, :, :S] = layer.keys[copy_R], layer.values[copy_R]
        self._set_lengths(torch.cat([self.length_R, length_P.to(self.device)[copy_R]]))
        logits_PV: Tensor = self.head(h_PH)
        return logits_PV[copy_R]

    def keep(self, index_R: Tensor) -> None:
        """Only these rows stay, in this order."""
        moved = (index_R != torch.arange(len(index_R), device=self.device)).nonzero()[:, 0]
        for part in (tensor for pair in self.cache for tensor in pair):
            past = part[:, :, : self.longest]
            past[moved] = past[index_R[moved]]
        self._set_lengths(self.length_R[index_R])

    def step(self, token_R: Tensor) -> Tensor:
        """The rows' next tokens in, their next logits [R, V] out."""
        R, L = len(token_R), self.longest + 1
        self._make_room(R, L)
        x_RH = self.backbone.embed_tokens(token_R)
        mask_RL = None
        at: Any = (slice(0, R), slice(None), self.longest)
        cos, sin = self.cos_L1D[self.longest], self.sin_L1D[self.longest]
        if self.ragged:
            at = (torch.arange(R, device=self.device), slice(None), self.length_R)
            cos, sin = self.cos_L1D[self.length_R], self.sin_L1D[self.length_R]
            empty_RL = torch.arange(L, device=self.device) > self.length_R[:, None]
            mask_RL = torch.zeros_like(empty_RL, dtype=x_RH.dtype).masked_fill_(empty_RL, -torch.inf)[:, None, None]
        for layer, (key, value) in zip(self.layers, self.cache, strict=True):
            x_RH = self._layer_step(layer, x_RH, key, value, at, cos, sin, mask_RL)
        self.length_R = self.length_R + 1
        self.longest = L
        logits_RV: Tensor = self.head(self.backbone.norm(x_RH))
        return logits_RV

    def _layer_step(
        self,
        layer: _Layer,
        x_RH: Tensor,
        key: Tensor,
        value: Tensor,
        at: Any,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        R, L, D, q, qk = len(x_RH), self.longest + 1, self.width, self.queries, self.queries + self.keys
        h_RH = self._norm(x_RH) * layer.before
        qkv_RhD = layer.qkv(h_RH).view(R, -1, D)
        qk_RhD = qkv_RhD[:, :qk]
        if layer.heads is not None:
            qk_RhD = self._norm(qk_RhD) * layer.heads
        qk_RhD = torch.addcmul(qk_RhD * cos, qk_RhD.roll(D // 2, -1), sin)
        key[at], value[at] = qk_RhD[:, q:].to(key.dtype), qkv_RhD[:, qk:].to(value.dtype)
        q_RkGD = qk_RhD[:, :q].view(R, self.keys, -1, D)
        # The G queries that share a key stand where a sequence of queries would: no key is repeated.
        a_RkGD = F.scaled_dot_product_attention(q_RkGD, key[:R, :, :L], value[:R, :, :L], attn_mask=mask)
        x_RH = x_RH + layer.out(a_RkGD.reshape(R, q * D))
        h_RH = self._norm(x_RH) * layer.after
        gate, up = layer.gate_up(h_RH).chunk(2, dim=-1)
        return x_RH + layer.down(F.silu(gate) * up)

    def _norm(self, x: Tensor) -> Tensor:
        """x / rms(x) along the last axis, in float32 at least."""
        wide = x if x.dtype == torch.float64 else x.float()
        size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        return (wide * torch.rsqrt(size * size / x.shape[-1] + self.eps)).to(x.dtype)

    def _set_lengths(self, length_R: Tensor) -> None:
        self.length_R = length_R
        ends = length_R.tolist()
        self.longest = max(ends, default=0)
        self.ragged = min(ends, default=0) != self.longest

    def _make_room(self, rows: int, length: int, like: Any = ()) -> None:
        """Buffers for so many rows and positions, of the type attention runs in; what is held moves along."""
        if self.cache and self.cache[0][0].shape[0] >= rows and self.cache[0][0].shape[2] >= length:
            return
        kind = self.device.type
        half = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        if not self.cache:
            self.cache = [(layer.keys[:0].to(half), layer.values[:0].to(half)) for layer in like]
        rows = max(rows, self.cache[0][0].shape[0])
        length = max(min(length + max(SPARE, length // 2), len(self.cos_L1D)), self.cache[0][0].shape[2])
        for i, (key, value) in enumerate(self.cache):  # one layer at a time: never all of it twice
            self.cache[i] = (self._roomier(key, rows, length), self._roomier(value, rows, length))

    def _roomier(self, held: Tensor, rows: int, length: int) -> Tensor:
        # Zeros, because what a mask gives no weight must still be a number.
        buffer = held.new_zeros(rows, held.shape[1], length, held.shape[3])
        buffer[: len(self.length_R), :, : self.longest] = held[: len(self.length_R), :, : self.longest]
        return buffer
