"""Pieces of HTML that the sections of the page share. What comes from a record is escaped by who puts it in."""

from collections.abc import Iterable, Sequence
from html import escape

from . import words
from .style import Mark


def table(name: str, headers: Iterable[str], rows: Iterable[Sequence[str]], classes: str, caption: str) -> str:
    """Cells are HTML. Closing tags that HTML makes optional are left out: there may be ten thousand rows."""
    head = "".join(f"<th scope=col>{header}" for header in headers)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}" for cell in row) for row in rows)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}">'
        f'<table id="{name}" class="{classes}"><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</thead>\n<tbody>{body}</tbody></table></div>"
    )


def select(label: str, options: Iterable[str]) -> str:
    chosen = "".join(f"<option>{escape(option)}</option>" for option in options)
    return f'<label>{label}<select name="{label}"><option value="">all</option>{chosen}</select></label>'


def filter_form(table: str, selects: str = "") -> str:
    return (
        f'<form hidden data-filters="{table}" role="search"><label>Filter: every word must occur'
        f'<input type="search" name="words" placeholder="hdim128 causal" autocomplete="off"></label>{selects}'
        '<output aria-live="polite"></output></form>'
    )


def legend(marks: Iterable[Mark], also: Iterable[str] = ()) -> str:
    items = [
        f'<li><span aria-hidden="true" style="color:var(--{mark.role})">{mark.symbol}</span> {escape(mark.words)}'
        for mark in marks
    ]
    return f'<ul class="legend">{"".join(items)}{"".join(f"<li>{text}" for text in also)}</ul>'


def fact(name: str, value: str, more: str = "") -> str:
    small = f"<small>{more}</small>" if more else ""
    return f"<div><dt>{name}</dt><dd>{value}{small}</dd></div>"


def milliseconds(seconds: float | None) -> str:
    return words.NONE if seconds is None else f"{seconds * 1e3:#.4g}".removesuffix(".")


def percent(ratio: float | None) -> str:
    return words.NONE if ratio is None else f"{100 * ratio:.1f}".replace("-", words.MINUS)


def maybe(value: object) -> str:
    return words.NONE if value is None else str(value)
