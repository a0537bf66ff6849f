"""The report: one page that holds everything, asks for nothing, and in which hostile text stays text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_runs import HOSTILE, bare_run, good_run, hostile_run

from opd.errors import UsageError
from opd.log import RunFolder
from opd.report import page, render
from opd.report.excerpt import inert_json
from opd.report.lights import lights
from opd.report.provenance import recipe_rows
from opd.report.run import Estimate, load
from opd.report.summary import duration, outcome
from opd.report.svg import Boundary, Scale, Series, labels, line_chart, number, smooth, thin, ticks

VOID = {"meta", "input", "br", "img", "link", "hr"}


class Page(HTMLParser):
    """A page taken apart: elements with attributes, text by element, and whether the tags nest."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]} at {self.getpos()}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for found, attrs in self.elements if found == tag]

    def text(self) -> str:
        return " ".join(" ".join(data.split()) for tag, data in self.texts if tag not in ("script", "style"))

    def payload(self) -> Any:
        return json.loads(next(data for tag, data in self.texts if tag == "script" and data.startswith("{")))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        "good": good_run(folder, steps=120),
        "slow": good_run(folder, "gad-slow", steps=90, seed=2, lift=0.05),
        "hostile": hostile_run(folder),
        "bare": bare_run(folder),
    }


def written(runs: dict[str, Path], *names: str, to: Path) -> tuple[Page, str]:
    html = render([runs[name] for name in names], to / "report.html").read_text(encoding="utf-8")
    return Page(html), html


EVERY = [("good",), ("hostile",), ("bare",), ("good", "slow"), ("good", "slow", "hostile", "bare")]


@pytest.mark.parametrize("names", EVERY, ids="+".join)
def test_a_page_is_well_formed_self_contained_and_small(
    runs: dict[str, Path], names: tuple[str, ...], tmp_path: Path
) -> None:
    found, html = written(runs, *names, to=tmp_path)
    assert len(html.encode()) < page.LIMIT
    assert {tag for tag, _ in found.elements} & {"img", "iframe", "link", "object", "embed", "base", "audio"} == set()
    for tag, attrs in found.elements:
        assert not [key for key in attrs if key.startswith("on")], (tag, attrs)
        assert "style" not in attrs and "src" not in attrs and "srcset" not in attrs, (tag, attrs)
        assert (attrs.get("href") or "#").startswith("#")
    ids = [attrs["id"] for _, attrs in found.elements if attrs.get("id")]
    assert len(ids) == len(set(ids))
    assert {(attrs["href"] or "")[1:] for attrs in found.all("a")} <= set(ids)
    words = set(re.findall(r"\bhttps?:[^\s\"'<]+", html))
    assert words <= {"http://www.w3.org/2000/svg"}  # a namespace, not an address that anything fetches


