"""What flex.trace() makes of functions, compiled for the host and asked at single places, against float64."""

import functools
import inspect
import math
import operator
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from random_score_functions import BATCH, HEADS, LONGEST, captured_tensors, random_mask, random_score_function
from torch.nn.attention.flex_attention import and_masks, noop_mask, or_masks
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
        values = torch.vmap(function)(score.clone(), *at.unbind(1))
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


def check_sum(
    function: CompiledFunction, score: torch.Tensor, at: torch.Tensor, value: torch.Tensor, digits: int
) -> None:
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
score + 1.5; 1.5 + score; torch.neg(score); score - 1; 1 - score; 3 * score; score * score; score / 3; score / 7.3
2 / (score + 9); -score; +score; abs(score); score.abs(); torch.abs(score); score.square(); torch.square(score)
score ** 2; score ** 3; score ** 5; score.pow(4); (score.abs() + 1) ** -2; (score.abs() + 1) ** 0.5
(score.abs() + 1) ** 2.5; (score.abs() + 1) ** -0.5; 1.5 ** score; 2 ** score; (score.abs() + 1) ** (score * 0.5)
torch.pow(score.abs() + 1, 1.7); torch.pow(2.5, score); score ** 0; score ** 1; torch.exp(score); score.exp()
torch.exp2(score); torch.expm1(score); torch.expm1(score * 0.01); torch.log(score.abs() + 0.01)
torch.log2(score.abs() + 0.01); torch.log10(score.abs() + 0.1); torch.log1p(score.abs()); torch.log1p(score * 0.001)
torch.log(score.abs() * 1e-30 + 1e-35); torch.sqrt(score.abs() + 0.1); torch.rsqrt(score.abs() + 0.1)
torch.reciprocal(score.abs() + 0.5); torch.tanh(score); torch.tanh(score * 0.05); 20 * torch.tanh(score / 20)
torch.sigmoid(score); torch.special.expit(score); torch.sin(score); torch.cos(score); score + torch.sin(kv_idx * 37.0)
score + torch.cos(q_idx * 4001.0); torch.tan(score * 0.5); torch.sinh(score); torch.cosh(score); torch.erf(score)
torch.erf(score * 0.1); torch.erfc(score); torch.relu(score); torch.nn.functional.relu(score)
torch.nn.functional.silu(score); torch.nn.functional.gelu(score); torch.nn.functional.gelu(score, approximate="tanh")
torch.nn.functional.softplus(score * 4); torch.nn.functional.softplus(score, beta=2, threshold=3)
torch.nn.functional.leaky_relu(score, 0.2); torch.maximum(score, score * 0.5 + 0.1); torch.minimum(score, -score)
torch.max(score, -score); torch.clamp(score, -1, 1); score.clamp(min=0.5); score.clip(max=0.25)
torch.clamp_min(score, 0.1); score.clamp_max(1); torch.clamp(score, slopes[h] - 1, slopes[h] + 1); torch.floor(score)
torch.ceil(score); torch.round(score); torch.trunc(score); torch.frac(score); torch.sign(score); torch.sgn(score)
score % 1.5; score % -1.5; torch.remainder(score, 0.7); torch.fmod(score, 0.7); torch.fmod(score, -0.7)
torch.fmod(score, slopes[h].abs() + 1); torch.fmod(-2.75 - h, score.abs() + 1.5); torch.add(score, 1.5, alpha=2)
torch.sub(score, 1.5, alpha=2); score.type(torch.float32) * 2
torch.div(score, 0.5, rounding_mode="floor")
torch.div(score, 0.5, rounding_mode="trunc"); torch.div(score, 3); torch.where(score > 0, score, 0.25 * score)
torch.where(score >= 0.3, 1.0, 2.0); torch.where(q_idx >= kv_idx, score, -1e4)
score.masked_fill(q_idx < kv_idx, -float("inf")); score.where(q_idx > kv_idx, 0)
torch.where(score != score, 0, score); torch.where(q_idx >= kv_idx, score, -float("inf"))
torch.where(q_idx >= kv_idx, torch.exp(score), -float("inf")); torch.where(score.isnan(), 1, score)
torch.where(torch.isinf(score), 1, score); torch.where(torch.isfinite(score), score, 0)
torch.where(torch.logical_or(score > 1, score < -1), score, 2 * score)
torch.where((score > 0).logical_not(), 0, score); torch.where((score > 0) ^ (h == 1), score, -score)
torch.where(score.lt(0).logical_and(b == 1), 3.0, score); torch.add(score, kv_idx, alpha=0.5)
torch.sub(score, q_idx, alpha=0.5); torch.rsub(score, 3); torch.mul(score, 2); score + torch.full_like(score, 3.5)
score + torch.zeros_like(score); score * torch.ones_like(score); score + torch.tensor(2.5); score * torch.tensor(3)
score + score.new_full((), 2.5); score.detach() * score; score.to(torch.float32) + kv_idx.to(score.dtype)
score.float() + kv_idx.float(); kv_idx.type_as(score) * score; score * (q_idx >= kv_idx)
score + (q_idx >= kv_idx).float(); score + (h == 1).int() * 2; score + (score > 0); score + (kv_idx - q_idx)
score + (kv_idx - q_idx) / 7; score + kv_idx // 3 - q_idx % 5; score + (kv_idx - q_idx) // 4
score + (kv_idx - q_idx) // 3; score + (kv_idx - q_idx) % 3; score + (kv_idx - q_idx) % -8
score + (kv_idx - q_idx) % 8; score + torch.fmod(kv_idx - q_idx, 5); score + (kv_idx - q_idx) // (h - 9)
score + (kv_idx - q_idx) % (h - 9); score + torch.div(kv_idx - q_idx, 3, rounding_mode="trunc")
score + (kv_idx - q_idx).abs() * 2; score + -kv_idx; score + (kv_idx << 2) - (q_idx >> 1); score + (1 << (kv_idx % 9))
score + (kv_idx & 6) + (q_idx | 3) + (h ^ b); score + ~h; score + (kv_idx - q_idx).clamp(-4, 9)
score + torch.minimum(kv_idx, q_idx); score + torch.maximum(h, b * 4); score + torch.sign(kv_idx - q_idx)
score + kv_idx ** 2 * 0.001; score + torch.square(h); score + (kv_idx - 100).relu()
score + torch.where(q_idx > kv_idx, 1, 0); score + torch.where(q_idx > kv_idx, h, 3); score + kv_idx.bool().float()
score + torch.floor(score).int(); score + (score * 3).long() % 4; score + (kv_idx * 1.7).to(torch.int64) % 5
score + torch.sqrt(kv_idx * 1.0); score + torch.log(1 + (q_idx - kv_idx).abs())
score + torch.exp(-0.1 * (q_idx - kv_idx).abs()); score + q_idx * kv_idx * 0.0001
score + (q_idx * 1000003 + kv_idx * 998244353) % 7; score + (q_idx * 2**40) % 11; score + slopes[h] * (kv_idx - q_idx)
score + of_batch[b, h]; score + of_batch[b][h]; score * temperature; score + relative[h, q_idx - kv_idx + 200]
score + relative[h][kv_idx]; score + pairs[h, q_idx, kv_idx] * slopes[h]; score + relative[:, 3][h]
score + relative[h, -1 - kv_idx]; score + relative[-1, kv_idx]; score + of_query[kv_idx % 7 - 7]
score + relative[..., 5][h]; score + pairs[:, q_idx][h, kv_idx]; score + pairs[h, :, 3][q_idx]
score + relative[1:][b, q_idx]; score + pairs[1, q_idx, kv_idx]; score + pairs[h, 3:, 2][q_idx % 9]
score + pairs[h][..., 4][q_idx]; score + pairs[:, -2, kv_idx][h]; score + pairs[:, ::7][h, q_idx % 9, kv_idx]
score + (-slopes)[h]; score + (slopes * 2 + 1)[h]; score * slopes.abs()[h] + slopes.sum()
score / of_batch[b, h].exp(); score + document[kv_idx]; score + prefix[b] - kinds[q_idx] + shift[h]
score + (kinds[q_idx] - kinds[kv_idx]); score + kinds[q_idx] * 200; score + shift[h] * shift[h]
score + hidden[b, kv_idx]; score * ~hidden[b, kv_idx]; score + document[kv_idx] * 3 - document[q_idx] // 2
score + buckets[(q_idx - kv_idx).abs().clamp(max=31), h]; score + halves[h] + brains[kv_idx]
score + torch.nn.functional.embedding((kv_idx - q_idx) % 32, buckets)[h]; kv_idx - q_idx; q_idx >= kv_idx; slopes[h]
1.0 * h; -float("inf") * torch.ones_like(score); score + float("inf"); score - slopes[h] * (q_idx - kv_idx).abs()
0.5 * score + 0.5 * torch.tanh(score + slopes[h]); score / (h + 1)
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
        "math": math,
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


