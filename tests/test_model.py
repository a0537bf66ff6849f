"""Real architectures in miniature: heads read right, gradients as plain autograd on their own logits gives them."""

from dataclasses import replace

import pytest
import torch
from tabled import packed, prompt, random_rollouts, random_table
from test_head import Largest
from torch import nn

from opd.anchors import old
from opd.batch import Total, pack
from opd.credits import log_ratio, reward
from opd.divergences import Divergence
from opd.errors import CheckFailedError, OpdError, UsageError
from opd.head import token_logp
from opd.loss import k3, match, nll, push
from opd.math import divergence as D
from opd.method import CRITIC, REFERENCE, TEACHER
from opd.model import CausalModel, adapter, base, load, probe_head, trained
from opd.signals import Dense, Score, Token
from opd.student import Optim, Student, guarded_step
from opd.types import Rollout, Turn

transformers = pytest.importorskip("transformers")

ROWS, VOCAB = 160, 150  # rows of the embedding, and how many of them are tokens
COMMON = {
    "vocab_size": ROWS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2 = {
    "vocab_size": ROWS,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS = {
    "Llama": {**COMMON, "attention_dropout": 0.1},
    "Qwen2": {**COMMON, "tie_word_embeddings": True},
    "Qwen3": {**COMMON, "head_dim": 8},
    "Gemma2": {**COMMON, "head_dim": 8, "final_logit_softcapping": 0.5, "query_pre_attn_scalar": 8},
    "GPT2": GPT2,  # tied, learned positions, dropout of 0.1
    "Granite": {**COMMON, "logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "Cohere": {**COMMON, "logit_scale": 0.3},
    "Phi": COMMON,  # a bias on the head
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of weights per kind and seed, made when first asked for."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def folder(kind: str, seed: int = 0, **changes):
        key = (kind, seed, *sorted(changes.items()))
        if key not in made:
            torch.manual_seed(seed)
            config = getattr(transformers, f"{kind}Config")(**KINDS[kind] | changes)
            name = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
            model = getattr(transformers, name)(config)
            for p in model.parameters():
                nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, 0.3 if p.ndim > 1 else 0.1)
            made[key] = root / str(len(made))
            model.save_pretrained(made[key])
        return made[key]

    return folder


def rollouts(seed: int = 0, rows: int = 6) -> list[Rollout]:
    g = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high, (), generator=g))
    out = []
    for r in range(rows):
        given, spoken = draw(2, 6), draw(1, 9)
        tokens = tuple(draw(0, VOCAB) for _ in range(given + spoken))
        mask = (False,) * given + (True,) * spoken
        behaviour = tuple(-2.0 - 0.1 * k if m else float("nan") for k, m in enumerate(mask))
        turns = (Turn(given, given + spoken, "stop"),)
        said = Rollout(prompt(r // 2), "student", tokens, mask, behaviour, (0,) * len(mask), turns, "")
        out.append(replace(said, sample=r % 2, reward=float(draw(0, 5))))
    return out


LOSS = (
    match(TEACHER, Divergence("jsd", (("beta", 0.3),), 1.7)).per("sequence")
    + 0.5 * nll()
    + push(log_ratio(TEACHER, "live") + reward(std=True), anchor=old(), clip=(0.2, 0.2))
)


def heard(batch, teacher: CausalModel):
    return replace(batch, signals={TEACHER: Dense(teacher.all_hidden(batch), teacher.head)})


def plain(module: nn.Module, teacher: nn.Module, batch) -> torch.Tensor:
    """LOSS from each row's own logits, by hand: no tiles, no padding, no head taken apart."""
    logps, logits, judged = [], [], []
    for rollout in batch.rollouts:
        at = [p - 1 for p, spoken in enumerate(rollout.mask) if spoken]
        ids = torch.tensor([rollout.tokens])
        logits.append(module(input_ids=ids, use_cache=False).logits[0, at, :VOCAB])
        with torch.no_grad():
            judged.append(teacher(input_ids=ids, use_cache=False).logits[0, at, :VOCAB])
    z, t, row, n = torch.cat(logits), torch.cat(judged), batch.row_N, len(batch.row_N)
    pick = lambda x: x.gather(-1, batch.token_N[:, None])[:, 0]
    token = lambda x: pick((x / batch.temperature).log_softmax(-1))
    divergence = D.jsd((z / 1.7).log_softmax(-1), (t / 1.7).log_softmax(-1), beta=0.3).sum(-1)
    share = 1.0 / torch.bincount(row)[row] / len(batch.rollouts)
    value, group = batch.reward_B, batch.group_B
    same = (group[:, None] == group[None]).to(value.dtype)
    centred = value - same @ value / same.sum(1)
    spread = (same @ centred.square() / (same.sum(1) - 1)).sqrt()
    advantage = torch.where(spread > 0, centred / (spread + 1e-6), 0.0)
    logps = token(z)
    credit = (token(t) - logps).detach() + advantage[row]
    pushed = -((logps - logps.detach()).exp() * credit).sum() / n
    return (divergence * share).sum() + 0.5 * -pick(z.log_softmax(-1)).sum() / n + pushed


def gradients(model: CausalModel, batch, loss=LOSS, **optim) -> dict[str, torch.Tensor]:
    student = Student(model, Optim(**optim))
    student.optimizer.zero_grad()
    student.gradient(batch, loss)
    found = {n: p.grad.clone() for n, p in trained(model.module)}
    student.optimizer.zero_grad()
    return found


def norm(x: dict[str, torch.Tensor]) -> float:
    return float(torch.cat([g.flatten().double() for g in x.values()]).norm())


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return norm({n: a[n].double() - b[n].double() for n in b}) / norm(b)


# --- every architecture -----------------------------------------------------------------------------------------------


@every_kind
def test_the_tiled_gradient_is_the_models_own(kind, saved):
    """Padded rows, cut batches, tiles and a padded vocabulary against autograd on `model(x).logits`."""
    model = load(saved(kind), dtype="float64", vocab=VOCAB)
    teacher = load(saved(kind, 1), dtype="float64", vocab=VOCAB, frozen=True)
    assert probe_head(model) < 1e-5
    batch = heard(pack(rollouts(), temperature=0.8, dtype=torch.float64), teacher)
    value = plain(model.module, teacher.module, batch)
    names, parameters = zip(*trained(model.module), strict=True)
    want = dict(zip(names, torch.autograd.grad(value, parameters), strict=True))
    for cuts in ({"tile": 7, "tokens_per_micro": 30}, {}):
        assert apart(gradients(model, batch, **cuts), want) < 1e-5  # norms inside are float32 in transformers
    assert all(p.grad is None for p in teacher.module.parameters())


@every_kind
@pytest.mark.parametrize("layout", ["left", "packed"])
def test_rows_in_other_layouts(layout, kind, saved):
    """Padded left, and end to end without seeing one another. In float32: eager attention in float64 makes nan of rows
    of padding, which nothing but a left layout has."""
    model = load(saved(kind), vocab=VOCAB)
    batch = heard(pack(rollouts(), temperature=1.0), model.frozen_copy("teacher"))
    want = gradients(model, batch, LOSS + nll())
    model.layout = layout
    assert apart(gradients(model, batch, LOSS + nll()), want) < 1e-4


@every_kind
def test_recomputing_activations_changes_nothing(kind, saved):
    """Same gradient, twice the work in the layers, and a model that is in eval mode whenever nobody trains it."""
    model = load(saved(kind), dtype="float64", vocab=VOCAB)
    slow = load(saved(kind), dtype="float64", vocab=VOCAB, gradient_checkpointing=True)
    batch = heard(pack(rollouts(), temperature=1.0, dtype=torch.float64), model.frozen_copy("teacher"))
    assert apart(gradients(slow, batch), gradients(model, batch)) < 1e-10
    calls = []
    (mlp, *_) = [m for n, m in slow.module.named_modules() if n.endswith("mlp")]
    mlp.register_forward_pre_hook(lambda *_: calls.append(slow.module.training))
    gradients(slow, batch)
    assert len(calls) == 2 and not slow.module.training
    Student(slow, Optim()).logp(batch)
    assert len(calls) == 3 and calls[2] is False


def test_padded_rows_are_no_tokens(saved):
    """151 rows or 160, the 150 tokens are the same: probabilities add to 1 over them, and padding never moves."""
    student = load(saved("Llama"), dtype="float64", vocab=VOCAB)
    teacher = load(saved("Llama", 1, vocab_size=151), dtype="float64", vocab=VOCAB, frozen=True)
    batch = heard(pack(rollouts(), temperature=1.0, dtype=torch.float64), teacher)
    z = batch.signals[TEACHER].logits(slice(0, 3))
    assert z.shape == (3, VOCAB)
    everything = torch.cat([token_logp(student.head, student.all_hidden(batch)[:1], torch.tensor([v]), 1.0)
                            for v in range(VOCAB)])  # fmt: skip
    assert float(everything.exp().sum()) == pytest.approx(1)
    grads = gradients(student, batch)
    assert grads["lm_head.weight"][VOCAB:].abs().max() == 0 < grads["lm_head.weight"][:VOCAB].abs().max()
    Student(student, Optim()).update(batch, LOSS, 0, lr=1e-2)
    fresh = load(saved("Llama"), dtype="float64", vocab=VOCAB)
    assert torch.equal(student.head.weight[VOCAB:], fresh.head.weight[VOCAB:])
    assert not torch.equal(student.head.weight[:VOCAB], fresh.head.weight[:VOCAB])


def test_no_tensor_is_as_large_as_all_logits(saved):
    """A whole update with every kind of signal; the teachers' and the student's extra passes included."""
    student = load(saved("Llama"), vocab=VOCAB)
    teacher = load(saved("Llama", 1), vocab=VOCAB, frozen=True)
    batch = pack([r for s in range(8) for r in rollouts(s)], temperature=1.0)
    loss = LOSS + 0.1 * k3(REFERENCE) + push(reward(CRITIC), anchor=old())
    with Largest() as mode:
        hidden = teacher.all_hidden(batch, 64)
        logp = token_logp(teacher.head, hidden, batch.token_N, 1.0, 8)
        signals = {TEACHER: Dense(hidden, teacher.head), REFERENCE: Token(logp), CRITIC: Score(batch.reward_B)}
        full = replace(batch, signals=signals)
        Student(student, Optim(tile=8, tokens_per_micro=64, passes=2)).update(full, loss, 0, 1e-3)
    assert len(batch.row_N) * VOCAB > 3 * mode.elements


def test_bfloat16_products_over_float32_weights(saved):
    exact, fast = load(saved("Llama"), vocab=VOCAB), load(saved("Llama"), vocab=VOCAB, dtype="bfloat16")
    teacher = load(saved("Llama", 1), vocab=VOCAB, dtype="bfloat16", frozen=True)
    assert {p.dtype for p in fast.module.parameters()} == {torch.float32}
    assert {p.dtype for p in teacher.module.parameters()} == {torch.bfloat16}
    batch = heard(pack(rollouts(), temperature=1.0), teacher)
    want, got = gradients(exact, batch), gradients(fast, batch)
    assert {g.dtype for g in got.values()} == {torch.float32} and 1e-6 < apart(got, want) < 0.05
    before = float(fast.head.weight.detach().sum())
    stats = Student(fast, Optim()).update(batch, LOSS, 0, lr=1e-6)  # below what bfloat16 weights could take up
    assert stats["loss/total"] == stats["loss/total"] and float(fast.head.weight.detach().sum()) != before


def test_a_frozen_copy_stays(saved):
    model = load(saved("Llama"), dtype="float64", vocab=VOCAB)
    batch = pack(rollouts(), temperature=1.0, dtype=torch.float64)
    copy = model.frozen_copy("reference")
    was = model.all_hidden(batch)
    Student(model, Optim()).update(batch, nll(), 0, lr=1e-2)
    assert torch.equal(copy.all_hidden(batch), was) and not torch.equal(model.all_hidden(batch), was)
    assert not list(trained(copy.module))


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
@pytest.mark.parametrize("recompute", [False, True])
def test_an_adapter_learns_alone(kind, recompute, saved):
    """Its gradient is plain autograd's, the base keeps every bit, and a reference is a copy of the adapter."""
    model = load(saved(kind), dtype="float64", vocab=VOCAB, lora=4, gradient_checkpointing=recompute)
    teacher = load(saved(kind, 1), dtype="float64", vocab=VOCAB, frozen=True)
    assert model.adapter == "student" and all(".student." in n for n, _ in trained(model.module))
    base_was = {n: p.clone() for n, p in model.module.named_parameters() if "lora" not in n}
    batch = heard(pack(rollouts(), temperature=0.8, dtype=torch.float64), teacher)
    learner, loss = Student(model, Optim()), match(TEACHER, Divergence("reverse_kl"))
    first = learner.update(batch, loss, 0, lr=1e-2)  # B starts at 0: only now has A a gradient
    reference = model.frozen_copy("reference")
    names, parameters = zip(*trained(model.module), strict=True)
    value = plain(model.module, teacher.module, batch)
    want = dict(zip(names, torch.autograd.grad(value, parameters), strict=True))
    assert apart(gradients(model, batch), want) < 1e-5
    was = reference.all_hidden(batch)
    for step in range(1, 4):
        last = learner.update(batch, loss, step, lr=1e-2)
    assert last["loss/total"] < first["loss/total"]
    assert torch.equal(reference.all_hidden(batch), was) and not torch.equal(model.all_hidden(batch), was)
    now = dict(model.module.named_parameters())
    assert all(torch.equal(now[n], p) for n, p in base_was.items())
    assert names == tuple(
        n for n, _ in trained(model.module)
    )  # after hearing another adapter, the student's still learns


def test_adapters_start_alike(saved):
    """On every rank and in every run, whatever was drawn before."""
    a = load(saved("Llama"), lora=4)
    torch.manual_seed(99)
    b = load(saved("Llama"), lora=4)
    assert all(torch.equal(p, q) for (_, p), (_, q) in zip(trained(a.module), trained(b.module), strict=True))


@pytest.mark.parametrize("total", [None, Total()])
def test_a_parameter_without_gradient_stops_the_run(total):
    """Also where gradients are summed over ranks, which is no reason to take None for zero."""
    model = random_table(1)
    model.module.forgotten = nn.Parameter(torch.ones(2, dtype=torch.float64))
    before = model.module.model.logits_SV.detach().clone()
    with pytest.raises(OpdError, match="1 of 2 parameters that should learn got no gradient, the first is `forgotten`"):
        Student(model, Optim()).update(packed(random_rollouts(("student",))), nll(), 0, 1e-2, total)
    assert torch.equal(model.module.model.logits_SV, before)


@pytest.mark.parametrize("how", ["entered another", "disabled"])
def test_an_adapter_left_before_backward_stops_the_run(how, saved):
    """peft moves `requires_grad` with the active adapter: backward then fills nothing, without a word."""
    model = load(saved("Llama"), vocab=VOCAB, lora=4)
    model.frozen_copy("other")
    batch = pack(rollouts(), temperature=1.0)
    learner = Student(model, Optim())
    learner.optimizer.zero_grad()
    hidden, _ = model.states(batch, range(len(batch.rollouts)))
    if how == "disabled":
        model.module.disable_adapter_layers()
    else:
        model.module.set_adapter("other")
    hidden.square().mean().backward()
    with pytest.raises(
        OpdError, match=r"parameters that should learn got no gradient, the first is `.*lora_A\.student"
    ):
        guarded_step(model.module, learner.optimizer, 1.0, 1e-3, {})


def test_the_adapter_inside_is_the_active_one(saved):
    model = load(saved("Llama"), vocab=VOCAB, lora=4)
    model.frozen_copy("other")
    with adapter(model.module, "other"):
        assert model.module.active_adapter == "other"
    assert model.module.active_adapter == "student" and all(".student." in n for n, _ in trained(model.module))


def test_adapters_that_cannot_be(saved):
    with pytest.raises(UsageError, match=r"student\.lora_targets of .* name its output layer"):
        load(saved("Llama"), lora=4, lora_targets=["lm_head"])
    with pytest.raises(UsageError, match=r"student\.lora_targets: no adapter for .*nowhere"):
        load(saved("Llama"), lora=4, lora_targets=["nowhere"])
    few = load(saved("Llama"), lora=2, lora_alpha=8, lora_targets=["q_proj"])
    assert len(list(trained(few.module))) == 4 and few.module.peft_config["student"].lora_alpha == 8


# --- loading ----------------------------------------------------------------------------------------------------------


def test_layers_can_be_dropped(saved):
    model = load(saved("Llama", num_hidden_layers=3), drop_layers=2, vocab=VOCAB)
    assert len(base(model.module).model.layers) == 1 == base(model.module).config.num_hidden_layers
    assert Student(model, Optim()).update(pack(rollouts(), temperature=1.0), nll(), 0, 1e-3)["loss/nll"] > 0
    with pytest.raises(UsageError, match=r"student\.drop_layers = 2: .* has 2 decoder layers"):
        load(saved("Llama"), drop_layers=2)


def test_pickled_weights_are_refused(saved, tmp_path):
    module = load(saved("Llama")).module
    module.config.save_pretrained(tmp_path)
    torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match="could not be loaded"):
        load(tmp_path)


def test_what_is_no_decoder_is_refused(tmp_path):
    transformers.T5Config().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="is an encoder-decoder"):
        load(tmp_path)
    with pytest.raises(UsageError, match="could not be loaded"):
        load(tmp_path / "nowhere")


def test_a_head_that_is_not_understood_is_refused(saved):
    """Something after the output layer that the config does not say, here by a config that says too much."""
    with pytest.raises(
        CheckFailedError, match=r"differ from its own by .* LlamaForCausalLM does something after the head"
    ):
        load(saved("Llama", logit_scale=2.0))


def test_stop_ids_and_dropout(saved):
    model = load(saved("GPT2"))
    assert model.stop_ids == (2,)
    assert all(m.p == 0 for m in model.module.modules() if isinstance(m, nn.Dropout))
    llama = load(saved("Llama"))
    assert {m.attention_dropout for m in llama.module.modules() if hasattr(m, "attention_dropout")} == {0.0}


def test_what_is_not_finite_changes_no_weight(saved):
    model = load(saved("Llama"), vocab=VOCAB)
    batch = pack(rollouts(), temperature=1.0)
    hidden = torch.full((len(batch.row_N), 16), float("nan"))
    batch = replace(batch, signals={TEACHER: Dense(hidden, model.head)})
    before = [p.detach().clone() for p in model.module.parameters()]
    with pytest.raises(OpdError, match=r"loss/match_teacher is nan.*: no weight was changed"):
        Student(model, Optim()).update(batch, match(TEACHER, Divergence("forward_kl")), 0, 1e-3)
    assert all(torch.equal(p, q) for p, q in zip(model.module.parameters(), before, strict=True))
