"""The bench, as far as it goes without a GPU; test_bench_model.py has its whole model."""

import json
from contextlib import nullcontext
from dataclasses import replace
from math import isnan, nan

import pytest
import torch
import torch.nn.functional as F
import tuning_records
from attention_reference import attention, check_attention, exact_gradients
from conftest import find_nvrtc, needs_enable_gqa, run_module, run_program
from torch.utils._python_dispatch import TorchDispatchMode

import flash_attn_jit
from flash_attn_jit.bench import (
    __main__ as bench,
    accuracy,
    backends,
    decode,
    flex,
    host_cost,
    integration_cost,
    memory,
    options,
    problem,
    timing,
)
from flash_attn_jit.bench.backends import NAMES, OURS, SDPA_EFFICIENT, SDPA_FLASH, SDPA_MATH, Backend, default_names
from flash_attn_jit.bench.decode import DecodeProblem
from flash_attn_jit.bench.out_of_memory import OUT_OF_MEMORY, is_out_of_memory
from flash_attn_jit.bench.problem import BACKWARD, BOTH, FORWARD, MASKS, NO_MASK, PASSES, Inputs, Problem, sweep
from flash_attn_jit.report.records import DATABASE, parse_record

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
    row = timing.row_of(large, which, [2.0, 1.0, 9.0])
    assert (row["ms_median"], row["ms_min"], row["ms_max"]) == (2.0, 1.0, 9.0)
    assert row["tflops"] == pytest.approx(large.flops(which) / 2e-3 / 1e12)


@pytest.mark.parametrize("which", PASSES)
def test_inputs_of_a_pass(which, on_cpu):
    q, k, v, dout, mask = SMALL.inputs(3, which)
    assert mask is None
    assert q.shape == (2, 24, 4, 16) and k.shape == v.shape == (2, 24, 2, 16)
    assert all(t.requires_grad == (which != FORWARD) for t in (q, k, v))
    if which == FORWARD:
        assert dout is None
    else:
        assert dout.shape == q.shape and not dout.requires_grad and not torch.equal(dout, q)


@pytest.mark.parametrize("name", MASKS)
def test_attn_masks_of_a_problem(name, on_cpu):
    """Ours and SDPA's math read the same one, whose bytes are counted."""
    problem = Problem(2, 4, 2, 16, 24, False, name)
    inputs = problem.inputs(0, FORWARD)
    size = 0 if name == NO_MASK else inputs.attn_mask.nbytes
    assert problem.read_bytes(FORWARD) == Problem(2, 4, 2, 16, 24, False).read_bytes(FORWARD) + size
    assert (name == NO_MASK) == (inputs.attn_mask is None)
    ours, theirs = (Backend(backend, problem).forward(inputs) for backend in (OURS, SDPA_EFFICIENT))
    torch.testing.assert_close(ours, theirs, atol=4e-3, rtol=0)
    assert [str(each) for each in sweep(2, (4, 2), [16], [24], [True, False], [NO_MASK, name])][-1] == str(problem)


@pytest.mark.parametrize("seqlen", [64, 68])
@pytest.mark.parametrize("name", MASKS)
def test_predictions_read_the_attn_mask(name, seqlen):
    """The program is asked for the kernel that reads it, and counts its bytes."""
    problem = Problem(2, 4, 2, 64, seqlen, False, name)
    flags = ["--head-dim", 64, "--batch", 2, "--heads", 4, "--gqa", 2, "--seqlen-q", seqlen, "--seqlen-k", seqlen]

    def dram_bytes(*more):
        done = run_program("model", *flags, *more, "--json", FLASH_ATTN_JIT_NVRTC=find_nvrtc(12))
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["problem"]["dram_seconds"] * 320e9

    difference = dram_bytes(*problem.feature_flags()) - dram_bytes()
    unmasked = Problem(2, 4, 2, 64, seqlen, False)
    assert difference == pytest.approx(problem.read_bytes(FORWARD) - unmasked.read_bytes(FORWARD), abs=1e-3)


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


def without_clocks(monkeypatch):
    def burst(calls, count):
        for call in calls:
            call()
        return 0.5 * count

    monkeypatch.setattr(timing, "rotating_inputs", lambda *of: [Problem.inputs(of[0], seed, of[1]) for seed in (0, 1)])
    monkeypatch.setattr(timing, "_burst_ms", burst)


