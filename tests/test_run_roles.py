"""Whole runs by who takes part: adapters on one frozen base, teachers of which only text is known, other tokenizers."""

import hashlib
import json

import driven
import pytest
import torch
from driven import metrics, run, small
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd import model as models
from opd import world
from opd.engines.base import Sampling
from opd.errors import UsageError
from opd.log import read
from opd.model import load
from opd.runs import measure
from opd.teachers import search_with, speak_with

NO_BAND = {"eval": {"every": 0, "length_band": None}}
WARM = {"name": "warm-up", "method": "seqkd", "critic": {"learn": True, "alone_steps": 2, "group": 2}, "steps": 3}
GAD = {"name": "gad", "method": {"name": "gad", "group": 3, "kl": 0.05}, "steps": 3}


def of(module, adapter):
    """Weights of an adapter; of the base for None."""
    mine = lambda name: f".{adapter}." in name if adapter else "lora_" not in name
    return {k: v.detach().clone() for k, v in module.named_parameters() if mine(k)}


def digest(weights):
    return hashlib.sha256(b"".join(w.numpy().tobytes() for _, w in sorted(weights.items()))).hexdigest()


def differ(one, other):
    """Whether every matrix of the two differs; False when none does."""
    assert one.keys() == other.keys() and one
    told = {not w.equal(other[name]) for name, w in one.items()}
    assert len(told) == 1, "some changed, some did not"
    return told.pop()


def renamed(weights, old, new):
    return {name.replace(f".{old}.", f".{new}."): w for name, w in weights.items()}


# --- LoRA ------------------------------------------------------------------------------------------------------------


def test_three_adapters_on_one_frozen_base(tmp_path, monkeypatch):
    """Each adapter learns only in its own turn, the reference is the student's at stage start, the base never moves."""
    runs, seen = driven.opened(monkeypatch), []

    def watch(kind, numbers):
        if kind in ("stage", "step"):
            module = runs[0].student.model.module
            names = [name for name in ("student", "critic", "reference") if name in module.peft_config]
            seen.append((kind, digest(of(module, None)), {name: of(module, name) for name in names}, numbers))
            assert runs[0].critic.models[0].module is module

    student = {"model": "world:student", "lora": 4}
    chosen = small(
        tmp_path, student=student, stages=[WARM, GAD], train={"lr": 0.01, "warmup_steps": 0}, eval={"keep": "last"}
    )
    _, folder = run(chosen, watch=watch)
    assert len({base for _, base, *_ in seen}) == 1
    before = seen[0][2]
    assert set(before) == {"student", "critic"}
    assert not differ(renamed(before["critic"], "critic", "student"), before["student"])
    for kind, _, now, numbers in seen[1:]:
        if kind == "stage":
            assert not differ(renamed(now["reference"], "reference", "student"), now["student"])
            reference = now["reference"]
        else:
            matrices = {n: w for n, w in now["student"].items() if "lora_B" in n}
            moved = any(not w.equal(before["student"][n]) for n, w in matrices.items())
            assert moved is ("lr/student" in numbers), numbers["step"]
            assert any(not w.equal(before["critic"][n]) for n, w in now["critic"].items())
            if "reference" in now:
                assert not differ(now["reference"], reference)
        before = now
    assert [kind for kind, *_ in seen] == ["stage", *["step"] * 3, "stage", *["step"] * 3]
    assert ["kl/reference_nats" in row for row in metrics(folder)] == [False] * 3 + [True] * 3
    _same_student(folder, runs[0])


def _same_student(folder, ended):
    """`model/` loads without peft and says, greedily, what the trained student says."""
    teachers, student = ended.parts.teachers, ended.student.model
    prompts = world.prompts("sort", 12, split="dev")
    voice, settings = teachers.renderer, {"samples": 1, "seed": 0, "step": 0, "rows": 64}
    greedy = Sampling(max_tokens=10, temperature=0.0)
    said = speak_with(student, voice, prompts, sampling=greedy, **settings)
    plain = load(folder / "model", vocab=student.head.vocab)
    assert plain.adapter is None and not any("lora" in name for name, _ in plain.module.named_parameters())
    assert [s[0].tokens for s in speak_with(plain, voice, prompts, sampling=greedy, **settings)] == [
        s[0].tokens for s in said
    ]
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    hugging = AutoModelForCausalLM.from_pretrained(folder / "model")
    ids = torch.tensor([voice.prompt_ids(prompts[0])])
    whole = hugging.generate(ids, do_sample=False, max_new_tokens=10, pad_token_id=0)[0, ids.shape[1] :]
    assert tokenizer.decode(whole, skip_special_tokens=True).strip() == voice.text(said[0][0].tokens)


