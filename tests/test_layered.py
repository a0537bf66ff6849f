"""Hidden-state distillation: its gradient against plain autograd, every layout, the map that learns, resume, adapters.

Also the strengths that no method asks by its defaults: methods that ask them are held to the whole contract.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_contract
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from driven import CrashError, at_step, crash, differences, metrics, resume, run, short, small, weights
from tabled import F64, hear, packed, prompt, random_rollouts, random_table
from test_model import COMMON, VOCAB, rollouts
from torch import nn

from opd.batch import Total
from opd.divergences import Divergence
from opd.errors import UsageError
from opd.gates import heard, truncated
from opd.loss import layers, match, nll
from opd.method import TEACHER, build
from opd.model import CausalModel, load
from opd.projector import Projectors
from opd.signals import Layered
from opd.student import Optim, Student
from opd.types import Says

METHODS = """
from opd.loss import layers, nll
from opd.method import TEACHER, Method, one
from opd.methods.gkd import gkd
from opd.methods.token_kd import token_kd

def inside() -> Method:
    return token_kd(hidden=0.5, hidden_kind="mse")

def deeper() -> Method:
    return token_kd(share=0.0, hidden=0.3, hidden_layers=((0, -2), (1, 1)))

def plain() -> Method:
    return Method(one("data"), nll() + 0.2 * layers(TEACHER, ((-1, -1),), "mse", project=False), goal="text")

def likeliest() -> Method:
    return gkd(on_policy=0.5, divergence="forward_kl", top_k=4)

def dropped() -> Method:
    return gkd(on_policy=0.0, divergence="forward_kl", top_k=5, rest="teacher_renormalised")
"""


# --- the contract -----------------------------------------------------------------------------------------------------


def over_methods(test: Any) -> bool:
    marks = getattr(test, "pytestmark", [])
    return any(mark.name == "parametrize" and mark.args[0] == "name" for mark in marks)


PROMISES = [n for n, test in vars(test_contract).items() if n.startswith("test_") and over_methods(test)]


@pytest.mark.parametrize("method", ["inside", "deeper", "plain", "likeliest", "dropped"])
@pytest.mark.parametrize("promise", [n for n in PROMISES if "ranks" not in n and "clip" not in n])
def test_the_contract(promise: str, method: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    (tmp_path / "mine.py").write_text(METHODS)
    test: Any = getattr(test_contract, promise)
    wanted = test.__code__.co_varnames[: test.__code__.co_argcount]
    given = {name: request.getfixturevalue(name) for name in wanted if name != "name"}
    test(f"{tmp_path}/mine.py:{method}", **given)


def test_what_is_asked() -> None:
    loss = build("token_kd", {"hidden": 0.5, "hidden_layers": ((1, 2), (-1, -1))}).loss
    assert loss.needs == {TEACHER: Says.LAYERS} and loss.depths == {TEACHER: (-1, 2)}
    assert str(loss).endswith("0.5 · mean_t[cosine(teacher, W π; layers 1~2, -1~-1)]")
    assert build("token_kd").loss.needs == {TEACHER: Says.DENSE} and not build("token_kd").loss.depths
    assert not layers(TEACHER, ()).terms
    with pytest.raises(ValueError, match="has no probabilities to be gated by"):
        layers(TEACHER, ((-1, -1),)).where(truncated(2.0))


def test_who_cannot_give_it_is_refused(tmp_path: Path) -> None:
    from opd.legs import legs

    (tmp_path / "t.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    method = {"name": "token_kd", "share": 0.0, "hidden": 0.5}
    chosen = short(tmp_path, method, teachers={"teacher": {"answers": str(tmp_path / "t.jsonl")}})
    with pytest.raises(UsageError, match="needs hidden states of its layers of `teacher`, which gives text only"):
        legs(chosen, tmp_path)


# --- real architectures -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A student, and a teacher that is wider and deeper."""
    root, made = tmp_path_factory.mktemp("models"), {}
    for name, changes in {"student": {}, "teacher": {"hidden_size": 24, "num_hidden_layers": 3}}.items():
        torch.manual_seed(len(made))
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON | changes))
        for p in model.parameters():
            nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, 0.3 if p.ndim > 1 else 0.1)
        made[name] = root / name
        model.save_pretrained(made[name])
    return made


PAIRS = ((0, 0), (1, 2), (-1, -1))
BATCH = packed(rollouts(), 1.3)


def listening(batch: Any, teacher: CausalModel, pairs: Any = PAIRS) -> Any:
    hidden, inner = teacher.all_states(batch, sorted({t for _, t in pairs}))
    return replace(batch, signals={TEACHER: Layered(hidden, teacher.head, None, inner)})


