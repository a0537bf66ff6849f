"""Numbers of the models of `real.py`: on held-out text, on their own samples, and before a critic they never met."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from opd import checkpoint, metrics
from opd.assemble import load_tokenizer, with_vocab
from opd.batch import pack
from opd.chat import Renderer, renderer
from opd.contest import contest
from opd.critic import beside
from opd.engines.base import Sampling
from opd.eval import answer, bits_per_byte
from opd.loss import Objective
from opd.math import divergence
from opd.model import CausalModel, load
from opd.student import Optim
from opd.teachers import Teachers
from opd.types import Prompt, Rollout

ROOM = {"stories260K": 112, "babyllama105": 182}  # tokens of an answer
SAMPLES = 2  # a test prompt and model
TAUGHT, PASSES, BATCH = 240, 3, 16  # the contest's critic: prompts, times it goes through them, prompts a step


# --- models and what they say ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Voice:
    """A model and the renderer that turns text into its ids."""

    model: CausalModel
    renderer: Renderer
    room: int  # tokens of an answer

    def given(self, prompt: Prompt, text: str, speaker: str, sample: int = 0, *, finished: bool = True) -> Rollout:
        return self.renderer.given(prompt, text, speaker, sample, finished=finished)

    def reads(self, said: Iterable[Rollout]) -> list[Rollout]:
        """Texts of others in this model's tokens, each as far as it has room."""
        room, given = self.room, self.renderer.given
        return [given(r.prompt, r.text, r.speaker, r.sample, finished=False, max_tokens=room) for r in said]

    def say(self, prompts: Sequence[Prompt], samples: int, seed: int) -> tuple[Rollout, ...]:
        """Samples at temperature 1, whole distribution."""
        teachers = Teachers(self.renderer, self.model)
        sampling = Sampling(self.room, 1.0)
        return answer(
            self.model, teachers, prompts, sampling, samples=samples, rewards=(), seed=seed, rows=256
        ).rollouts


def voice(place: Path, kind: str, *, drop: int = 0, weights: Path | None = None) -> Voice:
    """A model folder, or a folder of which `drop` layers are left out, with the student's weights of a checkpoint."""
    tokenizer = load_tokenizer(str(place))
    model = with_vocab(load(place, frozen=True, drop_layers=drop), len(tokenizer))
    if weights is not None:
        own = dict(model.module.named_parameters())
        for name, tensor in checkpoint.load(weights)[0]["student"].items():
            own[name].data.copy_(tensor)
    return Voice(model, renderer(tokenizer, stop_ids=model.stop_ids), ROOM[kind])


def text_numbers(said: Sequence[Rollout], own: Voice, judges: Mapping[str, Voice], real: Sequence[Rollout]) -> Any:
    """Of samples: bits per byte under the judges, lengths, variety, repetition."""
    texts = [r.text for r in said]
    fluency = {
        f"fluency/{name}_bits_per_byte": bits_per_byte(judge.model, judge.reads(said), judge.renderer.stop_ids)
        for name, judge in judges.items()
    }
    known = {r.prompt.id: r.text for r in real}
    return fluency | {
        "length/characters": fmean(map(len, texts)),
        "length/tokens": fmean(r.spoken for r in said),
        "length/ratio": metrics.length_ratio(list(map(len, texts)), [len(known[r.prompt.id]) for r in said]),
        "length/truncated_share": fmean(r.finish == "length" for r in said),
        "variety/distinct_1": metrics.distinct(texts, 1),
        "variety/distinct_2": metrics.distinct(texts, 2),
        "variety/repeated_4grams": fmean(map(repeated, texts)),
        "overlap/ngram_f1": fmean(metrics.overlap(r.text, known[r.prompt.id]) for r in said),
    }


def repeated(text: str, n: int = 4) -> float:
    """Share of a text's runs of n words that it has said before."""
    grams = metrics.ngrams(metrics.words(text), n)
    return 1 - len(grams) / grams.total() if grams else 0.0


