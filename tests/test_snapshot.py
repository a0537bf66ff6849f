"""Earlier selves: students kept at the ends of stages, running means, and names that are safe as files."""

from __future__ import annotations

from itertools import pairwise

import driven
import pytest
import torch
from driven import metrics, run, short

from opd import snapshot
from opd.assemble import model_path
from opd.errors import OpdError, UsageError
from opd.model import adapter, load, parameters, trained

ODD = ["../../away", "a/b", "..", "v1.5", "RL: sort & 'record'", "ünïcødé " * 20, "a b", "a_b", "A.tmp", ""]


def student(lora=None):
    return load(model_path("world:student"), lora=lora)


def moved(model, by):
    with torch.no_grad():
        for _, p in trained(model.module):
            p.add_(by)


# --- files ------------------------------------------------------------------------------------------------------------


def test_names_of_stages_are_safe_as_files(tmp_path):
    places = [snapshot.place(tmp_path, name) for name in ODD]
    assert {place.parent for place in places} == {tmp_path / "stages"} and len(set(places)) == len(ODD)
    assert all(len(place.name.encode()) < 100 and place.name.isascii() for place in places)
    model = student()
    for place in places:
        snapshot.keep(model, place)
    assert sorted(p.resolve() for p in tmp_path.rglob("*") if p.is_file()) == sorted(p.resolve() for p in places)


@pytest.mark.parametrize("lora", [None, 4], ids=["full", "lora"])
def test_a_student_comes_back_and_judges_as_it_was(tmp_path, lora):
    model, path = student(lora), tmp_path / "stages" / "x.safetensors"
    moved(model, 0.01)
    then = {name: p.detach().clone() for name, p in trained(model.module)}
    ids = torch.tensor([[5, 6, 7, 8]])
    said = model.module(input_ids=ids).logits.detach()
    snapshot.keep(model, path)
    moved(model, 0.05)
    now = model.module(input_ids=ids).logits.detach()
    judge = snapshot.frozen(model, path, "earlier")
    with torch.no_grad(), adapter(judge.module, judge.adapter):
        assert torch.equal(judge.module(input_ids=ids).logits, said)
    assert torch.equal(model.module(input_ids=ids).logits, now) and not torch.equal(now, said)
    assert parameters(judge) == parameters(model), "the other's adapter does not count"
    snapshot.return_to(model, path)
    assert all(torch.equal(p, then[name]) for name, p in trained(model.module))


def test_what_is_not_there_or_of_another_model_is_refused(tmp_path):
    model, path = student(), tmp_path / "stages" / "x.safetensors"
    with pytest.raises(OpdError, match="the stage whose student it holds has not ended"):
        snapshot.return_to(model, path)
    snapshot.keep(student(4), path)
    before = {name: p.clone() for name, p in trained(model.module)}
    with pytest.raises(UsageError, match="holds another model than the recipe's"):
        snapshot.return_to(model, path)
    assert all(torch.equal(p, before[name]) for name, p in trained(model.module))


# --- the running mean -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, 4], ids=["full", "lora"])
def test_the_mean_is_the_geometric_sum_of_what_the_student_was(lora):
    model, decay = student(lora), 0.9
    mean = model.frozen_copy("ema")
    names = [name for name, _ in trained(model.module)]
    there = [name if lora is None else name.replace(".student.", ".ema.") for name in names]
    own = dict(model.module.named_parameters())
    want = [own[name].detach().double().clone() for name in names]
    for step in range(5):
        moved(model, 0.02 * (step + 1))
        snapshot.move_mean(mean, model, decay)
        want = [decay * w + (1 - decay) * own[name].detach().double() for w, name in zip(want, names, strict=True)]
    got = dict(mean.module.named_parameters())
    for name, w in zip(there, want, strict=True):
        torch.testing.assert_close(got[name].detach().double(), w, rtol=0, atol=1e-6)
        assert not got[name].requires_grad


@pytest.mark.parametrize("lora", [None, 4], ids=["full", "lora"])
def test_a_run_with_a_mean_goes_on_exactly(tmp_path, lora, monkeypatch):
    """SDFT's teacher, killed after a step that no checkpoint holds; and it follows the formula over the steps."""
    runs = driven.opened(monkeypatch)
    method = {"name": "sdft", "top_k": 8, "decay": 0.8}
    seen = []

    def watch(kind, _numbers):
        own = runs[-1]
        if kind in ("stage", "step"):
            mean = own.parts.teachers.ema
            pick = lambda m, role: [
                p.detach().double().clone()
                for n, p in m.module.named_parameters()
                if (lora is None or f".{role}." in n) and "weight" in n
            ]
            seen.append((pick(own.student.model, "student"), pick(mean, "ema")))

    make = lambda name, steps=4: short(
        tmp_path,
        method,
        steps=steps,
        name=name,
        student={"model": "world:student", "lora": lora},
        teachers=None,
        views={"demonstration": "={response};{prompt}"},
        run={"threads": 1, "dir": str(tmp_path), "name": name, "save_every": 2, "keep": 9},
    )
    whole = run(make("whole"), watch=watch)[1]
    assert len(seen) == 5 and all(torch.equal(a, b) for a, b in zip(*seen[0], strict=True))
    for (_, before), (now, after) in pairwise(seen):
        for b, n, a in zip(before, now, after, strict=True):
            torch.testing.assert_close(a, 0.8 * b + 0.2 * n, rtol=0, atol=1e-6)
    assert any(not torch.equal(a, b) for a, b in zip(*seen[-1], strict=True)), "the mean lags behind"
    with pytest.raises(driven.CrashError):
        run(make("run"), watch=driven.at_step(3, driven.crash))
    driven.resume(tmp_path / "run")
    assert not driven.differences(whole, tmp_path / "run")
    assert "ema" in driven.saved(whole)[0]
    assert metrics(whole)[-1]["kl/reverse_nats"] > 0
