"""The bench, as far as it goes without a GPU."""

import json

import pytest
import torch
from attention_reference import attention, normal_qkv
from conftest import run_module

from flash_attn_jit.bench import accuracy, timing
from flash_attn_jit.bench.problem import Problem, sweep


def test_default_sweep():
    problems = list(sweep(4, (16, 16), [64, 128], [512, 16384], [False, True]))
    assert len(problems) == 8 and len(set(problems)) == 8


def test_flops_count_a_causal_mask_as_half():
    full, causal = (Problem(4, 16, 16, 64, 4096, is_causal) for is_causal in (False, True))
    assert full.flops == 4 * 4 * 16 * 4096 * 4096 * 64 and causal.flops * 2 == full.flops


def test_summary_is_of_the_median():
    problem = Problem(4, 16, 16, 64, 4096, False)
    row = timing.summary(problem, [2.0, 1.0, 9.0])
    assert (row["ms_median"], row["ms_min"], row["ms_max"]) == (2.0, 1.0, 9.0)
    assert row["tflops"] == pytest.approx(problem.flops / 2e-3 / 1e12)


@pytest.mark.parametrize("causal", [False, True])
def test_errors_are_measured_against_float64(causal, monkeypatch):
    monkeypatch.setattr(accuracy, "_SCORE_BYTES", 8 * 24 * 24 * 2)  # two heads at a time
    q, k, v = normal_qkv(2, 24, 24, 6, 3, 16)
    expected, _ = attention(q, k, v, causal=causal)
    out = expected.half()
    error = (out.double() - expected).abs()
    measured = accuracy.squared_and_max_error(out, (q, k, v), causal)
    assert measured["max"] == pytest.approx(error.max().item(), rel=1e-6)
    assert measured["mean_square"] == pytest.approx(error.square().mean().item(), rel=1e-6)
    out[1, 5, 4, 3] += 1
    assert accuracy.squared_and_max_error(out, (q, k, v), causal)["max"] > 0.9


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_timing_without_a_gpu_says_so(tmp_path):
    done = run_module("bench", cwd=tmp_path)
    assert done.returncode != 0 and "GPU" in done.stderr and not list(tmp_path.iterdir())


def test_target_is_set_before_it_is_read(tmp_path):
    done = run_module(
        "bench",
        "--host-cost",
        "--target",
        "compute_75",
        "--output",
        "cost.json",
        cwd=tmp_path,
        FLASH_ATTN_JIT_TARGET=None,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "cost.json").read_text())
    assert record["machine"]["target"] == "compute_75"
    assert {(row["backend"], row["grad_mode"]) for row in record["rows"]} == {
        (name, mode) for name in ("flash_attn_jit", "sdpa") for mode in ("off", "on")
    }


def test_unknown_backend(tmp_path):
    done = run_module("bench", "--backends", "xformers", cwd=tmp_path)
    assert done.returncode == 2 and "xformers" in done.stderr and "sdpa_flash" in done.stderr


def timing_record():
    rows = []
    for problem in sweep(4, (16, 16), [64, 128], [512, 1024], [False, True]):
        for backend, ms in (("flash_attn_jit", 1.0), ("sdpa_efficient", 2.0)):
            rows.append(
                {**problem.record(), "backend": backend, **timing.summary(problem, [ms, ms * 1.1, ms * 0.9])}
            )
        rows.append({**problem.record(), "backend": "sdpa_cudnn", "skipped": "not here"})
    return {"kind": "timing", "machine": {"gpu": "Tesla T4", "target": "native"}, "rows": rows}


def test_plot_from_json_alone(tmp_path):
    (tmp_path / "t4.json").write_text(json.dumps(timing_record()))
    done = run_module("bench", "--plot", "t4.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "t4.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_plot_of_no_timings(tmp_path):
    (tmp_path / "cost.json").write_text(json.dumps({"kind": "host_cost", "machine": {}, "rows": []}))
    done = run_module("bench", "--plot", "cost.json", cwd=tmp_path)
    assert done.returncode != 0 and "no timings" in done.stderr
