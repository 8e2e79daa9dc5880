"""The demo, in the interpreter where there is no GPU."""

import math
import re

import pytest
from conftest import TESTS_ALL, needs_nvrtc_of_the_tables, run_module, run_python

from flash_attn_jit.demo import _greatest as greatest

# make test has a causal one with groups and a full one.
MODELS = range(4) if TESTS_ALL else (0, 3)


def run_demo(folder):
    code = f"""
import os
os.chdir({str(folder)!r})
from flash_attn_jit import demo
demo.MODELS = [demo.MODELS[i] for i in {list(MODELS)}]
demo.main([])
"""
    return run_module("demo", cwd=folder) if len(MODELS) == 4 else run_python(code)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, run_demo(folder)


def test_a_nan_is_the_greatest_error():
    for at in range(3):
        assert math.isnan(greatest([math.nan if i == at else 1.0 for i in range(3)]))
    assert greatest([1.0, 3.0, 2.0]) == 3.0


def test_demo(demo):
    folder, done = demo
    assert done.returncode == 0, done.stderr
    _, *rows = [line for line in done.stdout.splitlines() if re.search(r"registers| B  ", line)]
    names = ("Llama-3-8B", "Qwen2.5-7B", "GPT-2", "SDXL")
    assert {row.split()[0] for row in rows} == {names[i] for i in MODELS}
    forward_spills = set()
    for row in rows:
        _, kernel, _, registers, spills, _, seconds, _, error = row.split()
        assert 0 < int(registers) <= 255 and int(spills) >= 0 and float(seconds) > 0
        if kernel.startswith("flash_fwd_"):
            assert 0 < float(error) < 4e-3
            forward_spills.add(spills)
        elif kernel.startswith("flash_bwd_preprocess_"):
            assert error == "-"
        else:
            assert 0 < float(error) < 1e-2
    for kind in ("flash_fwd", "flash_bwd_preprocess", "flash_bwd_dkdv", "flash_bwd_dq"):
        assert len({row.split()[0] for row in rows if f" {kind}_" in row}) == len(MODELS)
    kernels = {tuple(row.split()[1:3]) for row in rows}
    assert f"{len(kernels)}/{len(kernels)}" in done.stderr
    assert len(list((folder / "demo-pack").glob("*.kernel"))) == len(kernels)
    needs_nvrtc_of_the_tables()
    assert forward_spills == {"0"}


def test_training_step(demo):
    _, done = demo
    number = r"(\d\S*\d)"
    found = re.search(
        rf"training step .* loss {number} \(float64: {number}\), .* {number}, loss after the step {number}\.$",
        done.stdout,
        re.MULTILINE,
    )
    assert found, done.stdout
    loss, exact_loss, error, loss_after = map(float, found.groups())
    assert loss == pytest.approx(exact_loss, rel=1e-4) and loss_after < loss
    assert 0 < error < 2e-3


def test_token(demo):
    _, done = demo
    words = r"A token .* float64 (\S+) \(out\), (\S+) \(keys\), (\S+) \(values\)\.$"
    found = re.search(words, done.stdout, re.MULTILINE)
    assert found, done.stdout
    out, keys, values = map(float, found.groups())
    assert 0 < out < 4e-3 and 0 < keys < 4e-3 and values == 0


@pytest.mark.skipif(not TESTS_ALL, reason="make test-all: it takes a quarter of a minute")
def test_demo_again_builds_nothing(demo):
    folder, first = demo
    again = run_demo(folder)
    assert again.returncode == 0, again.stderr
    assert "built" not in again.stderr and again.stderr.count("there already") == first.stderr.count("built")
