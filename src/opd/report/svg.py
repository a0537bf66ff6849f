"""Charts as inline SVG text: no scripts, no fonts, no style attributes (the page's policy forbids them), only classes.

Colours are the classes c0..c5, dashes d0..d3; the page's style sheet gives them meaning in light and dark. A curve
carries its scale in data attributes, so that the page can read values back from it without a second copy of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from markupsafe import Markup
from markupsafe import escape as escape_html

WIDTH, HEIGHT = 380.0, 190.0
LEFT, RIGHT, TOP, BOTTOM = 42.0, 10.0, 14.0, 20.0
POINTS = 150  # beyond this a curve is drawn as bucket means inside their lowest and highest
SMOOTH = 60  # points of the moving average over a noisy curve
FLAT = 0.02  # an axis spans at least this share of its values
PLAIN = 50  # at this many points and below, bands are left out
NOISY = 6.0  # a curve that goes up and down this many times its own range is noisy
COLOURS, DASHES, SHADES = 6, 4, 4

Point = tuple[float, float]
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
MarkKind = Literal["warning", "best", "resume", "stop"]


@dataclass(frozen=True, slots=True)
class Series:
    """One curve: points in order of x, and where known the interval around each (low, high)."""

    name: str
    points: Sequence[Point]
    intervals: Sequence[tuple[float, float] | None] = ()
    colour: int = 0
    dash: int = 0
    dots: bool = False
    shade: int = 0  # 1 faint to SHADES full; 0 is full too

    @property
    def kind(self) -> str:
        """Its classes."""
        return f"c{self.colour % COLOURS} d{self.dash % DASHES}" + (f" m{self.shade}" if self.shade else "")


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened at a step: a triangle on the axis, its text shown on hover."""

    x: float
    kind: MarkKind
    text: str


@dataclass(frozen=True, slots=True)
class Boundary:
    """A stage begins at this step; of a certain run's colour where runs differ."""

    x: float
    text: str
    colour: int | None = None


@dataclass(frozen=True, slots=True)
class Scale:
    """Values to pixels along one axis, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (
            (math.log10(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        share = (at - low) / (high - low) if high > low else 0.5
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)


def visible(text: str) -> str:
    """Text as a page may hold it: control and direction-changing characters become a mark that can be seen."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def escape(text: str) -> Markup:
    """Text for an element or an attribute."""
    return escape_html(visible(text))


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within [low, high], roughly `about` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)] or ticks(low, high, 2 * about)  # none fell inside


def number(value: float | None, percent: bool = False, digits: int = 3) -> str:
    """A number for people: 3 significant digits; 12.3k, 4.56M; or a share as a percentage."""
    if value is None or not math.isfinite(value):
        return "–"
    if percent:
        return f"{value * 100:.{digits}g} %" if abs(value) < 9.995 else f"{value * 100:.0f} %"
    size = abs(value)
    for limit, suffix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if suffix == 'k' else limit):.{digits}g}{suffix}"
    if size >= 1000:
        return f"{value:.0f}"
    if size and size < 1e-3:
        return f"{value:.{digits - 1}g}"
    return f"{value:.{digits}g}"


