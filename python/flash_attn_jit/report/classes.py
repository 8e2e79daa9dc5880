"""The table of problem classes and their charts."""

from collections.abc import Sequence
from html import escape

from . import charts, html, words
from .findings import Figure, Finding
from .records import Candidate, Device
from .style import RIVAL, mark_of
from .svg import Sheet

MOST_CHARTS, _LEAST_CHARTS = 200, 24
# What the page may weigh, and about what its parts do: where rows alone are many, fewer charts are drawn.
_PAGE_BYTES, _CHART_BYTES, _ROW_BYTES = 2_000_000, 8_500, 180
# Fewer rows a chart where there are many charts, so that the page stays small.
_MANY_CHARTS, _FEWER_ROWS = 60, 12
_MOST_REASONS = 3

_HEADERS = (
    "Problem class",
    "Winner",
    "ms",
    "TFLOP/s",
    "% of peak",
    "Default loses, %",
    "Runner-up loses, %",
    "Told apart",
    "Model's choice loses, %",
    "Predicted / measured",
    "Times as fast as SDPA",
    "Regis&shy;ters",
    "Spilled bytes",
    "Blocks an SM",
    "Rejected",
)


def device_names(findings: Sequence[Finding]) -> dict[Device, str]:
    """Of each device, escaped; empty where there is but one."""
    devices = dict.fromkeys(finding.record.device for finding in findings)
    return {device: escape(str(device)) for device in devices} if len(devices) > 1 else {}


def _prediction(finding: Finding) -> float | None:
    return next((r for c, r in finding.predictions if c.tile == finding.record.winner), None)


def _class_row(finding: Finding, anchor: str | None, devices: dict[Device, str]) -> list[str]:
    record, winner = finding.record, finding.winner_candidate
    problem = escape(str(record.problem))
    name = f'<a href="#{anchor}">{problem}</a>' if anchor else problem
    if devices:
        name += f" {devices[record.device]}"
    if record.is_predicted:
        name += " (predicted)"
    runner_up = finding.runner_up
    lost = runner_up[1].seconds / finding.winner.seconds - 1 if runner_up and finding.winner else None
    told = {True: "yes", False: "no", None: words.NONE}[finding.is_told_apart]
    return [
        name,
        record.winner + (" = default" if record.winner == record.default else ""),
        html.milliseconds(finding.winner.seconds if finding.winner else None),
        words.number(finding.tflops),
        html.percent(finding.share_of_peak),
        html.percent(finding.default_regret),
        html.percent(lost),
        told,
        html.percent(finding.model_regret),
        words.number(_prediction(finding)),
        words.number(finding.times_as_fast),
        html.maybe(winner.registers),
        html.maybe(winner.spilled_bytes),
        html.maybe(winner.blocks_per_multiprocessor),
        str(len(finding.rejected)),
    ]


def _interval(figure: Figure) -> str:
    if figure.low == figure.high:
        return words.NONE
    return f"{html.milliseconds(figure.low)} to {html.milliseconds(figure.high)}"


def _candidates(finding: Finding, name: str, most: int) -> str:
    """The numbers behind a chart, and why the other candidates are not in it."""
    kept = [
        (candidate, figure)
        for rank, (candidate, figure) in enumerate(finding.ranked)
        if rank < most or candidate.tile in (finding.record.default, finding.record.winner)
    ]
    rows = [
        [
            candidate.tile,
            html.milliseconds(figure.seconds),
            _interval(figure),
            html.milliseconds(candidate.predicted_seconds),
            html.maybe(candidate.registers),
            html.maybe(candidate.spilled_bytes),
            html.maybe(candidate.blocks_per_multiprocessor),
            words.NONE if candidate.error is None else f"{candidate.error:.1e}",
        ]
        for candidate, figure in kept
    ]
    headers = ("Tile", "ms", "interval", "predicted", "registers", "spilled", "blocks", "max error")
    table = html.table(name, headers, rows, "", "Milliseconds; intervals of 95 %") if rows else ""
    left_out = len(finding.ranked) - len(kept)
    slower = f"<li>{left_out} more were measured, and are slower." if left_out else ""
    reasons = "".join(_rejected(outcome, them) for outcome, them in finding.rejected_by_outcome.items())
    more = f"<ul>{slower}{reasons}</ul>" if slower or reasons else ""
    total = len(finding.record.candidates)
    return f"<details><summary>Numbers: {total} candidate{'s' * (total > 1)}</summary>{table}{more}</details>"