@pytest.mark.parametrize("lora", [None, 4], ids=["full", "lora"])
def test_recomputed_activations_teach_the_same(tmp_path, lora):
    student = {"model": "world:student", "lora": lora}
    rows = []
    for name, recomputed in (("kept", False), ("again", True)):
        own = {**student, "gradient_checkpointing": recomputed}
        _, folder = run(small(tmp_path, name, student=own, stages=[WARM, GAD], **NO_BAND))
        rows.append((folder / "metrics.jsonl").read_bytes())
    assert rows[0] == rows[1]


@pytest.mark.parametrize("lora", [None, 4], ids=["full", "lora"])
def test_bfloat16_learns_in_float32(tmp_path, monkeypatch, lora):
    runs = driven.opened(monkeypatch)
    student = {"model": "world:student", "dtype": "bfloat16", "lora": lora}
    teachers = {"teacher": {"model": "world:teacher", "dtype": "bfloat16"}}
    chosen = small(tmp_path, student=student, teachers=teachers, stages=[WARM, GAD], **NO_BAND)
    summary, folder = run(chosen)
    assert summary["status"] == "finished" and metrics(folder)[-1]["grad/norm"] > 0
    learning = {p.dtype for _, p in models.trained(runs[0].student.model.module)}
    assert learning == {torch.float32}
    assert {w.dtype for w in driven.weights(folder).values()} == {torch.float32}


# --- measured again --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, 4], ids=["full", "lora"])
def test_the_final_model_measures_as_it_did_in_the_run(tmp_path, lora):
    student = {"model": "world:student", "lora": lora}
    summary, folder = run(small(tmp_path, student=student, stages=[{**GAD, "name": "only"}]))
    again = measure(folder)
    assert again == pytest.approx({k: v for k, v in summary["after"].items() if k in again}, abs=1e-4)
    assert set(summary["after"]) - set(again) == {"critic/heldout_accuracy", "critic/heldout_margin"}


# --- text alone ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["seqkd", {"name": "gad", "group": 2, "sft": 0.1}], ids=["seqkd", "gad"])
def test_recorded_answers_teach(tmp_path, method):
    """Two answers a prompt: both are heard."""
    path = driven.answers(tmp_path / "gpt.jsonl", 14)
    chosen = small(
        tmp_path, teachers={"teacher": {"answers": str(path)}}, stages=[{"method": method, "steps": 8}], **NO_BAND
    )
    summary, folder = run(chosen)
    assert summary["status"] == "finished" and metrics(folder)[-1]["grad/norm"] > 0
    spoken = {row["text"] for row in read(folder / "samples.jsonl") if row["speaker"] == "teacher"}
    heard = {row["teacher_text"] for row in read(folder / "samples.jsonl")}
    recorded = {json.loads(line)["response"] for line in path.read_text().splitlines()}
    assert heard <= recorded
    if method == "seqkd":
        assert spoken <= recorded
        assert len({text.endswith("!") for text in spoken}) == 2
    assert not (folder / "answers.jsonl").read_bytes()


def test_a_teacher_that_searches_says_its_likeliest_answer(tmp_path, monkeypatch):
    """Written down once a prompt like sampled text, the likeliest two it finds; no less likely than the greedy."""
    runs = driven.opened(monkeypatch)
    teacher = {"model": "world:teacher", "beams": 4, "samples": 2}
    stages = [{"method": "seqkd", "steps": 8}]
    chosen = small(tmp_path, teachers={"teacher": teacher}, stages=stages, **NO_BAND)
    summary, folder = run(chosen)
    assert summary["status"] == "finished" and metrics(folder)[-1]["grad/norm"] > 0
    written = read(folder / "answers.jsonl")
    teachers = runs[0].parts.teachers
    model, voice = teachers.model("teacher"), teachers.renderer
    prompts = {p.id: p for p in world.prompts("sort", 14)}
    found = search_with(model, voice, list(prompts.values()), 2, 10, 4, 64)
    texts = {i: [voice.text(s.tokens) for s in each] for i, each in zip(prompts, found, strict=True)}
    heard = {i: [row["response"] for row in written if row["prompt_id"] == i] for i in prompts}
    assert heard == texts and all(one != other for one, other in texts.values())
    greedy = speak_with(model, voice, list(prompts.values()), 1, Sampling(10, temperature=0.0), 0, 0, 64)
    for prompt, (best, second), (plain,) in zip(prompts.values(), found, greedy, strict=True):
        assert logp(model, voice, prompt, best) >= logp(model, voice, prompt, plain) - 1e-4
        assert logp(model, voice, prompt, best) >= logp(model, voice, prompt, second) - 1e-4


