"""The charts, drawn by matplotlib: one a problem class, predicted against measured, and the roofline."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import log10
from typing import Any, NamedTuple

from . import words
from .findings import Figure, Finding, median_or_none
from .records import Device
from .style import KIND_MARKS, OTHER_LABELS, RIVAL, ROLES, Mark, mark_of

_WIDTH = 360  # of every chart, in pixels: what a phone shows without shrinking letters
_ROW, _TOP, _BOTTOM = 27, 6, 36
_SIDE = 10
_PIXELS_PER_INCH = 72  # of matplotlib's SVG
_WIDEST = 1.6  # times slower than the winner that a row's marks may be and still stand on the scale
MOST_ROWS = 16
_BEYOND = 5  # matplotlib's caret to the right

_SETTINGS = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "flash-attn-jit",  # the same bytes every time
    "text.parse_math": False,  # a name may hold a dollar
    "path.simplify": False,
    "font.size": 11,
    "axes.linewidth": 0.8,
}


def _colour(role: str) -> str:
    return ROLES[role].light


@contextmanager
def drawing() -> Iterator[None]:
    """Around everything that makes or writes a chart."""
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("The report's charts need matplotlib: pip install 'flash-attn-jit[bench]'") from error
    with matplotlib.rc_context(_SETTINGS):  # type: ignore[arg-type]
        yield


def _figure(height: float, left: float = _SIDE, bottom: float = _BOTTOM) -> tuple[Any, Any]:
    """A figure without a background, and its axes with a grid of upright lines."""
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(_WIDTH / _PIXELS_PER_INCH, height / _PIXELS_PER_INCH), dpi=_PIXELS_PER_INCH)
    figure.patch.set_visible(False)
    box = (left / _WIDTH, bottom / height, (_WIDTH - left - _SIDE) / _WIDTH, (height - bottom - _TOP) / height)
    axes = figure.add_axes(box)
    axes.patch.set_visible(False)
    axes.set_axisbelow(True)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_colour("edge"))
    axes.grid(axis="x", color=_colour("grid"), linewidth=0.8)
    axes.tick_params(length=0, colors=_colour("muted"), labelsize=11, which="both")
    axes.xaxis.label.set_color(_colour("muted"))
    axes.yaxis.label.set_color(_colour("muted"))
    return figure, axes


class _Row(NamedTuple):
    """A line of a class's chart: a candidate, or an attention of PyTorch's."""

    label: str
    mark: Mark
    figure: Figure
    samples: Sequence[float]
    predicted: float | None
    is_winner: bool
    is_default: bool


def _rows(finding: Finding, most: int) -> list[_Row]:
    """The fastest candidates, the default and the winner among them whatever their rank, then PyTorch's."""
    record = finding.record
    ranked = finding.ranked
    kept = [
        (candidate, figure)
        for rank, (candidate, figure) in enumerate(ranked)
        if rank < most or candidate.tile in (record.default, record.winner)
    ]
    rows = []
    for candidate, figure in kept:
        is_winner, is_default = candidate.tile == record.winner, candidate.tile == record.default
        lost = figure.seconds / finding.winner.seconds - 1 if finding.winner else None
        parts = [
            candidate.tile,
            "winner" if is_winner else "",
            "default" if is_default else "",
            words.duration(figure.seconds) if is_winner or lost is None else words.loss(lost),
            candidate.limited_by,
        ]
        rows.append(
            _Row(
                " · ".join(filter(None, parts)),
                mark_of(candidate.limited_by),
                figure,
                [sample.seconds for sample in candidate.samples],
                None if record.is_predicted else candidate.predicted_seconds,
                is_winner,
                is_default,
            )
        )
    for name, seconds in sorted(record.others.items(), key=lambda item: item[1]):
        beside = f" · {words.loss(seconds / finding.winner.seconds - 1)}" if finding.winner else ""
        label = f"{OTHER_LABELS.get(name, name)}{beside}"
        rows.append(_Row(label, RIVAL, Figure(seconds, seconds, seconds, False), [], None, False, False))
    return rows


class _Scale(NamedTuple):
    """The seconds that a chart shows; what is beyond is drawn at its right end."""

    low: float
    high: float
    factor: float
    unit: str

    def place(self, seconds: float) -> float:
        return min(seconds, self.high) * self.factor


