"""What the student can do now: the same prompts and the same noise every time, so that evaluations can be paired."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import log

from opd import metrics
from opd import rewards as scoring
from opd.batch import pack
from opd.critic import Critics
from opd.engines.base import Sampling
from opd.head import token_logp
from opd.model import CausalModel
from opd.rewards import Reward
from opd.teachers import Teachers, speak_with
from opd.types import Prompt, Rollout

LOWER_IS_BETTER = ("eval/bits_per_byte", "eval/repetition", "eval/truncated_share")
EVAL_STEP = 2**31  # the noise of evaluations: no training step has this number


@dataclass(frozen=True)
class Answers:
    """What was said to the evaluation prompts in one manner (greedy or sampled), graded where there is a reward."""

    rollouts: tuple[Rollout, ...]
    right: tuple[bool, ...] | None  # whether each earned its full reward


def answer(
    model: CausalModel,
    teachers: Teachers,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    samples: int,
    rewards: Sequence[Reward],
    seed: int,
    rows: int,
) -> Answers:
    """Let a model speak to every prompt `samples` times and grade it."""
    renderer = teachers.renderer
    said = speak_with(model, renderer, prompts, samples, sampling, seed, EVAL_STEP, rows)
    rollouts = [
        renderer.spoken(p, renderer.prompt_ids(p), s.tokens, s.logp, s.finish, "student", k, 0)
        for p, each in zip(prompts, said, strict=True)
        for k, s in enumerate(each)
    ]
    if not rewards:
        return Answers(tuple(rollouts), None)
    graded = scoring.score(rewards, rollouts)
    full = sum(max(r.weight, 0.0) for r in rewards)
    right = tuple(r.finish != "length" and r.reward is not None and r.reward >= full - 1e-9 for r in graded)
    return Answers(tuple(graded), right)


def evaluate(
    model: CausalModel,
    teachers: Teachers,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    rewards: Sequence[Reward] = (),
    critic: Critics | None = None,
    text_role: str | None = None,
    greedy: bool = True,
    sampled: bool = True,
    samples: int = 1,
    seed: int = 0,
    rows: int = 256,
) -> dict[str, float]:
    """`eval/...` numbers over the prompts.

    With rewards: accuracy (share that earns the full reward and ended by itself), greedy and sampled, with its Wilson
    interval and by domain, and pass@k where there are several samples. With teacher text (of `text_role`, or recorded
    with the prompts): bits per byte of it, n-gram F1 and length ratio of the student's answers to it, and how often the
    critic tells them apart. Always: distinct-n, repetition, lengths and truncation. `eval/dev_score` is the mean of the
    greedy and sampled accuracies that were measured, or the n-gram F1 where nothing grades.
    """
    out: dict[str, float] = {"eval/prompts": float(len(prompts))}
    manners: dict[str, Answers] = {}
    ask = partial(answer, model, teachers, prompts, rewards=rewards, seed=seed, rows=rows)
    if greedy:
        manners["accuracy"] = ask(replace(sampling, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0), samples=1)
    if sampled or not greedy:
        manners["accuracy_sampled"] = ask(sampling, samples=samples)
    for name, said in manners.items():
        if said.right is not None:
            out |= _accuracy(name, said, len(prompts))
    for said in manners.values():
        out |= _texts(said.rollouts)
    last = list(manners.values())[-1]
    texts = _known(teachers, text_role, prompts, sampling)
    if any(texts.values()):
        out |= _against(last.rollouts, texts)
        out["eval/bits_per_byte"] = bits_per_byte(
            model, [t for p in prompts for t in texts[p.id]], teachers.renderer.stop_ids
        )
        if critic is not None and critic.steps and text_role:
            pairs = teachers.pairs(last.rollouts, text_role)
            ranks = critic.ranks(critic.score(pairs.rows), pairs) if pairs.count else {}
            if ranks:
                out["critic/heldout_accuracy"] = ranks["critic/accuracy"]
                out["critic/heldout_margin"] = ranks["critic/margin"]
            if last.right is not None:
                out |= right_over_wrong(critic, teachers, last)
    accuracies = [out[f"eval/{name}"] for name in manners if f"eval/{name}" in out]
    if accuracies:
        out["eval/dev_score"] = sum(accuracies) / len(accuracies)
    elif "eval/ngram_f1" in out:
        out["eval/dev_score"] = out["eval/ngram_f1"]
    return out


def right_over_wrong(critic: Critics, teachers: Teachers, said: Answers) -> dict[str, float]:
    """How often the critic ranks a right answer above a wrong one to the same prompt; ties count a half.

    For a person to look at, where there is a verifier and there are several samples a prompt, over all and by domain:
    near 0.5 the critic does not see what is wrong; high beside a falling accuracy, it sees that and the student pleases
    it in another way.
    """
    assert said.right is not None
    ended = [(r, right) for r, right in zip(said.rollouts, said.right, strict=True) if r.finish != "length"]
    if not ended:
        return {}
    score = critic.score([teachers.renderer.canonical(r).tokens for r, _ in ended]).tolist()
    sides: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
    for (rollout, right), value in zip(ended, score, strict=True):
        sides.setdefault((rollout.prompt.domain, rollout.prompt.id), ([], []))[right].append(value)
    won: dict[str, list[float]] = {}
    for (domain, _), (wrong, rights) in sides.items():
        won.setdefault(domain, []).extend((r > w) + 0.5 * (r == w) for r in rights for w in wrong)
    shares = {d: sum(x) / len(x) for d, x in won.items() if x}
    every = [x for each in won.values() for x in each]
    name = "heldout_right_over_wrong"
    out = {f"critic/{name}": sum(every) / len(every)} if every else {}
    return out | ({f"critic/{d or 'other'}/{name}": x for d, x in sorted(shares.items())} if len(won) > 1 else {})


def bits_per_byte(model: CausalModel, rollouts: Sequence[Rollout], stop_ids: Sequence[int]) -> float:
    """Bits a model needs for texts, given their prompts, over the texts' UTF-8 bytes: comparable across tokenizers.

    The stop token is left out, on both sides: what is measured is the text, not how well its end is foreseen. So are
    the bytes of outer whitespace. A truncated text counts as far as it goes. `nan` where there is no byte.
    """
    spoken = [r for r in rollouts if r.text]
    if not spoken:
        return float("nan")
    batch = pack(spoken, temperature=1.0, device=model.device)
    with model.autocast():
        logp_N = token_logp(model.head, model.all_hidden(batch), batch.token_N, 1.0)
    nats = -sum(x for t, x in zip(batch.token_N.tolist(), logp_N.tolist(), strict=True) if t not in stop_ids)
    return float(nats) / log(2) / sum(len(r.text.encode()) for r in spoken)


def _known(
    teachers: Teachers, role: str | None, prompts: Sequence[Prompt], sampling: Sampling
) -> Mapping[str, Sequence[Rollout]]:
    """The teacher's text to each prompt: what the role says, or what is recorded with the prompt."""
    said = teachers.texts(role, prompts) if role else {}
    given, limit = teachers.renderer.given, sampling.max_tokens
    return {
        p.id: said.get(p.id) or [given(p, text, "data", k, max_tokens=limit) for k, text in enumerate(p.responses)]
        for p in prompts
    }


