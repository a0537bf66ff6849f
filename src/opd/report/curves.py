"""Which curves the report draws, in which order, and how several runs share one chart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from opd.report import lights
from opd.report.places import by_place, octaves
from opd.report.run import Estimate, Points, Run
from opd.report.svg import DASHES, Boundary, Mark, MarkKind, Series, line_chart, swatch

MARKS: dict[str, MarkKind] = {"warning": "warning", "best": "best", "resume": "resume", "stop": "stop"}
MARKS_PER_RUN = 16
AREAS = ("loss/", "reward/", "gate/", "position/")  # drawn by what there is
PLACES = (
    ("position/kl_nats_from_{}", "KL by place in the answer", "nats; x: from token 1, 2, 4, ...", False),
    ("position/overlap_from_{}", "Overlap by place in the answer", "x: from token 1, 2, 4, ...", True),
)
MAIN = ("accuracy", "accuracy_sampled", "dev_score")  # evaluations shown first, beside the headline and its domains


@dataclass(frozen=True, slots=True)
class Spec:
    """One chart: what its curves are called, and where a rule asks for it, the healthy range."""

    title: str
    keys: tuple[tuple[str, str], ...]
    words: str = ""
    percent: bool = False
    healthy: tuple[float | None, float | None] | None = None
    from_zero: bool = False


@dataclass(frozen=True, slots=True)
class Key:
    """One entry of a legend."""

    swatch: Markup
    name: str


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawn chart with its caption and legend."""

    title: str
    words: str
    svg: Markup
    legend: tuple[Key, ...]


KNOWN: dict[str, tuple[Spec, ...]] = {
    "Reward and critic": (
        Spec("Reward", (("reward/mean", "mean"), ("reward/std", "spread in the batch")), "what the samples earn"),
        Spec(
            "Critic accuracy",
            (
                ("critic/accuracy", "training"),
                ("critic/heldout_accuracy", "held out"),
                ("critic/length_only_accuracy", "length alone"),
            ),
            "teacher ranked first",
            healthy=(lights.CRITIC_LOW, lights.CRITIC_HIGH),
        ),
        Spec("Critic scores", (("critic/score_student", "student"), ("critic/score_teacher", "teacher"))),
        Spec("Critic margin", (("critic/margin", "teacher - student"),), "in its score"),
        Spec("Critic loss", (("critic/loss", "loss"),)),
        Spec(
            "Degenerate groups",
            (("group/degenerate_share", "share"),),
            "all rewards equal",
            percent=True,
            healthy=(0.0, lights.DEGENERATE),
        ),
    ),
    "Teacher and student": (
        Spec(
            "KL",
            (("kl/reverse_nats", "KL(student || teacher)"), ("kl/forward_nats", "KL(teacher || student)")),
            "nats a token",
        ),
        Spec(
            "Overlap of likely tokens",
            (
                ("overlap/ratio", "shared of the top 16"),
                ("overlap/student_mass", "student's mass on them"),
                ("overlap/teacher_mass", "teacher's"),
            ),
            percent=True,
        ),
        Spec("Overlap advantage", (("overlap/advantage_nats", "mean"),), "nats a shared token; 0 is agreement"),
        Spec(
            "Entropy",
            (
                ("entropy/student_nats", "student"),
                ("entropy/teacher_nats", "teacher"),
                ("entropy/gap_nats", "gap, token by token"),
            ),
            "nats a token",
        ),
        Spec(
            "What only the judge was shown",
            (("leak/certain_share", "tokens only it can know"), ("leak/copied_share", "said by the student")),
            percent=True,
        ),
    ),
    "Trust and gates": (
        Spec("KL to the reference", (("kl/reference_nats", "KL"),), "nats a token"),
        Spec("Ratio", (("ratio/mean", "mean"),), "live over anchor probability"),
        Spec(
            "Stopped by the clip",
            (
                ("ratio/clipped_share", "of all tokens"),
                ("clip/positive_stopped_share", "of those to be raised"),
                ("clip/negative_stopped_share", "of those to be lowered"),
            ),
            percent=True,
        ),
        Spec(
            "Ratios outside the clip",
            (("clip/above_share", "above"), ("clip/below_share", "below")),
            percent=True,
        ),
        Spec(
            "Sampler and trainer",
            (("mismatch/mean_nats", "mean"), ("mismatch/nats_max", "largest")),
            "|log μ - log π_old|, nats",
        ),
        Spec(
            "Sampler and trainer apart",
            (("mismatch/outside_share", "tokens"),),
            "probability twice or half",
            percent=True,
            healthy=(0.0, lights.MISMATCH),
        ),
    ),
    "Text": (
        Spec(
            "Length", (("length/student_tokens", "student"), ("length/teacher_tokens", "teacher")), "tokens an answer"
        ),
        Spec("Length ratio", (("length/ratio", "student / teacher"),), healthy=(0.0, lights.LENGTH_RATIO)),
        Spec(
            "Truncated",
            (("length/truncated_share", "share"),),
            "answers cut at the limit",
            percent=True,
            healthy=(0.0, lights.TRUNCATED),
        ),
        Spec("Compression", (("text/repetition", "mean"),), "bytes over compressed bytes of an answer"),
        Spec(
            "Repeating and refusing",
            (("text/repeating_share", "compress tenfold"), ("text/refusal_share", "refuse")),
            "answers",
            percent=True,
        ),
    ),
    "Loss and optimisation": (
        Spec("Gradient norm", (("grad/norm", "norm"),), "before clipping"),
        Spec("Learning rate", (("lr/student", "student"), ("lr/critic", "critic"))),
        Spec("Tokens a step", (("tokens/generated", "generated"), ("tokens/trained", "trained")), from_zero=True),
    ),
    "Speed": (
        Spec("Speed", (("rate/tokens_per_s", "tokens / s"),), "tokens a second", from_zero=True),
        Spec(
            "Time a step",
            (("time/step_s", "step"), ("time/speak_s", "speak"), ("time/judge_s", "judge"), ("time/learn_s", "learn")),
            "seconds",
            from_zero=True,
        ),
        Spec("Peak memory", (("memory/peak_mib", "peak"),), "MiB", from_zero=True),
    ),
}


