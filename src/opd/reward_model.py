"""A Hugging Face sequence-classification model as a reward: one number for a prompt and an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from opd.chat import renderer
from opd.errors import OpdError, UsageError
from opd.types import Prompt

DTYPES = ("float32", "bfloat16", "float16")


class RewardModel:
    """`model(said) -> scores`, each a forward pass over the conversation as the model's own chat template writes it.

    Args:
        model: a folder or Hugging Face id of a model with one output and safetensors weights.
        batch: rows of a forward pass; rows of like length go together.
        max_tokens: longest row; by default what the model's positions hold.
        dtype: of weights and computation.
        trust_remote_code: run Python code that comes with the model.

    Raises `UsageError` for a model with no trained scalar head, or several outputs.
    """

    def __init__(
        self,
        model: str,
        batch: int = 8,
        max_tokens: int | None = None,
        dtype: str = "float32",
        trust_remote_code: bool = False,
    ) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        if dtype not in DTYPES:
            raise UsageError(f"reward_model: dtype '{dtype}' is none of {', '.join(DTYPES)}")
        try:
            tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
            self.model, found = AutoModelForSequenceClassification.from_pretrained(
                model,
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
        except (OSError, ValueError) as error:
            raise UsageError(f"reward_model: {model} cannot be loaded: {str(error).splitlines()[0]}") from error
        if missing := sorted(found["missing_keys"]):
            raise UsageError(
                f"reward_model: {model} has no weights for {', '.join(missing[:3])}: its scores would be random; name "
                "a model that was trained to score"
            )
        if self.model.config.num_labels != 1:
            raise UsageError(
                f"reward_model: {model} has {self.model.config.num_labels} outputs, where a reward model has one"
            )
        self.name = model
        self.model.eval().requires_grad_(False)
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        config: Any = self.model.config
        if config.pad_token_id is None:
            config.pad_token_id = tokenizer.pad_token_id  # the model finds a row's last token by it
        self.batch = batch if config.pad_token_id is not None else 1
        held = getattr(config.get_text_config(), "max_position_embeddings", None)
        self.max_tokens = min(max_tokens or held or 2**31, held or 2**31)
        self.renderer = renderer(tokenizer, stop_ids=(tokenizer.eos_token_id,))

    @torch.no_grad()
    def __call__(self, said: Sequence[tuple[Prompt, str]]) -> list[float]:
        """A score for each prompt and answer, the same for the same: each distinct row is scored once.

        Raises `OpdError` for rows longer than the model holds.
        """
        rows = [self.renderer.whole_ids(prompt, text) for prompt, text in said]
        for (prompt, _), row in zip(said, rows, strict=True):
            if len(row) > self.max_tokens:
                raise OpdError(
                    f"reward_model: prompt {prompt.id} {prompt.where} and its answer are {len(row)} tokens and "
                    f"{self.name} reads {self.max_tokens}; lower speak.max_tokens or data.max_prompt_tokens"
                )
        scores: dict[tuple[int, ...], float] = {}
        shortest_first = sorted(set(rows), key=lambda row: (len(row), row))
        for start in range(0, len(shortest_first), self.batch):
            chosen = shortest_first[start : start + self.batch]
            scores.update(zip(chosen, self._forward(chosen), strict=True))
        return [scores[row] for row in rows]

    def _forward(self, rows: Sequence[tuple[int, ...]]) -> list[float]:
        """Rows are padded on the right, where no token before the padding can see it."""
        longest, pad = max(map(len, rows)), self.model.config.pad_token_id or 0
        ids_BT = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows], device=self.model.device)
        mask_BT = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=self.model.device)
        scores_B1: torch.Tensor = self.model(input_ids=ids_BT, attention_mask=mask_BT).logits
        return [float(score) for score in scores_B1[:, 0].float()]