# Functions of the score at the ends of their ranges.
AT_ENDS = """
torch.exp(score); torch.exp2(score); torch.log(score); torch.log2(score); torch.log1p(score); torch.sqrt(score)
torch.rsqrt(score); torch.tanh(score); torch.sigmoid(score); torch.erf(score); torch.reciprocal(score); 1 / score
score / 3e38; score / 1e-38; torch.relu(score); torch.clamp(score, -2, 2); torch.maximum(score, slopes[h])
torch.minimum(slopes[h], score); torch.abs(score); torch.floor(score); torch.ceil(score); torch.round(score)
torch.trunc(score); score ** 2; score ** 3; score ** -1; score ** 0.5; score ** 1.5; score ** -1.5; score ** 40
score ** 41.0; 2.5 ** score; 0.5 ** score; torch.where(score > 0, 1.0, 0.0); torch.sign(score)
score.to(torch.int32) * 1.0; score * 0; torch.pow(slopes[h], score); torch.sin(score * 0 + 3e5)
torch.cos(score * 0 - 9e5); score % math.inf; torch.fmod(score, math.inf)
"""
ENDS = [
    0.0,
    -0.0,
    math.inf,
    -math.inf,
    math.nan,
    1e-44,
    1.2e-38,
    -1.2e-38,
    1e-30,
    -1e-30,
    1e-7,
    -1e-7,
    0.5,
    1.0,
    1 + 2**-23,
]
ENDS += [
    1 - 2**-24,
    -1.0,
    1.5,
    2.5,
    -0.5,
    -2.5,
    4.0,
    -5.5,
    17.0,
    87.0,
    88.8,
    89.0,
    -87.5,
    -103.0,
    -104.5,
    -150.0,
    127.9,
    128.0,
]
ENDS += [8388609.0, 16777216.0, -2147483648.0, 2147483520.0, 3e9, 1e19, -1e19, 1.8e19, 1e38, -1e38, 3.4e38, -3.4e38]