def _rejected(outcome: str, them: Sequence[Candidate]) -> str:
    shown = []
    for candidate in them[:_MOST_REASONS]:
        reason = candidate.reason if len(candidate.reason) <= 160 else candidate.reason[:157] + "..."
        shown.append(f'<span class="tile">{candidate.tile}</span>' + (f": {escape(reason)}" if reason else ""))
    more = f"; and {len(them) - len(shown)} more" if len(them) > len(shown) else ""
    return f"<li>{escape(outcome)} ({len(them)}): {'; '.join(shown)}{more}"


def _conditions(finding: Finding) -> str:
    """Beside which clock, and what held it down."""
    parts = []
    if finding.clocks:
        low, high = finding.clocks
        parts.append(f"SM clock {low:.0f} to {high:.0f} MHz" if low < high else f"SM clock {low:.0f} MHz")
    if finding.throttled_by:
        parts.append(f"throttled by {', '.join(finding.throttled_by)}")
    return "; ".join(parts)


def _card(finding: Finding, anchor: str, sheet: Sheet, most_rows: int, shows_device: bool) -> str:
    record = finding.record
    title, sizes = words.kernel_title(record.problem), words.size_title(record.problem)
    chart = sheet.chart(
        charts.class_chart(finding, most_rows), f"{title}; {sizes}", charts.class_description(finding, most_rows)
    )
    tag = f' <span class="tag predicted">{words.PREDICTED}</span>' if record.is_predicted else ""
    measured = "for" if record.is_predicted else "measured:"
    lines = [
        f"{escape(sizes[0].upper() + sizes[1:])}; {measured} {escape(str(record.sizes))}",
        escape(str(record.device)) if shows_device else "",
        escape(_conditions(finding)),
    ]
    sub = "".join(f'<p class="sub">{line}</p>' for line in lines if line)
    rule = f"<p>Winner: {escape(record.rule)}</p>" if record.rule else ""
    return (
        f'<article class="card" id="{anchor}"><h3>{escape(title)}{tag}</h3>{sub}{rule}{chart}'
        f"{_candidates(finding, f'n{anchor}', most_rows)}</article>"
    )


def chart_count(classes: int) -> int:
    room = (_PAGE_BYTES - classes * _ROW_BYTES) // _CHART_BYTES
    return min(classes, MOST_CHARTS, max(_LEAST_CHARTS, room)) if classes > MOST_CHARTS else classes


def table(findings: Sequence[Finding]) -> str:
    """Of all; those that have a chart are linked to it."""
    drawn, devices = chart_count(len(findings)), device_names(findings)
    rows = [_class_row(finding, f"p{i}" if i < drawn else None, devices) for i, finding in enumerate(findings)]
    known = [i for i in range(len(_HEADERS)) if any(row[i] != words.NONE for row in rows)]
    rows, headers = [[row[i] for i in known] for row in rows], [_HEADERS[i] for i in known]
    kernels = [finding.record.problem.kernel for finding in findings]
    selects = html.select("Kernel", dict.fromkeys(kernel.kind for kernel in kernels))
    selects += html.select("Mask", dict.fromkeys(kernel.mask for kernel in kernels))
    shown = html.table("classes", headers, rows, "sorts sticky", "Every problem class: press a heading to sort")
    return html.filter_form("classes", selects) + shown


def _legend(findings: Sequence[Finding], most_rows: int) -> str:
    limits = (mark_of(candidate.limited_by) for each in findings for candidate, _ in each.ranked[:most_rows])
    also = []
    if not all(finding.record.is_predicted for finding in findings):
        also = ["\u2758 samples", "\u25ac interval of the median, 95 %", "\u25c7 predicted"]
    rivals = [RIVAL] if any(finding.record.others for finding in findings) else []
    return html.legend([*dict.fromkeys(limits), *rivals], [*also, "\u25b8 off the scale"])


def cards(findings: Sequence[Finding], sheet: Sheet) -> str:
    """The charts, of as many as have one."""
    drawn = findings[: chart_count(len(findings))]
    most_rows = _FEWER_ROWS if len(drawn) > _MANY_CHARTS else charts.MOST_ROWS
    shows_device = bool(device_names(findings))
    shown = "".join(_card(finding, f"p{i}", sheet, most_rows, shows_device) for i, finding in enumerate(drawn))
    said = ""
    if left_out := len(findings) - len(drawn):
        said = (
            f'<div class="banner" role="note">Charts are drawn for the {len(drawn)} classes whose default loses most. '
            f"The other {words.count(left_out)} are rows of the table.</div>"
        )
    return (
        "<p>Each row is a candidate: its tile, what it loses beside the winner, and what limits it, by the model. The "
        f'winner is shaded.</p>{_legend(drawn, most_rows)}{said}<div class="cards">{shown}</div>'
    )
