"""A score is a finite number for this prompt and answer, or an error that names it."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from required import WORLD, needs_world

from opd import rewards
from opd.errors import OpdError, UsageError
from opd.rewards import Reward, load, load_all, score
from opd.types import Message, Prompt, Rollout, Turn


def ask(text: str = "q", answer: str | None = None, domain: str = "") -> Prompt:
    return Prompt((Message("user", text),), answer=answer, domain=domain, where="a.jsonl:3")


def said(text: str, prompt: Prompt | None = None) -> Rollout:
    return Rollout(
        prompt or ask(), "student", (1, 2), (False, True), (math.nan, -1.0), (-1, 0), (Turn(1, 2, "stop"),), text
    )


# -- what is compared


def test_exact_match() -> None:
    loose, exact = load("exact_match"), load({"use": "exact_match", "args": {"normal": "exact"}})
    for text, is_loose, is_exact in (
        ("New York", 1, 1),
        (" New York\n", 1, 1),
        ("new  york.", 1, 0),
        ("York", 0, 0),
        ("New York!", 0, 0),
    ):
        assert (loose(ask(answer="New York"), text), exact(ask(answer="New York"), text)) == (is_loose, is_exact), text


def test_regex() -> None:
    last = load({"use": "regex", "args": {"pattern": r"#### (\S+)"}})
    first = load({"use": "regex", "args": {"pattern": r"#### (\S+)", "take": "first"}})
    text = "so #### 3\nno, #### 4"
    assert (last(ask(answer="4"), text), first(ask(answer="4"), text), first(ask(answer="3"), text)) == (1, 0, 1)
    assert last(ask(answer="4"), "4") == 0
    assert load({"use": "regex", "args": {"pattern": r"\d+"}})(ask(answer="12"), "it is 12 of them") == 1
    present = load({"use": "regex", "args": {"pattern": "(?i)sorry", "compare": "present"}})
    absent = load({"use": "regex", "args": {"pattern": "(?i)sorry", "compare": "absent"}})
    assert (present(ask(), "Sorry."), present(ask(), "ok"), absent(ask(), "Sorry."), absent(ask(), "ok")) == (
        1,
        0,
        0,
        1,
    )


def test_task_verifier() -> None:
    reward = load("task")
    assert reward(ask("sqcbxa>", domain="sort"), "abcqx") == 1 and reward(ask("sqcbxa>", domain="sort"), "qcbxa") == 0
    assert reward(ask("down;sqcbxa>", domain="mine"), "xqcba") == 1, "a domain is a label: the marker tells the task"
    with pytest.raises(UsageError, match="'qcbxa>' belongs to no task"):
        reward(ask("qcbxa>", domain="sort"), "abcqx")


# -- math


@pytest.fixture(scope="module")
def math_reward() -> Any:
    pytest.importorskip("math_verify")
    return load({"use": "math_verify", "args": {"seconds": 20}})


@pytest.mark.parametrize(
    ("truth", "text", "right"),
    [
        ("18", "16 - 3 - 4 = 9, and 9 * 2 = 18. The answer is 18.", 1),
        ("18", "#### 18", 1),
        ("18", "It is 19.", 0),
        ("18", "I do not know.", 0),
        ("0.5", r"so \boxed{\frac{1}{2}}", 1),
        (r"\frac{1}{2}", "$0.5$", 1),
        ("x^2+1", "$1 + x^2$", 1),
        ("$(1,2)$", "$(1, 2)$", 1),
        ("1,234", "1234", 1),
        ("18", "18</s>\n\u2028\x00 18", 1),
    ],
)
def test_math(math_reward: Reward, truth: str, text: str, right: int) -> None:
    assert math_reward(ask(answer=truth), text) == right


def test_math_needs_a_truth_that_is_one(math_reward: Reward) -> None:
    with pytest.raises(OpdError, match=r"prompt \w+ \(a\.jsonl:3\) 'q', '' is no mathematical"):
        math_reward(ask(answer=""), "18")


@pytest.fixture
def slow_verifier(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A worker that never replies to what says so, in place of an answer that happens to be hard for sympy."""
    from opd import verify_math

    worker = textwrap.dedent(
        """
        import json, sys, time
        print(json.dumps("ready"), flush=True)
        for line in sys.stdin:
            truth, text = json.loads(line)
            if text == "hang": time.sleep(600)
            if text == "die": sys.exit(1)
            if text == "half": print("tr", end="", flush=True); time.sleep(600)
            print(json.dumps(truth == text), flush=True)
        """
    )
    start = subprocess.Popen
    started: list[Any] = []

    def popen(command: list[str], **kwargs: Any) -> Any:
        assert command[1:3] == ["-m", "opd.verify_math"]
        started.append(start([sys.executable, "-c", worker], **kwargs))
        return started[-1]

    monkeypatch.setattr(verify_math.subprocess, "Popen", popen)
    return verify_math.MathVerifier(1.0), started


