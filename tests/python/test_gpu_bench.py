"""The bench's whole model and its backends for grouped heads on a GPU: `pytest -m gpu`."""

import json

import pytest
import torch
from conftest import run_module

from flash_attn_jit.bench import decode, model
from flash_attn_jit.bench.backends import OURS, SDPA_EFFICIENT, SDPA_FLASH, SDPA_MATH, Backend
from flash_attn_jit.bench.decode import DecodeProblem
from flash_attn_jit.bench.model import ROUTED, SDPA, STEPS, Shape, Workload
from flash_attn_jit.bench.out_of_memory import OUT_OF_MEMORY
from flash_attn_jit.bench.problem import BOTH, Problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU"),
]
SMALL = Shape(layers=2, num_heads=8, num_heads_k=2, head_dim=64, intermediate=1024, vocabulary=1000, tokens=2048)


def test_routed_the_model_computes_what_it_computes_in_pytorch():
    logits, losses = {}, {}
    for name in (SDPA, ROUTED):
        workload = Workload(SMALL, 512, "cuda")
        with model._selected(name):
            logits[name] = workload.forward()
            losses[name] = torch.stack([workload.training() for _ in range(20)])
    error = (logits[ROUTED].double() - logits[SDPA].double()).abs().max()
    assert error < 0.01 * logits[SDPA].double().abs().max()
    torch.testing.assert_close(losses[ROUTED], losses[SDPA], atol=0.1, rtol=0)
    assert losses[ROUTED].isfinite().all() and losses[ROUTED][-1] < losses[ROUTED][0] - 0.1


def test_the_model_of_the_default_size_learns():
    """float16 weights and states: nothing overflows at the size that is measured."""
    workload = Workload(Shape(8, 32, 4, 64, 5632, 32000, 8192), 1024, "cuda")
    with model._selected(ROUTED):
        losses = torch.stack([workload.training() for _ in range(20)])
    assert losses.isfinite().all() and losses[-1] < losses[0]


def test_the_command(tmp_path):
    sizes = ("--layers", 2, "--heads", 8, "--heads-k", 2, "--tokens", 2048, "--seqlens", "512,2048")
    done = run_module("bench", "--model", *sizes, "--rounds", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "bench-model.json").read_text())["rows"]
    assert [(row["seqlen"], row["pass"], row["backend"]) for row in rows] == [
        (seqlen, step, name) for seqlen in (512, 2048) for step in STEPS for name in (SDPA, ROUTED)
    ]
    for row in rows:
        assert row["ms_median"] > 0 and row["peak_bytes"] > 2**20
    for theirs, ours in zip(rows[::2], rows[1::2]):
        if theirs["pass"] == "training" and theirs["sdpa_backend"] == "sdpa_math":
            assert ours["peak_bytes"] < theirs["peak_bytes"]  # which keeps every score


def test_running_out_of_memory_is_a_row_and_leaves_the_memory_free():
    """Room for the model, but not for the scores of PyTorch's math."""
    if model.sdpa_backend(SMALL) != SDPA_MATH:
        pytest.skip("this PyTorch keeps no scores for grouped heads")
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 3 * 2**30) / total)
    try:
        shape = Shape(2, 32, 4, 64, 512, 512, tokens=8192)  # 8 GiB of scores a layer, in float32
        forward, forward_routed, training, training_routed = model.run(shape, [8192], 2, 1.0)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert forward["skipped"] == training["skipped"] == OUT_OF_MEMORY
    assert forward_routed["ms_median"] > 0 and training_routed["ms_median"] > 0


def test_the_command_for_decode(tmp_path):
    sizes = ("--batch", 2, "--heads", 8, "--heads-k", 2, "--head-dims", 64, "--queries", "1,16", "--keys", 3000)
    done = run_module("bench", "--decode", *sizes, "--page-size", 16, "--rounds", 2, "--burst-ms", 5, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "bench-decode.json").read_text())["rows"]
    names = [OURS, "pages of 16", SDPA_FLASH, SDPA_EFFICIENT]
    assert [(row["queries"], row["backend"]) for row in rows] == [
        (queries, name) for queries in (1, 16) for name in names
    ]
    for row in rows:
        if row["backend"] != SDPA_FLASH:  # which Turing does not have
            assert row["share_of_copies"] > 0 and row["calls_of_a_launch"] > 1


def test_the_command_for_functions_of_a_user(tmp_path):
    sizes = ("--batch", 1, "--heads", 4, "--head-dims", 64, "--seqlens", 2500)
    done = run_module("bench", "--flex", *sizes, "--rounds", 2, "--burst-ms", 5, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "bench-flex.json").read_text())["rows"]
    assert len(rows) == 8 and all(row["times_as_long"] > 0 for row in rows)


def test_input_sets_pass_the_cache_and_leave_room():
    small, large = (DecodeProblem(1, 8, 8, 64, 1, keys) for keys in (1024, 65536))
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    assert (len(decode.input_sets(small, 1)) - 1) * small.kv_bytes() >= min(2 * l2_bytes, 31 * small.kv_bytes())
    free_bytes, _ = torch.cuda.mem_get_info()
    assert len(decode.input_sets(large, free_bytes // large.kv_bytes())) == 1


@pytest.mark.parametrize("name", [SDPA_EFFICIENT, SDPA_MATH])
def test_what_a_turing_gpu_has_for_grouped_heads_runs(name):
    problem = Problem(2, 8, 2, 64, 300, True)
    inputs = problem.inputs(0, BOTH)
    backend = Backend(name, problem)
    assert backend.why_not(inputs) == ""
    with backend.selected():
        gradients = backend.both(inputs)
    for got, expected in zip(gradients, Backend(OURS, problem).both(inputs)):
        torch.testing.assert_close(got, expected, atol=2e-2, rtol=0)
