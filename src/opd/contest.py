"""A fresh critic on held-out prompts: how far models' answers can be told from the teacher's, and who stands nearer.

The critic that taught a student is no judge of it: the student has learned to please that one. Here a new one, which
no student has met, learns from all contestants' answers to some prompts and judges their answers to others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from random import Random
from statistics import fmean

from opd.critic import Critic, pair_up
from opd.errors import UsageError
from opd.loss import Objective
from opd.metrics import Interval, length_only_accuracy, paired_difference
from opd.types import Rollout

Answers = Mapping[str, Sequence[Rollout]]  # of the teacher, by prompt id
Said = Mapping[str, Sequence[Rollout]]  # of every contestant, by its name
LOST = float("-inf")


@dataclass(frozen=True)
class Contest:
    """What the critic found on the held-out prompts. Intervals are 95 % bootstraps over prompts."""

    wins: Mapping[str, Interval]  # how often it takes a model's answer for the better of it and the teacher's
    duels: Mapping[tuple[str, str], Interval]  # how often it ranks the first model's answer above the second's
    length_only: Mapping[str, float]  # how often length alone finds the teacher's answer
    learned: tuple[float, ...]  # its accuracy over each pass of its own training, on pairs it had not yet learned from


def contest(
    critic: Critic,
    teach: tuple[Said, Answers],
    judge: tuple[Said, Answers],
    *,
    objective: Objective,
    passes: int = 3,
    prompts: int = 32,
    seed: int = 0,
) -> Contest:
    """Train the critic on the answers in `teach`, then let it rank those in `judge`.

    Rollouts come canonical (`Renderer.canonical`). A truncated answer is not shown to the critic: it loses against any
    other; the win of a sample is its mean over the teacher's answers to the prompt, ties counting a half.
    Raises `UsageError` where the two sets share a prompt, or a held-out prompt lacks the teacher's or a model's answer.
    """
    _refuse(teach, judge)
    learned = tuple(_passes(critic, *teach, objective, passes, prompts, seed))
    said, good = judge
    score = _scores(critic, [r for each in (*said.values(), *good.values()) for r in each])
    by_prompt = {name: _by_prompt(rollouts) for name, rollouts in said.items()}
    wins = {name: _interval([_ranked(score, own[i], good[i]) for i in sorted(good)]) for name, own in by_prompt.items()}
    duels = {
        (a, b): _interval([_ranked(score, by_prompt[a][i], by_prompt[b][i]) for i in sorted(good)])
        for a, b in combinations(by_prompt, 2)
    }
    return Contest(wins, duels, {name: _by_length(rollouts, good) for name, rollouts in said.items()}, learned)


def _refuse(teach: tuple[Said, Answers], judge: tuple[Said, Answers]) -> None:
    asked = {r.prompt.id for rollouts in judge[0].values() for r in rollouts}
    if shared := asked & {r.prompt.id for rollouts in teach[0].values() for r in rollouts}:
        raise UsageError(f"{len(shared)} prompts are both taught and judged: the critic would know their answers")
    for name, rollouts in judge[0].items():
        if missing := set(judge[1]) ^ {r.prompt.id for r in rollouts}:
            raise UsageError(f"{name} and the teacher did not answer the same prompts: {len(missing)} have one answer")


def _passes(
    critic: Critic, said: Said, good: Answers, objective: Objective, passes: int, prompts: int, seed: int
) -> Iterator[float]:
    by_prompt = _by_prompt([r for rollouts in said.values() for r in rollouts])
    for number in range(passes):
        order = sorted(by_prompt)
        Random(f"{seed} {number}").shuffle(order)
        found = []
        for at in range(0, len(order), prompts):
            bad = [r for i in order[at : at + prompts] for r in by_prompt[i]]
            pairs = pair_up(dict(good), bad)
            if pairs.count:
                found.append(critic.update(pairs, objective, critic.optim.lr)["critic/accuracy"])
        yield fmean(found) if found else 0.5


def _by_prompt(rollouts: Sequence[Rollout]) -> dict[str, list[Rollout]]:
    found: dict[str, list[Rollout]] = {}
    for r in rollouts:
        found.setdefault(r.prompt.id, []).append(r)
    return found


def _scores(critic: Critic, rollouts: Sequence[Rollout]) -> Mapping[tuple[int, ...], float]:
    rows = list(dict.fromkeys(r.tokens for r in rollouts if r.finish != "length"))
    return dict(zip(rows, critic.score(rows).tolist(), strict=True)) if rows else {}


def _ranked(score: Mapping[tuple[int, ...], float], ours: Sequence[Rollout], theirs: Sequence[Rollout]) -> float:
    own, other = ([LOST if r.finish == "length" else score[r.tokens] for r in side] for side in (ours, theirs))
    return fmean((a > b) + 0.5 * (a == b) for a in own for b in other)


def _interval(shares: Sequence[float]) -> Interval:
    return paired_difference([0.0] * len(shares), shares)


def _by_length(rollouts: Sequence[Rollout], good: Answers) -> float:
    return length_only_accuracy([good[r.prompt.id][0].spoken for r in rollouts], [r.spoken for r in rollouts])