def test_functions_at_the_ends_of_their_ranges(tmp_path: Path) -> None:
    """Against float64, rounded to float32; results below its normal numbers may be 0."""
    at = places(len(ENDS))
    at[:, 1] = 2
    score = torch.tensor(ENDS)
    failures: list[str] = []
    for expression, code in compiled_expressions(listed(AT_ENDS), tmp_path).items():
        found = code(score, at).score
        expected = vmap_in_torch(function_of(expression, torch.float64), score.double(), at).double()
        if "int32" in expression:  # saturates where torch's is not defined
            expected = score.double().clamp(-(2.0**31), 2.0**31 - 1).trunc().nan_to_num(0.0)
        expected = torch.where(expected.abs() >= 2.0**128 - 2.0**103, expected.sign() * math.inf, expected)
        same = (found == expected) | (found.isnan() & expected.isnan())
        near = (found - expected).abs() <= expected.abs() * 2.0**-18 + 2.0**-125
        if "sin" in expression or "cos" in expression:
            near = (found - expected).abs() <= 2.0**-20
        wrong = ~same & ~near
        failures += (
            [f"{expression} of {score[wrong]}: {found[wrong]} for {expected[wrong]}"] if bool(wrong.any()) else []
        )
    assert not failures, "\n".join(failures)


# ---- random functions ----

SEEDS = range(80)


def test_random_functions(tmp_path: Path) -> None:
    functions = [random_score_function(seed) for seed in SEEDS]
    traced = [trace(each.over(TENSORS), None, CPU) for each in functions]
    of_float64 = captured_tensors(1, torch.float64)
    for i, (function, code) in enumerate(zip(functions, compiled(traced, tmp_path))):
        print(f"seed {SEEDS[i]}:\n{function.text}")
        check(code, function.over(of_float64), scores(300, i), places(300, i), digits=15)


def test_random_masks(tmp_path: Path) -> None:
    functions = [random_mask(seed) for seed in SEEDS]
    traced = [trace(None, each.over(TENSORS), CPU) for each in functions]
    for i, (function, code) in enumerate(zip(functions, compiled(traced, tmp_path))):
        at = places(300, i)
        found, expected = code(scores(300), at).shown, vmap_in_torch(function.over(TENSORS), at)
        assert torch.equal(found, expected.expand(300)), f"seed {SEEDS[i]}:\n{function.text}\n{code.traced.code}"
        assert code.is_additive


def test_generators_are_varied() -> None:
    """What functions are made of: all tensors, and several kinds of results."""
    texts = [random_score_function(seed) for seed in SEEDS] + [random_mask(seed) for seed in SEEDS]
    assert len({each.text for each in texts}) > 0.9 * len(texts)
    assert set().union(*(each.named() for each in texts)) == set(TENSORS)


# ---- types ----

OPERANDS = "score; h; (q_idx > kv_idx); kinds[q_idx]; document[q_idx]; shift[h]; prefix[b]; slopes[h]; (kv_idx - q_idx)"
NUMBERS = "2; 0.5; True; 3"
BINARY = "+ - * / // % & | ^ == != < <= > >=".split()


def typed_expressions() -> list[str]:
    """Operators between all types, of which torch takes most: a seeded share."""
    values, numbers = listed(OPERANDS), listed(NUMBERS)
    pairs = [(a, b) for a in values for b in values + numbers] + [(a, b) for a in numbers for b in values]
    expressions = [f"{a} {op} {b}" for a, b in pairs for op in BINARY]
    expressions += [f"torch.where(q_idx > 3, {a}, {b})" for a, b in pairs]
    expressions += [f"torch.maximum({a}, {b})" for a in values for b in values]
    return random.Random(0).sample(expressions, 300)


def torchs_or_none(function: Any, *arguments: torch.Tensor) -> torch.Tensor | None:
    try:
        return vmap_in_torch(function, *arguments)
    except (RuntimeError, TypeError, ZeroDivisionError):
        return None


def test_types_are_promoted_as_torch_does(tmp_path: Path) -> None:
    score, at = scores(100), places(100)
    expected = {each: torchs_or_none(function_of(each, torch.float32), score, at) for each in typed_expressions()}
    taken = {each: values for each, values in expected.items() if values is not None}
    assert len(taken) > 200
    for expression, code in compiled_expressions(list(taken), tmp_path).items():
        digits = 18 if taken[expression].is_floating_point() else 30
        close(
            code(score, at).score, taken[expression].double().expand(100), digits, f"{expression}\n{code.traced.code}"
        )


# ---- functions that have names ----


def t5_bucket(relative: torch.Tensor, buckets: int, most: int) -> torch.Tensor:
    """The bucket of a key's distance, on either side of the query, as T5's code has it."""
    buckets //= 2
    side = (relative > 0).to(torch.long) * buckets
    distance = torch.abs(relative)
    exact = buckets // 2
    far = exact + (torch.log(distance.float() / exact) / math.log(most / exact) * (buckets - exact)).to(torch.long)
    far = torch.min(far, torch.full_like(far, buckets - 1))
    return side + torch.where(distance < exact, distance, far)


