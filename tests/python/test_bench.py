"""The bench, as far as it goes without a GPU."""

import json

import pytest
import torch
from attention_reference import attention, exact_gradients, normal, normal_qkv
from conftest import run_module
from torch.utils._python_dispatch import TorchDispatchMode

from flash_attn_jit.bench import accuracy, memory, problem, timing
from flash_attn_jit.bench.backends import NAMES, OURS, Backend
from flash_attn_jit.bench.problem import BACKWARD, BOTH, FORWARD, PASSES, Inputs, Problem, sweep

SMALL = Problem(2, 4, 2, 16, 24, True)


class Operators(TorchDispatchMode):
    """The names of this library's operators that run, in their order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "flash_attn_jit":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def on_cpu(monkeypatch):
    """The bench's inputs on the CPU, where the interpreter takes them."""
    monkeypatch.setattr(problem, "_DEVICE", "cpu")


def test_default_sweep():
    problems = list(sweep(4, (16, 16), [64, 128], [512, 16384], [False, True]))
    assert len(problems) == 8 and len(set(problems)) == 8


def test_flops_count_a_causal_mask_as_half():
    full, causal = (Problem(4, 16, 16, 64, 4096, is_causal) for is_causal in (False, True))
    assert full.flops(FORWARD) == 4 * 4 * 16 * 4096 * 4096 * 64 and causal.flops(FORWARD) * 2 == full.flops(FORWARD)


def test_flops_of_the_backward_pass():
    forward, backward, both = (SMALL.flops(which) for which in (FORWARD, BACKWARD, BOTH))
    assert (backward, both) == (2.5 * forward, 3.5 * forward)


def test_read_bytes():
    of_queries, of_keys = 2 * 2 * 24 * 4 * 16, 2 * 2 * 24 * 2 * 16
    assert SMALL.read_bytes(FORWARD) == of_queries + 2 * of_keys
    assert SMALL.read_bytes(BACKWARD) == 3 * of_queries + 2 * of_keys
    assert SMALL.read_bytes(BOTH) == 2 * of_queries + 2 * of_keys


@pytest.mark.parametrize("which", PASSES)
def test_summary_is_of_the_median(which):
    large = Problem(4, 16, 16, 64, 4096, False)
    row = timing.summary(large, which, [2.0, 1.0, 9.0])
    assert (row["ms_median"], row["ms_min"], row["ms_max"]) == (2.0, 1.0, 9.0)
    assert row["tflops"] == pytest.approx(large.flops(which) / 2e-3 / 1e12)


@pytest.mark.parametrize("which", PASSES)
def test_inputs_of_a_pass(which, on_cpu):
    q, k, v, dout = SMALL.inputs(3, which)
    assert q.shape == (2, 24, 4, 16) and k.shape == v.shape == (2, 24, 2, 16)
    assert all(t.requires_grad == (which != FORWARD) for t in (q, k, v))
    if which == FORWARD:
        assert dout is None
    else:
        assert dout.shape == q.shape and not dout.requires_grad and not torch.equal(dout, q)


@pytest.mark.parametrize("which, forwards, backwards", [(FORWARD, 5, 0), (BACKWARD, 0, 5), (BOTH, 5, 5)])
def test_what_a_call_of_a_pass_runs(which, forwards, backwards, on_cpu, monkeypatch):
    """Of the backward pass nothing else is timed, and each call walks the graph of its input set."""
    backend = Backend(OURS, SMALL)
    input_sets = [SMALL.inputs(seed, which) for seed in range(2)]
    calls = backend.calls(which, input_sets)
    with Operators() as ran:
        results = [calls[i % 2]() for i in range(5)]
    assert (ran.names.count("forward"), ran.names.count("backward")) == (forwards, backwards)
    if which != FORWARD:
        for i, result in enumerate(results):
            for got, expected in zip(result, backend.both(input_sets[i % 2])):
                assert torch.equal(got, expected)


