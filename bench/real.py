"""Distillation on real small models and GPT-written stories: what each method does, measured on prompts held out.

    python bench/real.py [--world ../shared/world] [--seeds 17 18] [--only gad char white] [--quick]

One command: it cuts the stories into prompts and short answers, trains every arm with `opd train` on `recipes/real`,
measures all of them on the test prompts, prints the tables and writes `bench/results/real.json`. Finished runs and
measurements are kept in `runs/real` and not made again; a run that was stopped is resumed. Of `real.json` only what was
asked for is replaced: other parts and seeds stay. One thread.

The world is a local folder with two pretrained story writers, `models/stories260K` (pieces of words) and
`models/babyllama105` (characters), and stories by GPT-3.5 and GPT-4, `text/tinystories_{train,test}.jsonl`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from real_measure import ROOM, Voice, World, duel, kept, measured, text_numbers, voice

from opd import checkpoint
from opd.data import read
from opd.lock import lock

ROOT = Path(__file__).resolve().parent.parent
ANSWER, PROMPT, SHORTEST, ANSWERS = 180, 70, 60, 4  # characters of an answer, of a prompt, at least; answers a prompt
DEV_SHARE = 9  # one distinct prompt in nine is for tuning
SEED = 17  # of the samples of models that no run made
SENTENCE = re.compile(r"[.!?][\"”’']?(?=\s|$)")


@dataclass(frozen=True)
class Arm:
    """One run of `opd train`, and where in the tables it stands."""

    name: str
    part: str
    recipe: str
    student: str
    drop: int = 0
    stages: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()  # overrides of the recipe


GAD = ("imitate", "warm-up", "gad")
AS_IN_THE_PAPER = ("stages.gad.method.std=true",)  # advantages are divided by their group's deviation
ARMS = (
    Arm("seqkd", "gad", "seqkd.yaml", "stories260K", 2),
    Arm("gad", "gad", "gad.yaml", "stories260K", 2, GAD),
    Arm("gad_std", "gad", "gad.yaml", "stories260K", 2, GAD, AS_IN_THE_PAPER),
    Arm("reverse_kl", "white", "gkd.yaml", "stories260K", 2),
    Arm("jsd", "white", "gkd_jsd.yaml", "stories260K", 2),
    Arm("token_opd", "white", "token_opd.yaml", "stories260K", 2),
    Arm("seqkd", "char", "seqkd.char.yaml", "babyllama105"),
    Arm("gad", "char", "gad.char.yaml", "babyllama105", 0, GAD),
    Arm("gad_std", "char", "gad.char.yaml", "babyllama105", 0, GAD, AS_IN_THE_PAPER),
)


# --- data ------------------------------------------------------------------------------------------------------------


def shortened(text: str, limit: int = ANSWER) -> str:
    """The first whole sentences of a story that fit `limit` characters, on one line."""
    text = " ".join(text.split())
    ends = [m.end() for m in SENTENCE.finditer(text) if m.end() <= limit]
    return text[: ends[-1]] if ends else ""


def split(world: Path) -> dict[str, list[dict[str, str]]]:
    """Rows of train, dev and test. No prompt stands in two of them; dev is cut out of the world's training rows."""
    out: dict[str, list[dict[str, str]]] = {"train": [], "dev": [], "test": []}
    count: Counter[str] = Counter()
    known: set[str] = set()
    for name in ("train", "test"):
        for line in (world / "text" / f"tinystories_{name}.jsonl").read_text("utf-8").splitlines():
            row = json.loads(line)
            prompt, response = row["prompt"], shortened(row["response"])
            if len(prompt) > PROMPT or len(response) < SHORTEST or (name == "test" and prompt in known):
                continue
            if name == "train":
                known.add(prompt)
            count[prompt] += 1
            dev = hashlib.sha256(prompt.encode()).digest()[0] % DEV_SHARE == 1
            if count[prompt] <= ANSWERS:
                out["dev" if name == "train" and dev else name].append({"prompt": prompt, "response": response})
    return out


