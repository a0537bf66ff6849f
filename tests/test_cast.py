"""Experts by domain: each row by its own judge, one model and one head at a time, exact however they are carried."""

from __future__ import annotations

import weakref
from dataclasses import replace
from functools import cache

import driven
import pytest
import torch
from driven import run, short, small

from opd.assemble import load_tokenizer, model_path
from opd.batch import pack
from opd.cast import Cast, carried, carried_head
from opd.chat import renderer
from opd.errors import UsageError
from opd.head import Head
from opd.method import EXPERT, build
from opd.model import load, parameters
from opd.record import flops
from opd.signals import Shelf
from opd.student import Optim, Student
from opd.teachers import Teachers
from opd.types import Judge, Message, Prompt, Says

ROLES = {"group": "world:expert-group", "sort": "world:student", "record": "world:teacher"}  # widths 96, 64 and 96
TEXTS = {"group": ("g3k7a>", "37ka"), "sort": ("sba>", "ab"), "record": ("rkq,47>", "[kq:47]")}
ORDER = ("sort", "group", "record", "group", "sort", "group")
EXPERTS = Judge(EXPERT)


@cache
def known(name, dtype="float64"):
    """A model to compare with: one for all tests."""
    return fetch(name, dtype)


def fetch(name, dtype="float64"):
    model = load(model_path(name), dtype=dtype, frozen=True)
    return replace(model, head=replace(model.head, vocab=len(load_tokenizer(name))))


@pytest.fixture(scope="module")
def voice():
    tokenizer = load_tokenizer("world:student")
    return renderer(tokenizer, stop_ids=(tokenizer.eos_token_id,))


def batch_of(voice, domains, dtype=torch.float64):
    rows = []
    for k, domain in enumerate(domains):
        text, answer = TEXTS[domain]
        prompt = Prompt((Message("user", text),), domain=domain)
        ids = voice.answer_ids(answer * (1 + k % 2))
        rows.append(voice.spoken(prompt, voice.prompt_ids(prompt), ids, (-1.0,) * len(ids), "stop", "student", k, 0))
    return pack(rows, temperature=1.2, dtype=dtype)


def cast(dtype="float64", kept=()):
    """Models by role, and what was loaded in which order, with whether those before were gone by then."""
    loaded, alive = [], []

    def loader(role):
        def go():
            gone = all(ref() is None for who, ref in alive if who not in kept)
            model = fetch(ROLES[role], dtype)
            alive.append((role, weakref.ref(model.module)))
            loaded.append((role, gone))
            return model

        return go

    return Cast({role: loader(role) for role in ROLES}, frozenset(kept)), loaded, alive


def hear(voice, domains, says=Says.DENSE, dtype="float64", kept=(), disk=None):
    models, loaded, alive = cast(dtype, kept)
    teachers = Teachers(voice, known("world:student", dtype), models, disk=disk)
    batch = teachers.hear(batch_of(voice, domains, getattr(torch, dtype)), {EXPERTS: says})
    return teachers, batch, loaded, alive


# --- who judges what --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("says", [Says.TOKEN, Says.DENSE])
@pytest.mark.parametrize("domains", [ORDER, ORDER[::-1], ("sort", "sort")], ids=["mixed", "reversed", "one"])
def test_every_row_is_judged_by_the_model_of_its_domain(voice, says, domains):
    """Against each row alone, through that model's own forward; experts of different widths share one batch."""
    _, batch, *_ = hear(voice, domains, says)
    for b, rollout in enumerate(batch.rollouts):
        model = known(ROLES[rollout.prompt.domain])
        with torch.no_grad():
            z_TV = model.module(input_ids=torch.tensor([rollout.tokens])).logits[0, :, : model.head.vocab]
        places = torch.tensor([p for p, m in enumerate(rollout.mask) if m])
        logp_nV = (z_TV[places - 1] / 1.2).log_softmax(-1)
        token_n = torch.tensor(rollout.tokens)[places]
        mine = batch.row_N == b
        want = logp_nV.gather(1, token_n[:, None])[:, 0]
        torch.testing.assert_close(batch.judged(EXPERTS)[mine], want, rtol=1e-10, atol=1e-10)
        if says is Says.DENSE:
            logits_nV = batch.signals[EXPERTS].logits(mine.nonzero()[:, 0])
            torch.testing.assert_close((logits_nV / 1.2).log_softmax(-1), logp_nV, rtol=1e-9, atol=1e-9)


