"""The recipes that come with the repository: all check, every CPU one runs, GAD's ablations switch what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import opd
from opd import checkpoint
from opd.errors import UsageError
from opd.legs import legs
from opd.method import catalogue
from opd.recipe import load

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
ALL = sorted(path.name for path in RECIPES.glob("*.yaml"))
CPU = [name for name in ALL if name.endswith(".cpu.yaml")]
ABLATIONS = sorted(path.stem for path in (RECIPES / "ablations").glob("*.yaml"))
METHODS = tuple(catalogue())


def bound(*files: Path, overrides: tuple[str, ...] = ()) -> tuple[Any, ...]:
    found = load(files, overrides).recipe
    return found, legs(found, files[0].parent)


def short(name: str, folder: Path) -> list[str]:
    """Overrides that make a recipe a matter of seconds and leave its form as it is."""
    stages = range(len(load(RECIPES / name).recipe.stages))
    changes = ("steps=2", "epochs=null", "critic.alone_steps=1")
    lengths = [f"stages.{i}.{change}" for i in stages for change in changes]
    if len(stages) == 1:  # `method:` without `stages:`
        lengths = ["train.steps=2", "train.epochs=null"]
    return [*lengths, "train.prompts=4", "eval.prompts=6", "eval.every=0", f"run.dir={folder}", "run.save_every=0"]


# --- what is there ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_recipes(method: str) -> None:
    """One for a CPU, and one at least at real sizes: for one GPU, or the paper's."""
    found = [m for m in ("cpu", "1gpu", "paper") if f"{method}.{m}.yaml" in ALL]
    assert found[:1] == ["cpu"] and len(found) > 1
    for machine in found:
        recipe, stages = bound(RECIPES / f"{method}.{machine}.yaml")
        assert stages[-1].method.name == method
        assert recipe.student.model.startswith("world:") == (machine == "cpu")


@pytest.mark.parametrize("name", ALL)
def test_every_recipe_checks_and_says_what_it_is(name: str) -> None:
    recipe, found = bound(RECIPES / name)
    assert found and recipe.data.dev, "a recipe measures what it does"
    assert (RECIPES / name).read_text().startswith("# ")


@pytest.mark.parametrize("name", CPU)
def test_every_cpu_recipe_runs(name: str, tmp_path: Path) -> None:
    run = opd.run(opd.load(RECIPES / name, *short(name, tmp_path)))
    assert run.summary["status"] == "finished"
    assert 0 <= run.after["eval/accuracy"] <= 1
    steps = [row for row in run.metrics() if "event" not in row]
    assert len(steps) == run.summary["step"] == 2 * len(bound(RECIPES / name)[1])
    assert steps[-1]["grad/norm"] > 0, "the student learns"
    assert (run.model / "model.safetensors").is_file()


@pytest.mark.parametrize("name", [name for name in ALL if name.endswith(".1gpu.yaml")])
def test_every_gpu_recipe_runs_in_small(name: str, tmp_path: Path) -> None:
    """Its own form, an adapter in bfloat16 with recomputation, on the built-in world's models and prompts."""
    recipe = load(RECIPES / name).recipe
    small = ["student.model=world:student", "student.lora=4", "data.train=world:sort:8", "data.dev=world:sort:4"]
    small += ["teachers.teacher={model: world:teacher, dtype: bfloat16}"] * bool(recipe.teachers)
    small += ["reward=task"] * bool(recipe.reward) + ["speak.max_tokens=12", "run.threads=1"]
    small += ["critic.accuracy_band=null"]  # in two steps a critic is behind, and the student would wait
    run = opd.run(opd.load(RECIPES / name, *small, *short(name, tmp_path)))
    steps = [row for row in run.metrics() if "event" not in row]
    assert run.summary["status"] == "finished" and steps[-1]["grad/norm"] > 0
    assert (run.model / "model.safetensors").is_file() and not (run.model / "adapter_config.json").exists()


# --- GAD as published ------------------------------------------------------------------------------------------------