def prepare(world: Path, folder: Path) -> dict[str, int]:
    """Write the splits, and the teacher's answers to train and dev; returns their sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = split(world)
    written = {**rows, "answers": rows["train"] + rows["dev"]}
    for name, each in written.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in each)
        (folder / f"{name}.jsonl").write_text(lines, "utf-8")
    return {name: len(each) for name, each in rows.items()}


# --- training --------------------------------------------------------------------------------------------------------


def command(arm: Arm, seed: int, world: Path, out: Path, extra: Sequence[str]) -> list[str]:
    """The `opd train` arguments of an arm."""
    models = world / "models"
    own = [f"student.model={models / arm.student}", f"run.name={folder_of(arm, seed)}", f"run.seed={seed}"]
    if arm.part == "white":
        own.append(f"teachers.teacher.model={models / 'stories260K'}")
    if arm.stages and arm.part == "gad":
        own.append(f"critic.init={models / 'stories260K'}")
    return ["train", f"recipes/real/{arm.recipe}", *own, f"run.dir={out}", *arm.changed, *extra, "--quiet"]


def folder_of(arm: Arm, seed: int) -> str:
    return f"{arm.part}-{arm.name}-{seed}"


def shortly(arm: Arm) -> list[str]:
    """Overrides that make a run of a few steps: does it go through?"""
    steps = [f"stages.{name}.steps=2" for name in arm.stages] or ["train.steps=2"]
    alone = ["stages.warm-up.critic.alone_steps=1"] if arm.stages else []
    return [*steps, *alone, "eval.prompts=8"]


def trained(arm: Arm, seed: int, world: Path, out: Path, extra: Sequence[str]) -> Path:
    """The run folder of an arm, trained now unless it is there; a run that was stopped goes on."""
    run, arguments = out / folder_of(arm, seed), command(arm, seed, world, out, extra)
    if status(run) != "finished":
        if (run / "recipe.yaml").is_file():
            arguments = ["train", "--resume", str(run), "--quiet"]
        elif run.exists():  # killed before it began
            shutil.rmtree(run)
        print("opd", *arguments, flush=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        before = cpu_of_children()
        subprocess.run([sys.executable, "-c", "from opd.cli import main; main()", *arguments], cwd=ROOT, check=True,
                       env=environment)  # fmt: skip
        spent = json.loads((run / "cpu.json").read_text()) if (run / "cpu.json").is_file() else 0.0
        (run / "cpu.json").write_text(json.dumps(spent + cpu_of_children() - before))
    return run


def cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def status(run: Path) -> str:
    place = run / "summary.json"
    return str(json.loads(place.read_text())["status"]) if place.is_file() else ""


# --- measuring -------------------------------------------------------------------------------------------------------


def cast(
    world: World, runs: Mapping[tuple[str, str, int], Path], part: str, seed: int
) -> dict[str, Callable[[], Voice]]:
    """Who is compared in a part, by name; models are loaded when they are asked to speak."""
    models = world.path / "models"
    out: dict[str, Callable[[], Voice]] = {}
    for arm in (a for a in ARMS if a.part == part):
        out["start"] = lambda arm=arm: voice(models / arm.student, arm.student, drop=arm.drop)
        if (run := runs.get((part, arm.name, seed))) is None:
            continue
        if arm.name == "gad":
            warm = checkpoint.complete(run / "checkpoints")
            place = warm[sorted(warm)[-2]]  # of the two last stages' ends the first
            out["warm-up"] = lambda arm=arm, place=place: voice(
                models / arm.student, arm.student, drop=arm.drop, weights=place
            )
        out[arm.name] = lambda arm=arm, run=run: voice(run / "model", arm.student)
    return out


def measure_all(world: World, runs: Mapping[tuple[str, str, int], Path]) -> dict[str, Any]:
    """Every model's numbers, and the contests: {"numbers": {part: {seed: {model: ..}}}, "contests": {..}}."""
    numbers: dict[str, Any] = {}
    contests: dict[str, Any] = {}
    for part, seed in dict.fromkeys((part, seed) for part, _, seed in runs):
        who = cast(world, runs, part, seed)
        white = part == "white"
        keys = {name: f"{part}-{name}" if name == "start" else f"{part}-{name}-{seed}" for name in who}
        for name, make in who.items():
            made = measured(world, keys[name], make, SEED if name == "start" else seed, white=white)
            numbers.setdefault(part, {}).setdefault(str(seed), {})[name] = made
        fighters = {name: (keys[name], make) for name, make in who.items() if name != "start"}
        if not white and len(fighters) > 1:
            place = world.out / "measured" / f"{part}-contest-{seed}.json"
            found = kept(place, lambda fighters=fighters, seed=seed: duel(world, fighters, seed))
            contests.setdefault(part, {})[str(seed)] = found
    return {"numbers": numbers, "contests": contests, "teacher": teacher_numbers(world)}


