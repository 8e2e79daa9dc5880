"""What is drawn over all classes: predicted against measured, the rooflines, the environment, two databases."""

from collections.abc import Sequence
from html import escape

from . import charts, html, words
from .classes import device_names
from .comparison import FASTER, SAME, SLOWER, VERDICTS, Compared, counts
from .findings import SAME_WITHIN, Finding, Origin, Summary, geometric_mean, origins, summarize
from .records import Device
from .style import KIND_MARKS
from .svg import Sheet

_MOST_ROOFS = 6
_VERDICT_SYMBOLS = dict(zip(VERDICTS, ("▲", "▼", "=", "?", "←", "→")))


def facts(summary: Summary) -> str:
    facts = [
        html.fact("Problem classes", words.count(summary.classes), f"{words.count(summary.candidates)} candidates")
    ]
    if summary.gain is not None:
        facts.append(html.fact("Faster than the default tiles", words.percent(summary.gain - 1), "geometric mean"))
    if summary.worst:
        problem = escape(str(summary.worst.record.problem))
        facts.append(html.fact("The default loses at most", words.percent(summary.worst.default_regret), problem))
    if summary.times_as_fast is not None:
        facts.append(html.fact("As fast as PyTorch's SDPA", words.times(summary.times_as_fast), "geometric mean"))
    if summary.predicted_records < summary.classes:
        more = "classes whose intervals overlap"
        facts.append(html.fact("Winner and runner-up not told apart", words.count(summary.unclear), more))
    if summary.model_gain is not None:
        facts.append(
            html.fact(
                "The model's choice loses", words.percent(summary.model_gain - 1), "geometric mean, beside the winner"
            )
        )
    if summary.within_tenth is not None:
        facts.append(
            html.fact(
                "Predicted within 10 %",
                words.percent(summary.within_tenth, 0),
                f"of {words.count(summary.predictions)} measured candidates",
            )
        )
    return f'<dl class="facts">{"".join(facts)}</dl>'


def prediction(findings: Sequence[Finding], sheet: Sheet) -> str:
    chart = charts.prediction_chart(findings)
    if chart is None:
        return ""
    ratios = [ratio for finding in findings for _, ratio in finding.predictions]
    summary = summarize(findings)
    text = (
        f"{words.count(len(ratios))} candidates; {words.percent(summary.within_tenth, 0)} lie within the band of 10 %. "
        "Large marks are winners. Where marks fall together one is drawn."
    )
    svg = sheet.chart(chart, "Predicted against measured", text)
    legend = _kinds_legend([finding for finding in findings if finding.predictions])
    return (
        f'<article class="card"><h3>Predicted against measured</h3><figure>{svg}<figcaption>{text}</figcaption>'
        f"</figure>{legend}</article>"
    )


def _peaks(roof: charts.Roof) -> str:
    lines = [f"{words.number(roof.peak_tflops)} TFLOP/s"] if roof.peak_tflops else []
    lines += [f"{words.number(roof.peak_gigabytes)} GB/s"] if roof.peak_gigabytes else []
    if not lines:
        return "The card's peaks were not measured."
    source = "as the model takes them" if roof.is_predicted else "measured"
    return f"Lines: the card's peaks, {source}, {' and '.join(lines)}."


def _roofline(roof: charts.Roof, findings: Sequence[Finding], sheet: Sheet) -> str:
    """Empty where no winner can be placed."""
    chart = charts.roofline_chart(roof, findings)
    if chart is None:
        return ""
    unknown = sum(finding.tflops is None for finding in findings)
    missing = f" {unknown} are left out: the record does not tell a window's widths." if unknown else ""
    shown = len(findings) - unknown
    text = f"{shown} winner{'s' if shown > 1 else ''}. {_peaks(roof)}{missing}"
    tag = f' <span class="tag predicted">{words.PREDICTED}</span>' if roof.is_predicted else ""
    svg = sheet.chart(chart, f"Roofline of {roof.device}" + (f", {words.PREDICTED}" if roof.is_predicted else ""), text)
    return (
        f'<article class="card"><h3>Roofline, {escape(str(roof.device))}{tag}</h3><figure>{svg}'
        f"<figcaption>{escape(text)}</figcaption></figure>{_kinds_legend(findings)}</article>"
    )