def test_the_paper_recipe_has_the_papers_numbers() -> None:
    """arXiv 2511.10643 v3; the optimizer's and the KL's form from its code."""
    recipe, (warm, gad) = bound(RECIPES / "gad-paper.yaml")
    assert (warm.method.name, warm.stage.epochs, gad.method.name, gad.stage.epochs) == ("seqkd", 1.0, "gad", 2.0)
    assert warm.learns and warm.stage.critic.alone_steps == 10 and warm.method.group == gad.method.group == 8
    args = dict(gad.stage.method.args)
    assert (args["clip"], args["std"], args["kl"], args["kl_form"]) == ((0.2, 0.2), True, 1e-3, "k3")
    for stage in (warm.stage, gad.stage):
        train, speak = stage.train, stage.speak
        assert (train.lr, train.prompts, train.updates, train.passes) == (1e-6, 256, 1, 1)
        assert (train.weight_decay, train.clip, train.betas, train.schedule) == (0.01, 0.2, (0.9, 0.999), "constant")
        assert (speak.temperature, speak.max_tokens, speak.top_p, speak.top_k) == (0.8, 1536, 1.0, 0)
    critic = recipe.critic
    assert {learned.objective.kind for leg in (warm, gad) for learned in leg.method.loss.learned} == {"bradley_terry"}
    assert (critic.lr, critic.weight_decay, critic.clip) == (1e-6, 0.01, 0.2)
    assert (critic.init, critic.steps) == (recipe.student.model, 1)
    assert (recipe.data.max_prompt_tokens, recipe.eval.every, recipe.run.save_every) == (2048, 50, 50)


def test_the_share_of_groups_without_credit_is_by_the_methods_own_measure(tmp_path: Path) -> None:
    few = ["data.train=world:sort:8", "train.prompts=8", "stages.warm-up=null", "stages.gad.steps=1"]
    shares = []
    for min_std in (0, 1e6):
        small = [*few, f"stages.gad.method.min_std={min_std}", "eval.prompts=4", f"run.dir={tmp_path / str(min_std)}"]
        run = opd.run(opd.load(RECIPES / "gad.cpu.yaml", *small))
        shares += [row["group/degenerate_share"] for row in run.metrics() if "event" not in row]
    assert shares[0] < 1 and shares[1] == 1


# --- ablations -------------------------------------------------------------------------------------------------------

SMALL = """\
student: {model: world:student}
teachers: {teacher: {model: world:teacher}}
critic: {lr: 1e-3}
data: {train: world:sort:8, dev: world:sort:4}
reward: task
stages:
  - {name: warm-up, method: seqkd, critic: {learn: true, alone_steps: 1, group: 2}, epochs: 1}
  - {name: gad, method: {name: gad, group: 2}, epochs: 1}
speak: {max_tokens: 12}
train: {lr: 1e-4, prompts: 4}
run: {save_every: 1, keep: 50, threads: 1}
"""
HERE = {
    "critic-of-another-size": ["critic.init=world:teacher"],
    "several-answers": ["teachers.teacher.model=world:teacher", "teachers.teacher.samples=2"],
    "frozen-critic": ["stages.critic.epochs=1", "stages.gad.epochs=1", "stages.gad.method.group=2"],
}


def ablated(name: str, folder: Path) -> opd.Run:
    base = folder / "small.yaml"
    base.write_text(SMALL)
    over = [RECIPES / "ablations" / f"{name}.yaml", *HERE.get(name, []), f"run.dir={folder / 'runs'}"]
    return opd.run(opd.load(base, *over))


def by_stage(run: opd.Run, name: str) -> dict[str, list[float]]:
    out: dict[str, list[float]] = {}
    for row in run.metrics():
        if "event" not in row:
            out.setdefault(row["stage"], []).append(row.get(name, float("nan")))
    return out


@pytest.mark.parametrize("base", ["gad-paper.yaml", "gad.1gpu.yaml"])
@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_composes_and_changes_something(name: str, base: str) -> None:
    plain, _ = bound(RECIPES / base)
    changed, found = bound(RECIPES / base, RECIPES / "ablations" / f"{name}.yaml")
    assert changed != plain and found[-1].method.name == "gad"
    assert f"`{name}.yaml`" in (RECIPES / "ablations" / "README.md").read_text()


def test_without_warm_up_gad_comes_first(tmp_path: Path) -> None:
    assert list(by_stage(ablated("no-warm-up", tmp_path), "loss/total")) == ["gad"]


def test_without_its_warm_up_the_critic_begins_in_the_second_stage(tmp_path: Path) -> None:
    losses = by_stage(ablated("no-critic-warm-up", tmp_path), "critic/loss")
    assert all(x != x for x in losses["warm-up"]) and all(x == x for x in losses["gad"])