def teacher_numbers(world: World) -> dict[str, Any]:
    """The same numbers of the GPT text itself, and of the untouched models' own continuations of the test prompts."""

    def gpt() -> dict[str, float]:
        judge = world.judges["stories260K"]
        said = world.real(judge)
        return text_numbers(said, judge, world.judges, said)

    out = {"gpt": kept(world.out / "measured" / "teacher-gpt.json", gpt)}
    for name, judge in world.judges.items():
        out[name] = measured(world, f"untouched-{name}", lambda judge=judge: judge, SEED, white=name == "stories260K")
    return out


# --- tables ----------------------------------------------------------------------------------------------------------

COLUMNS = {
    "held_out/bits_per_byte": ("GPT text, bits/byte", "{:.3f}"),
    "kl/reverse_nats": ("KL to teacher, nats", "{:.3f}"),
    "fluency/stories260K_bits_per_byte": ("own samples under stories260K", "{:.3f}"),
    "fluency/babyllama105_bits_per_byte": ("under babyllama105", "{:.3f}"),
    "length/characters": ("characters", "{:.0f}"),
    "length/ratio": ("length ratio", "{:.2f}"),
    "length/truncated_share": ("truncated", "{:.0%}"),
    "variety/distinct_2": ("distinct-2", "{:.3f}"),
    "variety/repeated_4grams": ("repeated 4-grams", "{:.1%}"),
}


def tables(found: Mapping[str, Any]) -> str:
    """Markdown: one table a part and seed, then the contests."""
    lines = []
    for part, seeds in found["numbers"].items():
        columns = {k: v for k, v in COLUMNS.items() if any(k in r for s in seeds.values() for r in s.values())}
        lines += ["", f"### {part}", "", "| model | seed | " + " | ".join(v[0] for v in columns.values()) + " |"]
        lines += ["|---|---|" + "---:|" * len(columns)]
        for seed, rows in seeds.items():
            lines += [_row(name, seed, row, columns) for name, row in rows.items()]
        extra = {"GPT (the teacher)": found["teacher"]["gpt"]} if part != "white" else {}
        lines += [_row(name, "", row, columns) for name, row in (extra | untouched(found)).items()]
    for part, seeds in found["contests"].items():
        lines += ["", f"### {part}: a critic that none of them has met", ""]
        for seed, row in seeds.items():
            for title, kind in (("taken for the better of it and the teacher", "wins"), ("pairwise", "duels")):
                said = (f"{name} {x[0]:.1%} [{x[1]:.1%}, {x[2]:.1%}]" for name, x in row[kind].items())
                lines.append(f"- seed {seed}, {title}: " + "; ".join(said))
    return "\n".join(lines) + "\n"