def test_carried_states_and_head_give_the_models_own_logits_to_the_bit(voice):
    _, batch, *_ = hear(voice, ORDER, dtype="float32")
    for role in ROLES:
        rows = [b for b, d in enumerate(ORDER) if d == role]
        model, part = known(ROLES[role], "float32"), batch_of(voice, ORDER, torch.float32).rows(rows)
        direct = model.head.logits(model.all_hidden(part))
        at = torch.cat([(batch.row_N == b).nonzero()[:, 0] for b in rows])
        assert torch.equal(batch.signals[EXPERTS].logits(at), direct)


def test_disk_and_memory_are_the_same_to_the_bit(voice, tmp_path):
    memory = hear(voice, ORDER, dtype="float32")[1]
    disk = hear(voice, ORDER, dtype="float32", disk=tmp_path / "carried")[1]
    every = torch.arange(len(memory.row_N))
    assert torch.equal(memory.signals[EXPERTS].logits(every), disk.signals[EXPERTS].logits(every))
    assert torch.equal(memory.judged(EXPERTS), disk.judged(EXPERTS))
    assert (tmp_path / "carried").is_dir() and not list((tmp_path / "carried").iterdir()), "files without a name"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_tensor_on_disk_is_the_tensor(tmp_path, dtype):
    for shape in ((3, 5), (0, 5), (1,)):
        x = torch.randn(*shape).to(dtype)
        assert torch.equal(carried(x, tmp_path), x) and carried(x, tmp_path).shape == x.shape
    head = Head(torch.randn(4, 2).requires_grad_(), 3, torch.randn(4), 0.5, 30.0)
    for folder in (None, tmp_path):
        copy = carried_head(head, folder)
        assert torch.equal(copy.weight, head.weight) and torch.equal(copy.bias, head.bias)
        assert copy.weight.data_ptr() != head.weight.data_ptr() and not copy.weight.requires_grad
        assert (copy.vocab, copy.scale, copy.softcap) == (3, 0.5, 30.0)


# --- one at a time ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("says", [Says.TOKEN, Says.DENSE])
def test_models_that_do_not_stay_are_gone_before_the_next_is_loaded(voice, says):
    teachers, _, loaded, alive = hear(voice, ORDER, says)
    assert [role for role, _ in loaded] == ["sort", "group", "record"] and all(gone for _, gone in loaded)
    assert teachers.cast.here == ("record",)
    teachers.hear(batch_of(voice, ORDER), {EXPERTS: says})
    assert [role for role, _ in loaded[3:]] == ["sort", "group"], "who is there is asked first"
    assert sum(ref() is not None for _, ref in alive) == 1


def test_models_that_stay_are_loaded_once(voice):
    teachers, _, loaded, _ = hear(voice, ORDER, kept=tuple(ROLES))
    teachers.hear(batch_of(voice, ORDER), {EXPERTS: Says.DENSE})
    assert len(loaded) == 3 and set(teachers.cast.here) == set(ROLES)


def test_nobody_is_loaded_who_has_no_row_and_counting_loads_nobody(voice):
    teachers, batch, loaded, _ = hear(voice, ("group", "sort"))
    method = build("full_vocab")
    first = flops(teachers.student, None, teachers, method, batch, learning=True)
    assert first == flops(teachers.student, None, teachers, method, batch, learning=True)
    assert [role for role, _ in loaded] == ["group", "sort"]
    tokens = [len(r.tokens) for r in batch.rollouts]
    sizes = [parameters(known(ROLES[role])) for role in ("group", "sort")]
    judged = 2 * sum(n * size for n, size in zip(tokens, sizes, strict=True))
    assert first == judged + 8 * parameters(teachers.student) * sum(tokens)


def counted(monkeypatch):
    """The numbers of the heads that were put on the device, in order; and that one at most is there."""
    takes = []
    plain = Shelf.take

    def take(self, number):
        if self._taken is None or self._taken[0] != number:
            takes.append(number)
        return plain(self, number)

    monkeypatch.setattr(Shelf, "take", take)
    return takes


