"""The demo, in the interpreter where there is no GPU."""

import re

import pytest
from conftest import run_module


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, run_module("demo", cwd=folder)


def test_demo(demo):
    folder, done = demo
    assert done.returncode == 0, done.stderr
    heading, *rows = [line for line in done.stdout.splitlines() if re.search(r"registers| B  ", line)]
    assert {row.split()[0] for row in rows} == {"Llama-3-8B", "Qwen2.5-7B", "GPT-2", "SDXL"}
    for row in rows:
        *_, registers, spills, _, seconds, _, error = row.split()
        assert 0 < int(registers) <= 255 and spills == "0" and 0 < float(seconds) and 0 < float(error) < 4e-3
    assert f"{len(rows)}/{len(rows)}" in done.stderr
    assert len(list((folder / "demo-pack").glob("*.kernel"))) == len(rows)


def test_demo_again_builds_nothing(demo):
    folder, first = demo
    again = run_module("demo", cwd=folder)
    assert again.returncode == 0, again.stderr
    assert "built" not in again.stderr and again.stderr.count("there already") == first.stderr.count("built")