def rooflines(findings: Sequence[Finding], sheet: Sheet) -> str:
    return "".join(_roofline(roof, them, sheet) for roof, them in charts.by_roof(findings)[:_MOST_ROOFS])


def _kinds_legend(findings: Sequence[Finding]) -> str:
    kinds = {finding.record.problem.kernel.kind for finding in findings}
    return html.legend(mark for kind, mark in KIND_MARKS.items() if kind in kinds)


def _origin_row(origin: Origin) -> list[str]:
    record, environment = origin.record, origin.record.environment
    return [
        escape(str(record.device)),
        escape(str(record.policy)),
        escape(environment.library),
        escape(html.maybe(environment.driver)),
        escape(html.maybe(environment.nvrtc)),
        words.number(environment.power_limit_watts),
        words.number(origin.peak_tflops),
        words.number(origin.peak_gigabytes),
        f'<span class="tile">{escape(record.templates[:12])}</span>',
        str(origin.records),
    ]


def environment(findings: Sequence[Finding]) -> str:
    rows = [_origin_row(origin) for origin in origins(findings)]
    headers = (
        "Device",
        "How it was timed",
        "Library",
        "Driver",
        "NVRTC",
        "Power limit, W",
        "Peak, TFLOP/s",
        "Peak, GB/s",
        "Templates",
        "Records",
    )
    throttled = sum(bool(finding.throttled_by) for finding in findings)
    note = (
        f"<p>While {throttled} of {len(findings)} classes were measured the card throttled in some rounds; candidates "
        "take turns, so that all meet the same clocks.</p>"
        if throttled
        else ""
    )
    table = html.table("environments", headers, rows, "words", "Where the records come from")
    return note + table


def _compared_row(each: Compared, devices: dict[Device, str]) -> list[str]:
    def cells(finding: Finding | None) -> list[str]:
        if finding is None:
            return [words.NONE, words.NONE]
        return [html.milliseconds(finding.winner.seconds if finding.winner else None), finding.record.winner]

    name = escape(str(each.finding.record.problem))
    if devices:
        name += f" {devices[each.finding.record.device]}"
    verdict = f"{_VERDICT_SYMBOLS[each.verdict]} {each.verdict}"
    return [name, verdict, words.number(each.ratio), *cells(each.here), *cells(each.there), escape(each.reason)]


def comparison(compared: Sequence[Compared], here: str, there: str) -> str:
    devices = device_names([each.finding for each in compared])
    told = geometric_mean(each.ratio for each in compared if each.ratio and each.verdict in (FASTER, SLOWER, SAME))
    facts = html.fact("As fast here as there", words.times(told), "geometric mean of what can be told") if told else ""
    facts += "".join(
        html.fact(f"{_VERDICT_SYMBOLS[verdict]} {verdict}", words.count(number))
        for verdict, number in counts(compared).items()
    )
    headers = ("Problem class", "Verdict", "Times as fast", "ms here", "Tile here", "ms there", "Tile there", "Why")
    table = html.table(
        "compared", headers, [_compared_row(each, devices) for each in compared], "sorts sticky", "The two databases"
    )
    selects = html.select("Verdict", counts(compared))
    return (
        f"<p>Here: <code>{escape(here)}</code>. There: <code>{escape(there)}</code>. "
        "Faster and slower are said where the intervals of the two winners do not overlap; same where they lie within "
        f"{words.percent(SAME_WITHIN, 0)} altogether; else it cannot be told.</p>"
        f'<dl class="facts">{facts}</dl>{html.filter_form("compared", selects)}{table}'
    )