def learn(student: Student, batch: Any, loss: Any) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    student.trainee.zero_grad()
    stats = student.gradient(batch, loss)
    return {n: p.grad.clone() for n, p in student.learned.items()}, stats


def stirred(student: Student, batch: Any, loss: Any) -> Student:
    """With maps that are no longer the identity."""
    student._fit(loss, batch)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in student.trainee.projectors.parameters():
            p += 0.1 * torch.randn(p.shape, dtype=p.dtype, generator=generator)
    return student


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_the_gradient_is_autograds_through_student_and_maps(kind: str, folders: dict[str, Path]) -> None:
    """Row by row through the models' own hidden states, without padding, tiles or micro-batches."""
    model, teacher = (load(folders[n], dtype="float64", vocab=VOCAB, frozen=n == "teacher") for n in folders)
    batch = listening(BATCH, teacher)
    loss = match(TEACHER, Divergence("forward_kl")) + 0.7 * layers(TEACHER, PAIRS, kind).per("sequence")
    student = stirred(Student(model, Optim(tile=3, tokens_per_micro=20)), batch, loss)
    got, stats = learn(student, batch, loss)

    student.trainee.zero_grad()
    maps = dict(student.trainee.projectors.items())
    total, value = torch.zeros((), dtype=F64), 0.0
    for rollout in batch.rollouts:
        at = [p - 1 for p, spoken in enumerate(rollout.mask) if spoken]
        ids = torch.tensor([rollout.tokens])
        mine = model.module(input_ids=ids, use_cache=False, output_hidden_states=True)
        with torch.no_grad():
            theirs = teacher.module(input_ids=ids, use_cache=False, output_hidden_states=True)
        q, p = (x.logits[0, at, :VOCAB].log_softmax(-1) for x in (mine, theirs))
        total = total + (p.exp() * (p - q)).sum() / len(batch.row_N)
        for s, t in PAIRS:
            a = maps[f"teacher_same_{s}_{t}"](mine.hidden_states[s][0, at])
            b = theirs.hidden_states[t][0, at]
            each = (
                1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)) if kind == "cosine" else ((a - b) ** 2).mean(-1)
            )
            total = total + 0.7 * each.mean() / len(PAIRS) / len(batch.rollouts)
            value += 0.7 * float(each.mean().detach()) / len(PAIRS) / len(batch.rollouts)
    total.backward()
    want = {n: p.grad for n, p in student.learned.items()}
    assert got.keys() == want.keys() and sum(n.startswith("projectors.") for n in got) == len(PAIRS)
    for name, grad in got.items():
        assert grad.norm() > 0 and (grad - want[name]).norm() < 1e-10 * want[name].norm(), name
    assert stats["loss/layers_teacher"] == pytest.approx(value, abs=1e-12)
    assert stats["loss/total"] == pytest.approx(float(total.detach()), abs=1e-12)
    assert not any(p.grad is not None for p in teacher.module.parameters())


LOSS = 0.5 * nll() + 0.7 * layers(TEACHER, PAIRS, "mse") + 0.1 * layers(TEACHER, ((1, -1),)).on("student")


def test_every_layout_gives_the_same_gradient(folders: dict[str, Path]) -> None:
    model, teacher = (load(folders[n], dtype="float64", vocab=VOCAB, frozen=n == "teacher") for n in folders)
    batch = listening(BATCH, teacher, (*PAIRS, (1, -1)))
    want, stats = learn(stirred(Student(model, Optim()), batch, LOSS), batch, LOSS)
    for layout, tile, micro in (("left", 1000, 10**6), ("right", 2, 9), ("packed", 5, 17), ("right", 1000, 1)):
        model.layout = layout
        order = [3, 0, 5, 1, 4, 2] if micro == 17 else list(range(6))
        student = stirred(Student(model, Optim(tile=tile, tokens_per_micro=micro)), batch, LOSS)
        got, same = learn(student, batch.rows(order), LOSS)
        for name, grad in got.items():
            assert (grad - want[name]).norm() < 1e-10 * want[name].norm(), (layout, name)
        assert same == pytest.approx(stats, rel=1e-10)