@pytest.mark.parametrize("which", PASSES)
def test_rows_of_a_timing_run(which, on_cpu, monkeypatch):
    def burst(calls, count):
        for call in calls:
            call()
        return 0.5 * count

    monkeypatch.setattr(timing, "rotating_inputs", lambda *of: [Problem.inputs(of[0], seed, of[1]) for seed in (0, 1)])
    monkeypatch.setattr(timing, "_burst_ms", burst)
    reason = "not on this machine"
    monkeypatch.setattr(Backend, "why_not", lambda backend, inputs: "" if backend.name == OURS else reason)
    ours, *others = timing.run(SMALL, which, NAMES, 4, 50.0)
    assert (ours["pass"], ours["backend"], len(ours["ms_samples"])) == (which, OURS, 4)
    assert ours["tflops"] == pytest.approx(SMALL.flops(which) / ours["ms_median"] * 1e-9)
    assert all(row["skipped"] == reason and row["pass"] == which for row in others)


@pytest.mark.parametrize("causal", [False, True])
def test_references(causal, monkeypatch):
    monkeypatch.setattr(accuracy, "_SCORE_BYTES", 8 * 24 * 24 * 2)  # two heads at a time: groups are cut
    q, k, v = normal_qkv(2, 24, 24, 6, 2, 16)
    dout = normal(*q.shape, seed=4)
    got = accuracy.references(Inputs(q, k, v, dout), causal)
    exact = {"out": attention(q, k, v, causal=causal)[0]}
    exact.update(zip(("dq", "dk", "dv"), exact_gradients(q, k, v, dout, causal=causal)))
    assert got.keys() == exact.keys()
    for name, expected in exact.items():
        torch.testing.assert_close(got[name], expected)
    (only,) = accuracy.references(Inputs(q, k, v, None), causal).items()
    assert only[0] == "out" and torch.equal(only[1], got["out"])


def test_greatest_error_and_mean_square():
    exact = torch.arange(2 * 24 * 6).reshape(2, 24, 6).double()
    got = exact.half()
    got[1, 5, 4] += 1
    measured = accuracy.max_and_mean_square(got, exact)
    assert measured == {"max": 1.0, "mean_square": 1 / exact.numel()}


@pytest.mark.parametrize(
    "passes, tensors",
    [(["fwd"], ["out"]), (["bwd"], ["dq", "dk", "dv"]), (["fwd", "bwd"], ["out", "dq", "dk", "dv"])],
    ids=str,
)
def test_accuracy(passes, tensors, on_cpu):
    rows = accuracy.run(SMALL, passes, [OURS], range(2))
    assert [row["tensor"] for row in rows] == tensors
    for row in rows:
        assert 0 < row["rms_error"] < row["max_error"] < 1e-2 and row["seeds"] == 2


def test_needed_bytes_are_those_of_the_tensors():
    even = Problem(2, 8, 2, 64, 128, False)
    q, k, rows = 2 * 128 * 8 * 64 * 2, 2 * 128 * 2 * 64 * 2, 2 * 128 * 8 * 4
    assert memory.needed_bytes(even) == 4 * q + 4 * k + 2 * rows
    assert memory.needed_bytes(Problem(1, 1, 1, 1, 1, False)) == 10 * 512


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
    modes = [(row["pass"], row["grad_mode"], row["inputs_need_gradients"]) for row in record["rows"]]
    assert [row["backend"] for row in record["rows"]] == ["flash_attn_jit", "sdpa"] * 4
    assert modes[::2] == modes[1::2]
    assert modes[::2] == [("fwd", "off", False), ("fwd", "on", False), ("fwd", "on", True), ("both", "on", True)]


def test_unknown_backend(tmp_path):
    done = run_module("bench", "--backends", "xformers", cwd=tmp_path)
    assert done.returncode == 2 and "xformers" in done.stderr and "sdpa_flash" in done.stderr


def test_unknown_pass(tmp_path):
    done = run_module("bench", "--passes", "fwd,backward", cwd=tmp_path)
    assert done.returncode == 2 and "'backward'" in done.stderr and "fwd, bwd, both" in done.stderr


def timing_record():
    rows = []
    for each in sweep(4, (16, 16), [64, 128], [512, 1024], [False, True]):
        for which in PASSES:
            of_pass = {**each.record(), "pass": which}
            for backend, ms in (("flash_attn_jit", 1.0), ("sdpa_efficient", 2.0)):
                times = timing.summary(each, which, [ms, ms * 1.1, ms * 0.9])
                rows.append({**of_pass, "backend": backend, **times})
            rows.append({**of_pass, "backend": "sdpa_cudnn", "skipped": "not here"})
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