def groups(runs: Sequence[Run], detail: int) -> dict[str, list[Chart]]:
    """All charts that have data, by section; metrics that no chart knows come last, so none is hidden.

    `detail` is the most points that a curve is drawn with.
    """
    frame = _Frame.of(runs, detail)
    outcome, more = _evaluations(runs, frame)
    out = {"Outcome": outcome}
    for title, specs in KNOWN.items():
        out[title] = [chart for spec in specs if (chart := _chart(spec, runs, frame))]
    out["Reward and critic"] += _rest(runs, frame, "reward/", "Reward")
    out["Teacher and student"] += _places(runs)
    out["Trust and gates"] += _rest(runs, frame, "gate/", "Open", percent=True)
    out["Loss and optimisation"] = _losses(runs, frame) + out["Loss and optimisation"]
    known = {key for specs in KNOWN.values() for spec in specs for key, _ in spec.keys}
    others = dict.fromkeys(key for run in runs for key in (*run.keys, *run.perf_keys))
    rest = [key for key in others if key not in known and not key.startswith(AREAS)]
    out["More of the evaluation"] = more
    out["Other"] = [chart for key in rest if (chart := _chart(Spec(key, ((key, key),)), runs, frame))]
    return {title: charts for title, charts in out.items() if charts}


@dataclass(frozen=True, slots=True)
class _Frame:
    """What all charts of a page share: the x axis, stage boundaries, event marks, points a curve."""

    detail: int
    steps: tuple[float, float]
    boundaries: tuple[Boundary, ...]
    marks: tuple[Mark, ...]

    @classmethod
    def of(cls, runs: Sequence[Run], detail: int) -> _Frame:
        starts = [min((*run.steps, *run.evals), default=0) for run in runs]
        last = max((run.last_step for run in runs), default=1)
        staged = [(index, run.stages) for index, run in enumerate(runs) if len(run.stages) > 1]
        alike = all(stages == staged[0][1] for _, stages in staged)
        shown = staged[:1] if alike else staged
        return cls(
            detail,
            (float(min(starts, default=0)), float(max(last, 1))),
            tuple(Boundary(float(step), name, None if alike else i) for i, stages in shown for step, name in stages),
            tuple(mark for run in runs for mark in _marks(run, len(runs) > 1)),
        )


def _marks(run: Run, named: bool) -> list[Mark]:
    """A run's events for the axis: each message once, of the improvements only the last."""
    found: dict[tuple[str, str], Mark] = {}
    for event in run.events:
        kind = MARKS.get(str(event.get("kind")))
        step = event.get("step")
        if kind is None or not isinstance(step, int):
            continue
        text = str(event.get("message") or "")
        key = ("best", "") if kind == "best" else (kind, text)
        if kind == "best" or key not in found:
            found[key] = Mark(float(step), kind, f"{run.name}: {text}" if named else text)
    return list(found.values())[:MARKS_PER_RUN]


def _chart(spec: Spec, runs: Sequence[Run], frame: _Frame) -> Chart | None:
    curves = [(run, key, label, points) for run in runs for key, label in spec.keys if (points := run.points(key))]
    labels = list(dict.fromkeys(label for _, _, label, _ in curves))
    series = [_series(runs, run, label, labels, points) for run, _, label, points in curves]
    return _draw(spec, series, labels, runs, frame)


def _series(runs: Sequence[Run], run: Run, label: str, labels: list[str], points: Points) -> Series:
    """One run: a colour a curve. Several runs: a colour a run, a dash a curve."""
    place = labels.index(label)
    if len(runs) == 1:
        return Series(label, points, colour=place)
    return Series(f"{run.name} {label}" if len(labels) > 1 else run.name, points, (), runs.index(run), place % DASHES)