@pytest.mark.parametrize(
    "how", [{"gradient_checkpointing": True}, {"lora": 3}, {"lora": 3, "gradient_checkpointing": True}]
)
def test_recomputation_and_adapters_see_the_same(how: dict[str, Any], folders: dict[str, Path]) -> None:
    """Recomputed activations change no bit; an adapter gets a gradient, its base none, the maps the same as without."""
    teacher = load(folders["teacher"], dtype="float64", vocab=VOCAB, frozen=True)
    found = {}
    for name, changes in {"plain": {}, "changed": how}.items():
        batch = listening(BATCH, teacher, (*PAIRS, (1, -1)))
        model = load(folders["student"], dtype="float64", vocab=VOCAB, **changes)
        found[name], _ = learn(stirred(Student(model, Optim()), batch, LOSS), batch, LOSS)
    maps = [n for n in found["plain"] if n.startswith("projectors.")]
    assert len(maps) == len(PAIRS) + 1
    for name in found["plain"] if "lora" not in how else maps:  # an adapter begins as nothing
        gap = (found["plain"][name] - found["changed"][name]).norm()
        assert gap < 1e-10 * found["plain"][name].norm(), name
    if "lora" in how:
        assert all("lora" in n for n in found["changed"] if n not in maps) and len(found["changed"]) > len(maps)


def test_a_rank_without_rows_takes_part_in_every_sum(folders: dict[str, Path]) -> None:
    """Its maps are those of the others, and their gradient is 0, not missing."""
    model, teacher = (load(folders[n], dtype="float64", vocab=VOCAB, frozen=n == "teacher") for n in folders)
    student = Student(model, Optim())
    batch = listening(BATCH, teacher, (*PAIRS, (1, -1)))
    student.gradient(batch.rows([]), LOSS, total=Total())
    assert sum(n.startswith("projectors.") for n in student.learned) == len(PAIRS) + 1
    assert all(p.grad is not None and not p.grad.any() for p in student.learned.values())


MAPPED = {"hidden": 0.5, "hidden_kind": "mse", "hidden_layers": ((0, 0), (-1, -1))}


def shared(prompts: set[int], total: Total | None = None) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Two updates from these prompts' rows of one batch: what has been learned, and the numbers."""
    method, model = build("token_kd", MAPPED), random_table(1)
    batch = hear(packed(random_rollouts(("data",))), method.needs, {"*": random_table(2)})
    ids = {prompt(n).id for n in prompts}
    student = Student(model, Optim(passes=2, clip=0.0, eps=1e-3))
    part = batch.rows([i for i, r in enumerate(batch.rollouts) if r.prompt.id in ids])
    stats = student.update(part, method.loss, 0, 1e-2, total)
    return {n: p.detach().clone() for n, p in student.learned.items()}, stats


def rank(number: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=2)
    splits = (({0, 1, 2}, {3}), ({0, 1, 2, 3}, set()))
    torch.save([shared(split[number], Total()) for split in splits], f"{folder}/{number}.pt")
    dist.destroy_process_group()


def test_two_ranks_are_one(tmp_path: Path) -> None:
    """Student and maps, with a rank that holds a quarter of the rows, or none."""
    want, stats = shared({0, 1, 2, 3})
    assert len(want) == 3 and not torch.equal(want["projectors.teacher_same_0_0.weight"], torch.eye(6, dtype=F64))
    mp.spawn(rank, args=(str(tmp_path),), nprocs=2)
    for number in range(2):
        for got, same in torch.load(tmp_path / f"{number}.pt"):
            assert all((got[n] - want[n]).norm() < 1e-10 * want[n].norm() for n in want)
            assert same == pytest.approx(stats, rel=1e-10)


def test_gates_shut_what_a_view_has_nothing_of(folders: dict[str, Path]) -> None:
    model, teacher = (load(folders[n], dtype="float64", vocab=VOCAB, frozen=n == "teacher") for n in folders)
    batch = listening(BATCH, teacher)
    signal = batch.signals[TEACHER]
    holes = replace(batch, signals={TEACHER: replace(signal, heard_N=batch.row_N != 2)})
    loss = layers(TEACHER, PAIRS, "mse").per("sequence_sum")
    got, _ = learn(Student(model, Optim()), holes, loss.where(heard(TEACHER)))
    want, _ = learn(Student(model, Optim()), batch.rows([0, 1, 3, 4, 5]), 5 / 6 * loss)
    assert all((got[n] - want[n]).norm() < 1e-10 * (1 + want[n].norm()) for n in want)