@pytest.mark.parametrize("trouble", ["hang", "die", "half"])
def test_a_worker_that_does_not_reply_is_killed_counted_and_replaced(slow_verifier: Any, trouble: str) -> None:
    verifier, started = slow_verifier
    assert verifier.right("4", "4") is True and len(started) == 1
    before = time.monotonic()
    assert verifier.right("4", trouble) is None
    assert time.monotonic() - before < 10
    assert verifier.timeouts == 1 and started[0].poll() is not None
    assert verifier.right("4", "4") is True and verifier.right("4", "5") is False
    assert len(started) == 2 and verifier.timeouts == 1
    verifier.close()
    assert started[1].poll() is not None


def test_a_real_worker_is_killed_at_the_limit() -> None:
    pytest.importorskip("math_verify")
    from opd.verify_math import MathVerifier

    verifier = MathVerifier(2.0)
    assert verifier.right("1/2", "$0.5$") is True  # starts it
    before = time.monotonic()
    assert verifier.right("5", "$9^{9^{9}}$") is None and verifier.timeouts == 1
    assert 1.9 < time.monotonic() - before < 10
    assert verifier.right("1/2", "$0.5$") is True and verifier.timeouts == 1
    verifier.close()


def test_timed_out_answers_have_no_score_or_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("math_verify")
    monkeypatch.setattr(
        "opd.verify_math.MathVerifier.right", lambda self, truth, text: None if text == "slow" else True
    )
    rows = [said("slow", ask(answer="1")), said("1", ask(answer="1"))]
    masked = score(load_all(["math_verify", "exact_match"]), rows)
    assert masked[0].reward is None and dict(masked[0].rewards) == {"exact_match": 0.0}
    assert masked[1].reward == 2.0
    wrong = score([load({"use": "math_verify", "args": {"on_timeout": "wrong"}})], rows)
    assert [r.reward for r in wrong] == [0.0, 1.0]


# -- sums and missing scores


def test_weighted_sum() -> None:
    specs = [
        {"use": "exact_match", "weight": 2.0},
        {"use": "regex", "args": {"pattern": "x", "compare": "present"}, "weight": -0.5},
        {"use": "regex", "args": {"pattern": "y", "compare": "present"}},
    ]
    rows = [said("xy", ask(answer="xy")), said("x", ask(answer="xy"))]
    scored = score(load_all(specs), rows)
    assert dict(scored[0].rewards) == {"exact_match": 1, "regex": 1, "regex-2": 1} and scored[0].reward == 2.5
    assert scored[1].reward == -0.5 and scored[1].tokens == rows[1].tokens
    assert rows[0].reward is None and score(load_all(specs), []) == []


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, "1", [1, 2]])
def test_a_missing_score_is_an_error_that_names_the_prompt(bad: Any) -> None:
    reward = Reward("mine", lambda said: [bad for _ in said])
    with pytest.raises(
        OpdError, match=rf"mine gave .* {ask().id} \(a\.jsonl:3\) 'q': every answer needs a finite number"
    ):
        score([reward], [said("x")])


def test_scores_are_one_for_each_answer() -> None:
    with pytest.raises(OpdError, match="gave 1 scores for 2 answers"):
        score([Reward("mine", lambda said: [1.0])], [said("x"), said("y")])
    with pytest.raises(OpdError, match=r"exact_match compares .* prompt \w+ .* has none"):
        load("exact_match")(ask(), "x")
    assert score([Reward("mine", lambda said: [True])], [said("x")])[0].reward == 1.0


# -- a user's own


def mine(folder: Path, body: str) -> None:
    (folder / "mine.py").write_text(textwrap.dedent(body))


def test_a_users_function(tmp_path: Path) -> None:
    mine(tmp_path, "def brevity(prompt, text, scale=1.0):\n    return -scale * len(text) + len(prompt.messages)\n")
    reward = load({"use": "./mine.py:brevity", "args": {"scale": 2.0}, "weight": 3}, tmp_path)
    assert (reward.name, reward.weight, reward(ask(), "abc")) == ("brevity", 3.0, -5.0)


def test_a_users_failure_has_prompt_and_place(tmp_path: Path) -> None:
    mine(
        tmp_path,
        """
        import json

        def brevity(prompt, text):
            return helper(text)

        def helper(text):
            return json.loads(text)["n"]
        """,
    )
    with pytest.raises(
        OpdError, match=r"brevity failed on .*a\.jsonl:3.*JSONDecodeError.*mine\.py:8; the answer was '\{x'"
    ):
        score([load("./mine.py:brevity", tmp_path)], [said("{x")])


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("def other(p, t): return 1", "no function `brevity`"),
        ("def brevity(p): return 1", "cannot be called as a reward"),
        ("def brevity(p, t, u): return 1", "missing a required argument: 'u'"),
        ("def brevity(p, t:\n    return 1", r"SyntaxError.*mine\.py:1"),
        ("x = 1\ny = x / 0\ndef brevity(p, t): return 1", r"ZeroDivisionError.*mine\.py:2"),
    ],
)
def test_a_users_file_is_checked_first(tmp_path: Path, body: str, why: str) -> None:
    mine(tmp_path, body)
    with pytest.raises(UsageError, match=why):
        load("./mine.py:brevity", tmp_path)