def _scale(finding: Finding, rows: Sequence[_Row]) -> _Scale:
    best = min(row.figure.seconds for row in rows)
    end = best * _WIDEST
    shown = [
        seconds
        for row in rows
        for seconds in (row.figure.low, row.figure.high, row.figure.seconds, *row.samples, row.predicted)
        if seconds is not None and best / _WIDEST <= seconds <= end
    ]
    low, high = min(shown), max(shown)
    if any(row.figure.seconds > high for row in rows):
        high = max(high, min(end, 1.1 * high))
    margin = 0.04 * max(high - low, 0.02 * high)
    factor, unit = (1e6, "microseconds") if high < 1e-3 else (1e3, "milliseconds") if high < 1 else (1.0, "seconds")
    return _Scale(low - margin, high + margin, factor, unit)


_NOTHING = float("nan")  # between the parts of one drawn line: a line for all rows is smaller and faster than one each
_Places = Sequence[tuple[int, _Row]]


def _draw_samples(axes: Any, places: _Places, scale: _Scale) -> None:
    xs: list[float] = []
    ys: list[float] = []
    for y, row in places:
        for seconds in row.samples:
            if scale.low <= seconds <= scale.high:
                xs += [seconds * scale.factor, seconds * scale.factor, _NOTHING]
                ys += [y - 0.14, y + 0.14, _NOTHING]
    if xs:
        axes.plot(xs, ys, color=_colour("muted"), linewidth=0.7, alpha=0.8)


def _draw_medians(axes: Any, places: _Places, scale: _Scale) -> None:
    """With their intervals, by what limits them."""
    for mark in dict.fromkeys(row.mark for _, row in places):
        of_mark = [(y, row.figure) for y, row in places if row.mark == mark]
        spread = [(y, each) for y, each in of_mark if each.low < each.high and each.seconds <= scale.high]
        if spread:
            xs = [x for _, each in spread for x in (scale.place(each.low), scale.place(each.high), _NOTHING)]
            ys = [x for y, _ in spread for x in (y, y, _NOTHING)]
            axes.plot(xs, ys, color=_colour(mark.role), linewidth=3, alpha=0.45, solid_capstyle="butt")
        for is_beyond, marker in ((False, mark.marker), (True, _BEYOND)):
            chosen = [(scale.place(each.seconds), y) for y, each in of_mark if (each.seconds > scale.high) == is_beyond]
            if chosen:
                _draw_marks(axes, chosen, marker, markersize=6, color=_colour(mark.role), markeredgewidth=0)


def _draw_predictions(axes: Any, places: _Places, scale: _Scale) -> None:
    shown = [
        (row.predicted * scale.factor, y)
        for y, row in places
        if row.predicted is not None and scale.low <= row.predicted <= scale.high
    ]
    if shown:
        hollow = {"markerfacecolor": "none", "markeredgecolor": _colour("ink"), "markeredgewidth": 0.9}
        _draw_marks(axes, shown, "d", markersize=7.5, **hollow)


def _draw_marks(axes: Any, at: Sequence[tuple[float, float]], marker: "str | int", **settings: Any) -> None:
    axes.plot([x for x, _ in at], [y for _, y in at], linestyle="none", marker=marker, clip_on=False, **settings)


def _write_labels(axes: Any, places: _Places, scale: _Scale) -> None:
    for y, row in places:
        is_marked = row.is_winner or row.is_default
        if row.is_winner:
            axes.axhspan(y - 0.28, y + 0.72, color=_colour("winner"), linewidth=0, zorder=0)
        axes.text(
            scale.low * scale.factor,
            y + 0.42,
            row.label,
            fontsize=10,
            fontfamily="DejaVu Sans Mono",
            color=_colour("ink" if is_marked else "muted"),
            fontweight=700 if is_marked else 400,
            verticalalignment="center",
        )