def test_widths_that_differ_need_a_map_and_layers_must_exist(folders: dict[str, Path]) -> None:
    model, teacher = (load(folders[n], dtype="float64", vocab=VOCAB, frozen=n == "teacher") for n in folders)
    batch = listening(BATCH, teacher)
    with pytest.raises(UsageError, match="layer -1 of the student is 16 wide and layer -1 of `teacher` 24"):
        Student(model, Optim()).gradient(batch, layers(TEACHER, ((-1, -1),), project=False))
    with pytest.raises(UsageError, match=r"layer 3 of .* is asked, and it has 0 \(its embeddings\) to 2"):
        model.states(batch, [0], (3,))
    with pytest.raises(UsageError, match=r"layer -5 of .* counted from the end -1 to -4"):
        teacher.all_states(batch, (-5,))


def test_the_last_layer_is_what_the_head_reads(folders: dict[str, Path]) -> None:
    teacher = load(folders["teacher"], dtype="float64", vocab=VOCAB, frozen=True)
    hidden, inner = teacher.all_states(BATCH, (-1, 3, 0))
    assert torch.equal(hidden, inner[-1]) and torch.equal(hidden, inner[3]) and not torch.equal(hidden, inner[0])
    assert torch.equal(hidden, teacher.all_hidden(BATCH))


# --- the map ----------------------------------------------------------------------------------------------------------


def test_the_map_finds_a_turn() -> None:
    """To a judge whose states are the student's, turned, the map finds the turn; it began as the identity."""
    maps = Projectors()
    g = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=F64, generator=g)).Q
    h = torch.randn(40, 6, dtype=F64, generator=g)
    batch = replace(BATCH, signals={TEACHER: Layered(h @ turn.T, None, None, {-1: h @ turn.T})})  # type: ignore[arg-type]
    assert maps.fit(layers(TEACHER, ((-1, -1),), "mse"), batch, 6, h)
    (only,) = maps.values()
    assert torch.equal(only.weight, torch.eye(6, dtype=F64))
    optimizer = torch.optim.Adam(maps.parameters(), 0.02)
    for _ in range(600):
        optimizer.zero_grad()
        (only(h) - h @ turn.T).square().mean().backward()
        optimizer.step()
    assert (only.weight - turn).norm() < 1e-2


def hidden_kd(**changes: Any) -> dict[str, Any]:
    return {"name": "token_kd", "hidden": 0.5, "hidden_kind": "mse", "hidden_layers": ((1, 2), (-1, -1))} | changes


def test_a_run_learns_resumes_exactly_and_exports_no_map(tmp_path: Path) -> None:
    """Killed between checkpoints, through a stage without maps and one with others: the bytes of an unbroken run."""
    stages = [
        {"name": "one", "method": hidden_kd(), "steps": 5},
        {"name": "two", "method": "sft", "steps": 2},
        {"name": "three", "method": hidden_kd(hidden_layers=((0, 0),), hidden_kind="cosine"), "steps": 3},
    ]
    chosen = lambda name: small(tmp_path, name, stages=stages, critic={}, eval={"every": 0, "at_start": False})
    _, whole = run(chosen("whole"))
    steps = metrics(whole)
    assert all(row["loss/layers_teacher"] > 0 for row in steps[:5] + steps[7:])
    assert not any("loss/layers_teacher" in row for row in steps[5:7])
    assert steps[4]["loss/layers_teacher"] < steps[0]["loss/layers_teacher"]
    for stop in (3, 6, 8):
        with pytest.raises(CrashError):
            run(chosen(f"cut{stop}"), watch=at_step(stop, crash))
        resume(tmp_path / f"cut{stop}")
        assert differences(whole, tmp_path / f"cut{stop}") == []
    from opd import checkpoint

    tensors, _ = checkpoint.load(checkpoint.latest(whole / "checkpoints"))
    assert set(tensors["projectors"]) == {"teacher_same_0_0.weight"}
    assert any(k.startswith("projectors.") for k in tensors["student_optimizer"])
    assert not any("projector" in k or "teacher" in k for k in (*weights(whole), *tensors["student"]))


def test_teachers_of_a_run_may_be_the_student_itself(tmp_path: Path) -> None:
    """The judge's strength is enough for roles that are there anyway: here the reference."""
    (tmp_path / "still.py").write_text(
        "from opd.loss import layers, nll\nfrom opd.method import REFERENCE, Method, one\n"
        "def still() -> Method:\n"
        "    return Method(one('data'), nll() + layers(REFERENCE, ((1, 1), (-1, -1)), 'mse', project=False))\n"
    )
    _, folder = run(short(tmp_path, f"{tmp_path}/still.py:still", 3), tmp_path)
    first, *rest = [row["loss/layers_reference"] for row in metrics(folder)]
    assert first == pytest.approx(0.0, abs=1e-12) and all(x > 0 for x in rest)
