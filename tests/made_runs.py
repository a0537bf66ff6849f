"""Synthetic run folders for the tests of report and samples: plausible curves, hostile text, and nothing trained."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

from opd.log import RunFolder

HOSTILE = (
    "</script><img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>",
    "<svg onload=alert(1)> & \"quotes\" 'single' <!-- {{ 7*7 }} {% raw %}",
    "\x1b[31mred\x1b[0m \x07 \u202egnp.exe\u2066 \x00 end",
    "]]> \u2028 \u2029 \\ javascript:alert(1) \ud800",
)
PROMPTS = (
    ("chat", "Explain to a ten year old why the sky is blue, in two sentences."),
    ("chat", "Write a polite reply to a customer whose parcel arrived broken."),
    ("math", "A shop sells pens at 3 for 2 euros. What do 12 pens cost? End with the number."),
    ("math", "What is the remainder of 1234 divided by 7?"),
    ("sort", "Sort these words by length: pear, fig, banana, kiwi"),
    ("sort", "Sort: 9 3 7 1 8"),
)
SAID = "Sunlight is a mix of all colours. Air bounces blue light around more than red, so blue comes from everywhere. "


def good_run(
    parent: Path, name: str = "gad-2026-11-22-01", *, steps: int = 300, seed: int = 1, lift: float = 0.22
) -> Path:
    """A finished two-stage GAD run that went well; `lift` is what it gains in accuracy."""
    dice = random.Random(seed)
    with RunFolder.create(parent, name) as run:
        _documents(run, steps, lift)
        for step in range(steps + 1):
            _step(run, dice, step, steps, lift)
        _events(run, steps)
    return parent / name


def hostile_run(parent: Path, name: str = "hostile") -> Path:
    """A run in which every text that somebody else could choose tries to become code."""
    bad = HOSTILE[0]
    with RunFolder.create(parent, name) as run:
        run.write_json(
            "plan.json",
            {
                "method": bad, "objective_words": bad, "equation": HOSTILE[1], "speaks": bad, "student": bad,
                "teachers": {bad: {"model": bad}}, "needs": {bad: bad}, "reads": [bad],
                "stages": [{"name": bad, "method": bad, "steps": 3, "equation": bad, "words": bad},
                           {"name": HOSTILE[1], "method": "b", "steps": 3, "equation": bad, "words": bad}],
            },
        )  # fmt: skip
        run.write_text("recipe.yaml", 'student: {model: "</script><img src=x onerror=alert(1)>"}\n')
        run.write_json("origins.json", {"student.model": bad})
        run.write_json("lock.json", {"packages": {bad: bad}})
        run.write_json("summary.json", {"status": bad, "reason": bad, "before": {f"eval/{bad}": 0.5}})
        for step in range(6):
            stage = bad if step < 3 else HOSTILE[1]
            run.metrics({"step": step, "stage": stage, "loss/total": 0.1 * step, f"loss/{bad}": 1.0, bad: 2.0})
            run.metrics({"step": step, "event": "eval", f"eval/{bad}/accuracy": 0.5, f"eval/{bad}": 0.2})
            for sample, text in enumerate(HOSTILE):
                run.sample(
                    {"step": step, "stage": bad, "prompt_id": f"{bad}{sample}", "prompt": text, "domain": bad,
                     "sample": sample, "speaker": bad, "text": text, "finish": bad, "tokens": 3, "reward": 0.5,
                     "score": 0.1, "teacher_text": text, "teacher_score": 0.2,
                     "kl_per_token": [0.1, 3.0], "pieces": [text, bad]}
                )  # fmt: skip
        run.event(3, "warning", bad, bad)
        run.event(4, "best", bad)
    return parent / name


def bare_run(parent: Path, name: str = "bare") -> Path:
    """A run killed in its first step: a plan, one torn line and no more."""
    with RunFolder.create(parent, name) as run:
        run.write_json("plan.json", {"method": "gkd"})
    (parent / name / "metrics.jsonl").write_bytes(b'{"step":1,"loss')
    return parent / name


def curved_run(parent: Path, name: str, steps: int, *evals: float, reason: str = "", **curves: Any) -> Path:
    """A run with the given curves, each (first value, last value) or a number, "kl__reverse_nats" for kl/reverse_nats,
    in a straight line with a little noise; and evaluations of the accuracy (+- 0.04) spread over its steps."""
    dice = random.Random(name)
    with RunFolder.create(parent, name) as run:
        for step in range(1, steps + 1):
            line: dict[str, Any] = {"step": step, "stage": "one"}
            for key, ends in curves.items():
                first, last = ends if isinstance(ends, tuple) else (ends, ends)
                value = first + (last - first) * (step - 1) / max(1, steps - 1)
                line[key.replace("__", "/")] = value * (1 + dice.gauss(0, 0.01))
            run.metrics(line)
        for index, value in enumerate(evals):
            at = round(steps * index / max(1, len(evals) - 1))
            edges = {"eval/accuracy_low": value - 0.04, "eval/accuracy_high": value + 0.04}
            run.metrics({"step": at, "stage": "one", "event": "eval", "eval/accuracy": value, **edges})
        if reason:
            run.write_json("summary.json", {"status": "stopped", "reason": reason, "step": steps})
    return parent / name


def _documents(run: RunFolder, steps: int, lift: float) -> None:
    run.write_json(
        "plan.json",
        {
            "method": "gad",
            "objective_words": "Reward the student's own answers by how much a critic takes them for the teacher's, "
            "stay close to the start of the stage, and teach the critic to tell the two apart.",
            "equation": "max_θ  E[ A(D(y)) · log π_θ(y) ] − 0.001 · KL(π_θ ‖ π_ref)\n"
            "min_φ  −E[ log σ(D_φ(y_T) − D_φ(y_S)) ]",
            "speaks": "both: the student samples, the teacher's recorded answers are the critic's good examples",
            "student": "Qwen/Qwen2.5-0.5B-Instruct (lora 16)",
            "teachers": {"teacher": "answers in gpt5.jsonl (9987 prompts)"},
            "stages": [
                {"name": "warm-up", "method": "seqkd", "steps": steps // 5, "equation": "−E_T[ log π_θ(y_T) ]",
                 "words": "Imitate the teacher's text."},
                {"name": "gad", "method": "gad", "steps": steps - steps // 5,
                 "equation": "E[ A(D(y)) · log π_θ(y) ] − 0.001 · KL(π_θ ‖ π_ref)",
                 "words": "Please the critic with own samples."},
            ],
            "needs": {"teacher": "TEXT", "critic": "SCORE", "reference": "TOKEN"},
            "reads": ["The critic reads the prompt and the answer, rendered as the student's chat template does."],
        },
    )  # fmt: skip
    run.write_text(
        "recipe.yaml",
        "student: {model: Qwen/Qwen2.5-0.5B-Instruct, lora: 16}\nteachers: {teacher: {answers: gpt5.jsonl}}\n"
        f"train: {{lr: {lift * 1e-5:.1e}, prompts: 64, updates: 1}}\nspeak: {{engine: local, temperature: 0.8}}\n"
        "eval: {every: 50, metric: dev_score}\nrun: {seed: 17, save_every: 50}\n",
    )
    run.write_json(
        "origins.json",
        {"student.model": "gad.yaml:2", "student.lora": "gad.yaml:2", "teachers.teacher.answers": "gad.yaml:3",
         "train.lr": "override train.lr=2e-6", "train.prompts": "gad.yaml:7", "train.updates": "default",
         "speak.engine": "default", "speak.temperature": "gad.yaml:9", "eval.every": "gad.yaml:11",
         "eval.metric": "default", "run.seed": "default", "run.save_every": "default"},
    )  # fmt: skip
    run.write_json(
        "lock.json",
        {"seed": 17, "threads": 2, "device": "cpu", "python": "3.11.7", "packages": {"opd": "0.1.0", "torch": "2.13.0"},
         "models": {"student": {"path": "m", "sha256": "9f" * 32}}, "data": {"a.jsonl": "ab" * 32}},
    )  # fmt: skip
    after = 0.41 + lift
    run.write_json(
        "summary.json",
        {"status": "finished", "reason": "", "step": steps, "seconds": 5021.7, "flops": 3.4e15 * (1 + lift),
         "before": {"eval/accuracy": 0.41, "eval/accuracy_low": 0.37, "eval/accuracy_high": 0.45},
         "after": {"eval/accuracy": after, "eval/accuracy_low": after - 0.04, "eval/accuracy_high": after + 0.04},
         "best": {"step": steps - 50, "value": after + 0.01},
         "tokens": {"generated": 12_345_678, "trained": 9_876_543}},
    )  # fmt: skip


def _step(run: RunFolder, dice: random.Random, step: int, steps: int, lift: float) -> None:
    done = step / steps
    noise = lambda scale: dice.gauss(0, scale)
    if step % 25 == 0:
        accuracy = 0.41 + lift * (1 - math.exp(-4 * done)) + noise(0.008)
        line: dict[str, Any] = {"step": step, "stage": "gad", "event": "eval", "eval/prompts": 500,
                                "eval/accuracy_sampled": accuracy - 0.03, "eval/length_tokens": 80 + 20 * done,
                                "critic/heldout_accuracy": 0.7 + noise(0.02)}  # fmt: skip
        line |= {"eval/accuracy": accuracy, "eval/accuracy_low": accuracy - 0.04, "eval/accuracy_high": accuracy + 0.04}
        line |= {
            f"eval/{d}/accuracy": accuracy + shift for d, shift in (("chat", 0.1), ("math", -0.12), ("sort", 0.02))
        }
        run.metrics(line)
        _samples(run, dice, step, done)
    if step == 0:
        return
    length = 80 + 20 * done + noise(3)
    spike = 8.0 if step in (120, 121) else 1.0
    run.metrics(
        {"step": step, "stage": "warm-up" if step <= steps // 5 else "gad",
         "loss/total": 1.2 * math.exp(-3 * done) + 0.3 + noise(0.05),
         "loss/push": 0.9 * math.exp(-3 * done) + noise(0.04),
         "loss/critic": 0.6 + noise(0.03), "grad/norm": spike * (0.5 + abs(noise(0.1))),
         "kl/reverse_nats": 0.5 * math.exp(-2 * done) + abs(noise(0.02)),
         "kl/reference_nats": 0.2 * done + abs(noise(0.01)),
         "entropy/student_nats": 0.9 - 0.25 * done + noise(0.02), "entropy/teacher_nats": 0.6 + noise(0.02),
         "kl/forward_nats": 0.6 * math.exp(-2 * done) + abs(noise(0.02)), "entropy/gap_nats": 0.3 - 0.1 * done,
         "overlap/ratio": 0.72 + 0.19 * done + noise(0.01), "overlap/advantage_nats": -0.05 * math.exp(-2 * done),
         "overlap/student_mass": 0.95 + 0.03 * done, "overlap/teacher_mass": 0.93 + 0.05 * done,
         "ratio/mean": 1 + noise(0.01), "ratio/clipped_share": abs(noise(0.01)),
         "clip/positive_stopped_share": 0.03 + abs(noise(0.01)), "clip/negative_stopped_share": abs(noise(0.01)),
         "clip/above_share": 0.02 + abs(noise(0.01)), "clip/below_share": abs(noise(0.01)),
         "gate/match_teacher_open_share": 0.18 + noise(0.01), "mismatch/mean_nats": 0.01 + abs(noise(0.001)),
         "mismatch/nats_max": 0.3 + abs(noise(0.05)), "mismatch/outside_share": abs(noise(0.0003)),
         "text/repetition": 1.6 + noise(0.05), "text/repeating_share": 0.0, "text/refusal_share": abs(noise(0.004)),
         "reward/mean": -0.6 + 0.5 * done + noise(0.1), "reward/std": 0.6 + noise(0.04),
         "reward/exact_match": 0.4 + lift * done + noise(0.04), "group/degenerate_share": 0.1 + abs(noise(0.03)),
         "length/student_tokens": length, "length/teacher_tokens": 88 + noise(2), "length/ratio": length / 88,
         "length/truncated_share": 0.04 * (1 - done) if step % 3 else 0.0,
         "critic/loss": 0.55 + noise(0.03), "critic/accuracy": 0.74 - 0.05 * done + noise(0.04),
         "critic/length_only_accuracy": 0.55 + noise(0.02), "critic/margin": 0.8 - 0.3 * done + noise(0.1),
         "critic/score_student": 0.1 + 0.6 * done + noise(0.1), "critic/score_teacher": 0.9 + 0.3 * done + noise(0.1),
         "tokens/generated": 41_000 + int(noise(500)), "tokens/trained": 33_000 + int(noise(500)),
         "lr/student": 1e-6 * (1 - done), "lr/critic": 1e-6, "mine/brevity": noise(1),
         **{f"position/kl_nats_from_{2**i}": 0.1 * (i + 1) * math.exp(-2 * done) + noise(0.005) for i in range(8)},
         **{f"position/overlap_from_{2**i}": 0.9 - 0.03 * i * (1.3 - done) + noise(0.005) for i in range(8)}}
    )  # fmt: skip
    run.perf(
        {"step": step, "time/step_s": 16 + noise(1), "time/speak_s": 9 + noise(0.5), "time/judge_s": 2 + noise(0.1),
         "time/learn_s": 4.5 + noise(0.2), "rate/tokens_per_s": 2500 + noise(90), "memory/peak_mib": 8123 + noise(5)}
    )  # fmt: skip


def _samples(run: RunFolder, dice: random.Random, step: int, done: float) -> None:
    for index, (domain, prompt) in enumerate(PROMPTS):
        words = SAID * dice.randint(1, 3)
        pieces = [word + " " for word in words.split()]
        heat = [max(0.0, dice.gauss(0.3, 0.6)) for _ in pieces] if index % 2 == 0 else None
        score = -0.5 + done + dice.gauss(0, 0.3)
        run.sample(
            {"step": step, "stage": "gad", "prompt_id": f"{index:02d}c0ffee", "prompt": prompt, "domain": domain,
             "sample": 0, "speaker": "student", "text": words,
             "finish": "length" if index == 1 and done < 0.3 else "stop",
             "tokens": len(pieces), "reward": round(score, 3), "score": score, "teacher_text": f"{SAID}That is all.",
             "teacher_score": 0.9, "kl_per_token": heat, "pieces": pieces if heat else None}
        )  # fmt: skip


def _events(run: RunFolder, steps: int) -> None:
    run.event(0, "stage", "stage warm-up: seqkd")
    run.event(steps // 5, "stage", "stage gad: gad, the reference is the student of this step")
    for step in range(50, steps + 1, 50):
        run.event(step, "checkpoint", f"saved step-{step:06d}")
    for step in (75, 100, 125):
        run.event(step, "best", f"dev_score {0.5 + step / 1000:.3f}")
    for step in (3, 4, 5):
        run.event(step, "warning", "6 % of the answers are cut at speak.max_tokens=256", "Raise speak.max_tokens.")
    run.event(180, "resume", "resumed from step-000150 after kill -9")
