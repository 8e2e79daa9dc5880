"""The bench's whole model, at a tiny size in the interpreter."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import needs_enable_gqa, run_module

from flash_attn_jit.bench import __main__ as bench, model, options
from flash_attn_jit.bench.model import (
    ROUTED,
    SDPA,
    STEPS,
    TRAINING,
    Decoder,
    Rotary,
    Shape,
    Workload,
)
from flash_attn_jit.bench.out_of_memory import OUT_OF_MEMORY

TINY = Shape(layers=2, num_heads=4, num_heads_k=2, head_dim=16, intermediate=32, vocabulary=64, tokens=32)
ARGUMENTS = (
    *("--model", "--layers", 2, "--heads", 4, "--heads-k", 2, "--head-dims", 16, "--intermediate", 32),
    *("--vocabulary", 64, "--tokens", 32, "--rounds", 2, "--burst-ms", 0.1),
)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def run(shape=TINY, seqlens=(16,)):
    needs_enable_gqa()
    return list(model.run(shape, seqlens, rounds=1, burst_ms=0.1))


def test_rotary_turns_pairs_as_complex_numbers():
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    pairs = torch.complex(x[..., :8], x[..., 8:])
    angles = torch.arange(5)[:, None] * 10000.0 ** (-torch.arange(8) / 8)
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    rotary = Rotary.of(5, 16, "cpu")
    assert rotary.cos.dtype is rotary.sin.dtype is torch.float16
    torch.testing.assert_close(rotary.turn(x), torch.cat((turned.real, turned.imag), -1), atol=5e-3, rtol=0)


def test_the_decoder_is_what_its_sizes_say():
    decoder = Decoder(TINY, "cpu")
    attention = 2 * 64 * 64 + 2 * 64 * 32
    of_a_layer = attention + 3 * 64 * 32 + 2 * 64
    assert sum(weight.numel() for weight in decoder.parameters()) == 2 * 64 * 64 + 2 * of_a_layer + 64
    assert {weight.dtype for weight in decoder.parameters()} == {torch.float16}
    for same, weight in zip(Decoder(TINY, "cpu").parameters(), decoder.parameters()):
        assert torch.equal(same, weight)


def test_no_token_sees_a_later_one():
    needs_enable_gqa()
    decoder = Decoder(TINY, "cpu")
    tokens = torch.arange(16).repeat(2, 1)
    tokens[1, 9:] = 50
    with torch.no_grad():
        first, second = decoder(tokens)
    assert torch.equal(first[:9], second[:9]) and not torch.equal(first[9:], second[9:])


def test_attention_is_called_as_models_call_it(monkeypatch):
    needs_enable_gqa()
    calls = []
    theirs = F.scaled_dot_product_attention

    def recorded(*tensors, **options):
        calls.append(([tuple(tensor.shape) for tensor in tensors], options))
        return theirs(*tensors, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    Workload(TINY, 16, "cpu").forward()
    shapes, options = calls[0]
    assert len(calls) == 2 and shapes == [(2, 4, 16, 16), (2, 2, 16, 16), (2, 2, 16, 16)]
    assert options == {"is_causal": True, "enable_gqa": True}


def test_routed_it_computes_what_it_computes_in_pytorch():
    needs_enable_gqa()
    logits, losses = {}, {}
    for name in (SDPA, ROUTED):
        workload = Workload(TINY, 16, "cpu")
        with model._selected(name):
            logits[name] = workload.forward()
            losses[name] = torch.stack([workload.training() for _ in range(8)])
    assert logits[SDPA].shape == (2, 16, 64)
    torch.testing.assert_close(logits[ROUTED], logits[SDPA], atol=2e-3, rtol=0)
    torch.testing.assert_close(losses[ROUTED], losses[SDPA], atol=2e-2, rtol=0)
    assert losses[ROUTED].isfinite().all() and losses[ROUTED][-1] < losses[ROUTED][0] - 0.01


def test_rows():
    rows = run(seqlens=(16, 32))
    assert [(row["seqlen"], row["batch"], row["pass"], row["backend"]) for row in rows] == [
        (seqlen, 32 // seqlen, step, name) for seqlen in (16, 32) for step in STEPS for name in (SDPA, ROUTED)
    ]
    for row in rows:
        assert row["ms_median"] > 0 and len(row["ms_samples"]) == 1 and row["sdpa_backend"] == "sdpa_math"
        assert row["layers"] == 2 and row["tokens"] == 32 and row["causal"]
    assert rows[1]["times_faster"] == rows[0]["ms_median"] / rows[1]["ms_median"]


def test_out_of_memory_is_a_row_and_the_rest_is_measured(monkeypatch):
    """PyTorch's attention runs out of memory where a graph keeps its scores: the forward pass, and this library's
    training step, are measured all the same."""
    theirs = F.scaled_dot_product_attention

    def exhausted(query, *tensors, **options):
        if query.requires_grad:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 GiB.")
        return theirs(query, *tensors, **options)

    class Patched:
        def __enter__(self):
            F.scaled_dot_product_attention = exhausted

        def __exit__(self, *error):
            F.scaled_dot_product_attention = theirs

    selected = model._selected
    monkeypatch.setattr(model, "_selected", lambda name: Patched() if name == SDPA else selected(name))
    freed = []
    monkeypatch.setattr(model, "free_memory", lambda: freed.append(True))
    forward, forward_routed, training, training_routed = run()
    assert training["skipped"] == OUT_OF_MEMORY and "ms_median" not in training
    assert forward["ms_median"] > 0 and forward_routed["times_faster"] > 0
    assert training_routed["ms_median"] > 0 and "times_faster" not in training_routed
    assert len(freed) == 2  # after it, and after the sequence length


def test_other_errors_are_no_result(monkeypatch):
    def fails(workload):
        raise RuntimeError("a matrix of a wrong shape")

    monkeypatch.setattr(Workload, "forward", fails)
    with pytest.raises(RuntimeError, match="wrong shape"):
        run()


def test_a_model_that_is_not_routed_has_no_time():
    """A head dim that this library has not: the calls fall back to PyTorch, and a time would be PyTorch's."""
    rows = run(replace(TINY, layers=1, head_dim=514))
    assert [row["backend"] for row in rows if "skipped" in row] == [ROUTED, ROUTED]
    assert "514" in rows[1]["skipped"] and rows[0]["ms_median"] > 0


