"""The built-in world: verifiers against enumeration, splits, habits, tokenizers, and the models that ship."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from itertools import permutations, product
from pathlib import Path

import pytest

from opd import tasks, world
from opd.errors import UsageError
from opd.tasks import ALPHABET, DOMAINS, TASKS, split_of, task
from opd.tasks.group import Group
from opd.tasks.record import Record
from opd.tasks.sort import Sort

NAMES = sorted(TASKS)


def bare(name: str, n: int, seed: int = 0) -> list[str]:
    return [p.text for p in tasks.prompts(name, n, seed)]


# ------------------------------------------------------------------------------------------------ verifiers


def test_group_accepts_exactly_digits_then_letters():
    one = Group("small", ((2, 2),))
    right = {a + b for a in ("37", "73") for b in ("ka", "ak")}
    for n in range(6):
        for chars in product("37ka", repeat=n):
            text = "".join(chars)
            assert one.check("g3k7a>", text) == (text in right), text
    assert not one.check("g3k7a>", "37kz")
    assert one.check("letters;g3k7a>", "ka37") and not one.check("letters;g3k7a>", "37ka")


def test_sort_accepts_exactly_the_order_the_rule_names():
    for rule, right in {"up": "aabc", "down": "cbaa", "copy": "baca"}.items():
        said = {"".join(p) for p in permutations("baca")}
        assert {text for text in said if task("sort").check(f"{rule};sbaca>", text)} == {right}
    assert task("sort").check("sbaca>", "aabc")
    assert not task("sort").check("sbaca>", "aab") and not task("sort").check("sbaca>", "aabcc")
    assert not task("sort").check("sbaca>", "")


def test_record_accepts_exactly_one_style():
    texts = {
        rule: rule.replace("a", "kq").replace("1", "47") for rule in Record.rules
    }  # no letter of the word is `a`, no digit of the number is 1
    assert len(set(texts.values())) == 12
    for rule, said in product(Record.rules, texts.values()):
        assert task("record").check(f"{rule};rkq,47>", said) == (texts[rule] == said)
    assert task("record").check("rkq,47>", "[kq:47]")
    assert not task("record").check("rkq,47>", "[kq:47")


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_right_under_every_rule_and_context(name):
    one, rng = task(name), random.Random(1)
    for prompt in bare(name, 20):
        for rule in one.rules:
            ruled = one.with_rule(prompt, rule)
            answer = one.answer(ruled, rng)
            assert one.check(ruled, answer)
            assert one.check(one.with_rule(one.with_start(prompt, answer), rule), answer)
            assert not one.check(ruled, answer + "x") and not one.check(ruled, answer[:-1])
        assert one.check(prompt, one.answer(one.with_rule(prompt), rng)), "the default rule is what a bare prompt means"


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_goes_on_from_the_start_it_was_given(name):
    one, rng = task(name), random.Random(2)
    for prompt in bare(name, 20):
        answer = one.answer(prompt, rng)
        start = answer[: rng.randint(0, len(answer))]
        assert one.answer(one.with_start(prompt, start), rng).startswith(start)
        assert one.check(prompt, one.answer(one.with_start(prompt, "#"), rng)), (
            "a start that cannot be right is ignored"
        )


def test_a_group_answer_is_drawn_from_all_right_ones():
    rng = random.Random(0)
    assert len({Group("g").answer("g1a2bc>", rng) for _ in range(300)}) == 2 * 6


@pytest.mark.parametrize("name", NAMES)
def test_a_hint_is_the_longest_right_start_and_one_character_more(name):
    one, rng = task(name), random.Random(3)
    seen = 0
    for prompt in bare(name, 30):
        right = one.answer(prompt, rng)
        assert one.hint(prompt, right) is None
        at = rng.randrange(len(right))
        hint = one.hint(prompt, right[:at] + "#" + right[at + 1 :])
        assert hint is not None and hint[:at] == right[:at] and len(hint) == at + 1
        assert one.answer(one.with_start(prompt, hint), rng).startswith(hint), "a hint can be answered from"
        assert one.hint(prompt, right + "#") == right
        seen += hint != right[: at + 1]
    assert seen > 0 or name.split("-")[0] != "group", "where many answers are right, a hint shows its own"


@pytest.mark.parametrize(
    "prompt", ["qabc>", "sabc", "", "sideways;sabc>", "up;up;sabc>", "=a;=b;sabc>", "digits;sabc>"]
)
def test_a_prompt_that_is_none_of_the_tasks_is_refused(prompt):
    with pytest.raises(UsageError, match="task"):
        tasks.check(prompt, "abc")


def test_the_domain_is_told_by_the_marker():
    for name in NAMES:
        prompt = bare(name, 1)[0]
        assert tasks.task_of(task(name).with_rule(prompt)).domain == task(name).domain
        assert tasks.check(prompt, task(name).answer(prompt, random.Random(0)))


# ------------------------------------------------------------------------------------------------ habits


@pytest.mark.parametrize("name", ["sort", "record"])
def test_habits_are_as_often_right_as_they_say(name):
    one, rng = task(name), random.Random(4)
    drawn = bare(name, 2000)
    said = sum(one.habits(one.parse(p).body)[one.rules[0]] for p in drawn) / len(drawn)
    seen = sum(one.check(p, one.habit(p, rng)) for p in drawn) / len(drawn)
    assert 0.2 < said < 0.6
    assert abs(seen - said) < 0.045, "four standard errors"
    for prompt in drawn[:50]:
        assert sum(one.habits(one.parse(prompt).body).values()) == pytest.approx(1)
        text = one.habit(prompt, rng)
        assert any(one.check(one.with_rule(prompt, r), text) for r in one.rules)


def test_habits_give_way_to_a_rule():
    rng = random.Random(5)
    for prompt in bare("sort", 50):
        assert Sort("sort").check(f"down;{prompt}", Sort("sort").habit(f"down;{prompt}", rng))


# ------------------------------------------------------------------------------------------------ splits


@pytest.mark.parametrize("name", NAMES)
def test_splits_are_disjoint_distinct_and_repeatable(name):
    drawn = {split: [p.text for p in tasks.prompts(name, 150, 7, split)] for split in tasks.SPLITS}
    assert all(split_of(text) == split for split, texts in drawn.items() for text in texts)
    assert len({t for texts in drawn.values() for t in texts}) == 450
    for split, texts in drawn.items():
        assert [p.text for p in tasks.prompts(name, 40, 7, split)] == texts[:40]
        assert [p.text for p in tasks.prompts(name, 40, 8, split)] != texts[:40]


def test_prompts_carry_domain_and_a_right_answer():
    for prompt in world.prompts("world:group-new", 30, split="dev"):
        assert prompt.domain == "group"
        assert tasks.check(prompt.text, prompt.answer or "")


def test_names_that_are_wrong_are_refused_with_the_nearest():
    with pytest.raises(UsageError, match=r"'sort' is\."):
        task("sorts")
    with pytest.raises(UsageError, match="'valid' is not a split"):
        tasks.prompts("sort", 1, split="valid")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="world:teacher"):
        world.path("world:tutor")


def test_neither_tasks_nor_world_load_torch():
    code = (
        "import sys, opd.tasks, opd.world as w; w.prompts('sort', 3); print({'torch', 'transformers'} & {*sys.modules})"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "set()"


# ------------------------------------------------------------------------------------------------ tokenizers and models


@pytest.fixture(scope="module")
def speech():
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    from opd.world import speech

    return speech


@pytest.fixture(scope="module")
def loaded(speech):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return {
        name: (
            AutoModelForCausalLM.from_pretrained(world.path(name), local_files_only=True, dtype=torch.float32).eval(),
            AutoTokenizer.from_pretrained(world.path(name), local_files_only=True),
        )
        for name in world.MODELS
    }


def assets() -> Path:
    return world.path("teacher").parent


def texts() -> list[str]:
    rng, found = random.Random(6), [ALPHABET, ALPHABET[::-1]]
    for name in NAMES:
        for prompt in bare(name, 100):
            ruled = task(name).with_rule(prompt, rng.choice(task(name).rules))
            found += [prompt, ruled, task(name).with_start(prompt, found[-1]), task(name).answer(ruled, rng)]
    return found


def test_both_tokenizers_give_every_text_back(loaded):
    plain, merged = loaded["teacher"][1], loaded["student-merged"][1]
    assert plain.get_vocab() == loaded["student"][1].get_vocab() and len(plain) <= 64
    fewer = 0
    for text in texts():
        ids, pairs = plain(text)["input_ids"], merged(text)["input_ids"]
        assert plain.decode(ids) == merged.decode(pairs) == text
        assert len(ids) == len(text) and plain.unk_token_id not in ids
        fewer += len(pairs) < len(ids)
    assert fewer > 500, "pairs do merge"
    assert merged.tokenize("r47an1,123>") == ["r", "47", "an", "1", ",", "12", "3", ">"]
    assert plain.decode(plain("aéb")["input_ids"]) == "a<unk>b"


def test_models_are_ordinary_folders_with_an_end_and_a_pad(loaded):
    facts = json.loads((assets() / "world.json").read_text())
    for name, (model, tok) in loaded.items():
        assert tok.pad_token_id not in (None, tok.eos_token_id)
        assert model.generation_config.eos_token_id == model.config.eos_token_id == tok.eos_token_id
        assert model.config.vocab_size == len(tok) == facts["models"][name]["vocabulary"]
        assert sum(p.numel() for p in model.parameters()) == facts["models"][name]["parameters"]
    assert sum(f.stat().st_size for f in assets().rglob("*") if f.is_file()) < 3e6


@pytest.mark.parametrize("name", world.MODELS)
def test_models_answer_as_well_as_world_json_says(name, loaded, speech):
    facts = json.loads((assets() / "world.json").read_text())["models"][name]["accuracy"]
    own = [name.removeprefix("expert-")] if name in world.EXPERTS else DOMAINS
    for domain in own:
        asked = [p.text for p in tasks.prompts(domain, 80, split="test")]
        for how, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            promised = facts[domain][how]
            seen = speech.accuracy(*loaded[name], task(domain), asked, temperature)
            assert abs(seen - promised) < 4 * (promised * (1 - promised) / 80) ** 0.5 + 0.02, (domain, how, seen)
        low, high = (0.2, 0.6) if name in world.STUDENTS else (0.85, 1.0)
        assert low <= facts[domain]["sampled"] <= high
        assert name in world.STUDENTS or facts[domain]["greedy"] >= 0.9
    assert all(facts[domain]["greedy"] <= 0.1 for domain in DOMAINS if domain not in own)


# ------------------------------------------------------------------------------------------------ making it


def test_a_world_is_remade_from_its_seed(tmp_path, speech):
    import torch

    from opd.world import make

    first = make.make(3, tmp_path / "a", quick=True, only=["student-merged", "student"])
    make.make(3, tmp_path / "b", quick=True, only=["student"])
    a, b = (tmp_path / which / "student" / "model.safetensors" for which in "ab")
    assert a.read_bytes() == b.read_bytes()
    assert list(first["models"]) == ["student", "student-merged"]
    assert {plan.name for plan in make.PLANS} == set(world.MODELS)
    other, _ = make.train(make.PLANS[1], 4, 1)
    same, _ = make.train(make.PLANS[1], 3, 1)
    weights = [model.get_input_embeddings().weight for model in (other, same)]
    assert not torch.equal(*weights)


def test_no_lesson_shows_a_dev_or_test_prompt(speech):
    from opd.world import make

    for plan in make.PLANS:
        for prompt, answer in make.lessons(plan.shares, plan.habits, random.Random(0), 300):
            assert split_of(prompt.split(";")[-1]) == "train"
            assert "=" in prompt or plan.habits or tasks.check(prompt, answer)


def test_the_sampler_ends_rows_on_their_own(loaded, speech):
    model, tok = loaded["teacher"]
    asked = [*bare("sort", 6), *bare("record", 6)]
    together = speech.speak(model, tok, asked, 0.0)
    assert together == [speech.speak(model, tok, [p], 0.0)[0] for p in asked]
    assert speech.speak(model, tok, asked[:1], 0.0, max_tokens=2) == [None]