def test_the_policy_allows_this_script_and_style_and_nothing_else(runs: dict[str, Path], tmp_path: Path) -> None:
    found, html = written(runs, "hostile", to=tmp_path)
    policy = next(m["content"] for m in found.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none';")
    for tag in ("style", "script"):
        inside = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        assert len(inside) == 1, f"more than one <{tag}>"
        digest = base64.b64encode(hashlib.sha256(inside[0].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy and "http" not in policy
    assert [attrs.get("type") for attrs in found.all("script")] == ["application/json", None]


def test_hostile_text_is_shown_as_text_everywhere(runs: dict[str, Path], tmp_path: Path) -> None:
    found, html = written(runs, "hostile", to=tmp_path)
    clean, _ = written(runs, "good", to=tmp_path)
    assert {tag for tag, _ in found.elements} <= {tag for tag, _ in clean.elements} | {"text", "title", "button"}
    assert found.text().count(HOSTILE[0]) > 25  # header, plan, warnings, legends, samples, tables
    assert "<img" not in html and 'onerror="' not in html.replace("&#34;", '"').split("<body>")[0]
    assert "{{ 7*7 }}" in found.text() and "49" not in found.text().split("Samples")[0].split("Objective")[1][:400]
    texts = found.payload()["texts"]
    assert HOSTILE[0] in texts and HOSTILE[1] in texts
    assert not set("\x00\x1b\u202e\u2066\x07") & set(html)


@given(
    st.recursive(
        st.text() | st.floats(allow_nan=False, allow_infinity=False) | st.none(),
        lambda inner: st.lists(inner, max_size=4),
    )
)
def test_inert_json_cannot_end_its_script_and_comes_back(value: Any) -> None:
    text = inert_json(value)
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == value


def test_one_run_says_what_happened(runs: dict[str, Path], tmp_path: Path) -> None:
    text = written(runs, "good", to=tmp_path)[0].text()
    assert (
        "The accuracy rose from 41.0 % [37.0, 45.0] to 63.0 % [59.0, 67.0]: +22.0 points, beyond the interval" in text
    )
    for part in (
        "Qwen/Qwen2.5-0.5B-Instruct (lora 16)", "answers in gpt5.jsonl", "finished at step 120", "12.3M", "9.88M",
        "1 h 23 min", "4.15 PFLOP", "speak 5", "E[ A(D(y)) · log π_θ(y) ]", "gives SCORE",
        "3 times, steps 3 to 5", "Raise speak.max_tokens.", "resumed from step-000150", "override train.lr=2e-6",
        "packages.torch", "Accuracy by domain", "Critic accuracy", "mine/brevity", "Reward: exact_match", "step 70",
    ):  # fmt: skip
        assert part in text, part
    assert "compared" not in text


def test_several_runs_are_compared(runs: dict[str, Path], tmp_path: Path) -> None:
    found, _ = written(runs, "good", "slow", to=tmp_path)
    text = found.text()
    assert "2 runs compared" in text
    assert "Highest accuracy after training: gad-2026-11-22-01, 63.0 % [59.0, 67.0]." in text
    assert "+22.0 points" in text and "+5.0 points" in text
    differing = text.split("What differs in the recipes")[1].split("Health")[0]
    assert "train.lr" in differing and "speak.temperature" not in differing and "Keys that only some" not in differing
    lines = [attrs for attrs in found.all("path") if attrs.get("data-name")]
    assert {attrs["data-name"] for attrs in lines} >= {"gad-2026-11-22-01", "gad-slow", "gad-slow student"}
    assert len({re.search(r"c\d", attrs["class"] or "")[0] for attrs in lines}) == 2  # type: ignore[index]
    assert found.payload()["runs"] == ["gad-2026-11-22-01", "gad-slow"]


def test_runs_whose_intervals_meet_are_not_ranked_with_confidence(tmp_path: Path) -> None:
    paths = [good_run(tmp_path, f"r{i}", steps=30, seed=i, lift=lift) for i, lift in enumerate((0.20, 0.21))]
    text = Page(render(paths, tmp_path / "report.html").read_text()).text()
    assert "Highest accuracy after training: r1, 62.0 % [58.0, 66.0]. Its interval overlaps that of r0" in text


def test_runs_of_one_name_are_told_apart_and_one_run_named_twice_is_refused(tmp_path: Path) -> None:
    paths = [good_run(tmp_path / side, "same", steps=20) for side in ("a", "b")]
    text = Page(render(paths, tmp_path / "report.html").read_text()).text()
    assert "a/same" in text and "b/same" in text
    with pytest.raises(UsageError, match="named twice"):
        render([paths[0], tmp_path / "b" / ".." / "a" / "same"], tmp_path / "x.html")
    with pytest.raises(UsageError, match="at least one run"):
        render([], tmp_path / "x.html")


def test_what_is_not_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run at"):
        render([tmp_path / "nowhere"], tmp_path / "x.html")
    with pytest.raises(UsageError, match=r"is not a run: it has none of plan\.json"):
        render([tmp_path], tmp_path / "x.html")


def test_a_run_killed_in_its_first_step_has_a_page_that_says_so(runs: dict[str, Path], tmp_path: Path) -> None:
    text = written(runs, "bare", to=tmp_path)[0].text()
    assert "still running, or killed at step 0" in text
    assert "No step was recorded yet." in text and "No sample was recorded yet." in text


def test_broken_files_become_sentences_not_tracebacks(tmp_path: Path) -> None:
    path = good_run(tmp_path, "broken", steps=20)
    (path / "lock.json").write_text("{")
    (path / "recipe.yaml").write_text("a: [")
    (path / "plan.json").write_text("[1]")
    with (path / "events.jsonl").open("a") as file:
        file.write("nonsense\n{}\n")
    text = Page(render([path], tmp_path / "report.html").read_text()).text()
    for part in ("lock.json: not JSON", "recipe.yaml: ", "plan.json: expected a mapping", "events.jsonl:"):
        assert part in text
    assert "The accuracy rose" in text


def test_a_page_of_many_long_runs_with_many_samples_stays_below_the_limit(tmp_path: Path) -> None:
    paths = [good_run(tmp_path, f"run-{i}", steps=200, seed=i) for i in range(7)]
    with RunFolder.open(paths[0]) as run:
        for step in range(150):
            for sample in range(8):
                run.sample({"step": step, "prompt_id": f"p{sample}", "prompt": "p" * 300, "text": f"{step} " * 1500})
    html = render(paths, tmp_path / "report.html").read_text()
    found = Page(html)
    assert len(html.encode()) < page.LIMIT
    steps = {row["step"] for row in found.payload()["rows"] if row["run"] == 0}
    assert {0, 200} <= steps, "the first and the last step stay"
    assert re.search(r"\d+ of \d+ recorded samples are in this page ?; all of them: opd samples", found.text())


def test_rendering_twice_gives_the_same_bytes(runs: dict[str, Path], tmp_path: Path) -> None:
    first = render([runs["good"]], tmp_path / "a.html").read_bytes()
    assert first == render([runs["good"]], tmp_path / "b.html").read_bytes()


def test_the_report_loads_neither_torch_nor_the_recipe_checker(runs: dict[str, Path], tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from opd.report import render\n"
        f"render([Path({str(runs['bare'])!r})], Path({str(tmp_path / 'x.html')!r}))\n"
        "print({'torch', 'transformers', 'pydantic', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# Reading ---------------------------------------------------------------------------------------------------------


def test_lines_written_twice_by_a_resume_count_once_and_the_later_stands(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, "r") as run:
        for value in (1.0, 2.0):
            run.metrics({"step": 1, "loss/total": value})
        run.metrics({"step": 1, "event": "eval", "eval/accuracy": 0.5, "critic/heldout_accuracy": 0.7})
    found = load(tmp_path / "r")
    assert found.points("loss/total") == [(1.0, 2.0)]
    assert found.evals == {1: {"accuracy": Estimate(0.5)}}
    assert found.points("critic/heldout_accuracy") == [(1.0, 0.7)]
    assert found.points("eval/accuracy") == []


def test_a_value_that_is_not_a_number_is_not_a_point(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, "r") as run:
        for step, value in enumerate(("1", True, None, [1], {"a": 1}, 3)):
            run.perf({"step": step, "rate/tokens_per_s": value})
        run.metrics({"step": 1})
    assert load(tmp_path / "r").points("rate/tokens_per_s") == [(5.0, 3.0)]


def test_the_main_figure_is_what_the_recipe_names(tmp_path: Path) -> None:
    def headline(metric: str, **figures: float) -> str | None:
        folder = RunFolder.create(tmp_path)
        folder.write_text("recipe.yaml", f"eval: {{metric: {metric}}}\n")
        folder.metrics({"step": 0, "event": "eval"} | {f"eval/{k}": v for k, v in figures.items()})
        folder.close()
        return load(folder.path).headline()

    assert headline("ngram_f1", accuracy=0.5, ngram_f1=0.3) == "ngram_f1"
    assert headline("dev_score", accuracy=0.5, dev_score=0.4) == "accuracy"
    assert headline("dev_score", dev_score=0.4, distinct_1=0.2) == "dev_score"
    assert headline("gone", distinct_1=0.2) == "distinct_1"
    assert headline("gone") is None


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        (
            (0.4, 0.3, 0.5),
            (0.6, 0.55, 0.65),
            "rose from 40.0 % [30.0, 50.0] to 60.0 % [55.0, 65.0]: +20.0 points, beyond",
        ),
        ((0.4, 0.3, 0.5), (0.45, 0.35, 0.55), "+5.0 points; the intervals overlap, so this may be chance."),
        ((0.4, None, None), (0.3, None, None), "fell from 40.0 % to 30.0 %: −10.0 points."),
        ((0.4, None, None), (0.4, None, None), "stayed from 40.0 % to 40.0 %."),
        ((0.4, None, None), None, "was 40.0 % before training; the other end was not measured."),
        (None, None, "No evaluation was recorded"),
    ],
)
def test_the_verdict_claims_no_more_than_was_measured(tmp_path: Path, before: Any, after: Any, sentence: str) -> None:
    def line(end: Any) -> dict[str, float]:
        names = ("eval/accuracy", "eval/accuracy_low", "eval/accuracy_high")
        return {k: v for k, v in zip(names, end or (), strict=False) if v is not None}

    with RunFolder.create(tmp_path, "r") as run:
        run.write_json("summary.json", {"status": "finished", "before": line(before), "after": line(after)})
    assert sentence in outcome(load(tmp_path / "r"))


def test_a_recipe_is_split_by_where_its_values_came_from(runs: dict[str, Path]) -> None:
    chosen, left = recipe_rows(load(runs["good"]))
    assert {row.key: row.origin for row in chosen}["train.lr"] == "override train.lr=2e-6"
    assert {"train.updates", "run.seed"} <= {row.key for row in left}
    assert not {row.key for row in chosen} & {row.key for row in left}


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.5, "0.5 s"), (48, "48 s"), (125, "2 min 5 s"), (3599.9, "1 h 0 min"), (12_000, "3 h 20 min")],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