def labels(levels: Sequence[float], percent: bool = False) -> list[str]:
    """The levels of an axis in as few digits as tell them apart."""
    for digits in range(3, 9):
        found = [number(level, percent, digits) for level in levels]
        if len(set(found)) == len(found):
            break
    return found if levels else []


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    steps: tuple[float, float] | None = None,
    percent: bool = False,
    from_zero: bool = False,
    healthy: tuple[float | None, float | None] | None = None,
    marks: Sequence[Mark] = (),
    boundaries: Sequence[Boundary] = (),
    detail: int = POINTS,
    places: Sequence[str] = (),
) -> Markup:
    """Curves over steps, or over `places`, whose names stand at x = 0, 1, ... `healthy` shades the range that a rule
    asks for; `steps` fixes the x axis for all charts; `from_zero` keeps steady amounts (speed, memory) from looking
    like noise; `detail` is the most points of a curve.
    """
    drawn = [s for s in series if s.points]
    if not drawn:
        return Markup("")
    first, last = steps or (min(s.points[0][0] for s in drawn), max(s.points[-1][0] for s in drawn))
    x = Scale(first, last, LEFT, WIDTH - RIGHT)
    y = _y_scale(drawn, healthy, from_zero)
    label = escape(title)
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" aria-label="{label}" '
        f'data-x="{x.low:g} {x.high:g}" data-y="{y.low:.9g} {y.high:.9g}" data-log="{int(y.log)}" '
        f'data-percent="{int(percent)}" data-places="{escape("|".join(places))}" '
        f'data-box="{LEFT:g} {WIDTH - RIGHT:g} {TOP:g} {HEIGHT - BOTTOM:g}">',
        _healthy(y, healthy),
        _grid(x, y, percent, places),
        *_boundaries(x, boundaries),
    ]
    parts += [_interval(s, x, y, detail) for s in drawn if detail > PLAIN]
    parts += [_curve(s, x, y, detail) for s in drawn]
    parts += [_mark(x, mark) for mark in marks]
    parts.append(f'<line class="hair" y1="{TOP:g}" y2="{HEIGHT - BOTTOM:g}" x1="-9" x2="-9"/></svg>')
    return Markup("".join(parts))


def swatch(colour: int, dash: int = 0, shade: int = 0) -> Markup:
    """The key of a curve in a legend."""
    kind = f"line {Series('', (), colour=colour, dash=dash, shade=shade).kind}"
    return Markup(f'<svg class="swatch" viewBox="0 0 22 8" aria-hidden="true"><path class="{kind}" d="M1 4H21"/></svg>')


def bar(value: float, largest: float, colour: int = 0) -> Markup:
    """A small horizontal bar for a table's cell: `value` as a share of `largest`."""
    share = max(0.0, min(1.0, value / largest)) if largest > 0 else 0.0
    return Markup(
        '<svg class="bar" viewBox="0 0 100 6" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="track" width="100" height="6"/><rect class="fill c{colour % COLOURS}" width="{share * 100:.1f}" '
        'height="6"/></svg>'
    )


@dataclass(frozen=True, slots=True)
class Change:
    """Before and after of one run for the comparison chart: (value, low, high) each."""

    name: str
    before: tuple[float, float | None, float | None] | None
    after: tuple[float, float | None, float | None] | None
    colour: int


def change_chart(changes: Sequence[Change], percent: bool, title: str) -> Markup:
    """One row a run: a hollow dot before, a full one after, whiskers for their intervals."""
    values = [v for c in changes for end in (c.before, c.after) if end for v in end if v is not None]
    if not values:
        return Markup("")
    width, row, top = 440.0, 38.0, 6.0
    bottom = top + row * len(changes)
    pad = (max(values) - min(values)) * 0.05 or 0.05
    low, high = min(values) - pad, max(values) + pad
    x = Scale(max(low, 0.0) if min(values) >= 0 else low, high, 12, width - 12)
    parts = [
        f'<svg class="chart wide" viewBox="0 0 {width:.0f} {bottom + 22:.0f}" role="img" aria-label="{escape(title)}">'
    ]
    for tick in ticks(x.low, x.high, 5):
        parts.append(f'<path class="grid" d="M{x(tick):.1f} {top}V{bottom}"/>')
        parts.append(f'<text class="tick mid" x="{x(tick):.1f}" y="{bottom + 14:.0f}">{number(tick, percent)}</text>')
    for index, change in enumerate(changes):
        at = top + row * index + row * 0.7
        parts.append(f'<text class="name" x="12" y="{at - 11:.1f}">{escape(_short(change.name, 60))}</text>')
        if change.before and change.after:
            ends = x(change.before[0]), x(change.after[0])
            parts.append(f'<path class="move c{change.colour % COLOURS}" d="M{ends[0]:.1f} {at:.1f}H{ends[1]:.1f}"/>')
        for end, kind in ((change.before, "hollow"), (change.after, "solid")):
            parts.append(_end(end, x, at, f"{kind} c{change.colour % COLOURS}"))
    return Markup("".join((*parts, "</svg>")))