@pytest.mark.parametrize("which", PASSES)
def test_rows_of_a_timing_run(which, on_cpu, monkeypatch):
    without_clocks(monkeypatch)
    reason = "not on this machine"
    monkeypatch.setattr(Backend, "why_not", lambda backend, inputs: "" if backend.name == OURS else reason)
    ours, *others = timing.run(SMALL, which, NAMES, 4, 50.0)
    assert (ours["pass"], ours["backend"], len(ours["ms_samples"])) == (which, OURS, 4)
    assert ours["tflops"] == pytest.approx(SMALL.flops(which) / ours["ms_median"] * 1e-9)
    assert all(row["skipped"] == reason and row["pass"] == which for row in others)


@pytest.mark.parametrize("when", ["before", "making the graphs", "warming up", "in a round"])
def test_out_of_memory_is_a_row_and_the_others_are_timed(when, on_cpu, monkeypatch):
    without_clocks(monkeypatch)
    calls = Backend.calls
    bursts = iter([0, 0] if when == "in a round" else [])

    def exhausted(*arguments):
        if next(bursts, None) is not None:
            return
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 32.00 GiB.")

    def calls_of(backend, which, input_sets):
        if backend.name == SDPA_MATH and when == "making the graphs":
            exhausted()
        return [exhausted] if backend.name == SDPA_MATH else calls(backend, which, input_sets)

    if when == "before":
        needs_enable_gqa()
        monkeypatch.setattr(Backend, "_sdpa", exhausted)
    else:
        monkeypatch.setattr(Backend, "why_not", lambda *_: "")
        monkeypatch.setattr(Backend, "calls", calls_of)
    ours, math = timing.run(SMALL, BACKWARD, [OURS, SDPA_MATH], 2, 50.0)
    assert math["skipped"] == OUT_OF_MEMORY and len(ours["ms_samples"]) == 2