def logp(model, voice, prompt, said):
    """The log-probability of an answer, of the whole row at once."""
    asked = voice.prompt_ids(prompt)
    with torch.no_grad():
        logits = model.module(torch.tensor([[*asked, *said.tokens]])).logits[0, len(asked) - 1 : -1]
    return float(logits[:, : model.head.vocab].log_softmax(-1)[range(len(said.tokens)), list(said.tokens)].sum())


@pytest.mark.parametrize("method", ["seqkd", {"name": "gad", "group": 2}], ids=["seqkd", "gad"])
def test_prompts_without_an_answer_stop_before_training(tmp_path, method):
    path = driven.answers(tmp_path / "gpt.jsonl", 12)
    chosen = small(
        tmp_path, teachers={"teacher": {"answers": str(path)}}, stages=[{"method": method, "steps": 2}], **NO_BAND
    )
    with pytest.raises(UsageError, match=r"gpt.jsonl has no answer for 2 of 14 prompts, such as 's\w+>'"):
        run(chosen)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("method", "asked"),
    [("token_opd", "log-probabilities of given tokens"), ("gkd", "the whole next-token distribution")],
)
def test_text_is_not_enough_and_no_model_is_loaded_to_say_so(tmp_path, monkeypatch, method, asked):
    monkeypatch.setattr(models, "load", None)
    path = driven.answers(tmp_path / "gpt.jsonl", 14)
    chosen = small(tmp_path, teachers={"teacher": {"answers": str(path)}}, stages=[{"method": method, "steps": 2}])
    with pytest.raises(UsageError, match=rf"{method} needs {asked} of `teacher`, which gives text only.*gad, seqkd"):
        run(chosen)
    assert not (tmp_path / "run").exists()


# --- another tokenizer -----------------------------------------------------------------------------------------------

MERGED = {"model": "world:student-merged"}


@pytest.mark.parametrize("later", [[], [{"method": "seqkd", "steps": 1}]], ids=["alone", "before-a-text-stage"])
def test_probabilities_of_another_tokenizer_are_refused_with_evidence(tmp_path, later):
    stages = [{"method": {"name": "gkd", "on_policy": 1.0}, "steps": 1}, *later]
    with pytest.raises(
        UsageError, match=r"`world:student-merged` and teacher `world:teacher` do not share a tok"
    ) as caught:
        run(small(tmp_path, student=MERGED, stages=stages))
    assert "gad, seqkd" in str(caught.value)
    evidence = str(caught.value).split("share a tokenizer: ")[1]
    assert "'" in evidence and any(character.isdigit() for character in evidence)


@pytest.mark.parametrize("method", ["seqkd", {"name": "gad", "group": 3}], ids=["seqkd", "gad"])
def test_text_crosses_tokenizers(tmp_path, method):
    summary, folder = run(small(tmp_path, student=MERGED, stages=[{"method": method, "steps": 3}]))
    assert summary["status"] == "finished" and metrics(folder)[-1]["grad/norm"] > 0
    teacher = {row["prompt_id"]: row["response"] for row in read(folder / "answers.jsonl")}
    rows = read(folder / "samples.jsonl")
    assert rows and all(row["teacher_text"] == teacher[row["prompt_id"]] for row in rows)
    assert all(text and not text.endswith("</s>") for text in teacher.values())
    if method != "seqkd":
        assert 0 <= metrics(folder)[-1]["critic/accuracy"] <= 1 and all(row["score"] is not None for row in rows)