def test_the_command_end_to_end(tmp_path):
    needs_enable_gqa()
    done = run_module(
        "bench",
        *ARGUMENTS,
        "--seqlens",
        "16,32",
        "--target",
        "compute_75",
        cwd=tmp_path,
        FLASH_ATTN_JIT_TARGET=None,
    )
    assert done.returncode == 0, done.stderr
    heading, *table, path = done.stdout.splitlines()
    assert "4 query and 2 key heads of 16" in heading and "hidden 64" in heading and "sdpa_math" in heading
    assert len(table) == 8 and path == "bench-model.json"
    assert all(" ms " in line and line.split()[2] in STEPS for line in table)
    assert "times as fast" in table[1] and table[0].split()[:2] == ["b2", "s16"]
    record = json.loads((tmp_path / "bench-model.json").read_text())
    assert record["kind"] == "model" and record["machine"]["target"] == "compute_75" and len(record["rows"]) == 8


def test_out_of_memory_in_the_table(monkeypatch, capsys):
    bench._print_rows("b1 s8192", [{"pass": TRAINING, "backend": SDPA, "skipped": OUT_OF_MEMORY}])
    assert capsys.readouterr().out.split() == [
        "b1",
        "s8192",
        "training",
        "sdpa",
        "does",
        "not",
        "run:",
        "out",
        "of",
        "memory",
    ]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--tokens", 32, "--seqlens", 12), "--seqlens has 12, and --tokens is 32"),
        (("--heads", 6, "--heads-k", 4), "--heads is 6, and --heads-k 4"),
        (("--head-dims", "16,32"), "--head-dims is [16, 32]"),
        (("--head-dims", 15), "--head-dims is [15]"),
        (("--batch", 4), "--batch means nothing with --model"),
        (("--layers", 0), "--layers: '0' is no integer above 0"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit(arguments, words, capsys):
    with pytest.raises(SystemExit) as ended:
        options.parse_arguments(["--model", *map(str, arguments)])
    assert ended.value.code == 2 and words in capsys.readouterr().err


def test_a_torch_without_enable_gqa(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "KNOWS_ENABLE_GQA", False)
    with pytest.raises(SystemExit, match=r"--model needs torch 2.5"):
        bench.main([*map(str, ARGUMENTS), "--seqlens", "16", "--output", str(tmp_path / "model.json")])