def _accuracy(name: str, said: Answers, prompts: int) -> dict[str, float]:
    assert said.right is not None
    share = metrics.accuracy(said.right)
    out = {f"eval/{name}": share.value, f"eval/{name}_low": share.low, f"eval/{name}_high": share.high}
    domains: dict[str, list[bool]] = {}
    by_prompt: dict[str, list[bool]] = {}
    for rollout, right in zip(said.rollouts, said.right, strict=True):
        domains.setdefault(rollout.prompt.domain, []).append(right)
        by_prompt.setdefault(rollout.prompt.id, []).append(right)
    if len(domains) > 1:
        for domain, rights in sorted(domains.items()):
            out[f"eval/{domain or 'other'}/{name}"] = sum(rights) / len(rights)
    k = min(len(v) for v in by_prompt.values())
    if k > 1:
        out[f"eval/pass_at_{k}"] = sum(metrics.pass_at_k(len(v), sum(v), k) for v in by_prompt.values()) / len(
            by_prompt
        )
    return out


def _texts(rollouts: Sequence[Rollout]) -> dict[str, float]:
    texts = [r.text for r in rollouts]
    out = {
        "eval/length_tokens": sum(r.spoken for r in rollouts) / max(1, len(rollouts)),
        "eval/truncated_share": sum(r.finish == "length" for r in rollouts) / max(1, len(rollouts)),
        "eval/distinct_1": metrics.distinct(texts, 1),
        "eval/distinct_2": metrics.distinct(texts, 2),
        "eval/repetition": sum(map(metrics.repetition, texts)) / max(1, len(texts)),
    }
    return {k: v for k, v in out.items() if v == v}  # no pairs of words, no share of distinct ones


def _against(rollouts: Sequence[Rollout], texts: Mapping[str, Sequence[Rollout]]) -> dict[str, float]:
    known = [r for r in rollouts if texts.get(r.prompt.id)]
    if not known:
        return {}
    f1 = [max(metrics.overlap(r.text, t.text) for t in texts[r.prompt.id]) for r in known]
    return {
        "eval/ngram_f1": sum(f1) / len(f1),
        "eval/length_ratio": metrics.length_ratio(
            [r.spoken for r in known], [texts[r.prompt.id][0].spoken for r in known]
        ),
    }
