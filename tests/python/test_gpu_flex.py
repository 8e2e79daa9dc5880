"""flex_attention on a GPU: what test_flex_attention.py asks of the interpreter, at lengths of several blocks."""

from typing import Any

import pytest
import test_flex_attention as flex
import torch
from conftest import needs_torch
from random_score_functions import captured_tensors, random_mask, random_score_function

import flash_attn_jit

flex_attention: Any = flash_attn_jit.flex_attention
pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_torch("2.9", "flex_attention's eager implementation has other names before")
    monkeypatch.setattr(flex, "DEVICE", "cuda")
    for name in ("_SLOPES", "_DOCUMENTS", "_PREFIXES", "_BUCKETS"):
        tensor = getattr(flex, name)
        longer = tensor if name != "_DOCUMENTS" else torch.arange(1000) // 70
        monkeypatch.setattr(flex, name, longer.cuda())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 72, 128, 256])
@pytest.mark.parametrize("name", flex.SCORES)
def test_score_functions(name: str, dim: int, dtype: torch.dtype) -> None:
    flex.compare(flex.inputs(2, 4, 4, 450, 700, dim, dtype), flex.SCORES[name])


@pytest.mark.parametrize("dim", [40, 64, 128])
@pytest.mark.parametrize("mask", flex.MASKS)
@pytest.mark.parametrize("score", [None, "alibi", "softcap"])
def test_masks(score: str | None, mask: str, dim: int) -> None:
    block_mask = flex.block_mask_of(flex.MASKS[mask], 2, 4, 900, 900)
    flex.compare(flex.inputs(2, 4, 2, 900, 900, dim), None if score is None else flex.SCORES[score], block_mask)


@pytest.mark.parametrize("case", flex.CASES, ids=lambda case: "-".join(str(value) for value in case.values()))
def test_pairwise(case: dict[str, Any]) -> None:
    flex.test_pairwise(case)


@pytest.mark.parametrize("seed", range(100, 160))
def test_random_functions(seed: int) -> None:
    captured = {name: tensor.cuda() for name, tensor in captured_tensors(seed).items()}
    functions = (random_score_function(each, jumps=False) for each in range(seed, 100000, 100))
    score_mod = next(function for function in functions if "score" in function.text.split("return")[1]).over(captured)
    tensors = flex.inputs(2, 6, 2, 200, 230, 64)
    block_mask = None
    if seed % 2:
        block_mask = flex.block_mask_of(random_mask(seed).over(captured), 2, 6, 200, 230)
    flex.compare(tensors, score_mod, block_mask)


def test_a_first_call_takes_less_than_a_second() -> None:
    """Of a new function, once NVRTC is open: three kernels, side by side."""
    q, k, v, dout = flex.inputs(1, 2, 2, 256, 256, 64)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    first: Any = flex_attention(*leaves, lambda score, b, h, q_idx, kv_idx: score * 0.75)
    first.backward(dout)
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    out: Any = flex_attention(*leaves, lambda score, b, h, q_idx, kv_idx: torch.tanh(score * 0.7501) * 1.25)
    end.record()
    torch.cuda.synchronize()
    assert torch.isfinite(out).all()
    assert begin.elapsed_time(end) < 1000