def test_other_errors_end_a_timing_run(on_cpu, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("an illegal memory access was encountered")

    without_clocks(monkeypatch)
    monkeypatch.setattr(Backend, "why_not", lambda *_: "")
    for calls in (broken, lambda *_: [broken]):
        monkeypatch.setattr(Backend, "calls", calls)
        with pytest.raises(RuntimeError, match="illegal"):
            timing.run(SMALL, FORWARD, [OURS], 1, 50.0)


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuModuleLoadData: CUDA_ERROR_OUT_OF_MEMORY",
    ],
)
def test_what_is_out_of_memory(words):
    assert is_out_of_memory(RuntimeError(words)) and is_out_of_memory(torch.cuda.OutOfMemoryError("..."))
    assert not is_out_of_memory(RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED"))


@pytest.mark.parametrize("name, heads_k, options", [
    (SDPA_MATH, 2, {"enable_gqa": True}),
    (SDPA_FLASH, 2, {"enable_gqa": True}),
    (SDPA_EFFICIENT, 4, {}),
])  # fmt: skip
def test_what_sdpa_gets_of_grouped_heads(name, heads_k, options, on_cpu, monkeypatch):
    """The memory-efficient kernel gets a key head for every query head, inside of what is timed."""
    if options:
        needs_enable_gqa()
    theirs, calls = F.scaled_dot_product_attention, []

    def recorded(q, k, v, mask, **given):
        calls.append((k.shape[1], v.shape[1], given))
        return theirs(q, k, v, mask, **given)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    inputs = SMALL.inputs(0, BOTH)
    gradients = Backend(name, SMALL).both(inputs)
    assert calls == [(heads_k, heads_k, {"dropout_p": 0.0, "is_causal": True, **options})]
    for got, expected in zip(gradients, Backend(OURS, SMALL).both(inputs)):
        torch.testing.assert_close(got, expected, atol=4e-3, rtol=0)


def test_math_runs_anywhere_and_is_no_rival_where_heads_are_not_grouped(on_cpu):
    assert default_names(SMALL) == list(NAMES)
    assert default_names(Problem(2, 4, 4, 16, 24, True)) == [name for name in NAMES if name != SDPA_MATH]
    needs_enable_gqa()
    assert Backend(SDPA_MATH, SMALL).why_not(SMALL.inputs(0, BOTH)) == ""


def test_a_torch_without_enable_gqa(on_cpu, monkeypatch):
    monkeypatch.setattr(backends, "KNOWS_ENABLE_GQA", False)
    assert "torch 2.5" in Backend(SDPA_MATH, SMALL).why_not(SMALL.inputs(0, FORWARD))
    ungrouped = Problem(2, 4, 4, 16, 24, True)
    assert Backend(SDPA_MATH, ungrouped).why_not(ungrouped.inputs(0, FORWARD)) == ""


def test_help_names_every_backend():
    text = " ".join(options._parser().format_help().split())
    for name in NAMES:
        assert name in text


@pytest.mark.parametrize(("causal", "mask"), [(True, NO_MASK), *((False, mask) for mask in MASKS)])
def test_references(causal, mask, on_cpu, monkeypatch):
    monkeypatch.setattr(accuracy, "_SCORE_BYTES", 8 * 24 * 24 * 2)  # two heads at a time: groups are cut
    q, k, v, dout, attn_mask = Problem(2, 6, 2, 16, 24, causal, mask).inputs(1, BOTH)
    got = accuracy.references(Inputs(q.detach(), k.detach(), v.detach(), dout, attn_mask), causal)
    options = {"causal": causal, "attn_bias": attn_mask}
    exact = {"out": attention(q.detach(), k.detach(), v.detach(), **options)[0]}
    exact.update(zip(("dq", "dk", "dv"), exact_gradients(q, k, v, dout, **options)))
    assert got.keys() == exact.keys()
    for name, expected in exact.items():
        torch.testing.assert_close(got[name], expected)
    (only,) = accuracy.references(Inputs(q.detach(), k.detach(), v.detach(), None, attn_mask), causal).items()
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
@pytest.mark.parametrize("mask", [NO_MASK, "holes", "batch-bias"])
def test_accuracy(passes, tensors, mask, on_cpu):
    rows = accuracy.run(replace(SMALL, causal=mask == NO_MASK, attn_mask=mask), passes, [OURS], range(2))
    assert [row["tensor"] for row in rows] == tensors
    for row in rows:
        assert 0 < row["rms_error"] < row["max_error"] < 1e-2 and row["seeds"] == 2


def test_a_nan_is_the_greatest_error(on_cpu, monkeypatch):
    """In whichever seed it is."""
    for at in range(3):
        found = [{"max": nan if seed == at else 1e-3, "mean_square": 1e-6} for seed in range(3)]
        assert isnan(accuracy._over_seeds(found)["max_error"])


TOKENS = DecodeProblem(batch=2, num_heads=4, num_heads_k=2, head_dim=16, queries=3, keys=40)


def test_the_grid_of_decode_problems():
    grid = decode.problems([1, 8], 32, [32, 8, 4], [64, 128], [1, 16], [2048, 8192])
    found = list(grid)
    assert len(found) == len(set(found)) == 2 * 3 * 2 * 2 * 2
    assert found[0].kv_bytes() == 2 * 2 * 2048 * 32 * 64
    assert str(found[-1]) == "b8 h32/4 d128 q16 k8192"


@pytest.mark.parametrize("page_size", [16, 3])
def test_what_the_contenders_of_a_decode_problem_compute(page_size):
    """This library's see every key before theirs, bottom-right; SDPA's have no mask."""
    needs_enable_gqa()
    ours, paged, flash, efficient = decode.contenders(TOKENS, page_size)
    inputs = TOKENS.inputs(0)
    for each in (ours, paged):
        check_attention(each.call(inputs)(), None, *inputs.qkv, causal=True)
    assert paged.name == f"pages of {page_size}" and decode.contenders(TOKENS, None)[1].name == SDPA_FLASH
    for each in (flash, efficient):  # on the CPU its math stands for both
        check_attention(each.call(inputs)(), None, *inputs.qkv)


def test_the_memory_efficient_kernel_gets_heads_that_were_repeated_before(monkeypatch):
    calls = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, _, **given: calls.append((k, v, given)) or q)
    *_, efficient = decode.contenders(TOKENS, None)
    call = efficient.call(TOKENS.inputs(0))
    call(), call()
    (first_k, _, options), (second_k, _, _) = calls
    assert (
        first_k.shape[1] == 4
        and first_k.data_ptr() == second_k.data_ptr()
        and options == {"dropout_p": 0.0, "is_causal": False}
    )


