"""Decode with any Hugging Face causal language model through its own forward and its own kinds of cache.

Shapes: P prompts, R rows (several samples of one prompt are several rows), S padded prompt length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

SPARE = 64  # positions by which a full cache buffer grows at least


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values at the front of buffers with room to grow, so that a step does not copy the whole past."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [rows, heads, new, width] and return all that is held."""
        new = key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            self.buffers: tuple[Tensor, Tensor] | None = None
            return self.keys, self.values
        held = self.keys.shape[-2]
        if self.buffers is None or held + new > self.buffers[0].shape[-2]:
            self.buffers = (_roomier(self.keys, new), _roomier(self.values, new))
        keys, values = (buffer[..., : held + new, :] for buffer in self.buffers)
        keys[..., held:, :] = key_states
        values[..., held:, :] = value_states
        self.keys, self.values = keys, values
        return keys, values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows stay, in this order."""
        self.keys, self.values, self.buffers = self.keys[indices], self.values[indices], None


def _roomier(held: Tensor, new: int) -> Tensor:
    rows, heads, length, width = held.shape
    buffer = held.new_empty(rows, heads, length + new + max(SPARE, length // 2), width)
    buffer[..., :length, :] = held
    return buffer


def _cache(model: nn.Module) -> DynamicCache:
    """The model's own kinds of cache layers (sliding windows and others), the ordinary ones with room to grow."""
    config = getattr(model, "config", None)
    cache = DynamicCache(config=config if hasattr(config, "get_text_config") else None)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    if not cache.layers:  # the model adds them as it goes
        cache.layer_class_to_replicate = RoomyLayer
    return cache


class Plain:
    """Rows that decode together from one padded prefill; new rows wait until all have left."""

    refills = False

    def __init__(self, model: nn.Module, pad_id: int) -> None:
        self.model = model
        self.pad_id = pad_id
        self.device = next(model.parameters()).device
        self.drops = True  # finished rows can leave before the others

    def admit(self, prompts: Sequence[Sequence[int]], copies: Sequence[int]) -> Tensor:
        """Prefill each prompt once; row r is a copy of prompt `copies[r]`. Returns the next logits [R, V]."""
        self.cache = _cache(self.model)
        self.drops = all(type(layer) in (RoomyLayer, DynamicSlidingWindowLayer) for layer in self.cache.layers)
        if not self.drops:  # recurrent states: every row is prefilled, and stays until the last has finished
            prompts, copies = [prompts[c] for c in copies], range(len(copies))
        longest = max(map(len, prompts))
        pads = [longest - len(prompt) for prompt in prompts]
        tokens_PS = torch.tensor([[self.pad_id] * n + list(p) for n, p in zip(pads, prompts, strict=True)])
        pad_P1 = torch.tensor(pads)[:, None]
        column_S = torch.arange(longest)
        self.mask_RS = (column_S >= pad_P1).long().to(self.device) if any(pads) else None
        position_PS = (column_S - pad_P1).clamp(min=0).to(self.device)
        logits_PV = self._forward(tokens_PS.to(self.device), position_PS)
        self.position_R1 = position_PS[:, -1:]
        index_R = torch.tensor(copies, device=self.device)
        if list(copies) != list(range(len(prompts))):
            self.keep(index_R)
        return logits_PV[index_R]

    def step(self, token_R: Tensor) -> Tensor:
        """The rows' next tokens in, their next logits [R, V] out."""
        self.position_R1 = self.position_R1 + 1
        if self.mask_RS is not None:
            self.mask_RS = nn.functional.pad(self.mask_RS, (0, 1), value=1)
        return self._forward(token_R[:, None], self.position_R1)

    def keep(self, index_R: Tensor) -> None:
        """Only these rows stay, in this order."""
        self.cache.batch_select_indices(index_R)
        self.position_R1 = self.position_R1[index_R]
        if self.mask_RS is not None:
            self.mask_RS = self.mask_RS[index_R]

    def _forward(self, tokens_RS: Tensor, position_RS: Tensor) -> Tensor:
        out = self.model(
            input_ids=tokens_RS,
            attention_mask=self.mask_RS,
            position_ids=position_RS,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits_RV: Tensor = out.logits[:, -1]
        return logits_RV
