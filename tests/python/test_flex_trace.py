"""What flex.trace() makes of functions, compiled for the host and asked at single places, against float64."""

import functools
import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from random_score_functions import BATCH, HEADS, LONGEST, captured_tensors, random_mask, random_score_function
from torch.nn.attention.flex_attention import and_masks, or_masks
from user_code import CompiledFunction, compiled

from flash_attn_jit.flex import trace
from flash_attn_jit.flex._operators import OPERATORS

CPU = torch.device("cpu")
TENSORS = captured_tensors(1)
LENGTH = 200


def places(count: int, seed: int = 0) -> torch.Tensor:
    """(count, 4): b, h, q and k."""
    generator = torch.Generator().manual_seed(seed)
    ends = (BATCH, HEADS, LENGTH, LENGTH)
    return torch.stack([torch.randint(0, end, (count,), generator=generator) for end in ends], 1)


def scores(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 2


def vmap_in_torch(function: Any, *arguments: torch.Tensor) -> torch.Tensor:
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    *score, at = arguments
    with TransformGetItemToIndex(), torch.no_grad():
        return torch.vmap(function)(*score, *at.unbind(1))


def eager(function: Any, score: torch.Tensor, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The function's values and derivatives as flex_attention's eager form has them."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    score = score.clone().requires_grad_()
    with TransformGetItemToIndex():
        values = torch.vmap(function)(score, *at.unbind(1))
    if not values.requires_grad:
        return values.to(score.dtype), torch.zeros_like(score)
    (derivative,) = torch.autograd.grad(values.sum(), score)
    return values.detach(), derivative


def check(function: CompiledFunction, of_float64: Any, score: torch.Tensor, at: torch.Tensor, digits: int = 19) -> None:
    """Against float64, to so many binary digits of 1 or of the value."""
    found = function(score, at)
    value, derivative = eager(of_float64, score.double(), at)
    code = function.traced.code
    close(found.score, value, digits, code)
    close(found.score_of_backward, value, digits, code)
    visible = value > -math.inf
    close(found.derivative[visible], derivative[visible], digits - 1, code)
    if not function.has_derivative:
        assert bool((found.derivative == 1).all()), code
    if function.is_additive:
        check_sum(function, score, at, value, digits)


def check_sum(function: CompiledFunction, score: torch.Tensor, at: torch.Tensor, value: torch.Tensor, digits: int) -> None:
    unit = 0.3125
    added, sums = function.sums(score * unit, at, unit)
    close(added, value - score.double(), digits, function.traced.code)
    close(sums, value * unit, digits, function.traced.code)


def close(found: torch.Tensor, expected: torch.Tensor, digits: int, code: str) -> None:
    found = found.double()
    same = (found == expected) | (found.isnan() & expected.isnan())
    bound = torch.clamp(expected.abs(), min=1.0) * 2.0**-digits
    wrong = ~same & ~((found - expected).abs() <= bound)
    assert not bool(wrong.any()), f"{found[wrong][:4]} for {expected[wrong][:4]}\n{code}"


# ---- operators: each with its digits where it has fewer ----

SCORES = """
score + 1.5; 1.5 + score; score - 1; 1 - score; 3 * score; score * score; score / 3; score / 7.3; 2 / (score + 9)
-score; +score; abs(score); score.abs(); torch.abs(score); score.square(); torch.square(score)
score ** 2; score ** 3; score ** 5; score.pow(4); (score.abs() + 1) ** -2; (score.abs() + 1) ** 0.5
(score.abs() + 1) ** 2.5; (score.abs() + 1) ** -0.5; 1.5 ** score; 2 ** score
(score.abs() + 1) ** (score * 0.5); torch.pow(score.abs() + 1, 1.7); torch.pow(2.5, score); score ** 0; score ** 1
torch.exp(score); score.exp(); torch.exp2(score); torch.expm1(score); torch.expm1(score * 0.01)
torch.log(score.abs() + 0.01); torch.log2(score.abs() + 0.01); torch.log10(score.abs() + 0.1)
torch.log1p(score.abs()); torch.log1p(score * 0.001); torch.log(score.abs() * 1e-30 + 1e-35)
torch.sqrt(score.abs() + 0.1); torch.rsqrt(score.abs() + 0.1); torch.reciprocal(score.abs() + 0.5)
torch.tanh(score); torch.tanh(score * 0.05); 20 * torch.tanh(score / 20); torch.sigmoid(score); torch.special.expit(score)
torch.sin(score); torch.cos(score); score + torch.sin(kv_idx * 37.0); score + torch.cos(q_idx * 4001.0); torch.tan(score * 0.5)
torch.sinh(score); torch.cosh(score); torch.erf(score); torch.erf(score * 0.1); torch.erfc(score)
torch.relu(score); torch.nn.functional.relu(score); torch.nn.functional.silu(score); torch.nn.functional.gelu(score)
torch.nn.functional.gelu(score, approximate="tanh"); torch.nn.functional.softplus(score * 4)
torch.nn.functional.softplus(score, beta=2, threshold=3); torch.nn.functional.leaky_relu(score, 0.2)
torch.maximum(score, score * 0.5 + 0.1); torch.minimum(score, -score); torch.max(score, -score)
torch.clamp(score, -1, 1); score.clamp(min=0.5); score.clip(max=0.25); torch.clamp_min(score, 0.1); score.clamp_max(1)
torch.clamp(score, slopes[h] - 1, slopes[h] + 1); torch.floor(score); torch.ceil(score); torch.round(score)
torch.trunc(score); torch.frac(score); torch.sign(score); torch.sgn(score)
score % 1.5; score % -1.5; torch.remainder(score, 0.7); torch.fmod(score, 0.7); torch.fmod(score, -0.7); torch.fmod(score, slopes[h].abs() + 1)
torch.div(score, 0.5, rounding_mode="floor"); torch.div(score, 0.5, rounding_mode="trunc"); torch.div(score, 3)
torch.where(score > 0, score, 0.25 * score); torch.where(score >= 0.3, 1.0, 2.0); torch.where(q_idx >= kv_idx, score, -1e4)
score.masked_fill(q_idx < kv_idx, -float("inf")); score.where(q_idx > kv_idx, 0); torch.where(score != score, 0, score)
torch.where(q_idx >= kv_idx, score, -float("inf")); torch.where(q_idx >= kv_idx, torch.exp(score), -float("inf"))
torch.where(score.isnan(), 1, score); torch.where(torch.isinf(score), 1, score); torch.where(torch.isfinite(score), score, 0)
torch.where(torch.logical_or(score > 1, score < -1), score, 2 * score); torch.where((score > 0).logical_not(), 0, score)
torch.where((score > 0) ^ (h == 1), score, -score); torch.where(score.lt(0).logical_and(b == 1), 3.0, score)
torch.add(score, kv_idx, alpha=0.5); torch.sub(score, q_idx, alpha=0.5); torch.rsub(score, 3); torch.mul(score, 2)
score + torch.full_like(score, 3.5); score + torch.zeros_like(score); score * torch.ones_like(score)
score + torch.tensor(2.5); score * torch.tensor(3); score + score.new_full((), 2.5); score.detach() * score
score.to(torch.float32) + kv_idx.to(score.dtype); score.float() + kv_idx.float(); kv_idx.type_as(score) * score
score * (q_idx >= kv_idx); score + (q_idx >= kv_idx).float(); score + (h == 1).int() * 2; score + (score > 0)
score + (kv_idx - q_idx); score + (kv_idx - q_idx) / 7; score + kv_idx // 3 - q_idx % 5; score + (kv_idx - q_idx) // 4
score + (kv_idx - q_idx) // 3; score + (kv_idx - q_idx) % 3; score + (kv_idx - q_idx) % -8; score + (kv_idx - q_idx) % 8
score + torch.fmod(kv_idx - q_idx, 5); score + (kv_idx - q_idx) // (h - 9); score + (kv_idx - q_idx) % (h - 9)
score + torch.div(kv_idx - q_idx, 3, rounding_mode="trunc"); score + (kv_idx - q_idx).abs() * 2; score + -kv_idx
score + (kv_idx << 2) - (q_idx >> 1); score + (1 << (kv_idx % 9)); score + (kv_idx & 6) + (q_idx | 3) + (h ^ b); score + ~h
score + (kv_idx - q_idx).clamp(-4, 9); score + torch.minimum(kv_idx, q_idx); score + torch.maximum(h, b * 4)
score + torch.sign(kv_idx - q_idx); score + kv_idx ** 2 * 0.001; score + torch.square(h); score + (kv_idx - 100).relu()
score + torch.where(q_idx > kv_idx, 1, 0); score + torch.where(q_idx > kv_idx, h, 3); score + kv_idx.bool().float()
score + torch.floor(score).int(); score + (score * 3).long() % 4; score + (kv_idx * 1.7).to(torch.int64) % 5
score + torch.sqrt(kv_idx * 1.0); score + torch.log(1 + (q_idx - kv_idx).abs()); score + torch.exp(-0.1 * (q_idx - kv_idx).abs())
score + q_idx * kv_idx * 0.0001; score + (q_idx * 1000003 + kv_idx * 998244353) % 7; score + (q_idx * 2**40) % 11
score + slopes[h] * (kv_idx - q_idx); score + of_batch[b, h]; score + of_batch[b][h]; score * temperature
score + relative[h, q_idx - kv_idx + 200]; score + relative[h][kv_idx]; score + pairs[h, q_idx, kv_idx] * slopes[h]
score + relative[:, 3][h]; score + relative[h, -1 - kv_idx]; score + relative[-1, kv_idx]; score + of_query[kv_idx % 7 - 7]
score + relative[..., 5][h]; score + pairs[:, q_idx][h, kv_idx]; score + pairs[h, :, 3][q_idx]; score + relative[1:][b, q_idx]
score + (-slopes)[h]; score + (slopes * 2 + 1)[h]; score * slopes.abs()[h] + slopes.sum(); score / of_batch[b, h].exp()
score + document[kv_idx]; score + prefix[b] - kinds[q_idx] + shift[h]; score + (kinds[q_idx] - kinds[kv_idx])
score + kinds[q_idx] * 200; score + shift[h] * shift[h]; score + hidden[b, kv_idx]; score * ~hidden[b, kv_idx]
score + document[kv_idx] * 3 - document[q_idx] // 2; score + buckets[(q_idx - kv_idx).abs().clamp(max=31), h]
score + halves[h] + brains[kv_idx]; score + torch.nn.functional.embedding((kv_idx - q_idx) % 32, buckets)[h]
kv_idx - q_idx; q_idx >= kv_idx; slopes[h]; 1.0 * h; -float("inf") * torch.ones_like(score); score + float("inf")
score - slopes[h] * (q_idx - kv_idx).abs(); 0.5 * score + 0.5 * torch.tanh(score + slopes[h]); score / (h + 1)
torch.where(q_idx >= kv_idx, score + slopes[h], torch.where(kv_idx < prefix[b], score - 1, -float("inf")))
"""
# Of which torch has no derivative, which is 0, or that of a division's rest.
VALUES = """
score // 0.5; score // -0.7; torch.floor_divide(score, slopes[h]); (score * 30) // 3.0; 5 // (score.abs() + 0.1)
torch.remainder(7.5, score.abs() + 1); 3 % (score + 9); score % slopes[h]; torch.fmod(score, slopes[h])
score + kv_idx // 0.1; score + kv_idx % 0.1; score + torch.fmod(kv_idx, 0.3); score + (kv_idx / 10) // 0.1
"""
DIGITS = {"torch.exp": 17, "cosh": 17, "sinh": 17, "**": 17, "pow": 17, "expm1": 17, "* 0.01": 19}


def listed(text: str) -> list[str]:
    return [each.strip() for line in text.strip().splitlines() for each in line.split(";")]


EXPRESSIONS = listed(SCORES)


def function_of(expression: str, dtype: torch.dtype, arguments: str = "score, b, h, q_idx, kv_idx") -> Any:
    tensors = captured_tensors(1, dtype)
    names = {
        "torch": torch,
        **tensors,
        "halves": tensors["slopes"].to(torch.float16 if dtype is torch.float32 else dtype),
        "brains": tensors["of_query"].bfloat16().to(torch.bfloat16 if dtype is torch.float32 else dtype),
    }
    return eval(f"lambda {arguments}: {expression}", names)


def compiled_expressions(expressions: list[str], folder: Path) -> dict[str, CompiledFunction]:
    traced = [trace(function_of(each, torch.float32), None, CPU) for each in expressions]
    return dict(zip(expressions, compiled(traced, folder)))


@pytest.fixture(scope="module")
def operators(tmp_path_factory: pytest.TempPathFactory) -> dict[str, CompiledFunction]:
    return compiled_expressions(EXPRESSIONS, tmp_path_factory.mktemp("operators"))


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_operator(operators: dict[str, CompiledFunction], expression: str) -> None:
    digits = min((digits for part, digits in DIGITS.items() if part in expression), default=19)
    check(operators[expression], function_of(expression, torch.float64), scores(400), places(400), digits)


def test_divisions_of_no_derivative(tmp_path: Path) -> None:
    """Against torch's float32: where a quotient is nearly whole float64 rounds elsewhere."""
    for expression, function in compiled_expressions(listed(VALUES), tmp_path).items():
        found = function(scores(400), places(400)).score
        values = vmap_in_torch(function_of(expression, torch.float32), scores(400), places(400))
        close(found, values.double(), 19, f"{expression}\n{function.traced.code}")


# ---- random functions ----

SEEDS = range(80)


def test_random_functions(tmp_path: Path) -> None:
    functions = [random_score_function(seed) for seed in SEEDS]
    traced = [trace(each.over(TENSORS), None, CPU) for each in functions]
    of_float64 = captured_tensors(1, torch.float64)
    for i, (function, code) in enumerate(zip(functions, compiled(traced, tmp_path))):
        try:
            check(code, function.over(of_float64), scores(300, i), places(300, i), digits=15)
        except AssertionError as error:
            raise AssertionError(f"seed {SEEDS[i]}:\n{function.text}") from error


def test_random_masks(tmp_path: Path) -> None:
    functions = [random_mask(seed) for seed in SEEDS]
    traced = [trace(None, each.over(TENSORS), CPU) for each in functions]
    for i, (function, code) in enumerate(zip(functions, compiled(traced, tmp_path))):
        at = places(300, i)
        found, expected = code(scores(300), at).shown, vmap_in_torch(function.over(TENSORS), at)
        assert torch.equal(found, expected.expand(300)), f"seed {SEEDS[i]}:\n{function.text}\n{code.traced.code}"
        assert code.is_identity and code.is_additive


def test_generators_are_varied() -> None:
    """What functions are made of: all tensors, and several kinds of results."""
    texts = [random_score_function(seed) for seed in SEEDS] + [random_mask(seed) for seed in SEEDS]
    assert len({each.text for each in texts}) > 0.9 * len(texts)
    assert set().union(*(each.named() for each in texts)) == set(TENSORS)
