"""The tuning report: what it reads, what it concludes, and what it draws; test_report_page.py has it in a browser."""

import copy
import itertools
import json
import random
import re
import time
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from xml.etree import ElementTree

import pytest
import tuning_records
from conftest import TESTS_ALL

from flash_attn_jit import _core
from flash_attn_jit.report import __main__ as report, classes, comparison, style, work
from flash_attn_jit.report.findings import Figure, Finding, summarize
from flash_attn_jit.report.page import Page, render
from flash_attn_jit.report.records import BadRecord, Kernel, Sizes, parse_record, read

NOW = datetime(2026, 11, 27, tzinfo=timezone.utc)


def finding(**arguments):
    return Finding(parse_record(tuning_records.record(**arguments)))


def page(values, **more):
    findings = [Finding(parse_record(value)) for value in values]
    return render(Page(findings, more.pop("complaints", []), "a test", **more), NOW)


@pytest.fixture
def database(tmp_path):
    def write(values, name="database.json"):
        path = tmp_path / name
        path.write_text(json.dumps(tuning_records.database(values)))
        return path

    return write


# Work


@pytest.mark.parametrize("mask", ["full", "causal", "window"])
def test_visible_pairs_are_those_that_one_counts(mask):
    widths = [(-1, -1), (0, 0), (2, 5), (-1, 3), (4, -1)] if mask == "window" else [(None, None)]
    for queries, keys, (left, right) in itertools.product((1, 2, 7, 12), (1, 3, 7, 15), widths):
        bounds = {"full": (-1, -1), "causal": (-1, 0), "window": (left, right)}[mask]
        seen = 0
        for i, j in itertools.product(range(queries), range(keys)):
            behind = i + keys - queries - j
            seen += (bounds[0] < 0 or behind <= bounds[0]) and (bounds[1] < 0 or -behind <= bounds[1])
        assert work.visible_pairs(Sizes(1, 1, 1, queries, keys, left, right), mask) == seen


def test_flops_and_bytes():
    sizes = Sizes(2, 8, 4, 100, 200)
    kernel = Kernel("", "fwd", 64, "full", (), 2)
    assert work.flops(kernel, sizes) == 4 * 2 * 8 * 100 * 200 * 64
    assert work.bytes_moved(kernel, sizes) == 2 * (8 * 100 * (2 * 2 * 64 + 4) + 4 * 200 * 2 * 2 * 64)
    backward = [work.flops(Kernel("", kind, 64, "full", (), 2), sizes) for kind in ("bwd_dkdv", "bwd_dq")]
    assert backward == [2 * work.flops(kernel, sizes), 1.5 * work.flops(kernel, sizes)]


def test_a_window_of_unknown_widths_has_no_flops():
    value = tuning_records.record(mask="window")
    assert Finding(parse_record(value)).tflops is None
    value["measured"] |= {"window_left": 64, "window_right": 0}
    assert Finding(parse_record(value)).tflops > 0
    assert "window's widths" in page([tuning_records.record(mask="window"), tuning_records.record()])


# Reading


def test_a_record_is_read():
    record = parse_record(tuning_records.record(head_dim=128))
    assert record.device.name == "Tesla T4" and record.problem.kernel.head_dim == 128
    assert str(record.problem) == "fwd hdim128 fp16 causal gqa1 vec16 q1024 k1024 bh64"
    assert len(record.candidates) == 19 and len(record.candidate(record.winner).samples) == 7