# Health ----------------------------------------------------------------------------------------------------------


def judged(tmp_path: Path, **curves: list[float]) -> dict[str, tuple[str, str]]:
    """The lights of a run with these curves ("critic__accuracy" is critic/accuracy)."""
    folder = RunFolder.create(tmp_path)
    for step in range(max(len(values) for values in curves.values())):
        folder.metrics({"step": step} | {k.replace("__", "/"): v[step] for k, v in curves.items() if step < len(v)})
    folder.close()
    return {light.name: (light.status, light.value) for light in lights(load(folder.path))}


@pytest.mark.parametrize(
    ("name", "key", "good", "bad"),
    [
        ("critic accuracy", "critic__accuracy", [0.56, 0.89], [0.54, 0.91]),
        ("critic beyond length", "critic__length_only_accuracy", [0.5, 0.65], [0.66]),
        ("length ratio", "length__ratio", [0.5, 1.3], [1.31]),
        ("truncated answers", "length__truncated_share", [0.0, 0.02], [0.021]),
        ("degenerate groups", "group__degenerate_share", [0.0, 0.5], [0.51]),
    ],
)
def test_a_light_turns_at_its_threshold_and_looks_at_the_last_tenth(
    tmp_path: Path, name: str, key: str, good: list[float], bad: list[float]
) -> None:
    for values, status in ((good, "good"), (bad, "bad")):
        for value in values:
            other = bad[0] if status == "good" else good[0]
            assert judged(tmp_path, **{key: [other] * 90 + [value] * 10})[name][0] == status, value


