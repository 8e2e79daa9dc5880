"""The page: one HTML file with everything in it, that runs no script but its own and asks no network."""

import base64
import hashlib
from collections.abc import Iterator, Sequence
from datetime import datetime
from html import escape
from importlib.resources import files
from typing import NamedTuple

from . import charts, classes, overall
from .comparison import Compared
from .findings import Finding, Summary, by_regret, summarize
from .style import theme
from .svg import Sheet

_MOST_COMPLAINTS = 50


def _predicted_banner(summary: Summary) -> str:
    if not summary.predicted_records:
        return ""
    if summary.predicted_records == summary.classes:
        text = "Every figure on this page is <strong>predicted</strong> by the model of the card. Nothing was measured."
    else:
        text = (
            f"{summary.predicted_records} of {summary.classes} classes are <strong>predicted</strong> by the model of "
            "the card, not measured; each says so."
        )
    return f'<div class="banner" role="note">{text}</div>'


def _complaints(complaints: Sequence[str]) -> str:
    if not complaints:
        return ""
    items = "".join(f"<li>{escape(line)}" for line in complaints[:_MOST_COMPLAINTS])
    more = len(complaints) - _MOST_COMPLAINTS
    rest = f"<li>and {more} more" if more > 0 else ""
    what = "One record" if len(complaints) == 1 else f"{len(complaints)} records"
    return f'<div class="banner" role="note">{what} could not be read:<ul>{items}{rest}</ul></div>'


def _file(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _head(title: str, css: str, script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{css}</style></head>\n"
    )


def _css(sheet: Sheet) -> str:
    themes = (
        f":root{{color-scheme:light dark;{theme('light')}}}\n"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{theme('dark')}}}}}\n"
    )
    return themes + _file("page.css") + sheet.css()


class Page(NamedTuple):
    """What a page is made of."""

    findings: Sequence[Finding]
    complaints: Sequence[str]
    source: str
    compared: Sequence[Compared] | None = None
    against: str = ""


def _days(findings: Sequence[Finding]) -> str:
    days = sorted(finding.record.when[:10] for finding in findings)
    return days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"


def _navigation(sections: dict[str, str]) -> str:
    links = "".join(f'<a href="#{name}">{title}</a>' for name, (title, body) in _titled(sections) if body)
    return f'<nav aria-label="Sections">{links}</nav>'


_TITLES = {
    "comparison": "Side by side",
    "table": "Problem classes",
    "overall": "Model and roofline",
    "charts": "Candidates",
    "environment": "Environment",
}


def _titled(sections: dict[str, str]) -> Iterator[tuple[str, tuple[str, str]]]:
    return ((name, (title, sections[name])) for name, title in _TITLES.items())


def _sections(page: Page, findings: Sequence[Finding], sheet: Sheet) -> dict[str, str]:
    """By name; empty where there is nothing to show."""
    with charts.drawing():
        cards = classes.cards(findings, sheet)
        over_all = overall.prediction(findings, sheet) + overall.rooflines(findings, sheet)
    compared = page.compared
    return {
        "comparison": overall.comparison(compared, page.source, page.against) if compared is not None else "",
        "table": classes.table(findings),
        "overall": f'<div class="cards">{over_all}</div>' if over_all else "",
        "charts": cards,
        "environment": overall.environment(findings),
    }


def render(page: Page, now: datetime) -> str:
    """There is at least one finding."""
    sheet = Sheet()
    findings = by_regret(page.findings)
    summary = summarize(findings)
    sections = _sections(page, findings, sheet)
    devices = ", ".join(dict.fromkeys(finding.record.device.name for finding in findings))
    script = _file("page.js")
    parts = [
        _head(f"Tuning report: {devices}", _css(sheet), script),
        f'<body>{sheet.shapes()}<header><h1>Tuning report</h1><p class="sub">{escape(devices)}, {_days(findings)}</p>',
        _predicted_banner(summary),
        _complaints(page.complaints),
        f"{_navigation(sections)}</header><main>",
        overall.facts(summary),
        *(
            f'<section><h2 id="{name}">{title}</h2>{body}</section>'
            for name, (title, body) in _titled(sections)
            if body
        ),
        f"</main><footer>From <code>{escape(page.source)}</code>, drawn {now:%Y-%m-%d %H:%M} UTC.</footer>",
        f"<script>{script}</script></body></html>\n",
    ]
    return "\n".join(part for part in parts if part)