def test_what_cannot_be_loaded() -> None:
    for spec, why in (
        ("exact_mach", "did you mean exact_match"),
        ("./none.py:f", "no file"),
        ({"use": "regex"}, "missing a required argument: 'pattern'; it takes pattern, compare"),
        ({"use": "regex", "args": {"pattern": "("}}, "cannot be read"),
        ({"use": "regex", "args": {"pattern": "a", "compare": "gone"}}, "gone"),
        ({"use": "exact_match", "args": {"normal": "soft"}}, "soft"),
        ({"use": "math_verify", "args": {"seconds": 0}}, "seconds"),
    ):
        with pytest.raises(UsageError, match=why):
            load(spec)  # type: ignore[arg-type]


# -- reward models


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    import torch
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

    vocab = {token: k for k, token in enumerate(["<pad>", "<end>", "<unk>", *map(chr, range(32, 127))])}
    backend = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<end>",
        unk_token="<unk>",
        pad_token="<pad>",
        chat_template="{% for m in messages %}{{ m.role }}:{{ m.content }}<end>!{% endfor %}",
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        num_labels=1,
        pad_token_id=0,
    )
    model = LlamaForSequenceClassification(config)
    torch.nn.init.normal_(model.score.weight)
    folder = tmp_path_factory.mktemp("rm")
    model.save_pretrained(folder / "good")
    model.model.save_pretrained(folder / "headless")
    for name in ("good", "headless"):
        tokenizer.save_pretrained(folder / name)
    return folder, model.eval(), tokenizer


def test_a_reward_model_scores_the_conversation(tiny_model: Any) -> None:
    import torch

    folder, model, tokenizer = tiny_model
    answers = ["yes", "no, for a reason", "", "perhaps so", "yes"]
    found = score(
        [load({"use": "reward_model", "args": {"model": str(folder / "good"), "batch": 2}})], [said(t) for t in answers]
    )
    for text, rollout in zip(answers, found, strict=True):
        chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]
        ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=False)
        with torch.no_grad():
            alone = model(input_ids=ids).logits.item()
        assert rollout.reward == pytest.approx(alone, abs=1e-5), text
    assert len({r.reward for r in found}) == 4 and found[0].reward == found[4].reward


def test_reward_models_that_cannot_score(tiny_model: Any, tmp_path: Path) -> None:
    folder, model, tokenizer = tiny_model
    with pytest.raises(UsageError, match=r"no weights for score\.weight: its scores would be random"):
        load({"use": "reward_model", "args": {"model": str(folder / "headless")}})(ask(), "x")
    with pytest.raises(OpdError, match=r"prompt \w+ a\.jsonl:3 and its answer are \d+ tokens and .* reads 64"):
        load({"use": "reward_model", "args": {"model": str(folder / "good")}})(ask(), "x" * 70)
    with pytest.raises(UsageError, match="cannot be loaded"):
        load({"use": "reward_model", "args": {"model": str(tmp_path / "none")}})(ask(), "x")
    model.config.num_labels = 2
    two = type(model)(model.config)
    two.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model.config.num_labels = 1
    with pytest.raises(UsageError, match="has 2 outputs"):
        load({"use": "reward_model", "args": {"model": str(tmp_path)}})(ask(), "x")


# -- import cost and real tasks


def test_loading_rewards_imports_no_model_library() -> None:
    code = (
        "import sys; from opd import rewards, data, mixture, metrics, chat\n"
        "rewards.load_all(['exact_match', 'math_verify', 'task', {'use': 'reward_model', 'args': {'model': 'x'}}])\n"
        "data.read('world:sort:3')\n"
        "assert not {'torch', 'transformers', 'datasets', 'sympy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_world
def test_real_answers_are_right(math_reward: Reward) -> None:
    from opd.data import read

    tasks = read(WORLD / "tasks" / "gsm8k_test.jsonl")[:40]
    assert all(math_reward(p, p.responses[0]) == 1 for p in tasks)
    marked = load({"use": "regex", "args": {"pattern": r"#### (\S+)"}})
    assert all(marked(p, p.responses[0]) == 1 for p in tasks)
    assert rewards.score([math_reward], [said(tasks[0].responses[0], tasks[1])])[0].reward == 0.0