def untouched(found: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{name}, untouched": row for name, row in found["teacher"].items() if name != "gpt"}


def _row(name: str, seed: str, row: Mapping[str, float], columns: Mapping[str, tuple[str, str]]) -> str:
    cells = [form.format(row[key]) if key in row else "" for key, (_, form) in columns.items()]
    return f"| {name} | {seed} | " + " | ".join(cells) + " |"


# --- the command -----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=Path, default=Path(os.environ.get("OPD_WORLD", "../shared/world")))
    parser.add_argument("--out", type=Path, default=Path("runs/real"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[17, 18])
    parser.add_argument("--only", nargs="+", choices=["gad", "white", "char"], default=["gad", "white", "char"])
    parser.add_argument("--finished", action="store_true", help="train nothing: measure the runs that have finished")
    parser.add_argument("--quick", action="store_true", help="a few steps each, into another folder: does it run?")
    args = parser.parse_args()
    if not (args.world / "models").is_dir():
        sys.exit(f"{args.world} has no models/: name the folder with --world or OPD_WORLD")
    args.world = args.world.resolve()
    os.chdir(ROOT)
    torch.set_num_threads(1)
    sizes = prepare(args.world, Path("runs/real/data"))
    out = args.out.with_name(args.out.name + "-quick") if args.quick else args.out
    seeds = args.seeds[:1] if args.quick else args.seeds
    runs = {
        (arm.part, arm.name, seed): trained(arm, seed, args.world, out, shortly(arm) if args.quick else [])
        for seed in seeds
        for arm in ARMS
        if arm.part in args.only and (not args.finished or status(out / folder_of(arm, seed)) == "finished")
    }
    judges = {name: voice(args.world / "models" / name, name) for name in ROOM}
    prompts = {name: tuple(read(f"runs/real/data/{name}.jsonl")) for name in ("train", "test")}
    tested = prompts["test"][:8] if args.quick else prompts["test"]
    world = World(args.world, out, prompts["train"], tested, judges, args.quick)
    place = (out if args.quick else ROOT / "bench" / "results") / "real.json"
    found = merged(json.loads(place.read_text()) if place.is_file() else {}, made(world, runs, sizes, args))
    print(tables(found))
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {place}")


def made(world: World, runs: Mapping[Any, Path], sizes: Mapping[str, int], args: Any) -> dict[str, Any]:
    """What goes into real.json: numbers, versions, seconds and the commands that made them."""
    locked = lock(seed=args.seeds[0], threads=1)
    arms = {f"{a.part}-{a.name}-{s}": a for a in ARMS for s in args.seeds}
    return {
        "versions": {"python": locked["python"], **locked["packages"]},
        "prompts": dict(sizes),
        "runs": {
            run.name: {
                "command": "opd " + " ".join(command(arms[run.name], seed, Path("$OPD_WORLD"), args.out, [])),
                "seconds": json.loads((run / "summary.json").read_text())["seconds"],
                "cpu_seconds": json.loads((run / "cpu.json").read_text()),
                "tokens": json.loads((run / "summary.json").read_text())["tokens"],
                "critic": critic_seen(run),
            }
            for (_, _, seed), run in runs.items()
        },
        **measure_all(world, runs),
    }


def critic_seen(run: Path) -> dict[str, list[float]]:
    """What the critic knew of fresh samples in the last stage: means of its first and of its last eight steps."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "event" not in row and row["stage"] == rows[-1]["stage"]]
    names = [name for name in ("critic/accuracy", "critic/margin") if rows and name in rows[0]]
    seen = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: [round(fmean(part), 4) for part in (each[:8], each[-8:])] for name, each in seen.items()}


def merged(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The new results over the earlier: runs by name, numbers and contests by part and seed; nothing else stays."""
    return {
        **now,
        "runs": {**before.get("runs", {}), **now["runs"]},
        **{kind: _by_part_and_seed(before.get(kind, {}), now[kind]) for kind in ("numbers", "contests")},
    }


def _by_part_and_seed(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    parts = [arm.part for arm in ARMS if arm.part in {*before, *now}]
    both = {part: {**before.get(part, {}), **now.get(part, {})} for part in parts}
    return {part: dict(sorted(seeds.items(), key=lambda item: int(item[0]))) for part, seeds in both.items()}


if __name__ == "__main__":
    main()