def thin(points: Sequence[Point], limit: int) -> tuple[list[Point], list[tuple[float, float]] | None]:
    """At most `limit` points, and where that needs means, the (lowest, highest) of each bucket, so no spike is lost."""
    if len(points) <= limit:
        return list(points), None
    edges = [round(i * len(points) / limit) for i in range(limit + 1)]
    buckets = [points[a:b] for a, b in pairwise(edges)]
    means = [(sum(p[0] for p in b) / len(b), sum(p[1] for p in b) / len(b)) for b in buckets]
    return means, [(min(p[1] for p in b), max(p[1] for p in b)) for b in buckets]


def _y_scale(
    series: Sequence[Series], healthy: tuple[float | None, float | None] | None, from_zero: bool = False
) -> Scale:
    values = [v for s in series for _, v in s.points]
    values += [v for s in series for pair in s.intervals if pair for v in pair]
    low, high = min(values), max(values)
    middle = sorted(values)[len(values) // 2]
    if low > 0 and high / low > 50 and high / middle > 20:  # a few spikes would flatten the rest
        return Scale(low / 1.1, high * 1.1, HEIGHT - BOTTOM, TOP, log=True)
    if healthy:  # the edge of the rule is worth seeing when the curve comes near it
        span = (high - low) or abs(high) or 1.0
        for edge in healthy:
            if edge is not None and low - span <= edge <= high + span:
                low, high = min(low, edge), max(high, edge)
    if 0 <= low < 0.45 * high or (from_zero and low > 0):
        low = 0.0
    short = FLAT * max(abs(low), abs(high)) - (high - low)
    if short > 0:  # a change this small is drawn as small
        low, high = low - short / 2, high + short / 2
    pad = (high - low) * 0.06 or 1.0
    return Scale(low if low == 0 else low - pad, high + pad, HEIGHT - BOTTOM, TOP)


def _grid(x: Scale, y: Scale, percent: bool, places: Sequence[str] = ()) -> str:
    parts = []
    levels = [v for v in _decades(y) if y.low <= v <= y.high] if y.log else ticks(y.low, y.high, 4)
    for level, label in zip(levels, labels(levels, percent), strict=True):
        at = y(level)
        parts.append(f'<path class="grid" d="M{LEFT:g} {at:.1f}H{WIDTH - RIGHT:g}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 5:g}" y="{at + 3.5:.1f}">{label}</text>')
    named: dict[float, str] = dict(enumerate(places)) or {v: number(v) for v in ticks(x.low, x.high, 5) if v == int(v)}
    for step, name in named.items():
        at = x(step)
        anchor = "end" if at > WIDTH - 16 else "mid"
        shown = min(at + 9, WIDTH) if anchor == "end" else at
        parts.append(f'<text class="tick {anchor}" x="{shown:.1f}" y="{HEIGHT - 5:g}">{escape(name)}</text>')
    return "".join(parts)


def _decades(y: Scale) -> list[float]:
    low, high = math.floor(math.log10(y.low)), math.ceil(math.log10(y.high))
    factors = (1, 2, 5) if high - low <= 2 else (1,)
    return [factor * 10.0**power for power in range(low, high + 1) for factor in factors]


def _healthy(y: Scale, healthy: tuple[float | None, float | None] | None) -> str:
    if not healthy or all(edge is None or not y.low < edge < y.high for edge in healthy):
        return ""
    low, high = (edge if edge is not None else bound for edge, bound in zip(healthy, (y.low, y.high), strict=True))
    if y.log:
        low = max(low, y.low)
    top, tall, wide = y(high), y(low) - y(high), WIDTH - LEFT - RIGHT
    return f'<rect class="healthy" x="{LEFT:g}" y="{top:.1f}" width="{wide:g}" height="{tall:.1f}"/>'


def _curve(series: Series, x: Scale, y: Scale, detail: int) -> str:
    """The curve; a noisy one as a moving average, over itself drawn faint or over the band of `_interval`."""
    points, spread = thin(series.points, detail)
    kind = series.kind
    average = smooth(series.points, min(SMOOTH, detail))
    out = ""
    if average and not spread:
        out = f'<path class="line {kind} faint" d="{_path(points, x, y)}"/>'
    out += f'<path class="line {kind}" data-name="{escape(series.name)}" d="{_path(average or points, x, y)}"/>'
    if series.dots or len(points) == 1:
        few = points[:: len(points) // 60 + 1]
        out += "".join(f'<circle class="dot {kind}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="2.6"/>' for a, b in few)
    return out


def smooth(points: Sequence[Point], most: int = SMOOTH) -> list[Point]:
    """A centred moving average over about a twentieth of a noisy curve; [] for a curve that needs none."""
    if len(points) < SMOOTH:
        return []
    values = [value for _, value in points]
    travelled, span = sum(abs(b - a) for a, b in pairwise(values)), max(values) - min(values)
    if travelled < NOISY * span or not span:
        return []
    reach = max(2, len(points) // 40)
    centres = [round(i * (len(points) - 1) / (most - 1)) for i in range(most)]
    near = [values[max(0, i - reach) : i + reach + 1] for i in centres]
    return [(points[i][0], sum(part) / len(part)) for i, part in zip(centres, near, strict=True)]


def _interval(series: Series, x: Scale, y: Scale, detail: int) -> str:
    """The band of intervals where they are given, or of lowest and highest where the curve had to be thinned."""
    if series.intervals:
        known = [(p[0], pair) for p, pair in zip(series.points, series.intervals, strict=True) if pair]
        known = known[:: len(known) // detail + 1]
    else:
        points, spread = thin(series.points, detail)
        known = [(p[0], pair) for p, pair in zip(points, spread or (), strict=False)]
    if not known:
        return ""
    kind = f"c{series.colour % COLOURS}"
    if len(known) == 1:
        at, (low, high) = known[0]
        return f'<path class="whisker {kind}" d="M{x(at):.1f} {y(low):.1f}V{y(high):.1f}"/>'
    outline = [(at, pair[1]) for at, pair in known] + [(at, pair[0]) for at, pair in reversed(known)]
    return f'<path class="band {kind}" d="{_path(outline, x, y)}Z"/>'


def _path(points: Sequence[Point], x: Scale, y: Scale) -> str:
    return "M" + "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in points)


def _boundaries(x: Scale, boundaries: Sequence[Boundary]) -> list[str]:
    """Upright lines, named where there is room for the name."""
    parts = []
    ordered = sorted(boundaries, key=lambda b: b.x)
    ends = [*(x(later.x) for later in ordered[1:]), WIDTH + 4]
    for boundary, end in zip(ordered, ends, strict=False):
        at, text = x(boundary.x), _short(boundary.text, 18)
        kind = "stage" if boundary.colour is None else f"stage c{boundary.colour % COLOURS}"
        parts.append(f'<path class="{kind}" d="M{at:.1f} {TOP - 8:g}V{HEIGHT - BOTTOM:g}"/>')
        if at + 6.0 * len(text) + 4 <= end:
            parts.append(f'<text class="stage-name" x="{at + 3:.1f}" y="{TOP - 3:g}">{escape(text)}</text>')
    return parts


def _mark(x: Scale, mark: Mark) -> str:
    at, foot = x(mark.x), HEIGHT - BOTTOM
    shape = f"M{at - 4:.1f} {foot + 5:g}L{at:.1f} {foot - 3:g}L{at + 4:.1f} {foot + 5:g}Z"
    title = f"step {mark.x:g}, {mark.kind}: {_short(mark.text, 240)}"
    return f'<path class="mark {mark.kind}" d="{shape}"><title>{escape(title)}</title></path>'


def _end(end: tuple[float, float | None, float | None] | None, x: Scale, at: float, kind: str) -> str:
    if not end:
        return ""
    value, low, high = end
    whisker = ""
    if low is not None and high is not None:
        whisker = f'<path class="whisker {kind}" d="M{x(low):.1f} {at:.1f}H{x(high):.1f}"/>'
    return f'{whisker}<circle class="{kind}" cx="{x(value):.1f}" cy="{at:.1f}" r="5"/>'


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
