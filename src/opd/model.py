"""A causal language model in this process: loading, its output head, and hidden states at the tokens that carry loss.

Student, teachers and reference are all read through `CausalModel`. Rows are laid out for a forward pass in one of three
ways that must not change a number: padded right (the default), padded left, or packed end to end.

Shapes: b rows of a micro-batch, L their longest length, m their loss tokens, H width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from opd.batch import Batch
from opd.errors import CheckFailedError, UsageError
from opd.head import Head

Layout = Literal["right", "left", "packed"]
STUDENT = "student"  # the adapter that learns under LoRA


@dataclass(frozen=True)
class Rows:
    """A micro-batch as the model takes it; `at` picks the hidden states [m, H] that predict its loss tokens."""

    inputs: dict[str, Tensor]
    line_m: Tensor
    place_m: Tensor

    def pick(self, h_bLH: Tensor) -> Tensor:
        return h_bLH[self.line_m, self.place_m]


def lay_out(batch: Batch, rows: Sequence[int], layout: Layout, pad: int = 0) -> Rows:
    """Token ids, mask and positions of some rows. The mask comes from lengths, never from comparing ids with a pad."""
    device = batch.row_N.device
    tokens = [batch.rollouts[r].tokens for r in rows]
    length = torch.tensor([len(t) for t in tokens])
    line, place = [], []
    starts = (length.cumsum(0) - length).tolist()
    longest = int(length.max())
    spans = _spans(batch, rows)
    for i, span in enumerate(spans):
        before = batch.position_N[span] - 1
        shift = {"right": 0, "left": longest - int(length[i]), "packed": starts[i]}[layout]
        line.append(torch.full_like(before, 0 if layout == "packed" else i))
        place.append(before + shift)
    if layout == "packed":
        ids = torch.tensor([[t for row in tokens for t in row]])
        inputs = {"input_ids": ids, "position_ids": torch.cat([torch.arange(n) for n in length.tolist()])[None]}
    else:
        fill = [pad] * longest
        right = layout == "right"
        ids = torch.tensor([[*t, *fill[len(t) :]] if right else [*fill[len(t) :], *t] for t in tokens])
        mask = (torch.arange(longest) if right else torch.arange(longest).flip(0))[None] < length[:, None]
        inputs = {"input_ids": ids, "position_ids": (mask.long().cumsum(1) - 1).clamp_min(0)}
        if not bool(mask.all()):
            inputs["attention_mask"] = mask.long()
    return Rows({k: v.to(device) for k, v in inputs.items()}, torch.cat(line), torch.cat(place))


def _spans(batch: Batch, rows: Sequence[int]) -> list[slice]:
    end = batch.length_B.cumsum(0).tolist()
    count = batch.length_B.tolist()
    return [slice(end[r] - count[r], end[r]) for r in rows]


def flat_index(batch: Batch, rows: Sequence[int]) -> Tensor:
    """[m] where the loss tokens of these rows stand among all N."""
    parts = [torch.arange(s.start, s.stop) for s in _spans(batch, rows)]
    return (torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)).to(batch.row_N.device)


def micro_batches(batch: Batch, rows: Sequence[int], tokens: int, layout: Layout = "right") -> list[list[int]]:
    """Rows sorted by length and cut so that each cut holds at most `tokens`, padding included (longer rows alone)."""
    order = sorted(rows, key=lambda r: (len(batch.rollouts[r].tokens), r))
    cuts: list[list[int]] = []
    used = 0
    for r in order:
        n = len(batch.rollouts[r].tokens)
        grown = used + n if layout == "packed" else n * (len(cuts[-1]) + 1 if cuts else 1)
        if cuts and grown <= tokens:
            cuts[-1].append(r)
            used = grown
        else:
            cuts.append([r])
            used = n
    return cuts


@dataclass
class CausalModel:
    """A model with its backbone and head taken apart. `compute` is the type matrix products run in."""

    module: nn.Module
    head: Head
    compute: torch.dtype = torch.float32
    layout: Layout = "right"
    name: str = ""
    stop_ids: tuple[int, ...] = ()
    adapter: str | None = None  # the LoRA adapter that is this model's own
    gradient_checkpointing: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def backbone(self) -> nn.Module:
        return backbone(self.module)

    def autocast(self) -> AbstractContextManager[Any]:
        """Float32 master weights, products in `compute`."""
        if self.compute in (torch.float32, torch.float64):
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute)

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """For a forward with gradient: activations are dropped where the recipe asks. Hugging Face does that in train
        mode only; nothing random is left in it (`load` saw to that), and outside of a forward the mode is eval.
        """
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            yield
            return
        self.module.train()
        try:
            yield
        finally:
            self.module.eval()

    def states(self, batch: Batch, rows: Sequence[int], depths: Sequence[int] = ()) -> tuple[Tensor, dict[int, Tensor]]:
        """[m, H] hidden states that predict the loss tokens of these rows, and those of the layers `depths`; gradient
        as the caller's mode says."""
        at = lay_out(batch, rows, self.layout)
        inner = {"output_hidden_states": True} if depths else {}
        with adapter(self.module, self.adapter), self.autocast(), self.recomputing():
            out = self.backbone(**at.inputs, use_cache=False, **inner)
        known = len(out.hidden_states) if depths else 0
        if wrong := [d for d in depths if not -known <= d < known]:
            raise UsageError(
                f"layer {wrong[0]} of {self.name or 'the model'} is asked, and it has 0 (its embeddings) to "
                f"{known - 1}, or counted from the end -1 to -{known}"
            )
        return at.pick(out.last_hidden_state), {d: at.pick(out.hidden_states[d]) for d in depths}

    @torch.no_grad()
    def all_states(
        self, batch: Batch, depths: Sequence[int] = (), tokens_per_pass: int = 32768
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """[N, H] for every loss token, of the last layer and of others, without gradient, in passes of its own size."""
        width, spoken = self.head.weight.shape[1], [r for r in range(len(batch.rollouts)) if batch.length_B[r]]
        out_NH = torch.zeros(len(batch.row_N), width, dtype=self.hidden_dtype, device=self.device)
        inner = {depth: torch.zeros_like(out_NH) for depth in depths}
        for cut in micro_batches(batch, spoken, tokens_per_pass, self.layout):
            at_m = flat_index(batch, cut)
            h_mH, own = self.states(batch, cut, depths)
            out_NH[at_m] = h_mH.to(out_NH.dtype)
            for depth, x_mH in own.items():
                inner[depth][at_m] = x_mH.to(out_NH.dtype)
        return out_NH, inner

    def all_hidden(self, batch: Batch, tokens_per_pass: int = 32768) -> Tensor:
        """[N, H] for every loss token, without gradient."""
        return self.all_states(batch, (), tokens_per_pass)[0]

    @property
    def hidden_dtype(self) -> torch.dtype:
        """What hidden states are kept in."""
        return self.head.weight.dtype if self.compute == torch.float32 else self.compute

    def frozen_copy(self, name: str) -> CausalModel:
        """The model as it is now, without gradient: a reference. Under LoRA, a copy of the adapter on the same base."""
        if self.adapter is not None:
            return replace(self, adapter=copy_adapter(self.module, self.adapter, name), name=name, extra={})
        module = copy.deepcopy(self.module).requires_grad_(False)
        return replace(self, module=module, head=read_head(module, self.head.vocab), name=name, extra={})


# --- reading a Hugging Face model ------------------------------------------------------------------------------------


def base(module: nn.Module) -> Any:
    """The causal LM under a peft wrapper, or the module itself."""
    return module.get_base_model() if hasattr(module, "get_base_model") else module  # type: ignore[operator]


def backbone(module: nn.Module) -> nn.Module:
    """The part that turns ids into hidden states."""
    inner = base(module)
    found: nn.Module = getattr(inner, getattr(inner, "base_model_prefix", "model"))
    return found


def read_head(module: nn.Module, vocab: int | None = None) -> Head:
    """Weight, bias, scale and softcap of the output layer, from the module and its config."""
    inner = base(module)
    linear = inner.get_output_embeddings()
    config = inner.config
    scale = 1.0
    if getattr(config, "logits_scaling", None):  # Granite divides
        scale = 1.0 / float(config.logits_scaling)
    elif getattr(config, "logit_scale", None):  # Cohere multiplies
        scale = float(config.logit_scale)
    softcap = getattr(config, "final_logit_softcapping", None)
    weight = linear.weight
    return Head(weight, vocab or weight.shape[0], getattr(linear, "bias", None), scale, softcap)


@torch.no_grad()
def probe_head(model: CausalModel, tolerance: float = 1e-3) -> float:
    """Largest difference of a tile's logits from the model's own, on a short row; `CheckFailedError` above it."""
    ids = torch.arange(8, device=model.device).remainder(model.head.vocab)[None]
    with model.autocast():
        own = base(model.module)(input_ids=ids, use_cache=False).logits[..., : model.head.vocab]
        ours = model.head.logits(model.backbone(input_ids=ids, use_cache=False).last_hidden_state[0])
    own, ours = own[0].double(), ours.double()
    gap = float((own - ours).abs().max())
    limit = tolerance * max(1.0, float(own.abs().max())) * (30 if model.compute == torch.bfloat16 else 1)
    if not gap <= limit:
        kind = type(base(model.module)).__name__
        raise CheckFailedError(
            f"{model.name or kind}: logits made from its hidden states and output layer differ from its own by "
            f"{gap:.3g} (limit {limit:.3g}). {kind} does something after the head that opd does not know: not usable"
        )
    return gap


def load(
    source: str | Path,
    *,
    dtype: Literal["float32", "bfloat16", "float64"] = "float32",
    device: str | torch.device = "cpu",
    vocab: int | None = None,
    trust_remote_code: bool = False,
    drop_layers: int = 0,
    frozen: bool = False,
    gradient_checkpointing: bool = False,
    lora: int | None = None,
    lora_alpha: float | None = None,
    lora_targets: Sequence[str] | None = None,
) -> CausalModel:
    """A Hugging Face causal LM, ready to be read in tiles.

    Weights that learn are float32 and `dtype` is what products run in; frozen ones are stored in `dtype`.
    `drop_layers` removes that many of the last decoder layers. `gradient_checkpointing` recomputes activations in the
    backward pass. `lora` is the rank of an adapter called "student" on a frozen base; `lora_alpha` (twice the rank
    unless given) over the rank is its scale, `lora_targets` the modules that get one (every linear layer unless given,
    the output layer never). Only safetensors are read: pickled weights are refused. Raises `UsageError` for a model
    that cannot be loaded so, `CheckFailedError` for one whose head opd does not understand.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    compute = getattr(torch, dtype)
    stored = compute if frozen or lora or dtype == "float64" else torch.float32
    remote = {"trust_remote_code": trust_remote_code}
    try:
        if AutoConfig.from_pretrained(str(source), **remote).is_encoder_decoder:
            raise UsageError(f"model `{source}` is an encoder-decoder; opd distils decoders. TRL's GKD handles T5")
        module = AutoModelForCausalLM.from_pretrained(str(source), dtype=stored, use_safetensors=True, **remote)
    except (OSError, ValueError) as error:
        raise UsageError(f"model `{source}` could not be loaded: {str(error).splitlines()[0]}") from error
    if drop_layers:
        _drop_layers(module, drop_layers, str(source))
    _no_noise(module)
    if gradient_checkpointing:
        try:
            enable = getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        except ValueError as error:
            raise UsageError(f"student.gradient_checkpointing: `{source}` cannot: {error}") from error
    if lora:
        module = _with_adapter(module, lora, lora_alpha, lora_targets, str(source))
    module.to(device).eval()
    if frozen:
        module.requires_grad_(False)
    config, generation = base(module).config, base(module).generation_config
    stops = generation.eos_token_id if generation is not None else None
    stops = config.eos_token_id if stops is None else stops
    stop_ids = (stops,) if isinstance(stops, int) else tuple(stops or ())
    head = read_head(module, vocab)
    model = CausalModel(
        module,
        head,
        compute=compute,
        name=str(source),
        stop_ids=stop_ids,
        adapter=STUDENT if lora else None,
        gradient_checkpointing=gradient_checkpointing,
    )
    probe_head(model)
    return model


def _no_noise(module: nn.Module) -> None:
    """Dropout and router jitter to 0, as layers or as numbers read in the forward: a run is a function of its seed."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        for name, number in vars(part).items():
            if isinstance(number, float) and ("drop" in name or "jitter" in name):
                setattr(part, name, 0.0)


def _with_adapter(
    module: nn.Module, rank: int, alpha: float | None, targets: Sequence[str] | None, source: str
) -> nn.Module:
    """A peft model whose adapter "student" learns. Its start is the same on every rank and in every run."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        target_modules="all-linear" if targets is None else list(targets),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    output = module.get_output_embeddings()  # type: ignore[operator]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            wrapped: nn.Module = get_peft_model(module, config, adapter_name=STUDENT)
        except ValueError as error:
            raise UsageError(
                f"student.lora_targets: no adapter for `{source}`: {str(error).splitlines()[0]}"
            ) from error
    if base(wrapped).get_output_embeddings() is not output:
        raise UsageError(
            f"student.lora_targets of `{source}` name its output layer, which is read in tiles and would not see the "
            "adapter: leave it out"
        )
    return wrapped


def _drop_layers(module: nn.Module, count: int, source: str) -> None:
    layers = next((m for _, m in backbone(module).named_children() if isinstance(m, nn.ModuleList)), None)
    if layers is None or count >= len(layers):
        have = "none that it can find" if layers is None else str(len(layers))
        raise UsageError(f"student.drop_layers = {count}: `{source}` has {have} decoder layers")
    del layers[len(layers) - count :]
    config = module.config
    config.num_hidden_layers = len(layers)  # type: ignore[union-attr]
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: len(layers)]  # type: ignore[union-attr, index]


@contextmanager
def adapter(module: nn.Module, name: str | None) -> Iterator[None]:
    """Inside, this LoRA adapter of a peft model is the active one; afterwards the one before is again.

    peft's `set_adapter` also moves `requires_grad` to the adapter it enters: a forward made under one adapter and a
    backward under another leaves every gradient None without a word. So both end before the adapter is left.
    """
    before = getattr(module, "active_adapter", None)
    if name is None or before == name:
        yield
        return
    module.set_adapter(name)  # type: ignore[operator]
    try:
        yield
    finally:
        module.set_adapter(before)  # type: ignore[operator]


def copy_adapter(module: nn.Module, source: str, name: str) -> str:
    """Add (or overwrite) a frozen adapter with the weights of another; returns its name."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    if name not in module.peft_config:  # type: ignore[operator]
        module.add_adapter(name, module.peft_config[source])  # type: ignore[operator, index]
    weights = {k: v.clone() for k, v in get_peft_model_state_dict(module, adapter_name=source).items()}
    set_peft_model_state_dict(module, weights, adapter_name=name)
    module.set_adapter(source)  # type: ignore[operator]
    return name


def parameters(model: CausalModel) -> int:
    """Parameters that work on each token: embedding look-ups are free, the head counts, others' adapters do not."""
    others = {*getattr(model.module, "peft_config", ())} - {model.adapter}
    own = sum(p.numel() for n, p in model.backbone.named_parameters() if others.isdisjoint(n.split(".")))
    free: int = t.weight.numel() if (t := base(model.module).get_input_embeddings()) else 0
    return own - free + model.head.weight.numel()


def trained(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that learn, by name."""
    return ((n, p) for n, p in module.named_parameters() if p.requires_grad)