def named_score_functions(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    slopes, relative, table = tensors["slopes"], tensors["relative"], tensors["buckets"]
    document, prefix = tensors["document"], tensors["prefix"]

    def nothing(score, b, h, q_idx, kv_idx):
        return score

    def alibi(score, b, h, q_idx, kv_idx):
        return score + slopes[h] * (kv_idx - q_idx)

    def alibi_of_distance(score, b, h, q_idx, kv_idx):
        score -= torch.exp2(-((h + 1) * 8.0 / HEADS)) * (q_idx - kv_idx).abs()
        return score

    def softcap(score, b, h, q_idx, kv_idx):
        return 20 * torch.tanh(score / 20)

    def t5(score, b, h, q_idx, kv_idx):
        return score + table[t5_bucket(kv_idx - q_idx, 32, 128), h]

    def relative_bias(score, b, h, q_idx, kv_idx):
        return score + relative[h][q_idx - kv_idx + LONGEST]

    def causal(score, b, h, q_idx, kv_idx):
        return torch.where(q_idx >= kv_idx, score, -float("inf"))

    def window_of_documents(score, b, h, q_idx, kv_idx):
        same = document[q_idx] == document[kv_idx]
        return torch.where(same & ((q_idx - kv_idx).abs() <= 64), score + slopes[h], float("-inf"))

    def soft_capped_mixture(score, b, h, q_idx, kv_idx):
        gate = torch.sigmoid(slopes[h])
        capped = 30 * torch.tanh((score + relative[h, q_idx - kv_idx + LONGEST]) / 30)
        return torch.where(kv_idx < prefix[b], gate * capped + (1 - gate) * score, -float("inf"))

    def temperature(score, b, h, q_idx, kv_idx):
        return score * torch.log(q_idx + 2.0) / tensors["temperature"]

    functions = (alibi, alibi_of_distance, softcap, t5, relative_bias, causal, window_of_documents)
    return {each.__name__: each for each in (nothing, *functions, soft_capped_mixture, temperature)}


ADDITIVE = {"nothing", "alibi", "alibi_of_distance", "t5", "relative_bias", "causal", "window_of_documents"}


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> dict[str, CompiledFunction]:
    functions = named_score_functions(TENSORS)
    traced = [trace(each, None, CPU) for each in functions.values()]
    return dict(zip(functions, compiled(traced, tmp_path_factory.mktemp("named"))))


@pytest.mark.parametrize("name", named_score_functions(TENSORS))
def test_named_score_function(named: dict[str, CompiledFunction], name: str) -> None:
    function = named[name]
    of_float64 = named_score_functions(captured_tensors(1, torch.float64))[name]
    check(function, of_float64, scores(2000), places(2000))
    assert function.is_additive == (name in ADDITIVE)
    assert function.has_derivative == (name not in ADDITIVE)


def test_t5_buckets_are_torchs(named: dict[str, CompiledFunction]) -> None:
    """Where a distance lies on the edge of a bucket, too: of all distances."""
    distances = torch.arange(-LONGEST + 1, LONGEST)
    at = torch.stack([torch.zeros_like(distances), distances % HEADS, LONGEST - distances, 0 * distances + LONGEST], 1)
    found = named["t5"](torch.zeros(len(at)), at).score
    assert torch.equal(found, TENSORS["buckets"][t5_bucket(distances, 32, 128), at[:, 1]])


def named_masks() -> dict[str, Any]:
    document, prefix, hidden = TENSORS["document"], TENSORS["prefix"], TENSORS["hidden"]

    def causal(b, h, q_idx, kv_idx):
        return q_idx >= kv_idx

    def window(b, h, q_idx, kv_idx):
        return (q_idx - kv_idx <= 32) & (kv_idx - q_idx <= 8)

    def prefix_lm(b, h, q_idx, kv_idx):
        return (kv_idx < prefix[b]) | (q_idx >= kv_idx)

    def documents(b, h, q_idx, kv_idx):
        return document[q_idx] == document[kv_idx]

    def padding(b, h, q_idx, kv_idx):
        return hidden[b, kv_idx].logical_not()

    def dilated(b, h, q_idx, kv_idx):
        return ((q_idx - kv_idx) % (h + 1) == 0) & causal(b, h, q_idx, kv_idx)

    def blocks(b, h, q_idx, kv_idx):
        return q_idx // 24 == kv_idx // 24

    def none(b, h, q_idx, kv_idx):
        return False

    alone = (causal, window, prefix_lm, documents, padding, dilated, blocks, none, noop_mask)
    masks = {each.__name__: each for each in alone}
    masks["documents, causal"] = and_masks(documents, causal)
    masks["window or prefix"] = or_masks(window, and_masks(prefix_lm, noop_mask))
    return masks


def test_named_masks(tmp_path: Path) -> None:
    masks = named_masks()
    at = places(4000)
    for (name, mask), code in zip(
        masks.items(), compiled([trace(None, each, CPU) for each in masks.values()], tmp_path)
    ):
        expected = torch.zeros(len(at), dtype=torch.bool) if name == "none" else vmap_in_torch(mask, at)
        assert torch.equal(code(scores(len(at)), at).shown, expected.expand(len(at))), name
        assert code.is_trivial == (name == "noop_mask")


def test_operators_of_bools(tmp_path: Path) -> None:
    masks = [
        lambda b, h, q, k: torch.logical_and(q > k, h) | torch.bitwise_xor(q > 5, k.gt(3)),
        lambda b, h, q, k: torch.logical_or(q < k, h) & torch.bitwise_not(q.ge(5)),
        lambda b, h, q, k: torch.logical_xor(q < k, h) & torch.bitwise_or(q.le(90), k.ne(3)),
        lambda b, h, q, k: torch.logical_not(torch.bitwise_and(q, 3)) | torch.eq(k, 7) | q.lt(5),
        lambda b, h, q, k: torch.maximum(q > k, h == 1) + torch.minimum(q < 9, k > 4),
        lambda b, h, q, k: (q > k) * (h != 1) | torch.where(h > 3, q > 3, k.long() > 50),
        lambda b, h, q, k: (q > k) != (h > 2),
        lambda b, h, q, k: ((q > k) == (h > 2)) & ~((q - k) > 30),
        lambda b, h, q, k: (q > k) < (h > 2),
        lambda b, h, q, k: torch.isnan(torch.log(q - k)) ^ torch.isinf(1 / h) ^ torch.isfinite(1 / b),
    ]
    at = places(1000)
    for i, code in enumerate(compiled([trace(None, each, CPU) for each in masks], tmp_path)):
        assert torch.equal(code(scores(len(at)), at).shown, vmap_in_torch(masks[i], at)), i


def test_places_beyond_the_tensors_read_nothing_else(tmp_path: Path) -> None:
    """Rows of a tile may lie behind a sequence's last: what they are is of no account."""

    def far(score, b, h, q_idx, kv_idx):
        read = TENSORS["relative"][h, q_idx - kv_idx + LONGEST] + TENSORS["pairs"][h, q_idx, kv_idx]
        score = score + read + TENSORS["document"][q_idx * 3] + TENSORS["of_query"][-kv_idx]
        return score + q_idx // (kv_idx - 300) + q_idx % (kv_idx - 300) + (1 << (q_idx - kv_idx).clamp(-70, 70))

    (function,) = compiled([trace(far, None, CPU)], tmp_path)
    function(scores(500), places(500) * 3)
    function(scores(500), places(500) * 80000)


# ---- derivatives where something is infinite ----


def test_what_is_not_chosen_has_no_derivative(tmp_path: Path) -> None:
    """In torch 0 times infinity is NaN behind torch.where; here what is not chosen takes no part."""
    functions = {
        "root": lambda score, b, h, q, k: torch.where(score > 0, torch.sqrt(score), 0.0),
        "logarithm": lambda score, b, h, q, k: 2 * torch.where(q > k, torch.log(score.abs() - score), -float("inf")),
        "root of relu": lambda score, b, h, q, k: torch.sqrt(torch.relu(score)),
    }
    at, score = places(300), scores(300)
    for name, code in zip(functions, compiled([trace(each, None, CPU) for each in functions.values()], tmp_path)):
        derivative = code(score, at).derivative
        chosen = at[:, 2] > at[:, 3] if name == "logarithm" else score > 0
        assert bool((derivative[~chosen] == 0).all()), name
        assert bool((derivative[chosen] != 0).any()), name


def test_derivatives_where_there_are_two(tmp_path: Path) -> None:
    """At a kink they are torch's."""
    kinks = """
        torch.relu(score); torch.abs(score); torch.clamp(score, -1, 1); score.clamp(min=0); score.clamp(max=1)
        torch.maximum(score, torch.zeros_like(score)); torch.minimum(torch.ones_like(score), score)
        torch.maximum(score, score * score); torch.minimum(score * 2, score + 1)
        torch.where(score >= 1, 2 * score, score); torch.where(score > 1, 2 * score, score)
        torch.sign(score) * score; torch.nn.functional.leaky_relu(score, 0.5); torch.clamp(score, min=slopes[h] * 0)
    """
    score = torch.tensor([-1.0, 0.0, 1.0, 0.5])
    for expression, code in compiled_expressions(listed(kinks), tmp_path).items():
        _, derivative = eager(function_of(expression, torch.float64), score.double(), places(4))
        found = code(score, places(4)).derivative
        assert torch.equal(found.double(), derivative), f"{expression}: {found} for {derivative}"


# ---- what a kernel is keyed by ----


def code_of(score_mod: Any, mask_mod: Any = None) -> str:
    return trace(score_mod, mask_mod, CPU).code


def test_one_code_of_functions_that_compute_the_same() -> None:
    slopes, others = TENSORS["slopes"], torch.randn(HEADS)

    def first(score, b, h, q_idx, kv_idx):
        return score + slopes[h] * (kv_idx - q_idx)

    def second(s, batch, head, i, j):
        distance = j - i
        unused = torch.sin(others[head]) * s  # noqa: F841
        return others[head] * distance * 1.0 + s

    of_first, of_second = trace(first, None, CPU), trace(second, None, CPU)
    assert of_first.code == of_second.code
    assert of_first.tensors == (slopes,)
    assert of_second.tensors == (others,)


def test_other_codes_of_functions_that_compute_something_else() -> None:
    slopes, integers = TENSORS["slopes"], TENSORS["shift"]
    functions = [
        None,
        lambda score, b, h, q, k: score + 1.0,
        lambda score, b, h, q, k: score + 1.0000001,
        lambda score, b, h, q, k: score + q,
        lambda score, b, h, q, k: score + k,
        lambda score, b, h, q, k: score * 0.0,
        lambda score, b, h, q, k: score * -0.0,
        lambda score, b, h, q, k: score + math.nan,
        lambda score, b, h, q, k: score + math.inf,
        lambda score, b, h, q, k: score + slopes[h],
        lambda score, b, h, q, k: score + slopes.half()[h],
        lambda score, b, h, q, k: score + slopes.bfloat16()[h],
        lambda score, b, h, q, k: score + integers[h],
        lambda score, b, h, q, k: score + slopes[b],
        lambda score, b, h, q, k: score + slopes[h] + slopes.clone()[h],
        lambda score, b, h, q, k: score + slopes[h] + slopes[h],
    ]
    codes = [code_of(each) for each in functions]
    assert len(set(codes)) == len(codes)
    assert code_of(lambda score, b, h, q, k: score + True) == codes[1]  # as in Python


def test_constants_follow_their_closures() -> None:
    limit = 3
    mask = lambda b, h, q, k: q - k < limit  # noqa: E731
    first = code_of(None, mask)
    limit = 4
    assert code_of(None, mask) != first
    limit = 3
    assert code_of(None, mask) == first


def test_a_tensor_is_passed_once() -> None:
    slopes, document = TENSORS["slopes"], TENSORS["document"]
    traced = trace(
        lambda score, b, h, q, k: score + slopes[h] * document[k] + slopes[:][h],
        lambda b, h, q, k: document[q] == document[k],
        CPU,
    )
    assert [each.data_ptr() for each in traced.tensors] == [slopes.data_ptr(), document.data_ptr()]


def test_alibi_is_one_conversion_and_one_multiply_add_a_pair() -> None:
    slopes = TENSORS["slopes"]
    code = code_of(lambda score, b, h, q, k: score + slopes[h] * (k - q))
    for name in ("score(const UserTensors& tensors, float score, int b, int h, int q, int k) const", "scaled_sum("):
        lines = [line.strip() for line in code[code.index(name) :].split("}")[0].splitlines()[1:] if line.strip()]
        assert len(lines) == 4, lines
        assert [lines[0][-6:], lines[1][:30]] == ["k - q;", "const float v1 = static_cast<f"]
        assert "fma_rounded(m" in lines[2]


@pytest.mark.parametrize(
    ("expression", "count"),
    {
        "score + slopes[h] * (kv_idx - q_idx)": 1,
        "score - slopes[h] * (kv_idx - q_idx).abs()": 1,
        "score + (kv_idx - q_idx) / 7": 1,
        "score + relative[h, kv_idx] + relative[h, q_idx] - slopes[h] * kv_idx": 3,
        "torch.where(q_idx >= kv_idx, score + relative[h, kv_idx], -float('inf'))": 1,
    }.items(),
)
def test_terms_of_a_sum_are_one_operation_each(expression: str, count: int) -> None:
    code = code_of(function_of(expression, torch.float32))
    code = code[code.index("scaled_sum(") :].split("}")[0]
    assert code.count("fma_rounded(") == count, code
    assert " * " not in code and "float v" in code, code


def test_many_operators() -> None:
    def deep(score, b, h, q, k):
        for i in range(3000):
            score = score * 0.5 + torch.tanh(score) + i
        return score

    assert code_of(deep).count("tanh_of") > 3000


def test_each_operator_that_errors_name_is_tested() -> None:
    names = set(re.findall(r"\b[a-z][a-z_0-9]+\b", OPERATORS)) - {
        "and",
        "captured",
        "tensors",
        "indexed",
        "by",
        "values",
    }
    assert len(names) > 50
    texts = SCORES + VALUES + inspect.getsource(named_masks) + inspect.getsource(test_operators_of_bools)
    assert not {name for name in names - {"torch"} if not re.search(rf"\b{name}\(", texts)}


# ---- errors ----


def line_of(function: Any, text: str) -> str:
    """Where the text stands in a function's source, as errors name it."""
    lines, first = inspect.getsourcelines(function)
    (offset,) = (i for i, line in enumerate(lines) if text in line)
    return f"({__file__}, line {first + offset})"


def refused(function: Any, error: type[Exception], *parts: str, is_mask: bool = False) -> str:
    with pytest.raises(error) as caught:
        trace(None if is_mask else function, function if is_mask else None, CPU)
    message = str(caught.value)
    for part in ("mask_mod" if is_mask else "score_mod", "; accepted: ", *parts):
        assert part in message, message
    return message


def test_unknown_operators_are_named_with_their_line() -> None:
    def with_function(score, b, h, q_idx, kv_idx):
        score = score + 1
        return torch.cumsum(score, 0)

    def with_method(score, b, h, q_idx, kv_idx):
        return score.cumsum(0)

    def in_place(score, b, h, q_idx, kv_idx):
        return score.add_(1)

    def reduced(score, b, h, q_idx, kv_idx):
        return score.max()

    def with_out(score, b, h, q_idx, kv_idx):
        return torch.exp(score, out=score)

    def to_half(score, b, h, q_idx, kv_idx):
        return score.to(torch.float16)

    refused(with_function, NotImplementedError, "torch.cumsum", line_of(with_function, "cumsum"), OPERATORS)
    refused(with_method, NotImplementedError, ".cumsum", line_of(with_method, "cumsum"), OPERATORS)
    refused(in_place, NotImplementedError, ".add_", line_of(in_place, "add_"))
    refused(reduced, NotImplementedError, "max of one value", line_of(reduced, "score.max"))
    refused(with_out, TypeError, "torch.exp", line_of(with_out, "out="))
    refused(to_half, NotImplementedError, "torch.float16", line_of(to_half, "float16"), "float32")


def test_questions_about_values_are_refused_with_advice() -> None:
    def branches(score, b, h, q_idx, kv_idx):
        if q_idx > kv_idx:
            return score
        return -score

    def between(score, b, h, q_idx, kv_idx):
        return torch.where(0 < q_idx < 3, score, 0)

    def loops(score, b, h, q_idx, kv_idx):
        return sum(score for _ in range(h))

    def module_math(score, b, h, q_idx, kv_idx):
        return math.exp(score)

    def to_int(score, b, h, q_idx, kv_idx):
        return int(q_idx) + score

    def item(score, b, h, q_idx, kv_idx):
        return score * h.item()

    refused(branches, NotImplementedError, "torch.where", "& | ~", line_of(branches, "if q_idx"))
    refused(between, NotImplementedError, "a < b < c", line_of(between, "0 < q_idx"))
    refused(loops, NotImplementedError, "range()", line_of(loops, "range(h)"))
    refused(module_math, NotImplementedError, "module math", "torch.exp", line_of(module_math, "math.exp"))
    refused(to_int, NotImplementedError, "x.long()", line_of(to_int, "int(q_idx)"))
    refused(item, NotImplementedError, "item()", line_of(item, "h.item"))


OF_ONE = [operator.neg, operator.pos, operator.abs, operator.invert, bool, int, float, complex, round, math.floor]
OF_ONE += [math.ceil, math.trunc, operator.index, reversed, list, "{:.2f}".format, lambda x: x(), range]
OF_TWO = [*"add sub mul truediv floordiv mod pow matmul and_ or_ xor lshift rshift eq ne lt le gt ge".split()]
OF_TWO += ["iadd", "isub", "imul", "itruediv", "imatmul", "iand", "contains"]
OPERATIONS: list[Any] = [*((f, 1) for f in OF_ONE), *((getattr(operator, name), 2) for name in OF_TWO), (divmod, 2)]


@pytest.mark.parametrize("first", ["score", "place", "number"])
@pytest.mark.parametrize("second", ["score", "place", "number", "tensor"])
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: getattr(operation[0], "__name__", "format"))
def test_whatever_python_asks_of_values_is_traced_or_refused(operation: Any, second: str, first: str) -> None:
    """Never answered as Python answers for any object."""
    call, operands = operation

    def function(score, b, h, q_idx, kv_idx):
        given = {"score": score, "place": h, "number": 3, "tensor": TENSORS["slopes"]}
        result = call(*(given[first], given[second])[:operands])
        return result if first == "number" and operands == 1 else torch.where(q_idx > 0, result, 0)

    try:
        trace(function, None, CPU)
    except (NotImplementedError, TypeError, ValueError) as error:
        if "number" in (first, second if operands == 2 else first) and "score_mod" not in str(error):
            return  # Python's own, of numbers alone
        assert "; accepted: " in str(error), error


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: getattr(operation[0], "__name__", "format"))
def test_whatever_python_asks_of_tensors_that_are_not_indexed_is_refused(operation: Any) -> None:
    call, operands = operation
    of_batch = TENSORS["of_batch"]
    allowed = (reversed, list)  # go through elements by their numbers

    for other in ("score", "number"):

        def function(score, b, h, q_idx, kv_idx, other=other):
            result = call(*(of_batch[b], score if other == "score" else 3)[:operands])
            return score + sum(result) if call in allowed else torch.where(q_idx > 0, result, 0)

        if call in allowed:
            trace(function, None, CPU)
        else:
            refused(function, NotImplementedError, "of_batch", "1 dimension is not indexed")