def kl_to(teacher: Voice, student: Voice, said: Sequence[Rollout]) -> dict[str, float]:
    """Exact KL of student and teacher, both ways, in nats: means over the tokens of the student's samples."""
    batch = pack(said, temperature=1.0)
    logp_NV = [m.head.logits(m.all_hidden(batch)).log_softmax(-1) for m in (student.model, teacher.model)]
    return {
        "kl/reverse_nats": float(divergence.reverse_kl(*logp_NV).sum(-1).mean()),
        "kl/forward_nats": float(divergence.forward_kl(*logp_NV).sum(-1).mean()),
        "entropy/student_nats": float(divergence.entropy(logp_NV[0]).mean()),
    }


# --- measurements ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """What every measurement reads."""

    path: Path
    out: Path
    train: tuple[Prompt, ...]
    test: tuple[Prompt, ...]
    judges: Mapping[str, Voice]
    quick: bool

    def real(self, own: Voice) -> list[Rollout]:
        return [own.given(p, text, "data", k) for p in self.test for k, text in enumerate(p.responses)]


def measured(world: World, name: str, make: Callable[[], Voice], seed: int, *, white: bool) -> dict[str, float]:
    """Numbers of a model on the test prompts, kept in a file by its name."""

    def work() -> dict[str, float]:
        own = make()
        real = world.real(own)
        said = own.say(world.test, 1 if world.quick else SAMPLES, seed)
        out = {"held_out/bits_per_byte": bits_per_byte(own.model, real, own.renderer.stop_ids)}
        out |= text_numbers(said, own, world.judges, real)
        if white:
            out |= kl_to(world.judges["stories260K"], own, said)
        keep_samples(samples_of(world, name), said)
        return out

    return kept(world.out / "measured" / f"{name}.json", work)


def kept(place: Path, work: Callable[[], Mapping[str, Any]]) -> Any:
    """The content of a file, made now unless it is there."""
    if not place.is_file():
        place.parent.mkdir(parents=True, exist_ok=True)
        began, cpu = time.perf_counter(), time.process_time()
        made = {**work(), "seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
        place.write_text(json.dumps(made, indent=1))
    return json.loads(place.read_text())


def samples_of(world: World, name: str) -> Path:
    return world.out / "samples" / f"{name}.jsonl"


def keep_samples(place: Path, said: Iterable[Rollout]) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": r.prompt.text, "text": r.text, "finish": r.finish} for r in said]
    place.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def duel(world: World, contestants: Mapping[str, tuple[str, Callable[[], Voice]]], seed: int) -> dict[str, Any]:
    """The held-out critic: the untouched stories260K with a scalar head, taught on train prompts, asked about test's.

    `contestants` are by name: where `measured` kept their samples, and the model. The critic is shown one sample of
    each on `TAUGHT` train prompts, against each of the teacher's answers, and judges those that `measured` took on the
    test prompts. It reads every text in its own tokens, whoever spoke it.
    """
    reader = world.judges["stories260K"]
    asked = {p.text: p for p in world.test}
    taught = world.train[: 60 if world.quick else TAUGHT]
    teach: dict[str, list[Rollout]] = {}
    judge: dict[str, list[Rollout]] = {}
    for name, (key, make) in contestants.items():
        rows = [json.loads(line) for line in samples_of(world, key).read_text("utf-8").splitlines()]
        judge[name] = [heard(reader, asked[r["prompt"]], r["text"], name, r["finish"]) for r in rows]
        said = make().say(taught, 1, seed)
        teach[name] = [heard(reader, r.prompt, r.text, name, r.finish) for r in said]

    def good(prompts: Sequence[Prompt]) -> dict[str, list[Rollout]]:
        return {p.id: [heard(reader, p, text, "teacher", "stop") for text in p.responses] for p in prompts}

    found = contest(
        beside(reader.model, Optim(lr=3e-4, weight_decay=0.01), seed=seed),
        (teach, good(taught)),
        (judge, good(world.test)),
        objective=Objective("bradley_terry", good="teacher", bad="student"),
        passes=1 if world.quick else PASSES,
        prompts=BATCH,
        seed=seed,
    )
    return {
        "wins": {k: tuple(v) for k, v in found.wins.items()},
        "duels": {f"{a} > {b}": tuple(v) for (a, b), v in found.duels.items()},
        "length_only_accuracy": dict(found.length_only),
        "learned": list(found.learned),
    }


def heard(reader: Voice, prompt: Prompt, text: str, speaker: str, finish: str) -> Rollout:
    """A text as the reader reads it, with a stop token where it ended by itself."""
    return reader.given(prompt, text, speaker, finished=finish != "length")