@pytest.mark.parametrize("layout", ["right", "packed"])
def test_each_head_is_taken_once_an_optimizer_batch(voice, monkeypatch, layout):
    """Micro-batches are made of one expert's rows after the other's, whatever the order of rows and their lengths."""
    _, batch, *_ = hear(voice, ORDER)
    student = Student(replace(load(model_path("world:student"), dtype="float64"), layout=layout), Optim())
    student.model.head = replace(student.model.head, vocab=batch.signals[EXPERTS].shelf.heads[0].vocab)
    loss, grads = build("full_vocab").loss, []
    for tokens, tile in ((10**6, 1000), (12, 1000), (30, 3)):
        takes = counted(monkeypatch)
        student.optim = Optim(tokens_per_micro=tokens, tile=tile)
        student.optimizer.zero_grad()
        stats = student.gradient(batch, loss)
        grads.append(torch.cat([p.grad.flatten() for p in student.model.module.parameters() if p.grad is not None]))
        assert sorted(set(takes)) == sorted(takes) and len(takes) in (2, 3), takes  # one may lie there already
        assert stats["loss/total"] > 0
    for grad in grads[1:]:
        assert (grad - grads[0]).norm() < 1e-10 * grads[0].norm()


def test_a_head_is_let_go_before_the_next_comes():
    held = []

    class Weight(torch.Tensor):
        """A tensor that makes a new one wherever it goes."""

        def to(self, *_):
            new = torch.Tensor(self.as_subclass(torch.Tensor).clone())
            assert all(ref() is None for ref in held), "two heads on the device"
            held.append(weakref.ref(new))
            return new

    heads = [Head(torch.randn(5, w).as_subclass(Weight), 5) for w in (2, 3)]
    from opd.signals import Experts

    judge_N, place_N = torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 1])
    experts = Experts(judge_N, place_N, (torch.randn(2, 2), torch.randn(2, 3)), Shelf(heads, torch.device("cpu")))
    assert experts.logits(slice(None)).shape == (4, 5)
    assert experts.logp(torch.tensor([0, 1, 2, 3]), 1.0).isfinite().all()
    assert len(held) >= 3


# --- recipes ----------------------------------------------------------------------------------------------------------

MIXED = {"data": {"train": ["world:sort:6", "world:group:6"]}}


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ({}, r"none for 'group' \(with probabilities: teacher, sort\)"),
        ({"group": {"answers": "texts.jsonl"}}, r"none for 'group' \(.*; group gives text only\)"),
    ],
)
def test_a_domain_without_an_expert_is_refused_with_names(tmp_path, others, said):
    driven.answers(tmp_path / "texts.jsonl", 6)
    texts = {role: {"answers": str(tmp_path / home["answers"])} for role, home in others.items()}
    teachers = {"sort": {"model": "world:expert-sort"}, **texts}
    with pytest.raises(UsageError, match=said):
        run(short(tmp_path, "full_vocab", teachers=teachers, **MIXED))
    assert not (tmp_path / "run").exists()


def test_a_text_only_teacher_of_another_stage_does_not_weaken_the_experts(tmp_path):
    """And what no stage asks for probabilities may have a tokenizer of its own."""
    teachers = {
        "teacher": {"model": "world:student-merged"},
        "sort": {"model": "world:expert-sort", "resident": False},
        "group": {"model": "world:expert-group", "resident": False},
    }
    stages = [{"method": "seqkd", "steps": 1}, {"method": "full_vocab", "steps": 2}]
    own = {"every": 0, "at_start": False, "length_band": None}
    chosen = small(tmp_path, teachers=teachers, stages=stages, eval=own, **MIXED, run={"carry": "disk"})
    summary, folder = run(chosen)
    assert summary["status"] == "finished" and not list((folder / "carried").iterdir())


def test_disk_and_memory_give_the_same_run(tmp_path):
    teachers = {role: {"model": f"world:expert-{role}", "resident": False} for role in ("sort", "group")}
    rows = []
    for carry in ("memory", "disk"):
        own = {"threads": 1, "dir": str(tmp_path), "carry": carry}
        made = short(tmp_path, "full_vocab", steps=2, teachers=teachers, run=own | {"name": carry}, **MIXED)
        rows.append((run(made)[1] / "metrics.jsonl").read_bytes())
    assert rows[0] == rows[1]


def test_a_single_teacher_that_does_not_stay_teaches_the_same(tmp_path):
    rows = []
    for resident in (True, False):
        teachers = {"teacher": {"model": "world:teacher", "resident": resident}}
        own = {"threads": 1, "dir": str(tmp_path), "name": str(resident)}
        method = {"name": "gkd", "on_policy": 1.0, "divergence": "jsd"}
        rows.append(
            (run(short(tmp_path, method, steps=2, teachers=teachers, run=own))[1] / "metrics.jsonl").read_bytes()
        )
    assert rows[0] == rows[1]