def test_numbers_of_numpy_are_pythons() -> None:
    numpy = pytest.importorskip("numpy")
    relative = TENSORS["relative"]
    of_python = trace(lambda score, b, h, q, k: 2.5 * score + relative[3, k] * 4, None, CPU)
    of_numpy = trace(
        lambda score, b, h, q, k: score * numpy.float32(2.5) + relative[numpy.int64(3), k] * numpy.int8(4), None, CPU
    )
    assert of_python.code == of_numpy.code


def test_random_numbers_are_refused() -> None:
    refused(lambda score, b, h, q, k: score + torch.rand(()), NotImplementedError, "torch.rand, which is random")
    refused(lambda score, b, h, q, k: score + torch.randn(9)[h], NotImplementedError, "torch.randn, which is random")
    refused(lambda score, b, h, q, k: score + torch.empty(9).uniform_()[h], NotImplementedError, "uniform_")
    refused(lambda score, b, h, q, k: score + torch.rand_like(score), NotImplementedError, "torch.rand_like")
    slopes = TENSORS["slopes"]
    refused(lambda score, b, h, q, k: score + torch.nn.functional.dropout(slopes)[h], NotImplementedError, "is random")


def test_types_are_torchs() -> None:
    refused(lambda score, b, h, q, k: score & 1, TypeError, "& | ^ of floats")
    refused(lambda score, b, h, q, k: ~score, TypeError, "~ of a float")
    refused(lambda score, b, h, q, k: -(q > k), TypeError, "of bools")
    refused(lambda score, b, h, q, k: torch.where(q - k, score, 0), TypeError, "chooses by", "x != 0")
    refused(lambda score, b, h, q, k: score << 1, TypeError, "shifts")
    refused(lambda score, b, h, q, k: torch.clamp(q > k, True), TypeError, "clamp of bools")
    refused(lambda score, b, h, q, k: h**b, NotImplementedError, "integers to a power", "x.float() ** y")
    refused(lambda score, b, h, q, k: score + "1", NotImplementedError, "a str")
    refused(lambda score, b, h, q, k: score.type("torch.IntTensor"), NotImplementedError, "torch.IntTensor", "x.to(")
    gelu = torch.nn.functional.gelu
    refused(lambda score, b, h, q, k: gelu(score, approximate="fast"), NotImplementedError, "'fast'", "'tanh'")