def without_a_gpu_to_time(monkeypatch, ms):
    """A launch of two calls takes so long, whoever's."""
    monkeypatch.setattr(timing, "_burst_ms", lambda calls, count: [call() for call in calls] and ms)


def test_rows_of_a_decode_problem(monkeypatch):
    without_a_gpu_to_time(monkeypatch, 0.5)
    monkeypatch.setattr(Backend, "why_not", lambda backend, _: "" if backend.name == SDPA_FLASH else "not here")
    monkeypatch.setattr(Backend, "selected", lambda _: nullcontext())
    ours, paged, flash, efficient = rows = decode.run(TOKENS, 16, copied=1e9, rounds=3, burst_ms=0.1)
    assert [row["backend"] for row in rows] == [OURS, "pages of 16", SDPA_FLASH, SDPA_EFFICIENT]
    for row in (ours, paged, flash):
        assert row["calls_of_a_launch"] == 2 and row["us_samples"] == [250.0] * 3 and row["us_a_call"] == 250.0
        assert row["share_of_copies"] == pytest.approx(TOKENS.kv_bytes() / 250e-6 / 1e9)
    assert 0 < ours["max_error"] < 4e-3 and paged["max_error"] == ours["max_error"]
    assert efficient["skipped"] == "not here" and "share_of_copies" not in efficient
    assert "times_as_long" not in ours and paged["times_as_long"] == flash["times_as_long"] == 1.0


# Two calls a burst: two bursts to warm up and one to see how many calls a graph has; two more to warm that up.
@pytest.mark.parametrize(
    "calls_before", [0, 5, 7, 11], ids=["at first", "before the graph", "warming up", "in a round"]
)
def test_a_contender_that_runs_out_of_memory_is_a_row(calls_before, monkeypatch):
    bursts = iter(range(calls_before))
    theirs = Backend.forward

    def forward(backend, inputs):
        if backend.name == SDPA_EFFICIENT and next(bursts, None) is None:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 32.00 GiB.")
        return theirs(backend, inputs)

    monkeypatch.setattr(Backend, "forward", forward)
    monkeypatch.setattr(Backend, "why_not", lambda *_: "")
    monkeypatch.setattr(Backend, "selected", lambda _: nullcontext())
    without_a_gpu_to_time(monkeypatch, 0.5)
    ours, flash, efficient = decode.run(TOKENS, None, 1e9, 2, 0.1)
    assert efficient["skipped"] == OUT_OF_MEMORY and "us_a_call" in ours and "us_a_call" in flash


@pytest.mark.parametrize("change", [nan, 0.01])
def test_a_wrong_result_is_not_timed(change, monkeypatch):
    ours = decode._ours

    def wrong(inputs):
        out = ours(inputs)
        out[1, 2, 3, 4] += change
        return out

    monkeypatch.setattr(decode, "_ours", wrong)
    with pytest.raises(SystemExit, match=r"b2 h4/2 d16 q3 k40, flash_attn_jit is WRONG"):
        decode.run(TOKENS, None, 1e9, 1, 1.0)


def test_the_bandwidth_of_copies(monkeypatch):
    monkeypatch.setattr(decode, "_COPIED_BYTES", 1 << 20)
    monkeypatch.setattr(timing, "_burst_ms", lambda calls, count: [call() for call in calls] and 2.0)
    assert decode.copied_bytes_per_second(3, 10.0) == pytest.approx(2 * (1 << 20) / 2e-3)