def class_chart(finding: Finding, most_rows: int = MOST_ROWS) -> Any:
    """Every measured candidate, or the fastest of many: median, interval, samples and prediction."""
    rows = _rows(finding, most_rows)
    figure, axes = _figure(_TOP + _BOTTOM + _ROW * max(1, len(rows)))
    axes.set_yticks([])
    axes.set_ylim(-0.36, max(1, len(rows)) - 0.26)
    if not rows:
        axes.set_xticks([])
        axes.text(0.5, 0.5, "no candidate was measured", transform=axes.transAxes, horizontalalignment="center")
        return figure
    scale = _scale(finding, rows)
    places = list(zip(reversed(range(len(rows))), rows))
    for draw in (_draw_samples, _draw_medians, _draw_predictions, _write_labels):
        draw(axes, places, scale)
    axes.set_xlim(scale.low * scale.factor, scale.high * scale.factor)
    axes.locator_params(axis="x", nbins=5)
    axes.ticklabel_format(axis="x", useOffset=False)
    note = f", {words.PREDICTED.upper()}" if finding.record.is_predicted else ""
    beyond = "; ▸ off the scale" if any(row.figure.seconds > scale.high for row in rows) else ""
    axes.set_xlabel(f"{scale.unit} a launch{note}{beyond}")
    return figure


def class_description(finding: Finding, most_rows: int = MOST_ROWS) -> str:
    """What the chart shows, for those who do not see it."""
    labels = [row.label for row in _rows(finding, most_rows)[:6]]
    source = "Predicted, not measured. " if finding.record.is_predicted else ""
    return f"{source}Candidates, the fastest first: {'; '.join(' '.join(label.split()) for label in labels)}."


class _Dot(NamedTuple):
    x: float
    y: float
    kind: str
    is_bold: bool = False


def _thinned(dots: Sequence[_Dot], most: int) -> list[_Dot]:
    """At most about `most`, by leaving out those that fall on a place where one of their kind stands already."""
    step = 0.004
    while True:
        kept: dict[tuple[int, int, str], _Dot] = {}
        for dot in dots:
            place = (round(log10(dot.x) / step), round(log10(dot.y) / step), dot.kind)
            if place not in kept or (dot.is_bold and not kept[place].is_bold):
                kept[place] = dot
        if len(kept) <= most:
            return list(kept.values())
        step *= 1.5


def _draw_dots(axes: Any, dots: Sequence[_Dot]) -> None:
    for kind, mark in KIND_MARKS.items():
        for is_bold in (False, True):
            chosen = [dot for dot in dots if dot.kind == kind and dot.is_bold == is_bold]
            if chosen:
                axes.plot(
                    [dot.x for dot in chosen],
                    [dot.y for dot in chosen],
                    mark.marker,
                    color=_colour(mark.role),
                    markersize=5.5 if is_bold else 3.5,
                    alpha=0.9 if is_bold else 0.55,
                    markeredgewidth=0,
                )