def test_indices_are_refused_by_name() -> None:
    slopes, kinds = TENSORS["slopes"], TENSORS["kinds"]
    refused(lambda score, b, h, q, k: score + slopes, NotImplementedError, "slopes", "1 dimension is not indexed")
    refused(lambda score, b, h, q, k: slopes, ValueError, "returns a tensor of 1 dimensions")
    refused(lambda score, b, h, q, k: score + slopes[score], NotImplementedError, "slopes", "float32")
    refused(lambda score, b, h, q, k: score + slopes[kinds[q]], NotImplementedError, "slopes", "uint8", "x.long()")
    refused(lambda score, b, h, q, k: score + slopes[h, q], ValueError, "slopes", "2 indices")
    refused(lambda score, b, h, q, k: score + TENSORS["relative"][h, 5000], IndexError, "5000", "-512 to 511")
    refused(lambda score, b, h, q, k: score + TENSORS["relative"][h, q:], NotImplementedError, "slice")
    refused(lambda score, b, h, q, k: score[0], NotImplementedError, "no dimensions")


class WithWeights:
    def __init__(self) -> None:
        self.weights = torch.randn(HEADS, requires_grad=True)

    def __call__(self, score, b, h, q_idx, kv_idx):
        return score + self.weights[h]


def test_captured_tensors_are_refused_by_name() -> None:
    bias = torch.randn(HEADS, requires_grad=True)
    advice = ("requires a gradient", "attn_bias=")

    def learned(score, b, h, q_idx, kv_idx):
        return score + bias[h]

    refused(learned, NotImplementedError, "captures bias, ", "bias.detach()", line_of(learned, "bias[h]"), *advice)
    refused(WithWeights(), NotImplementedError, "captures self.weights, ", *advice)
    refused(lambda score, b, h, q, k: score + (bias * 2)[h], NotImplementedError, "a tensor of shape (6,)", *advice)
    refused(lambda score, b, h, q, k: score + bias.sum(), NotImplementedError, *advice)
    # Whatever is read before it, in the same memory.
    refused(lambda score, b, h, q, k: score + bias.detach()[h] + bias[h], NotImplementedError, "captures bias, ")
    in_dict: dict[str, Any] = {"x": bias}
    in_list: list[Any] = [0, bias]
    rows = torch.randn(2, HEADS, requires_grad=True)
    refused(lambda score, b, h, q, k: score + in_dict["x"][h], NotImplementedError, "captures in_dict['x'], ", *advice)
    refused(lambda score, b, h, q, k: score + in_list[1][h], NotImplementedError, "captures in_list[1], ", *advice)
    refused(lambda score, b, h, q, k: score + rows[0][h], NotImplementedError, "captures rows, ", "rows.detach()")
    with torch.no_grad():
        trace(learned, None, CPU)
    trace(lambda score, b, h, q, k: score + bias.detach()[h], None, CPU)

    double, empty, many = torch.zeros(3, dtype=torch.float64), torch.zeros(0), torch.zeros(1, 1, 1, 1, 1)
    elsewhere = torch.zeros(3, device="meta")
    refused(lambda score, b, h, q, k: score + double[h], ValueError, "double", "torch.float64", "double.float()")
    refused(lambda score, b, h, q, k: score + empty[h], ValueError, "empty", "no elements")
    refused(lambda score, b, h, q, k: score + elsewhere[h], ValueError, "elsewhere", "meta", "cpu")
    refused(lambda score, b, h, q, k: score + many[b, h, q, k, k], NotImplementedError, "many", "5 dimensions", "4")