def critics(run: opd.Run) -> dict[int, dict[str, torch.Tensor]]:
    places = checkpoint.complete(run.path / "checkpoints")
    saved = {step: checkpoint.load(place)[0].get("critic", {}) for step, place in places.items()}
    return {step: dict(tensors) for step, tensors in saved.items() if tensors}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


def test_a_frozen_critic_learns_first_and_then_not_at_all(tmp_path: Path) -> None:
    run = ablated("frozen-critic", tmp_path)
    norms, losses = by_stage(run, "grad/norm"), by_stage(run, "critic/loss")
    assert {k: len(v) for k, v in norms.items()} == {"warm-up": 2, "critic": 2, "gad": 2}
    assert all(x != x for x in norms["critic"]), "the student stands still while its critic learns"
    assert all(x == x for x in losses["critic"]) and all(x != x for x in losses["gad"])
    assert all(x == x for x in by_stage(run, "critic/accuracy")["gad"]), "and is still measured"
    saved = critics(run)
    assert not same(saved[3], saved[4]) and same(saved[4], saved[6])


def test_an_answer_must_leave_room_for_a_prompt(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"speak.max_tokens is 512, and `world:student` holds \d+ tokens"):
        opd.run(opd.load(RECIPES / "sft.cpu.yaml", "speak.max_tokens=512", f"run.dir={tmp_path}"))


def test_a_critic_that_never_learned_cannot_be_frozen(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(SMALL)
    overrides = ("stages.warm-up.critic={}", "stages.gad.critic.learn=false")
    with pytest.raises(UsageError, match=r"stage `gad` leaves the critic as it is .* no stage before it teaches one"):
        bound(tmp_path / "small.yaml", overrides=overrides)


def test_the_plain_gan_is_in_both_stages() -> None:
    _, found = bound(RECIPES / "gad-paper.yaml", RECIPES / "ablations" / "bce.yaml")
    assert all("log(1 - σ(D(student)))" in str(leg.method.loss) for leg in found)


@pytest.mark.parametrize(
    ("stages", "kinds"),
    [
        (("beside", "bce", "bradley_terry"), ["bce", "bce", "bradley_terry"]),
        (("bce", "bradley_terry", "beside"), ["bce", "bradley_terry", "bradley_terry"]),
        (("bce", "beside", "bradley_terry"), ["bce", "bradley_terry", "bradley_terry"]),
        (("beside",), ["bradley_terry"]),
    ],
)
def test_a_critic_beside_another_method_learns_as_in_the_next_stage(
    tmp_path: Path, stages: tuple[str, ...], kinds: list[str]
) -> None:
    """Else as in the last one before it, else by Bradley-Terry."""
    beside: dict[str, Any] = {"method": "seqkd", "critic": {"learn": True}}
    listed = [beside if s == "beside" else {"method": {"name": "gad", "objective": s}} for s in stages]
    named = [{"name": str(k), "steps": 1, **stage} for k, stage in enumerate(listed)]
    (tmp_path / "small.yaml").write_text(SMALL)
    _, found = bound(tmp_path / "small.yaml", overrides=(f"stages={json.dumps(named)}",))
    assert [learned.objective.kind for leg in found for learned in leg.method.loss.learned] == kinds


def test_a_critic_may_have_another_size_but_not_another_tokenizer(tmp_path: Path) -> None:
    run = ablated("critic-of-another-size", tmp_path)
    student = checkpoint.load(checkpoint.complete(run.path / "checkpoints")[2])[0]["student"]
    size = lambda tensors: sum(t.numel() for t in tensors.values())
    assert size(critics(run)[2]) != size(student)
    (tmp_path / "small.yaml").write_text(SMALL)
    with pytest.raises(UsageError, match="does not share the tokenizer of student"):
        opd.run(opd.load(tmp_path / "small.yaml", "critic.init=world:student-merged", f"run.dir={tmp_path}"))


def test_several_answers_are_all_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from opd.teachers import Teachers

    seen: list[int] = []
    texts = Teachers.texts

    def watched(self: Teachers, role: str, prompts: Any) -> Any:
        found = texts(self, role, prompts)
        seen.extend(len(answers) for answers in found.values())
        return found

    monkeypatch.setattr(Teachers, "texts", watched)
    ablated("several-answers", tmp_path)
    assert set(seen) == {2}


def test_cross_entropy_stays_on_beside_the_reward(tmp_path: Path) -> None:
    terms = by_stage(ablated("cross-entropy", tmp_path), "loss/nll")
    assert all(x == x for x in terms["gad"])
