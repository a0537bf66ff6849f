"""An exact model for tests: next-token logits in a table indexed by the position and the token before.

It takes the place of a Hugging Face model wherever one is read: the student, its head, micro-batches and layouts are
the real ones, and every expectation over a tiny vocabulary can be enumerated.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from opd.head import Head
from opd.model import CausalModel


class Table(nn.Module):
    """Hidden states are rows of the table: state = (position, token). The layer below is made of them."""

    def __init__(self, positions: int, vocab: int, generator: torch.Generator | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.vocab = vocab
        logits = torch.zeros(positions * vocab, vocab, dtype=dtype)
        if generator is not None:
            logits = torch.randn(positions * vocab, vocab, dtype=dtype, generator=generator)
        self.logits_SV = nn.Parameter(logits)

    def forward(self, input_ids: Tensor, position_ids: Tensor, **_: Any) -> SimpleNamespace:
        h_bLV = self.logits_SV[position_ids * self.vocab + input_ids]
        return SimpleNamespace(last_hidden_state=h_bLV, hidden_states=(h_bLV.tanh(), h_bLV))


class TableLM(nn.Module):
    """A causal LM of `positions` x `vocab` states over `vocab` tokens; the head is the identity and does not learn."""

    base_model_prefix = "model"

    def __init__(
        self, positions: int, vocab: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float64
    ) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab, max_position_embeddings=positions)
        self.model = Table(positions, vocab, generator, dtype)
        self.head = nn.Linear(vocab, vocab, bias=False, dtype=dtype)
        self.head.weight = nn.Parameter(torch.eye(vocab, dtype=dtype), requires_grad=False)

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def logits(self, tokens: Tensor) -> Tensor:
        """[L, V] after each token of one row."""
        place = torch.arange(len(tokens), device=tokens.device)
        return self.model.logits_SV[place * self.model.vocab + tokens]


def table_model(positions: int, vocab: int, seed: int | None = None, dtype: torch.dtype = torch.float64) -> CausalModel:
    """A `CausalModel` over a table: random logits from `seed`, or uniform."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    module = TableLM(positions, vocab, generator, dtype)
    head = Head(module.head.weight, vocab)
    return CausalModel(module, head, compute=dtype, name="table", stop_ids=(vocab - 1,))
