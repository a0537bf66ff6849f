"""The arithmetic of bench/world.py: what a cell is, what is wrong with an answer, what a table says."""

import importlib.util
import sys
from pathlib import Path

import pytest

from opd import recipe as recipes

PLACE = Path(__file__).parents[1] / "bench" / "world.py"
spec = importlib.util.spec_from_file_location("bench_world", PLACE)
world = importlib.util.module_from_spec(spec)
sys.modules["bench_world"] = world
spec.loader.exec_module(world)


@pytest.mark.parametrize(
    ("prompt", "text", "kind"),
    [
        ("g3k7a>", "73ka", "right"),
        ("g3k7a>", "k73a", "order"),
        ("g3k7a>", "73kx", "stranger"),
        ("g3k7a>", "73k", "missing"),
        ("g3k7a>", "733ka", "twice"),
        ("g3k7a>", "733k", "twice and missing"),
        ("sqca>", "acq", "right"),
        ("sqca>", "qca", "order"),
        ("rab,12>", "[ab:12]", "right"),
        ("rab,12>", "(ab:12)", "style"),
        ("rab,12>", "[ab:13]", "stranger"),
    ],
)
def test_what_is_wrong_with_an_answer(prompt, text, kind):
    assert world.flaw(prompt, text, "stop") == kind
    assert world.flaw(prompt, text, "length") == "endless"


@pytest.mark.parametrize("method", world.METHODS)
@pytest.mark.parametrize("task", world.TASKS)
def test_every_cell_is_a_recipe(method, task, tmp_path):
    (tmp_path / "seed1" / "teacher").mkdir(parents=True)
    cell = world.Cell(method, task, 0, "dev")
    recipe = recipes.build(cell.recipe(tmp_path, tmp_path))
    assert len(recipe.data.dev) == len(world.TASKS[task]) and recipe.run.threads == 1


def test_a_cell_is_named_by_its_settings():
    cell = lambda *settings, **k: world.Cell("gad", "mixture", k.get("seed", 0), "dev", settings)
    set_ = (("stages.*.method.std", False), ("train.lr", 3e-5))
    data = cell(*set_).recipe(Path("w"), Path("r"))
    assert [s["method"]["std"] for s in data["stages"]] == [False, False] and data["train"]["lr"] == 3e-5
    keys = {cell().key, cell(*set_).key, cell(set_[0]).key, cell(seed=1).key}
    assert len(keys) == 4 and cell(*set_).key == cell(*set_).key
    assert "std" not in world.METHODS["gad"]["stages"][0]["method"], "settings of one cell are not those of the next"


def test_a_gain_and_its_interval():
    up, low, high = world.gain(0.2, 0.6, 100)
    assert up == pytest.approx(0.4) and high - up == pytest.approx(up - low) == pytest.approx(1.96 * 0.0632, abs=1e-3)
    assert world.spread([0.5]) == "50.0" and world.spread([0.4, 0.6]) == "50.0 ± 14.1"