def test_a_bad_light_says_why_and_what_to_do(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, "r") as run:
        for step in range(50):
            run.metrics(
                {"step": step, "critic/accuracy": 0.99, "length/ratio": 2.0, "length/truncated_share": 0.3,
                 "entropy/student_nats": 2.0 / (1 + step), "group/degenerate_share": 0.9,
                 "critic/length_only_accuracy": 0.9, "text/repeating_share": 0.2, "mismatch/outside_share": 0.1,
                 "grad/norm": 100.0 if step % 10 == 9 else 1.0}
            )  # fmt: skip
    found = lights(load(tmp_path / "r"))
    assert len(found) == 9
    assert all(light.status == "bad" and light.why and light.remedy and light.rule for light in found)
    text = Page(render([tmp_path / "r"], tmp_path / "x.html").read_text()).text()
    assert all(light.why in text and light.remedy in text for light in found)


def test_entropy_is_judged_against_its_own_start(tmp_path: Path) -> None:
    assert judged(tmp_path, entropy__student_nats=[1.0] * 50 + [0.51] * 50)["entropy"][0] == "good"
    assert judged(tmp_path, entropy__student_nats=[1.0] * 50 + [0.49] * 50)["entropy"][0] == "bad"
    assert "entropy" not in judged(tmp_path, entropy__student_nats=[1.0] * 5)


def test_gradient_spikes_are_counted_against_the_median_before_them(tmp_path: Path) -> None:
    calm = [1.0] * 100
    calm[40] = 9.0
    assert judged(tmp_path, grad__norm=calm)["gradient spikes"] == ("good", "1 of 100 steps, worst 9x at step 40")
    calm[60] = 7.0
    assert judged(tmp_path, grad__norm=calm)["gradient spikes"][0] == "bad"
    falling = [100.0 / (1 + step) for step in range(100)]
    assert judged(tmp_path, grad__norm=falling)["gradient spikes"] == ("good", "0 of 100 steps")


def test_the_critic_is_judged_on_held_out_prompts_when_there_are_enough(tmp_path: Path) -> None:
    few = judged(tmp_path, critic__accuracy=[0.95] * 50, critic__heldout_accuracy=[0.7] * 2)
    many = judged(tmp_path, critic__accuracy=[0.95] * 50, critic__heldout_accuracy=[0.7] * 6)
    assert few["critic accuracy"] == ("bad", "0.95") and many["critic accuracy"] == ("good", "0.70")


# Charts ----------------------------------------------------------------------------------------------------------

FINITE = st.floats(-1e12, 1e12, allow_nan=False)


