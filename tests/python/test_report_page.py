"""The tuning report in a browser: headless Chromium, where there is one."""

import copy
import re
import shutil
import subprocess
from datetime import datetime, timezone

import pytest
import tuning_records

from flash_attn_jit.report.comparison import compare
from flash_attn_jit.report.findings import Finding
from flash_attn_jit.report.page import Page, render
from flash_attn_jit.report.records import parse_record

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


@pytest.fixture(scope="module")
def text():
    values = tuning_records.records(4)
    values[1]["key"]["device"]["name"] = values[2]["rule"] = HOSTILE
    other = copy.deepcopy(values)
    findings, there = ([Finding(parse_record(value)) for value in side] for side in (values, other[1:]))
    page = Page(findings, [HOSTILE], "a test", compare(findings, there), "another")
    return render(page, datetime(2026, 11, 27, tzinfo=timezone.utc))


class Browser:
    """Pages are opened from files, with no name that resolves."""

    def __init__(self, folder):
        self._folder = folder
        self._pages = 0

    def open(self, text, *flags):
        self._pages += 1
        path = self._folder / f"page{self._pages}.html"
        path.write_text(text, encoding="utf-8")
        done = subprocess.run(
            [
                *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
                *("--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={self._folder / 'profile'}"),
                *("--enable-logging=stderr", "--virtual-time-budget=5000", *flags, path.as_uri()),
            ],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        return done.stdout, said

    def ask(self, text, script):
        """What the script puts into `answer`, run after the page's own; what a test adds, the page's policy forbids."""
        free = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
        asked = f"<pre id=answer></pre><script>{script};document.getElementById('answer').textContent=answer</script>"
        dom, said = self.open(free.replace("</body>", asked + "</body>"), "--dump-dom")
        assert not said
        return re.search(r'<pre id="answer">(.*?)</pre>', dom, re.DOTALL)[1]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    return Browser(tmp_path_factory.mktemp("browser"))


def test_it_loads_without_a_complaint(browser, text):
    dom, said = browser.open(text, "--dump-dom")
    assert not said
    assert "4 of 4 shown" in dom  # its script ran under its own policy
    title = re.search("<title>(.*?)</title>", dom)[1]
    assert title.startswith("Tuning report: ") and dom.count("<script") == 1 and "<img" not in dom


COLUMN = """
const table = document.getElementById('classes');
const headers = Array.from(table.tHead.rows[0].cells, cell => cell.textContent);
const column = (name) => Array.from(table.tBodies[0].rows, row => row.cells[headers.indexOf(name)].textContent);
const press = (name) => table.tHead.rows[0].cells[headers.indexOf(name)].querySelector('button').click();
"""


def test_the_table_sorts(browser, text):
    script = (
        COLUMN
        + "press('ms'); let answer = column('ms').join(' '); press('ms'); answer += ' | ' + column('ms').join(' ')"
    )
    script += "; answer += ' | ' + table.tHead.rows[0].cells[headers.indexOf('ms')].getAttribute('aria-sort')"
    falling, rising, direction = browser.ask(text, script).split(" | ")
    numbers = [float(number) for number in falling.split()]
    assert len(numbers) == 4 and numbers == sorted(numbers, reverse=True)
    assert rising.split() == falling.split()[::-1] and direction == "ascending"


def test_the_table_filters_and_its_charts_with_it(browser, text):
    script = """
const form = document.querySelector("form[data-filters=classes]");
form.querySelector('input').value = 'HDIM64 fwd';
form.querySelectorAll('select')[1].value = 'causal';
form.dispatchEvent(new Event('submit', {cancelable: true}));
const shown = (what) => Array.from(document.querySelectorAll(what)).filter(each => each.offsetParent !== null).length;
const answer = [form.querySelector('output').textContent, shown('#classes tbody tr'), shown('.card[id^=p]')].join();
"""
    assert browser.ask(text, script) == "1 of 4 shown,1,1"


def test_a_phone_scrolls_in_one_direction_alone(browser, text, tmp_path):
    """The page in a frame of a phone's width: wide tables scroll in themselves."""
    inner = tmp_path / "inner.html"
    inner.write_text(re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text), encoding="utf-8")
    reports = "<script>parent.postMessage([document.documentElement.scrollWidth, innerWidth].join(' '), '*')</script>"
    inner.write_text(inner.read_text(encoding="utf-8").replace("</body>", reports + "</body>"), encoding="utf-8")
    frame = f"""<iframe src="{inner.as_uri()}" width=360 height=800 style="border:0"></iframe><pre id=answer></pre>
<script>addEventListener('message', (event) => document.getElementById('answer').textContent = event.data)</script>"""
    dom, _ = browser.open(f"<!doctype html><body>{frame}</body>", "--dump-dom")
    scroll, width = map(int, re.search(r'<pre id="answer">(\d+) (\d+)', dom).groups())
    assert width == 360 and scroll <= width


@pytest.mark.parametrize(("theme", "darkest"), [(0, True), (1, False)])
def test_both_themes(browser, text, tmp_path, theme, darkest):
    from matplotlib.image import imread

    picture = tmp_path / "page.png"
    _, said = browser.open(
        text, f"--screenshot={picture}", "--window-size=800,600", f"--blink-settings=preferredColorScheme={theme}"
    )
    assert not said
    corner = imread(picture)[5, 5, :3].mean()
    assert (corner < 0.2) == darkest and (corner > 0.8) != darkest