def changed(path, value):
    """A record with another value at the path; value "absent" takes it out."""
    made = tuning_records.record()
    at = made
    for name in path[:-1]:
        at = at[name]
    if value == "absent":
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return made


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (["format"], "other", "format is 'other'; accepted: flash-attn-jit tuning record"),
        (["version"], 2, "version is 2; accepted: an integer from 1 to 1"),
        (["version"], True, "version is True"),
        (["key"], [], "key is a list of 0; accepted: an object"),
        (["winner"], "absent", "winner is missing"),
        (["winner"], "m1n1w1q1l1b1k1", "winner is 'm1n1w1q1l1b1k1'; accepted: the tile of a candidate"),
        (["default"], "<script>", "default is '<script>'; accepted: a text like 'm256n16w8q96l2b4k7'"),
        (["seconds"], float("nan"), "seconds is nan"),
        (["seconds"], 10**400, "seconds is 1"),
        (["when"], "today", "when is 'today'"),
        (["rule"], "a\nb", "rule is 'a\\nb'; accepted: printable text"),
        (["candidates"], {}, "candidates is an object; accepted: a list"),
        (["candidates", 3, "outcome"], "fine", "candidates[3].outcome is 'fine'; accepted: measured, pruned"),
        (["candidates", 0, "samples", 1, "seconds"], 0, "candidates[0].samples[1].seconds is 0"),
        (["candidates", 0, "registers"], -1, "candidates[0].registers is -1"),
        (["candidates", 0, "median_seconds"], "1", "candidates[0].median_seconds is '1'"),
        (
            ["key", "problem", "kernel"],
            "fwd hdim64 fp16 full gqa1",
            "key.problem.kernel is 'fwd hdim64 fp16 full gqa1'",
        ),
        (["key", "device", "name"], "x" * 201, "key.device.name is "),
        (["others"], {"sdpa": float("inf")}, "others.sdpa is inf"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(path, value, complaint):
    with pytest.raises(BadRecord, match=re.escape(complaint)):
        parse_record(changed(path, value))


def test_bad_files_are_told_and_the_others_read(tmp_path):
    folder = tmp_path / "tuning" / "t4"
    folder.mkdir(parents=True)
    (folder / "a.json").write_text(json.dumps(tuning_records.record()))
    bad = {
        "b.json": b"{",
        "c.json": b"\xff\xfe\x00",
        "d.json": b"[" * 100_000,
        "e.json": b'{"format": NaN}',
        "f.json": b"1" * 10_000,
        "g.json": b"",
        "h.json": json.dumps(changed(["rounds"], "absent")).encode(),
    }
    for name, data in bad.items():
        (folder / name).write_bytes(data)
    (folder / "i.json").mkdir()
    found = read(tmp_path / "tuning")
    assert len(found.records) == 1 and found.files == 9
    assert [Path(complaint.split(": ")[0]).name for complaint in found.complaints] == [*bad, "i.json"]
    assert all("\n" not in complaint for complaint in found.complaints)


def test_bad_records_of_a_database_are_told(database):
    path = database([tuning_records.record(), 7, changed(["when"], "absent")])
    found = read(path)
    assert len(found.records) == 1
    assert found.complaints == [
        f"{path}: record 1: the file is 7; accepted: an object",
        f"{path}: record 2: when is missing",
    ]


def test_random_damage_is_refused_or_drawn():
    """Whatever a record holds, it is a BadRecord or it is drawn."""
    draw = random.Random(1)
    junk = [None, True, -1, 0, 1e308, 1e-300, 2**70, "", "</script>", "x" * 5000, [], {}, [[]], float("nan"), "m8"]

    def places(value, path=()):
        if isinstance(value, dict | list):
            for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                yield (*path, key)
                yield from places(inner, (*path, key))

    plain = tuning_records.record(count=4)
    every = list(places(plain))
    kept = []
    for _ in range(500):
        value = copy.deepcopy(plain)
        path = draw.choice(every)
        at = value
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = draw.choice(junk)
        try:
            parse_record(value)
        except BadRecord:
            continue
        kept.append(value)
    assert 20 < len(kept) < 480
    text = page(kept[:6])
    assert "nan" not in re.sub(r"<script>.*</script>", "", text, flags=re.DOTALL).lower()


# Conclusions


def test_regret_and_runner_up():
    value = tuning_records.record(count=3)
    seconds = {}
    for each, median in zip((c for c in value["candidates"] if c["outcome"] == "measured"), (1e-3, 1.1e-3, 1.5e-3)):
        each |= {"median_seconds": median, "low_seconds": 0.99 * median, "high_seconds": 1.01 * median}
        seconds[median] = each["tile"]
    value |= {
        "winner": seconds[1e-3],
        "default": seconds[1.5e-3],
        "others": {"sdpa_math": 9e-3, "sdpa_efficient": 2e-3},
    }
    found = Finding(parse_record(value))
    assert found.default_regret == pytest.approx(0.5)
    assert found.runner_up[0].tile == seconds[1.1e-3] and found.is_told_apart is True
    assert found.best_other == ("sdpa_efficient", 2e-3) and found.times_as_fast == pytest.approx(2)
    assert {outcome: len(them) for outcome, them in found.rejected_by_outcome.items()} == {
        "pruned": 2,
        "compile failed": 1,
        "wrong result": 1,
        "timed out": 1,
    }
    for each in value["candidates"]:
        if each["tile"] == seconds[1.1e-3]:
            each["low_seconds"] = 1.005e-3
    assert Finding(parse_record(value)).is_told_apart is False


def test_the_models_choice():
    value = tuning_records.record(count=3)
    measured = [each for each in value["candidates"] if each["outcome"] == "measured"]
    for each, median, predicted in zip(measured, (1e-3, 2e-3, 3e-3), (1.2e-3, 1.1e-3, 3e-3)):
        each |= {
            "median_seconds": median,
            "low_seconds": median,
            "high_seconds": median,
            "predicted_seconds": predicted,
        }
    value["winner"] = measured[0]["tile"]
    found = Finding(parse_record(value))
    assert found.model_choice.tile == measured[1]["tile"] and found.model_regret == pytest.approx(1.0)
    assert sorted(ratio for _, ratio in found.predictions) == pytest.approx([0.55, 1.0, 1.2])
    assert summarize([found]).within_tenth == pytest.approx(1 / 3)


def test_a_record_without_any_figure_is_drawn():
    value = tuning_records.record(count=2)
    for each in value["candidates"]:
        each |= {"outcome": "not reached", "median_seconds": None, "samples": []}
    value["others"] = {}
    found = Finding(parse_record(value))
    assert found.winner is None and found.default_regret is None and found.tflops is None
    assert "no candidate was measured" in page([value])


def at(seconds, spread):
    return Figure(seconds, seconds * (1 - spread), seconds * (1 + spread), True)


@pytest.mark.parametrize(
    ("here", "there", "verdict"),
    [
        (at(1.0, 0.001), at(1.2, 0.001), comparison.FASTER),
        (at(1.2, 0.001), at(1.0, 0.001), comparison.SLOWER),
        (at(1.0, 0.001), at(1.005, 0.001), comparison.SAME),
        (at(1.0, 0.1), at(1.05, 0.1), comparison.UNTOLD),
        (at(1.0, 0.03), at(1.0, 0.03), comparison.UNTOLD),
        (at(1.0, 0.001)._replace(has_interval=False), at(2.0, 0.001), comparison.UNTOLD),
    ],
)
def test_verdicts(here, there, verdict):
    assert comparison.judge(here, there)[0] == verdict


def test_two_databases(database, tmp_path, capsys):
    old = [
        tuning_records.record(seqlen=seqlen, scale=scale)
        for seqlen, scale in ((512, 1), (1024, 1), (2048, 1), (128, 1))
    ]
    new = [tuning_records.record(seqlen=seqlen, scale=scale) for seqlen, scale in ((512, 0.8), (1024, 1), (2048, 1.3))]
    new.append(tuning_records.record(seqlen=256))
    html = tmp_path / "page.html"
    arguments = ["--database", database(new, "new.json"), "--against", database(old, "old.json"), "--html", html]
    report.main([str(argument) for argument in arguments])
    printed = capsys.readouterr().out
    found = {line.split()[6]: line for line in printed.splitlines() if line.startswith("fwd")}
    verdicts = {"q512": "faster", "q1024": "same", "q2048": "slower", "q256": "only here", "q128": "only there"}
    for lengths, verdict in verdicts.items():
        assert f"  {verdict} " in found[lengths] + " "
    assert "1 faster, 1 slower, 1 same, 1 only here, 1 only there" in printed
    text = html.read_text()
    assert all(f"▲ {comparison.FASTER}" in text or verdict in text for verdict in verdicts.values())


def test_what_cannot_be_compared_is_said():
    here = finding()
    other_sizes = copy.deepcopy(tuning_records.record())
    other_sizes["measured"]["seqlen_q"] = 700
    (sizes,) = comparison.compare([here], [Finding(parse_record(other_sizes))])
    assert sizes.verdict == comparison.UNTOLD and "700 queries" in sizes.reason
    (policies,) = comparison.compare([here], [Finding(parse_record(tuning_records.predicted()))])
    assert policies.verdict == comparison.UNTOLD and "predicted by the model" in policies.reason


def test_two_cards_are_compared_where_each_side_has_one():
    other = {"name": "NVIDIA GeForce RTX 2080 Ti", "sm": 75, "multiprocessors": 68, "code": "native"}
    here, there = finding(scale=0.5, device=other), finding()
    assert [each.verdict for each in comparison.compare([here], [there])] == [comparison.FASTER]
    both = [there, finding(device=other, seqlen=512)]
    verdicts = sorted(each.verdict for each in comparison.compare([here], both))
    assert verdicts == [comparison.ONLY_HERE, comparison.ONLY_THERE, comparison.ONLY_THERE]


# The page


def svgs(text):
    return [ElementTree.fromstring(found) for found in re.findall(r"<svg class=\"chart\".*?</svg>", text, re.DOTALL)]


def test_a_page_of_one_record():
    text = page([tuning_records.record()])
    assert text.startswith("<!doctype html>") and len(text) < 60_000
    charts = svgs(text)
    assert len(charts) == 3  # the class, predicted against measured, the roofline
    words = "".join(charts[-1].itertext())
    for shown in ("winner", "default", "SDPA memory-efficient", "microseconds a launch"):
        assert shown in words
    assert "PREDICTED" not in words


def test_peaks_that_differ_a_little_make_one_roof():
    values = tuning_records.records(3)
    for value, peak in zip(values, (50.0, 50.4, 51.0)):
        value["environment"]["peak_tflops"] = peak
    text = page(values)
    assert text.count("<h3>Roofline, ") == 1 and "50.4 TFLOP/s and 240 GB/s" in text
    assert text.partition('id="environments"')[2].partition("</table>")[0].count("<tr><td>") == 1


def test_the_same_records_make_the_same_bytes():
    values = tuning_records.records(3)
    assert page(values) == page(values)


def test_a_page_asks_no_network():
    text = page(tuning_records.records(3), compared=comparison.compare([finding()], [finding()]))
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<link(?! rel=\"icon\" href=\"data:,\")", text)


def test_ids_are_unique_and_links_lead_somewhere():
    text = page(tuning_records.records(5))
    ids = re.findall(r'\sid="?([^" >]+)', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', text)) <= set(ids)
    assert set(" ".join(re.findall(r'aria-labelledby="([^"]+)"', text)).split()) <= set(ids)


def test_predictions_are_marked_on_every_chart_and_in_the_head():
    text = page([tuning_records.predicted(seqlen=seqlen) for seqlen in (512, 1024)])
    head, _, rest = text.partition("<main>")
    assert "Nothing was measured" in head
    charts = svgs(rest)
    assert len(charts) == 3
    for chart in charts:
        assert "predicted, not measured" in "".join(chart.itertext()).lower()
    assert rest.count('class="tag predicted"') == 3
    mixed = page([tuning_records.predicted(), tuning_records.record(seqlen=512)])
    assert "1 of 2 classes are" in mixed and mixed.count('class="tag predicted"') == 2


def test_many_charts_stay_small():
    """The whole of what is promised with TESTS_ALL: 200 classes under 2 MB."""
    count = 200 if TESTS_ALL else 10
    text = page(tuning_records.records(count, candidates=20))
    assert len(svgs(text)) == count + 2
    assert len(text.encode()) < (2_000_000 if TESTS_ALL else 160_000)


def test_beyond_200_classes_the_greatest_regrets_are_drawn():
    assert [classes.chart_count(n) for n in (1, 200, 201, 1000, 10_000)] == [1, 200, 200, 200, 24]
    kinds = [parse_record(value) for value in tuning_records.records(40)]
    findings = [
        Finding(replace(record, problem=replace(record.problem, batch_heads=i)))
        for i, record in zip(range(10_000), itertools.cycle(kinds))
    ]
    begin = time.process_time()
    text = render(Page(findings, [], "a test"), NOW)
    assert time.process_time() - begin < 60
    assert len(text.encode()) < 2_500_000
    assert "Charts are drawn for the 24 classes whose default loses most. The other 9,976 are rows" in text
    drawn = [float(cells) for cells in re.findall(r'<tr><td><a href="#p\d+">.*?(?:<td>[^<]*){4}<td>([\d.]+)', text)]
    greatest = sorted((100 * each.default_regret for each in findings), reverse=True)[:24]
    assert drawn == pytest.approx(greatest, abs=0.06)


def test_every_kind_of_kernel_has_words_and_a_mark():
    kinds = {family.word for family in _core.kernel_families()}
    assert set(style.KIND_WORDS) == set(style.KIND_MARKS) == kinds


HOSTILE = "</script></style><script>alert(1)</script><img src=x onerror=alert(2)>\"'&$\\frac{"


def test_hostile_text_stays_text():
    value = tuning_records.record()
    value["key"]["device"]["name"] = HOSTILE
    value["key"]["templates"] = value["environment"]["library"] = value["environment"]["nvrtc"] = HOSTILE
    value["rule"] = HOSTILE
    value["others"] = {HOSTILE: 1e-3}
    for each in value["candidates"]:
        each["reason"] = HOSTILE
        each["limited_by"] = "</svg><script>"
        for sample in each["samples"]:
            sample["throttled_by"] = [HOSTILE]
    there = copy.deepcopy(value)
    there["measured"]["batch"] = 3
    compared = comparison.compare([Finding(parse_record(value))], [Finding(parse_record(there))])
    text = page([value], compared=compared, against=HOSTILE, complaints=[HOSTILE])
    assert text.count("<script") == 1 and text.count("</script") == 1 and text.count("<style") == 1
    assert "<img" not in text and "$\\frac{" in text
    svgs(text)  # well formed


def test_colours_can_be_told_from_what_they_lie_on():
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return sum(weight * x for weight, x in zip((0.2126, 0.7152, 0.0722), linear))

    def contrast(a, b):
        low, high = sorted((luminance(a), luminance(b)))
        return (high + 0.05) / (low + 0.05)

    grounds = {
        "ink": ["surface", "page", "winner"],
        "muted": ["surface", "page", "winner"],
        "link": ["surface", "page"],
    }
    grounds |= {role: ["surface"] for role in ("tensor", "lsu", "xu", "issue", "fma", "alu", "dram", "other", "rival")}
    grounds |= {"warned": ["warning"]}
    for theme in ("light", "dark"):
        for role, others in grounds.items():
            for other in others:
                assert contrast(*(getattr(style.ROLES[name], theme) for name in (role, other))) >= 4.5, (theme, role)


def test_marks_differ_in_shape_too():
    marks = [style.mark_of(limit) for limit in ("tensor", "lsu", "xu", "issue", "fma", "alu", "dram", "")] + [
        style.RIVAL
    ]
    assert len({mark.marker for mark in marks}) == len({mark.symbol for mark in marks}) == len(marks)


# The command


def test_png_charts(database, tmp_path, capsys):
    folder = tmp_path / "charts"
    report.main(["--database", str(database(tuning_records.records(2))), "--png", str(folder)])
    names = sorted(path.name for path in folder.iterdir())
    assert names[2:] == ["predicted_against_measured.png", "roofline_0.png"]
    assert names[0].startswith("000_") and names[0].endswith("bh64.png")
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in names)
    assert not (tmp_path / "report.html").exists()
    assert str(folder) in capsys.readouterr().out


def test_the_cache_is_read_where_no_database_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "cache_folder", lambda: tmp_path / "cache")
    with pytest.raises(SystemExit, match=r"There are no tuning records in .*/cache/tuning yet"):
        report.main([])
    folder = tmp_path / "cache" / "tuning" / "t4"
    folder.mkdir(parents=True)
    (folder / "bad.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"holds no record that can be read \(1 files, 1 bad\)"):
        report.main([])
    (folder / "good.json").write_text(json.dumps(tuning_records.record()))
    report.main([])
    printed = capsys.readouterr()
    assert f"passed over: {folder / 'bad.json'}: format is missing" in printed.err
    assert printed.out.splitlines()[-1] == str(tmp_path / "report.html")
    assert "One record could not be read" in (tmp_path / "report.html").read_text()


def test_demo(database, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "_DEMO", database([tuning_records.predicted()]))
    report.main(["--demo"])
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == str(tmp_path / "demo-report.html")
    assert "1 of the classes are predicted, not measured" in printed
    assert "Nothing was measured" in (tmp_path / "demo-report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--demo", "--database", "x"], "--demo draws records of its own"),
        (["--html", "nowhere/page.html"], "--html is nowhere/page.html: there is no folder nowhere"),
        (["--database", "nowhere"], "--database is nowhere: there is none"),
    ],
)
def test_bad_calls(arguments, complaint, capsys):
    with pytest.raises(SystemExit) as stopped:
        report.main(arguments)
    assert complaint in capsys.readouterr().err + str(stopped.value)