@given(st.lists(FINITE, min_size=1, max_size=400), st.booleans(), st.booleans(), st.sampled_from([20, 50, 150]))
def test_a_chart_of_any_numbers_is_well_formed_and_inside_its_box(
    values: list[float], percent: bool, from_zero: bool, detail: int
) -> None:
    series = Series('a "b" <c>', [(float(i), v) for i, v in enumerate(values)], dots=len(values) < 9)
    svg = line_chart(
        [series], title='<t> & "u"', percent=percent, from_zero=from_zero, healthy=(0.0, 1.0), detail=detail
    )
    found = Page(svg)
    assert next(attrs["data-name"] for attrs in found.all("path") if attrs.get("data-name")) == 'a "b" <c>'
    numbers = [
        (float(x), float(y))
        for attrs in found.all("path")
        if "line" in (attrs["class"] or "").split() or attrs["class"] == "band c0"
        for x, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", attrs["d"] or "")
    ]
    assert numbers and all(0 <= x <= 380 and 0 <= y <= 190 for x, y in numbers)
    assert "nan" not in svg and "inf" not in svg


def test_no_points_no_chart() -> None:
    assert line_chart([Series("a", [])], title="t") == ""


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(2, 8))
def test_ticks_are_round_ordered_and_inside(low: float, span: float, about: int) -> None:
    high = low + span
    if not high > low or span < abs(low) * 1e-6:
        return
    found = ticks(low, high, about)
    assert 1 <= len(found) <= 2 * about + 2
    assert found == sorted(set(found))
    slack = span * 1e-6 + 1e-11
    assert all(low - slack <= tick <= high + slack for tick in found)


@given(st.lists(st.tuples(st.just(0.0), FINITE), min_size=1, max_size=1000), st.integers(20, 200))
def test_thinning_loses_no_spike(points: list[tuple[float, float]], limit: int) -> None:
    means, spread = thin(points, limit)
    assert len(means) <= limit
    values = [value for _, value in points]
    if spread is None:
        assert means == points
    else:
        assert min(low for low, _ in spread) == min(values) and max(high for _, high in spread) == max(values)


def test_only_noise_is_smoothed() -> None:
    ramp = [(float(i), float(i)) for i in range(200)]
    noise = [(float(i), float(i % 2)) for i in range(200)]
    assert smooth(ramp) == [] and smooth(noise[:30]) == []
    assert all(0.4 < value < 0.6 for _, value in smooth(noise))


def test_a_logarithmic_scale_is_used_when_spikes_would_flatten_the_rest() -> None:
    points = [(float(i), 1000.0 if i == 7 else 1.0) for i in range(50)]
    assert 'data-log="1"' in line_chart([Series("a", points)], title="t")
    assert Scale(1, 100, 0, 1, log=True)(10) == pytest.approx(0.5)


def test_levels_of_an_axis_are_told_apart() -> None:
    assert labels([0.5435, 0.544, 0.5445], percent=False) == ["0.5435", "0.544", "0.5445"]
    assert labels([0.0, 0.5, 1.0], percent=True) == ["0 %", "50 %", "100 %"]
    assert labels([]) == []


def test_a_change_too_small_to_matter_is_drawn_small() -> None:
    points = [(float(i), 1 + 1e-6 * (i % 2)) for i in range(20)]
    low, high = re.search(r'data-y="(\S+) (\S+)"', line_chart([Series("a", points)], title="t")).groups()  # type: ignore[union-attr]
    assert 0.98 < float(low) < 0.995 and 1.005 < float(high) < 1.02


def test_stage_names_are_left_out_where_the_next_stage_would_cut_them() -> None:
    stages = [Boundary(0, "warm-up"), Boundary(5, "gad"), Boundary(60, "last")]
    svg = line_chart([Series("a", [(0.0, 1.0), (100.0, 2.0)])], title="t", boundaries=stages)
    assert re.findall(r'class="stage-name"[^>]*>([^<]*)<', svg) == ["gad", "last"]


@pytest.mark.parametrize(
    ("value", "percent", "text"),
    [
        (0.635, True, "63.5 %"),
        (1.0, True, "100 %"),
        (0.0, True, "0 %"),
        (1234.0, False, "1234"),
        (41_000, False, "41k"),
        (0.5, False, "0.5"),
        (12_345_678, False, "12.3M"),
        (3.4e15, False, "3.4P"),
        (1e-6, False, "1e-06"),
        (None, False, "–"),
    ],
)
def test_numbers_are_written_for_people(value: float | None, percent: bool, text: str) -> None:
    assert number(value, percent) == text
