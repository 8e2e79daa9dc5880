"""``python -m flash_attn_jit.report``: draws tuning records, from a database or from the cache, into one HTML page."""

import argparse
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from .._environment_report import cache_folder
from . import charts, words
from .classes import chart_count
from .comparison import Compared, compare, counts
from .findings import Finding, by_regret, summarize
from .page import Page, render
from .records import Found, read

_DEMO = Path(__file__).parent.parent / "data" / "demo_records.json"
_MOST_COMPLAINTS = 20


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m flash_attn_jit.report",
        description="Draws tuning records into one HTML page that needs no network. Nothing is run and nothing is "
        "timed. Records come from the cache's folder unless --database names others.",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="the page (default: report.html, or none with --png)")
    parser.add_argument(
        "--png", type=Path, metavar="DIR", help="write the charts alone, as PNG files, into this folder"
    )
    parser.add_argument(
        "--database",
        type=Path,
        metavar="PATH",
        help="what `flash-attn-jit tune --export` wrote, or a folder of records",
    )
    parser.add_argument("--against", type=Path, metavar="PATH", help="another database or folder to compare it with")
    parser.add_argument(
        "--demo", action="store_true", help="draw records of a T4 that its model predicted, which come with the package"
    )
    options = parser.parse_args(arguments)
    if options.demo and options.database:
        parser.error("--demo draws records of its own: leave --database out, or --demo")
    if options.html is None and options.png is None:
        options.html = Path("demo-report.html" if options.demo else "report.html")
    if options.html is not None and not options.html.absolute().parent.is_dir():
        parser.error(f"--html is {options.html}: there is no folder {options.html.parent}")
    return options


def _cache_folder() -> Path:
    try:
        folder = cache_folder()
    except RuntimeError as error:
        raise SystemExit(f"The cache's folder is not known: {error}") from None
    if folder is None:
        raise SystemExit("There is no cache folder: name a database with --database, or see the demo with --demo.")
    return folder / "tuning"


def _read(path: Path, if_missing: str) -> Found:
    if not path.exists():
        raise SystemExit(if_missing)
    found = read(path)
    for complaint in found.complaints[:_MOST_COMPLAINTS]:
        print(f"passed over: {complaint}", file=sys.stderr)
    if len(found.complaints) > _MOST_COMPLAINTS:
        print(f"passed over: {len(found.complaints) - _MOST_COMPLAINTS} more", file=sys.stderr)
    return found


def _summary_lines(findings: Sequence[Finding]) -> list[str]:
    summary = summarize(findings)
    lines = [f"{summary.classes} problem classes, {summary.candidates} candidates"]
    if summary.predicted_records:
        lines.append(f"{summary.predicted_records} of the classes are predicted, not measured")
    if summary.gain is not None and summary.worst:
        lines.append(
            f"beside the default tiles: {words.loss(summary.gain - 1)} in the geometric mean; the default loses "
            f"at most {words.percent(summary.worst.default_regret)} ({summary.worst.record.problem})"
        )
    if summary.times_as_fast is not None:
        lines.append(f"beside PyTorch's SDPA: {words.times(summary.times_as_fast)} as fast in the geometric mean")
    if summary.unclear:
        lines.append(f"winner and runner-up cannot be told apart in {summary.unclear}")
    return lines


def comparison_lines(compared: Sequence[Compared]) -> list[str]:
    """The two databases as text."""
    total = ", ".join(f"{number} {verdict}" for verdict, number in counts(compared).items())
    problems = [str(each.finding.record.problem) for each in compared]
    width = max(map(len, problems), default=0)
    lines = [
        f"{problem:{width}}  {each.verdict:14}  {words.times(each.ratio):>7}  {each.reason}"
        for problem, each in zip(problems, compared)
    ]
    return [*(line.rstrip() for line in lines), total or "nothing to compare"]


def _write_charts(findings: Sequence[Finding], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    drawn = by_regret(findings)[: chart_count(len(findings))]
    with charts.drawing():
        for i, finding in enumerate(drawn):
            problem = finding.record.problem
            title = f"{words.kernel_title(problem)}\n{finding.record.device.name}; {words.size_title(problem)}"
            charts.write_png(
                charts.class_chart(finding), folder / f"{i:03}_{str(problem).replace(' ', '_')}.png", title
            )
        if figure := charts.prediction_chart(findings):
            charts.write_png(figure, folder / "predicted_against_measured.png", "Predicted against measured")
        for i, (roof, them) in enumerate(charts.by_roof(findings)):
            if figure := charts.roofline_chart(roof, them):
                charts.write_png(figure, folder / f"roofline_{i}.png", f"Roofline of {roof.device}")
    left_out = f"; those of the {len(drawn)} classes whose default loses most" if len(findings) > len(drawn) else ""
    print(f"charts in {folder}{left_out}")


def _read_named(flag: str, path: Path) -> Found:
    return _read(path, f"{flag} is {path}: there is none; accepted: a database or a folder of records")


def _read_source(options: argparse.Namespace) -> tuple[str, Found]:
    """What the records come from, in words, and what was found there."""
    if options.demo:
        return "the package's demo", _read(_DEMO, f"This installation has no demo records: {_DEMO} is missing.")
    if options.database:
        return str(options.database), _read_named("--database", options.database)
    folder = _cache_folder()
    missing = (
        f"There are no tuning records in {folder} yet: `flash-attn-jit tune` makes them, --database names others, and "
        "--demo draws some that the model of a T4 predicted."
    )
    return str(folder), _read(folder, missing)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    source, found = _read_source(options)
    findings = [Finding(record) for record in found.records]
    if not findings:
        raise SystemExit(
            f"{source} holds no record that can be read ({found.files} files, {len(found.complaints)} bad)."
        )
    compared = None
    if options.against:
        compared = compare(findings, [Finding(record) for record in _read_named("--against", options.against).records])
        print("\n".join(comparison_lines(compared)))
    print("\n".join(_summary_lines(findings)))
    if options.png:
        _write_charts(findings, options.png)
    if options.html:
        page = Page(findings, found.complaints, source, compared, str(options.against or ""))
        options.html.write_text(render(page, datetime.now(timezone.utc)), encoding="utf-8")
        print(options.html.absolute())


if __name__ == "__main__":
    main()