def test_the_command_for_decode(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(decode, "_COPIED_BYTES", 1 << 20)
    monkeypatch.setattr(bench, "_can_measure", lambda _: True)
    monkeypatch.chdir(tmp_path)
    sizes = ["--batch", "2", "--heads", "4", "--heads-k", "2", "--head-dims", "16", "--queries", "1,3", "--keys", "40"]
    bench.main(["--decode", *sizes, "--page-size", "16", "--rounds", "2", "--burst-ms", "1"])
    printed = capsys.readouterr().out
    assert "A copy on the device reads and writes" in printed and "of a copy's bandwidth" in printed
    rows = json.loads((tmp_path / "bench-decode.json").read_text())["rows"]
    assert [row["queries"] for row in rows] == [1] * 4 + [3] * 4
    assert all(row["copied_bytes_per_second"] > 0 for row in rows)


def test_rows_of_functions_of_a_user(on_cpu, monkeypatch):
    """Of which each gives what is built in."""
    monkeypatch.setattr(flex, "_WINDOW", 9)
    monkeypatch.setattr(timing, "_burst_ms", lambda calls, count: [call() for call in calls] and 2.0)
    rows = list(flex.run(Problem(1, 2, 2, 16, 150, False), [FORWARD, BACKWARD], 2, 0.1))
    names = ["alibi", "softcap", "causal", "window"]
    assert [(row["backend"], row["pass"]) for row in rows] == [(n, p) for n in names for p in (FORWARD, BACKWARD)]
    assert all(row["ms_users"] == row["ms_built_in"] == 2.0 and row["times_as_long"] == 1.0 for row in rows)


def test_functions_of_a_user_that_give_something_else_are_not_timed(on_cpu, monkeypatch):
    theirs = flex._pairs

    def pairs(*arguments):
        for pair in theirs(*arguments):
            yield pair._replace(users=lambda q, k, v: flash_attn_jit.flash_attn_func(q, k, v, softmax_scale=0.1))

    monkeypatch.setattr(flex, "_pairs", pairs)
    with pytest.raises(SystemExit, match="alibi as functions of a user is WRONG"):
        list(flex.run(Problem(1, 2, 2, 16, 150, False), [FORWARD], 2, 0.1))


def test_the_command_for_functions_of_a_user(on_cpu, monkeypatch, tmp_path):
    monkeypatch.setattr(flex, "_WINDOW", 9)
    monkeypatch.setattr(bench, "_can_measure", lambda _: True)
    monkeypatch.setattr(timing, "_burst_ms", lambda calls, count: [call() for call in calls] and 2.0)
    monkeypatch.chdir(tmp_path)
    bench.main(["--flex", "--batch", "1", "--heads", "2", "--head-dims", "16", "--seqlens", "40", "--passes", "fwd"])
    assert len(json.loads((tmp_path / "bench-flex.json").read_text())["rows"]) == 4


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
        *("--host-cost", "--rounds", 1),
        *("--target", "compute_75", "--output", "cost.json"),
        cwd=tmp_path,
        FLASH_ATTN_JIT_TARGET=None,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "cost.json").read_text())
    assert record["machine"]["target"] == "compute_75"
    calls, caches, of_integrations = record["rows"][:12], record["rows"][12:16], record["rows"][16:]
    assert [row["backend"] for row in calls] == ["flash_attn_jit", "sdpa", "flex_attention"] * 4
    modes = [(row["pass"], row["grad_mode"], row["inputs_need_gradients"]) for row in calls]
    assert modes[::3] == modes[1::3] == modes[2::3]
    assert modes[::3] == [("fwd", "off", False), ("fwd", "on", False), ("fwd", "on", True), ("both", "on", True)]
    assert [row["backend"] for row in caches] == ["flash_attn_jit", "sdpa"] * 2
    assert [row["mode"] for row in caches[::2]] == ["grad off, a cache", "grad off, a cache, appending"]
    rows = calls + caches
    assert all(row["us_median"] > 0 for row in rows)
    measured = {row["backend"]: row for row in of_integrations if row["backend"] != "flash_attn_jit"}
    assert list(measured) == list(integration_cost.INTEGRATIONS)
    assert measured["sdpa"]["us_median"] > 0 and measured["comfyui"]["mode"] == "integrations.comfyui"
    assert "transformers" in measured["transformers"].get("skipped", "transformers")


@pytest.mark.parametrize("mode", [mode for mode in host_cost._MODES if mode.cache], ids=str)
def test_what_a_call_over_a_cache_does(mode, monkeypatch):
    """One query over 4096 keys, on both sides."""
    monkeypatch.setattr(host_cost, "_queries", lambda device: 1)
    given = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: given.append((q.shape, k.shape)))
    ours, sdpa = host_cost._calls(mode, "cpu").values()
    with Operators() as ran, torch.no_grad():
        assert ours().shape == (1, 1, 8, 64)
        sdpa()
    assert ran.names == (["append", "forward"] if mode.appends else ["forward"])
    assert given == [((1, 8, 1, 64), (1, 8, 4096, 64))]


