"""DPO as a push, and SODA: its gradient, its numbers, its fixed point, and a reference that speaks."""

import json

import driven
import pytest
import torch
from driven import metrics, run, small
from tabled import F64, V, gradient, hear, packed, prefix, prompt, random_table, relative, rollout, table
from torch.nn import functional as F

from opd.anchors import live
from opd.credits import preference
from opd.loss import push
from opd.method import REFERENCE, build
from opd.student import Optim, Student

NAN = float("nan")


def said(*tokens):
    return [(t, NAN) for t in tokens]


def answers(speaker, number, *each):
    return [rollout(number, speaker, prefix(number), said(*y), sample=k) for k, y in enumerate(each)]


PAIRS = [
    *answers("teacher", 0, (1, 2, 5)), *answers("reference", 0, (3, 5)),
    *answers("reference", 1, (0, 0, 0, 4)), *answers("teacher", 1, (2,)),
    *answers("teacher", 2, (4, 4)), *answers("reference", 2, (4, 1, 5)),
]  # fmt: skip
SEVERAL = [
    *answers("teacher", 0, (1, 2), (2, 5), (3,)), *answers("reference", 0, (4, 5), (1, 1)),
    *answers("teacher", 1, (0,), (5,), (2, 2, 5)), *answers("reference", 1, (4,), (1, 3, 5)),
]  # fmt: skip


def by_autograd(model, reference, rows, beta):
    """-log sigmoid(z) over all pairs, and their accuracy and margin, written out."""
    logits = model.module.model.logits_SV.detach().clone().requires_grad_()
    now, then = logits.log_softmax(-1), table(reference).detach()

    def gain(row):
        start = len(row.tokens) - row.spoken
        at = [(i - 1) * V + row.tokens[i - 1] for i in range(start, len(row.tokens))]
        return (now - then)[at, list(row.tokens[start:])].sum()

    of = lambda who, n: [gain(r) for r in rows if r.speaker == who and r.prompt.id == prompt(n).id]
    z = torch.stack([
        beta * (good - bad) for n in range(3) for good in of("teacher", n) for bad in of("reference", n)
    ])  # fmt: skip
    loss = -F.logsigmoid(z).mean()
    loss.backward()
    stats = {"loss": loss.item(), "accuracy": (z > 0).double().mean().item(), "margin": z.mean().item()}
    return logits.grad, {f"preference/{k}": v for k, v in stats.items()}


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("rows", [PAIRS, SEVERAL], ids=["pairs", "several"])
def test_the_push_has_dpos_gradient_and_numbers(rows, beta):
    model, reference = random_table(1), random_table(3)
    method = build("soda", {"beta": beta})
    batch = hear(packed(rows), method.needs, {"reference": reference})
    got, stats = gradient(model, batch, method.loss, micro=5, tile=2)
    want, numbers = by_autograd(model, reference, rows, beta)
    assert relative(got, want) < 1e-12
    assert {k: v for k, v in stats.items() if k.startswith("preference/")} == pytest.approx(numbers, rel=1e-12)
    assert want.norm() > 1e-2


def test_at_the_start_every_pair_is_undecided():
    """pi = reference: z = 0, the loss is ln 2, ties count a half, and a good token gets beta / 2."""
    model = random_table(1)
    method = build("soda", {"beta": 0.4})
    batch = hear(packed(PAIRS), method.needs, {"reference": model})
    _, stats = gradient(model, batch, method.loss)
    assert stats["preference/loss"] == pytest.approx(torch.log(torch.tensor(2.0)).item(), rel=1e-6)
    assert (stats["preference/accuracy"], stats["preference/margin"]) == (0.5, 0.0)