def _draw(spec: Spec, series: list[Series], labels: list[str], runs: Sequence[Run], frame: _Frame) -> Chart | None:
    if not series:
        return None
    svg = line_chart(
        series,
        title=spec.title,
        steps=frame.steps,
        percent=spec.percent,
        from_zero=spec.from_zero,
        healthy=spec.healthy,
        marks=frame.marks,
        boundaries=frame.boundaries,
        detail=frame.detail,
    )
    if len(runs) == 1:
        legend = [Key(swatch(s.colour, s.dash), s.name) for s in series] if len(series) > 1 else []
    else:  # the runs' colours are in the legend above all charts; here only what the dashes mean
        legend = (
            [Key(swatch(-1, place % DASHES), label) for place, label in enumerate(labels)] if len(labels) > 1 else []
        )
    return Chart(spec.title, spec.words, svg, tuple(legend))


def _losses(runs: Sequence[Run], frame: _Frame) -> list[Chart]:
    """The total and each term: on one chart when they are few and one run's, else a chart each."""
    keys = list(dict.fromkeys(key for run in runs for key in run.keys if key.startswith("loss/")))
    keys.sort(key=lambda key: key != "loss/total")
    named = tuple((key, key.removeprefix("loss/")) for key in keys)
    if len(runs) == 1 and 1 < len(named) <= DASHES:
        specs = [Spec("Loss", named, "the total and its terms")]
    else:
        specs = [Spec("Loss" if label == "total" else f"Loss: {label}", ((key, label),)) for key, label in named]
    return [chart for spec in specs if (chart := _chart(spec, runs, frame))]


def _rest(runs: Sequence[Run], frame: _Frame, area: str, title: str, percent: bool = False) -> list[Chart]:
    drawn = {key for specs in KNOWN.values() for spec in specs for key, _ in spec.keys}
    keys = dict.fromkeys(key for run in runs for key in run.keys if key.startswith(area) and key not in drawn)
    names = {key: key.removeprefix(area).removesuffix("_open_share") for key in keys}
    specs = [Spec(f"{title}: {name}", ((key, name),), percent=percent) for key, name in names.items()]
    return [chart for spec in specs if (chart := _chart(spec, runs, frame))]


def _places(runs: Sequence[Run]) -> list[Chart]:
    """What was measured by place in the answer."""
    charts = []
    for name, title, words, percent in PLACES:
        starts = sorted({start for run in runs for start in octaves(run, name)})
        series = by_place(runs, name, starts) if len(starts) > 1 else []
        if series:
            names, steps = [str(start) for start in starts], (0.0, float(len(starts) - 1))
            svg = line_chart(series, title=title, steps=steps, percent=percent, places=names)
            legend = [Key(swatch(s.colour, s.dash, s.shade), s.name) for s in series] if len(runs) == 1 else []
            when = "" if len(runs) == 1 else "; the last quarter of each"
            charts.append(Chart(title, words + when, svg, tuple(legend)))
    return charts


def is_share(name: str) -> bool:
    """Whether an evaluation's figure is a share of 1, to be shown in percent."""
    return any(word in name for word in ("accuracy", "share", "pass_at"))


def _evaluations(runs: Sequence[Run], frame: _Frame) -> tuple[list[Chart], list[Chart]]:
    """(the main figures, the others): a chart a figure with its interval; one run's domains share a chart."""
    names = list(dict.fromkeys(name for run in runs for line in run.evals.values() for name in line))
    headline = next((name for run in runs if (name := run.headline())), None)
    names = sorted((name for name in names if name != "prompts"), key=lambda name: name != headline)
    by_figure: dict[str, list[str]] = {}
    for name in names:
        domain, _, figure = name.rpartition("/")
        by_figure.setdefault(f"{figure} by domain" if domain and len(runs) == 1 else name, []).append(name)
    main: list[Chart] = []
    more: list[Chart] = []
    for title, members in by_figure.items():
        labels = [name.rpartition("/")[0] or name for name in members]
        series = [
            _evaluation(runs, run, label, labels, points)
            for run in runs
            for name, label in zip(members, labels, strict=True)
            if (points := [(float(step), line[name]) for step, line in run.evals.items() if name in line])
        ]
        words = "with intervals" if any(s.intervals for s in series) else ""
        spec = Spec(figure_words(title), (), words, percent=is_share(title))
        if chart := _draw(spec, series, labels, runs, frame):
            figure = members[0].rpartition("/")[2]
            (main if figure == headline or members[0] in MAIN else more).append(chart)
    return main, more


def _evaluation(
    runs: Sequence[Run], run: Run, label: str, labels: list[str], points: Sequence[tuple[float, Estimate]]
) -> Series:
    known = [(e.low, e.high) if e.low is not None and e.high is not None else None for _, e in points]
    alone = len(labels) == 1
    return Series(
        (label if len(runs) == 1 else run.name if alone else f"{run.name} {label}"),
        [(step, estimate.value) for step, estimate in points],
        known if alone and any(known) else (),
        labels.index(label) if len(runs) == 1 else runs.index(run),
        0 if len(runs) == 1 else labels.index(label) % DASHES,
        dots=True,
    )


def figure_words(name: str) -> str:
    """An evaluation's figure as a title: math/accuracy_sampled is "Accuracy sampled, math"."""
    domain, _, figure = name.rpartition("/")
    text = figure.replace("_", " ")
    return text[:1].upper() + text[1:] + (f", {domain}" if domain else "")
