"""Bits per byte against tables that can be read off, and a contest whose outcome is known."""

from dataclasses import replace
from math import log2

import pytest
import torch
from required import WORLD, needs_world
from tabled import GOOD, V, packed, random_table, rollout, sampled_logp
from transformers import LlamaConfig, LlamaForCausalLM

from opd.contest import contest
from opd.critic import beside
from opd.errors import UsageError
from opd.eval import bits_per_byte
from opd.loss import Objective
from opd.model import CausalModel, read_head
from opd.student import Optim
from opd.types import Message, Prompt

STOP = V - 1
STORIES = WORLD / "models" / "stories260K"


def text(number: int, ids: tuple[int, ...], said: str, finish: str = "stop"):
    """A row that speaks these ids and reads as `said`."""
    return replace(rollout(number, "data", (1,), [(i, float("nan")) for i in ids], finish=finish), text=said)


# --- bits per byte ----------------------------------------------------------------------------------------------------


def test_a_uniform_model_needs_the_logarithm_of_its_vocabulary_for_each_token():
    rows = [text(0, (0, 2, STOP), "abcd"), text(1, (3, STOP), "é")]
    assert bits_per_byte(random_table(None), rows, [STOP]) == pytest.approx(3 * log2(V) / (4 + 2))


def test_bits_are_those_of_the_text_without_its_stop_token():
    model = random_table(5)
    rows = [text(0, (0, 2, 4, STOP), "one"), text(1, (3, 1), "two", finish="length")]
    batch = packed(rows)
    logp = sampled_logp(model, batch)[batch.token_N != STOP]
    assert len(logp) == 5
    assert bits_per_byte(model, rows, [STOP]) == pytest.approx(-float(logp.sum()) / torch.log(torch.tensor(2.0)) / 6)


def test_no_text_has_no_bits_per_byte():
    assert bits_per_byte(random_table(5), [text(0, (STOP,), "")], [STOP]) != 0
    assert str(bits_per_byte(random_table(5), [], [STOP])) == "nan"


# --- the contest ------------------------------------------------------------------------------------------------------


def answers(kind, numbers, token, samples=2, finish="stop"):
    """`samples` answers of two tokens to each prompt; the first token says who spoke."""
    return [
        rollout(n, kind, (1,), [(token(n, k), 0.0), (k % 2, 0.0), (STOP, 0.0)], sample=k, finish=finish)
        for n in numbers
        for k in range(samples)
    ]


def critic(seed=0):
    """A small transformer that reads the rows."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    module = LlamaForCausalLM(LlamaConfig(vocab_size=V, max_position_embeddings=16, **shape)).eval()
    return beside(CausalModel(module, read_head(module), stop_ids=(STOP,)), Optim(lr=0.02), seed=seed)


def by_prompt(rows):
    return {n: [r for r in rows if r.prompt.id == n] for n in {r.prompt.id for r in rows}}


def fought(far, near, teacher, *, finish="stop", seed=0):
    """A contest in which `near` answers as the teacher does (GOOD) and `far` does not."""
    train, test = range(24), range(24, 40)
    each = lambda ask: {"far": answers("far", ask, far), "near": answers("near", ask, near, finish=finish)}
    good = lambda ask: by_prompt(answers("teacher", ask, teacher))
    objective = Objective("bradley_terry", good="teacher", bad="student")
    return contest(critic(seed), (each(train), good(train)), (each(test), good(test)), objective=objective, prompts=8)


def test_the_contestant_that_speaks_as_the_teacher_wins_half_and_the_other_nothing():
    found = fought(lambda n, k: 3, lambda n, k: GOOD, lambda n, k: GOOD)
    assert found.wins["near"].value == pytest.approx(0.5)
    assert found.wins["far"].value < 0.05 and found.wins["far"].high < 0.3
    assert found.duels["far", "near"].value < 0.05
    assert found.learned[-1] > found.learned[0]
    assert found.length_only == {"far": 0.5, "near": 0.5}


def test_answers_that_nothing_tells_apart_are_even():
    same = lambda n, k: (n + k) % 3
    found = fought(same, same, same)
    assert found.wins["far"] == found.wins["near"]
    assert found.duels["far", "near"].value == pytest.approx(0.5)


def test_a_truncated_answer_loses_without_being_read():
    found = fought(lambda n, k: 3, lambda n, k: GOOD, lambda n, k: GOOD, finish="length")
    assert found.wins["near"].value == 0.0
    assert found.duels["far", "near"].value == 1.0


def test_prompts_that_were_taught_are_not_judged():
    rows = {"a": answers("a", range(4), lambda n, k: 3)}
    good = by_prompt(answers("teacher", range(4), lambda n, k: GOOD))
    objective = Objective("bradley_terry", good="teacher", bad="student")
    with pytest.raises(UsageError, match="4 prompts are both taught and judged"):
        contest(critic(), (rows, good), (rows, good), objective=objective)
    fewer = {"a": answers("a", range(5, 7), lambda n, k: 3)}
    other = by_prompt(answers("teacher", range(5, 8), lambda n, k: GOOD))
    with pytest.raises(UsageError, match="did not answer the same prompts: 1"):
        contest(critic(), (rows, good), (fewer, other), objective=objective)


# --- real models ------------------------------------------------------------------------------------------------------


@needs_world
def test_real_text_costs_a_real_model_about_one_bit_a_byte_whatever_its_vocabulary():
    """And the character model, of another tokenizer, gives a number that can stand beside it."""
    from opd.assemble import load_tokenizer, with_vocab
    from opd.chat import renderer
    from opd.model import load

    story = "She loved to play outside in the park with her friends. One day, she saw a big red ball."
    prompt = Prompt((Message("user", "Once upon a time, there was a little girl named Lily."),))
    found = {}
    for name in ("stories260K", "babyllama105"):
        place = STORIES.parent / name
        tokenizer = load_tokenizer(str(place))
        model = with_vocab(load(place, frozen=True), len(tokenizer))
        voice = renderer(tokenizer, stop_ids=model.stop_ids)
        cost = lambda said, model=model, voice=voice: bits_per_byte(
            model, [voice.given(prompt, said, "data")], voice.stop_ids
        )
        found[name] = cost(story)
        assert cost(story[::-1]) > 3 * found[name]
        assert model.stop_ids == (1,) and voice.given(prompt, story, "data").tokens[-1] == 1
    assert all(0.2 < bits < 1.3 for bits in found.values()), found