def _plain_ticks(axis: Any, low: float, high: float) -> None:
    """Of a logarithmic axis, in plain numbers: the fewer, the more decades it has."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    decades = log10(high / low)
    steps = (1, 1.5, 2, 3, 4, 5, 6, 8) if decades <= 0.9 else (1, 2, 5) if decades <= 2.5 else (1,)
    ticks = [step * 10.0**power for power in range(-12, 13) for step in steps if low <= step * 10.0**power <= high]
    axis.set_major_locator(FixedLocator(ticks[:: 1 + len(ticks) // 9]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}" if value < 1e5 else f"{value:.0e}"))


def _logarithmic(axes: Any, xs: tuple[float, float], ys: tuple[float, float]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(*xs)
    axes.set_ylim(*ys)
    _plain_ticks(axes.xaxis, *xs)
    _plain_ticks(axes.yaxis, *ys)
    axes.grid(axis="y", color=_colour("grid"), linewidth=0.8)


MOST_DOTS = 1500


def prediction_chart(findings: Sequence[Finding]) -> Any | None:
    """Predicted against measured milliseconds of every candidate that has both; winners are drawn larger."""
    dots = [
        _Dot(seconds * 1e3, ratio * seconds * 1e3, finding.record.problem.kernel.kind, is_winner)
        for finding in findings
        for candidate, ratio in finding.predictions
        for seconds, is_winner in [_measured(finding, candidate.tile)]
    ]
    if not dots:
        return None
    low, high = (choose(value for dot in dots for value in dot[:2]) for choose in (min, max))
    ends = (low / 1.3, high * 1.3)
    figure, axes = _figure(320, left=52)
    _logarithmic(axes, ends, ends)
    axes.fill_between(ends, [0.9 * x for x in ends], [1.1 * x for x in ends], color=_colour("winner"), linewidth=0)
    axes.plot(ends, ends, color=_colour("edge"), linewidth=1)
    _draw_dots(axes, _thinned(dots, MOST_DOTS))
    axes.set_xlabel("measured, milliseconds")
    axes.set_ylabel("predicted, milliseconds")
    return figure


def _measured(finding: Finding, tile: str) -> tuple[float, bool]:
    figure = finding.figure(tile)
    assert figure is not None
    return figure.seconds, tile == finding.record.winner


class Roof(NamedTuple):
    """One device. Its peaks are the medians of what its records measured, a little else each time."""

    device: Device
    is_predicted: bool
    peak_tflops: float | None
    peak_gigabytes: float | None


def by_roof(findings: Sequence[Finding]) -> list[tuple[Roof, list[Finding]]]:
    """Those with the most findings first."""
    found: dict[tuple[Device, bool], list[Finding]] = {}
    for finding in findings:
        found.setdefault((finding.record.device, finding.record.is_predicted), []).append(finding)
    return [
        (
            Roof(
                device,
                is_predicted,
                median_or_none(finding.record.environment.peak_tflops for finding in them),
                median_or_none(finding.record.environment.peak_gigabytes for finding in them),
            ),
            them,
        )
        for (device, is_predicted), them in sorted(found.items(), key=lambda item: -len(item[1]))
    ]


def roofline_chart(roof: Roof, findings: Sequence[Finding]) -> Any | None:
    """The winners by operations a byte and speed, under the device's peaks where they were measured."""
    dots = [
        _Dot(finding.intensity, finding.tflops, finding.record.problem.kernel.kind, True)
        for finding in findings
        if finding.intensity and finding.tflops
    ]
    if not dots:
        return None
    peak, slope = roof.peak_tflops, roof.peak_gigabytes
    ridge = peak * 1e3 / slope if peak and slope else None
    across = [dot.x for dot in dots] + ([ridge] if ridge else [])
    up = [dot.y for dot in dots] + ([peak] if peak else [])
    xs = (min(across) / 2, max(across) * 1.6)
    ys = (min(up) / 2, max(up) * 1.5)
    figure, axes = _figure(320, left=52)
    _logarithmic(axes, xs, ys)
    if peak:
        begin = max(xs[0], min(ridge, xs[1])) if ridge else xs[0]
        axes.plot([begin, xs[1]], [peak, peak], color=_colour("ink"), linewidth=1.2)
        _roof_label(axes, xs[1], peak, f"{words.number(peak)} TFLOP/s", "right")
    if slope:
        end = min(xs[1], ridge or xs[1], ys[1] * 1e3 / slope)
        begin = max(xs[0], ys[0] * 1e3 / slope)
        if begin < end:
            axes.plot([begin, end], [begin * slope / 1e3, end * slope / 1e3], color=_colour("ink"), linewidth=1.2)
            _roof_label(axes, begin * 1.3, begin * slope / 1e3, f"{words.number(slope)} GB/s", "left")
    _draw_dots(axes, _thinned(dots, MOST_DOTS))
    axes.set_xlabel("FLOPs a byte, every tensor moved once")
    axes.set_ylabel("TFLOP/s" + (f", {words.PREDICTED}" if roof.is_predicted else ""))
    return figure


def _roof_label(axes: Any, x: float, y: float, text: str, side: str) -> None:
    axes.text(x, y * 1.06, text, fontsize=11, color=_colour("ink"), horizontalalignment=side)


def write_png(figure: Any, path: Any, title: str) -> None:
    """The chart alone, in the light theme, under its title."""
    figure.patch.set_visible(True)
    figure.patch.set_facecolor(_colour("surface"))
    height = figure.get_figheight()
    extra = 34 / _PIXELS_PER_INCH
    for axes in figure.axes:
        box = axes.get_position()
        axes.set_position(
            (box.x0, box.y0 * height / (height + extra), box.width, box.height * height / (height + extra))
        )
    figure.set_figheight(height + extra)
    figure.text(
        _SIDE / _WIDTH, 1 - 0.12 / (height + extra), title, fontsize=9, color=_colour("ink"), verticalalignment="top"
    )
    figure.savefig(path, dpi=2 * _PIXELS_PER_INCH, metadata={"Software": None})