def test_unknown_backend(tmp_path):
    done = run_module("bench", "--backends", "xformers", cwd=tmp_path)
    assert done.returncode == 2 and "xformers" in done.stderr and "sdpa_flash" in done.stderr


def test_unknown_pass(tmp_path):
    done = run_module("bench", "--passes", "fwd,backward", cwd=tmp_path)
    assert done.returncode == 2 and "'backward'" in done.stderr and "fwd, bwd, both" in done.stderr


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--seeds", 3), "--seeds means nothing in a timing run"),
        (("--memory", "--rounds", 3), "--rounds means nothing with --memory, which takes --batch"),
        (("--memory", "--passes", "fwd"), "--passes means nothing with --memory"),
        (("--accuracy", "--burst-ms", 3), "--burst-ms means nothing with --accuracy"),
        (("--host-cost", "--seqlens", 512), "--seqlens means nothing with --host-cost, which takes --rounds"),
        (("--plot", "bench.json", "--heads", 3), "--heads means nothing with --plot"),
        (("--tokens", 512), "--tokens means nothing in a timing run"),
        (("--heads", 4, "--heads-k", 3), "--heads is 4, and --heads-k 3"),
        (("--rounds", 0), "--rounds: '0' is no integer above 0"),
        (("--batch", "1,8"), "--batch is 1,8; accepted in a timing run: one number"),
        (("--model", "--heads-k", "8,4"), "--heads-k is 8,4; accepted with --model: one number"),
        (("--decode", "--heads-k", "8,3"), "--heads is 32, and --heads-k 3; accepted: a multiple"),
        (("--decode", "--causal", "no"), "--causal means nothing with --decode, which takes --batch"),
        (("--page-size", 16), "--page-size means nothing in a timing run"),
        (("--seqlens", "512,x"), "--seqlens: 'x' is no integer above 0"),
        (("--burst-ms", "nan"), "--burst-ms: 'nan' is no number"),
        (("--fast",), "unrecognized arguments: --fast"),
    ],
    ids=str,
)
def test_options_that_mean_nothing(arguments, words, capsys):
    with pytest.raises(SystemExit) as ended:
        options.parse_arguments([str(argument) for argument in arguments])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and words in told
    assert told.startswith("python -m flash_attn_jit.bench: ") and told.count("\n") == 1


def test_defaults_of_each_kind():
    given = [[], ["--accuracy"], ["--memory"]]
    timed, accurate, memory_run = (options.parse_arguments(arguments) for arguments in given)
    assert (timed.kind, timed.rounds, timed.heads_k, max(timed.seqlens)) == ("timing", 5, None, 16384)
    assert (accurate.kind, accurate.seeds, max(accurate.seqlens)) == ("accuracy", 5, 4096)
    assert options.parse_arguments(["--accuracy", "--seqlens", "8192"]).seqlens == [8192]
    masked = options.parse_arguments(["--accuracy", "--attn-masks", "bool,bias"])
    assert masked.attn_masks == ["bool", "bias"] and accurate.attn_masks == [NO_MASK]
    assert (memory_run.kind, memory_run.seqlens) == ("memory", [1024, 4096])
    tokens = options.parse_arguments(["--decode", "--batch", "4"])
    assert (tokens.kind, tokens.batch, tokens.heads_k, tokens.page_size) == ("decode", [4], [32, 8, 4], None)
    assert options.parse_arguments(["--batch", "8", "--heads-k", "4"]).heads_k == 4 and timed.batch == 4
    whole = options.parse_arguments(["--model"])
    assert (whole.layers, whole.heads, whole.heads_k, whole.head_dims, whole.tokens) == (8, 32, 4, [64], 8192)
    assert whole.seqlens == [1024, 2048, 4096, 8192]


def timing_record():
    rows = []
    for each in sweep(4, (16, 16), [64, 128], [512, 1024], [False, True]):
        for which in PASSES:
            of_pass = {**each.record(), "pass": which}
            for backend, ms in (("flash_attn_jit", 1.0), ("sdpa_efficient", 2.0), ("sdpa_math", 8.0)):
                times = timing.row_of(each, which, [ms, ms * 1.1, ms * 0.9])
                rows.append({**of_pass, "backend": backend, **times})
            rows.append({**of_pass, "backend": "sdpa_cudnn", "skipped": "not here"})
    return {"kind": "timing", "machine": {"gpu": "Tesla T4", "target": "native"}, "rows": rows}