def test_captured_tensors_are_eight_at_most() -> None:
    tensors = [torch.zeros(HEADS) for _ in range(9)]

    def reads(count: int) -> Any:
        return lambda score, b, h, q, k: functools.reduce(lambda sum, each: sum + each[h], tensors[:count], score)

    assert len(trace(reads(8), None, CPU).tensors) == 8
    refused(reads(9), NotImplementedError, "one tensor too many", "8", "torch.stack")


def test_signatures_and_results() -> None:
    def no_result(score, b, h, q_idx, kv_idx):
        score = score + 1

    refused(lambda score, b, h, q: score, ValueError, "cannot be called", "(score, b, h, q_idx, kv_idx)")
    refused(lambda score, b, h, q, k: q > k, ValueError, "(b, h, q_idx, kv_idx)", is_mask=True)
    refused(3, ValueError, "is 3", "a function of")
    refused(no_result, ValueError, "returns None", "a number", line_of(no_result, "def no_result"))
    refused(lambda b, h, q, k: q - k, ValueError, "returns int64", "a bool", "x != 0", is_mask=True)
    refused(lambda b, h, q, k: 1, ValueError, "returns int64", "a bool", is_mask=True)
    assert "true" in code_of(None, lambda b, h, q, k: True)
    assert code_of(lambda score, b, h, q, k: 2) == code_of(lambda score, b, h, q, k: 2.0)


def test_errors_of_the_function_are_its_own() -> None:
    def broken(score, b, h, q_idx, kv_idx):
        return {}["missing"] + score

    def mistyped(score, b, h, q_idx, kv_idx):
        return len(3) + score

    with pytest.raises(KeyError, match="missing"):
        trace(broken, None, CPU)
    with pytest.raises(TypeError, match="no len"):
        trace(mistyped, None, CPU)