def test_a_row_without_a_partner_teaches_nothing():
    model, method = random_table(1), build("soda")
    lonely = [*PAIRS[:2], *answers("teacher", 2, (1, 1, 1)), *answers("reference", 1, (2, 2))]
    batch = hear(packed(lonely), method.needs, {"reference": random_table(3)})
    pair = batch.rows([0, 1])
    assert relative(2 * gradient(model, batch, method.loss)[0], gradient(model, pair, method.loss)[0]) < 1e-12


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_the_fixed_point_is_the_teacher_sharpened_against_the_reference(beta):
    """Every pair of one token, as often as teacher and reference say it: at ref (p / ref)^(1 / beta) nothing moves."""
    teacher, said_by_reference = torch.tensor([1, 2, 3, 4, 1, 1]), torch.tensor([2, 1, 1, 1, 2, 1])
    p, ref = teacher.double() / teacher.sum(), said_by_reference.double() / said_by_reference.sum()
    state = (len(prefix(0)) - 1) * V + prefix(0)[-1]
    model, reference = random_table(1), random_table(3)
    with torch.no_grad():
        model.module.model.logits_SV[state] = ref.log() + (p / ref).log() / beta
        reference.module.model.logits_SV[state] = ref.log()
    rows = answers("teacher", 0, *[(v,) for v in range(V) for _ in range(int(teacher[v]))])
    rows += answers("reference", 0, *[(v,) for v in range(V) for _ in range(int(said_by_reference[v]))])
    method = build("soda", {"beta": beta})
    batch = hear(packed(rows), method.needs, {"reference": reference})
    got, _ = gradient(model, batch, method.loss)
    assert got.abs().max() < 1e-15
    away, _ = gradient(reference, batch, method.loss)
    assert away.abs().max() > 1e-2


def test_several_updates_follow_the_student_as_it_moves():
    """The weight is of the present student, not of the one that began the batch: two passes are two steps of DPO."""
    method, reference = build("soda", {"beta": 1.0}), random_table(3)
    batch = hear(packed(PAIRS), method.needs, {"reference": reference})
    twice, once = random_table(1), random_table(1)
    Student(twice, Optim(passes=2, clip=0.0)).update(batch, method.loss, 0, lr=0.3)
    by_hand = Student(once, Optim(clip=0.0))
    for step in range(2):
        by_hand.update(batch, method.loss, step, lr=0.3)
    torch.testing.assert_close(table(twice), table(once), rtol=0, atol=1e-14)


def test_the_equation_says_dpo():
    credit = preference("teacher", "reference", REFERENCE, beta=0.1)
    assert str(push(credit, anchor=live())) == (
        "mean_t[-log π · [DPO: ±0.1 σ(-z), z = 0.1 Σ_t(log π - log reference) of teacher less that of reference]]"
    )
    assert credit.reads == {"live"} and table(random_table(1)).dtype == F64


# --- a run ------------------------------------------------------------------------------------------------------------

SODA = {"name": "first", "method": {"name": "soda", "beta": 0.5}, "steps": 4}
BARE = {
    "data": {"train": "world:sort:6"},
    "train": {"prompts": 3, "lr": 3e-3},
    "eval": {"every": 0, "length_band": None},
}


def told(folder):
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def test_the_reference_answers_each_prompt_once_a_stage(tmp_path):
    chosen = small(tmp_path, stages=[SODA, {**SODA, "name": "second"}], **BARE)
    _, folder = run(chosen)
    rows = told(folder)
    roles = [r["role"] for r in rows]
    assert {r: roles.count(r) for r in roles} == {"teacher": 12, "reference of first": 6, "reference of second": 6}
    assert len({(r["role"], r["prompt_id"]) for r in rows}) == 24  # the teacher answers the prompts of data.dev as well
    text = {(r["role"], r["prompt_id"]): r["response"] for r in rows}
    changed = [i for w, i in text if w == "reference of first" and text[w, i] != text["reference of second", i]]
    assert changed, "the second snapshot is of a student that has learned"
    steps = [row for row in metrics(folder) if "event" not in row]
    first, second = steps[:4], steps[4:]
    for stage in (first, second):
        assert stage[0]["preference/accuracy"] == pytest.approx(0.5) or abs(stage[0]["preference/margin"]) < 1e-4
        assert stage[0]["preference/loss"] == pytest.approx(0.6931, abs=1e-3)
        assert stage[-1]["preference/loss"] < 0.6 and stage[-1]["preference/margin"] > 0.1
    assert first[0]["length/reference_tokens"] > 0


@pytest.mark.parametrize("step", [3, 7])
def test_a_resumed_run_meets_the_same_answers(tmp_path, step):
    """Killed in the first stage and in the second: what the snapshots said is known again, or said again."""
    whole, cut = (small(tmp_path, name, stages=[SODA, {**SODA, "name": "second"}], **BARE) for name in ("whole", "cut"))
    _, folder = run(whole)
    with pytest.raises(driven.CrashError):
        run(cut, watch=driven.at_step(step, driven.crash))
    driven.resume(tmp_path / "cut")
    assert driven.differences(folder, tmp_path / "cut") == []