def test_plot_from_json_alone(tmp_path):
    (tmp_path / "t4.json").write_text(json.dumps(timing_record()))
    done = run_module("bench", "--plot", "t4.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "t4.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_plot_of_no_timings(tmp_path):
    for record in (
        {"kind": "host_cost", "machine": {}, "rows": []},
        {"kind": "predict", "machine": {}, "rows": [{"tflops": 1.0, "problem": {}}]},
        {"cases": []},
    ):
        (tmp_path / "other.json").write_text(json.dumps(record))
        done = run_module("bench", "--plot", "other.json", cwd=tmp_path)
        assert done.returncode != 0 and "no timings" in done.stderr


def test_predictions_of_a_card(tmp_path):
    problems = ["--head-dims", 64, "--seqlens", "256,1024", "--causal", "no"]
    nvrtc = {"FLASH_ATTN_JIT_NVRTC": find_nvrtc(12)}
    done = run_module("bench", "--predict", "t4", *problems, "--passes", "fwd,bwd,both", cwd=tmp_path, **nvrtc)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "bench-predict.json").read_text())["rows"]
    assert [row["pass"] for row in rows] == ["fwd", "bwd", "both"] * 2
    for forward, backward, both in (rows[:3], rows[3:]):
        assert both["ms_predicted"] == pytest.approx(forward["ms_predicted"] + backward["ms_predicted"])
        assert len(backward["kernels"]) == 3 and forward["tflops"] > 1
    assert rows[0]["ms_predicted"] < rows[3]["ms_predicted"]


def test_no_predictions_of_a_card_that_is_not_known(tmp_path):
    done = run_module("bench", "--predict", "a100", "--head-dims", 64, "--seqlens", 256, cwd=tmp_path)
    assert done.stdout.count("is not predicted: flash-attn-jit model: --gpu is 'a100'") == 4
    assert done.returncode == 1 and "Nothing was predicted" in done.stderr
    assert not list(tmp_path.glob("*.json"))


def test_sdpa_beside_tuning_records(on_cpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    without_clocks(monkeypatch)
    monkeypatch.setattr(Backend, "why_not", lambda backend, inputs: "")
    monkeypatch.setattr(Backend, "selected", lambda backend: nullcontext())
    monkeypatch.setattr(timing, "_burst_ms", lambda calls, count: 0.25)
    of_another = {**tuning_records.T4, "name": "Tesla T40"}
    records = [
        tuning_records.record(head_dim=16, seqlen=24, batch=1),
        tuning_records.record(head_dim=16, seqlen=24, batch=1, device=of_another),
        tuning_records.record("bwd_dq", head_dim=16, seqlen=24, batch=1),
        tuning_records.record(head_dim=16, seqlen=24, batch=1, mask="window"),
    ]
    for record in records:
        record["others"] = {}
    path, output = tmp_path / "database.json", tmp_path / "beside.json"
    path.write_text(json.dumps({"format": DATABASE, "version": 1, "records": records}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    bench.main(["--beside", str(path), "--output", str(output)])
    written = json.loads(output.read_text())["records"]
    assert [record["others"] for record in written] == [{SDPA_EFFICIENT: 0.25e-3}, {}, {}, {}]
    assert [{**record, "others": {}} for record in written] == records
    assert parse_record(written[0]).others == {SDPA_EFFICIENT: 0.25e-3}
    assert "q24 k24" in capsys.readouterr().out

    path.write_text(json.dumps({"format": DATABASE, "version": 1, "records": records[1:]}))
    with pytest.raises(SystemExit, match="no record is this GPU's"):
        bench.main(["--beside", str(path)])
    assert json.loads(path.read_text())["records"] == records[1:]
    for bad in ("no JSON", "[]", json.dumps({"format": DATABASE, "version": 1, "records": [{}]})):
        path.write_text(bad)
        with pytest.raises(SystemExit, match=r"--beside is .*; accepted: what `flash-attn-jit tune --export` wrote"):
            bench.main(["--beside", str(path)])
