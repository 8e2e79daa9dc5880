"""flex_attention beside PyTorch's own, eager in float64: forward and gradients."""

import math
import random
from itertools import product
from typing import Any

import flex_reference
import pytest
import torch
from conftest import TESTS_ALL, needs_torch
from random_score_functions import BATCH, HEADS, captured_tensors, random_mask, random_score_function

pytest.importorskip("torch.nn.attention.flex_attention")

from torch.nn.attention.flex_attention import BlockMask, create_block_mask

import flash_attn_jit
from flash_attn_jit import UnsupportedError, flash_attn_func
from flash_attn_jit.flex import trace

flex_attention: Any = flash_attn_jit.flex_attention
HALF = torch.float16
DEVICE = "cpu"  # test_gpu_flex.py has another one
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def needs_eager_flex_attention() -> None:
    needs_torch("2.9", "flex_attention's eager implementation has other names before")


def inputs(
    batch: int,
    heads: int,
    heads_k: int,
    seqlen_q: int,
    seqlen_k: int,
    dim: int,
    dtype: torch.dtype = HALF,
    seed: int = 0,
    dim_v: int | None = None,
) -> list[torch.Tensor]:
    """q, k, v and dout, heads first, in memory with the sequence first as models have it."""
    generator = torch.Generator().manual_seed(seed)
    dim_v = dim if dim_v is None else dim_v
    shapes = [(seqlen_q, heads, dim), (seqlen_k, heads_k, dim), (seqlen_k, heads_k, dim_v), (seqlen_q, heads, dim_v)]
    made = (torch.randn(batch, *shape, generator=generator) for shape in shapes)
    return [x.to(DEVICE, dtype).transpose(1, 2) for x in made]


def run(tensors: list[torch.Tensor], **options: Any) -> flex_reference.Results:
    q, k, v, dout = tensors
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = flex_attention(*leaves, return_lse=True, **options)
    out.backward(dout)
    return flex_reference.Results(out.detach(), lse.detach(), *flex_reference.gradients_of(leaves))


def compare(
    tensors: list[torch.Tensor], score_mod: Any = None, block_mask: Any = None, scale: float | None = None
) -> None:
    q, k = tensors[:2]
    of_scores = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    found = run(tensors, score_mod=score_mod, block_mask=block_mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    q, k, v, dout = tensors
    exact = flex_reference.eager(q, k, v, dout, score_mod, block_mask, of_scores)
    mask_mod = None if block_mask is None else block_mask.mask_mod
    flex_reference.check(found, exact, flex_reference.emulated(q, k, v, dout, score_mod, mask_mod, of_scores))


# ---- functions that papers and models have ----

_SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.03, 0.4])
_DOCUMENTS = torch.arange(300) // 70
_PREFIXES = torch.tensor([40, 131], dtype=torch.int32)
_BUCKETS = torch.randn(32, 4, generator=torch.Generator().manual_seed(3))


def alibi(score, b, h, q_idx, kv_idx):
    return score - _SLOPES[h] * (q_idx - kv_idx).abs()


def softcap(score, b, h, q_idx, kv_idx):
    return 2 * torch.tanh(score / 2)


def bucket_of(distance):
    """T5's: 16 for small distances on either side, then logarithmic ones to 128."""
    near = distance.abs()
    far = 8 + (torch.log(near.clamp(min=1) / 8) / math.log(128 / 8) * 8).to(torch.int32)
    return torch.where(distance > 0, 16, 0) + torch.where(near < 8, near, far.clamp(max=15))


def t5(score, b, h, q_idx, kv_idx):
    return score + _BUCKETS[bucket_of(kv_idx - q_idx), h]


def softcapped_mixture(score, b, h, q_idx, kv_idx):
    capped = 3 * torch.tanh(score / 3)
    return torch.where(
        h % 2 == 0, capped + 0.1 * torch.sigmoid(score), 0.5 * capped - _SLOPES[h] * (q_idx - kv_idx).abs()
    )


def relative_hidden(score, b, h, q_idx, kv_idx):
    return torch.where((q_idx - kv_idx).abs() <= 60, score, -float("inf"))


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def window(b, h, q_idx, kv_idx):
    return (q_idx - kv_idx <= 50) & (kv_idx - q_idx <= 20)


def prefix_lm(b, h, q_idx, kv_idx):
    return (q_idx >= kv_idx) | (kv_idx < _PREFIXES[b])


def documents(b, h, q_idx, kv_idx):
    return (_DOCUMENTS[q_idx] == _DOCUMENTS[kv_idx]) & (q_idx >= kv_idx)


def hides_rows(b, h, q_idx, kv_idx):
    return (q_idx % 3 != h % 3) & (kv_idx > 5)


SCORES: dict[str, Any] = {f.__name__: f for f in (alibi, softcap, t5, softcapped_mixture, relative_hidden)}
MASKS: dict[str, Any] = {f.__name__: f for f in (causal, window, prefix_lm, documents, hides_rows)}


def block_mask_of(
    mask_mod: Any, batch: int | None, heads: int | None, seqlen_q: int, seqlen_k: int, **options: Any
) -> BlockMask:
    return create_block_mask(mask_mod, batch, heads, seqlen_q, seqlen_k, device=DEVICE, **options)


@pytest.mark.parametrize("name", SCORES)
def test_score_functions(name: str) -> None:
    compare(inputs(2, 4, 4, 150, 200, 64), SCORES[name])


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str) -> None:
    compare(inputs(2, 4, 2, 300, 300, 64), block_mask=block_mask_of(MASKS[name], 2, 4, 300, 300))


@pytest.mark.parametrize("score, mask", [("alibi", "documents"), ("softcap", "window"), ("t5", "hides_rows")])
def test_scores_under_masks(score: str, mask: str) -> None:
    compare(inputs(2, 4, 2, 300, 300, 64), SCORES[score], block_mask_of(MASKS[mask], 2, 4, 300, 300))


# ---- what the kernels tell apart ----

# Every two values of two factors meet. Head dims: of each tile row's kinds, whole and half steps, elements; blocks: of
# one tile and of several, the last of which are whole or not.
FACTORS: dict[str, list[Any]] = {
    "dim": [16, 40, 64, 72, 96, 128, 33, 160],
    "dim_v": ["the same", 24, 64, 128, 33],
    "lengths": [(128, 128), (300, 200), (61, 400), (256, 129), (1, 70)],
    "heads": [(1, 1), (4, 4), (4, 2), (6, 1)],
    "score": [None, "alibi", "softcap"],
    "mask": [None, "causal", "documents_of_any_length", "hides_rows"],
    "block": [128, (64, 128), (128, 64), (256, 128)],
    "broadcast": [True, False],
    "dtype": [HALF, torch.bfloat16],
}


def documents_of_any_length(b, h, q_idx, kv_idx):
    return q_idx // 70 == kv_idx // 70


def _pairwise() -> list[dict[str, Any]]:
    """Greedily, with a fixed seed: cases in which every two values of two factors stand together once at least."""
    names = list(FACTORS)
    pairs = {
        frozenset(((a, i), (b, j)))
        for x, a in enumerate(names)
        for b in names[x + 1 :]
        for i, j in product(range(len(FACTORS[a])), range(len(FACTORS[b])))
    }
    draw, cases = random.Random(5), []
    while pairs:
        tries = [{name: draw.randrange(len(values)) for name, values in FACTORS.items()} for _ in range(40)]
        best = max(tries, key=lambda each: len(pairs & _pairs_of(each)))
        if pairs & _pairs_of(best):
            cases.append(best)
        pairs -= _pairs_of(best)
    return [{name: FACTORS[name][i] for name, i in case.items()} for case in cases]


def _pairs_of(case: dict[str, int]) -> set[frozenset[tuple[str, int]]]:
    items = list(case.items())
    return {frozenset((a, b)) for x, a in enumerate(items) for b in items[x + 1 :]}


CASES = _pairwise()


@pytest.mark.parametrize(
    "case", CASES if TESTS_ALL else CASES[::5], ids=lambda case: "-".join(str(value) for value in case.values())
)
def test_pairwise(case: dict[str, Any]) -> None:
    heads, heads_k = case["heads"]
    seqlen_q, seqlen_k = case["lengths"]
    dim_v = case["dim"] if case["dim_v"] == "the same" else case["dim_v"]
    tensors = inputs(2, heads, heads_k, seqlen_q, seqlen_k, case["dim"], case["dtype"], dim_v=dim_v)
    score_mod = None if case["score"] is None else SCORES[case["score"]]
    block_mask = None
    if case["mask"] is not None:
        mask_mod = MASKS.get(case["mask"], documents_of_any_length)
        is_for_all = case["broadcast"] and case["mask"] != "hides_rows"
        sizes = (None, None) if is_for_all else (2, heads)
        block_mask = block_mask_of(mask_mod, sizes[0], sizes[1], seqlen_q, seqlen_k, BLOCK_SIZE=case["block"])
    compare(tensors, score_mod, block_mask)


@pytest.mark.parametrize("seed", range(30 if TESTS_ALL else 4))
def test_random_functions(seed: int) -> None:
    captured = captured_tensors(seed)
    # Eager flex_attention has no gradient of a function that leaves the score out.
    functions = (random_score_function(each, jumps=False) for each in range(seed, 10000, 100))
    score_mod = next(function for function in functions if "score" in function.text.split("return")[1]).over(captured)
    draw = random.Random(seed)
    seqlen_q, seqlen_k = draw.randint(1, 200), draw.randint(1, 200)
    heads = draw.choice([1, 2, 3, 6])
    tensors = inputs(
        draw.randint(1, BATCH), heads, draw.choice([1, heads]), seqlen_q, seqlen_k, draw.choice([24, 64, 80])
    )
    block_mask = None
    if seed % 2:
        mask_mod = random_mask(seed).over(captured)
        block_mask = block_mask_of(mask_mod, tensors[0].shape[0], heads, seqlen_q, seqlen_k)
    assert heads <= HEADS
    compare(tensors, score_mod, block_mask)


# ---- block masks ----


def test_blocks_that_are_not_listed_are_left_out_and_full_ones_are_not_asked() -> None:
    q, k, v, dout = inputs(1, 2, 2, 256, 384, 64)
    counts, blocks = torch.tensor([[[1, 1]]]).int(), torch.tensor([[[[2, 0, 0], [0, 0, 0]]]]).int()
    whole_counts, whole_blocks = torch.tensor([[[1, 0]]]).int(), torch.tensor([[[[0, 0, 0], [0, 0, 0]]]]).int()
    block_mask = BlockMask.from_kv_blocks(
        counts, blocks, whole_counts, whole_blocks, mask_mod=lambda b, h, q, k: k % 2 == 0, seq_lengths=(256, 384)
    )
    sees = torch.zeros(256, 384, dtype=torch.bool)
    sees[:128, :128] = True
    sees[:128, 256::2] = True
    sees[128:, 0:128:2] = True
    check_pairs_seen([q, k, v, dout], block_mask, sees)


def check_pairs_seen(tensors: list[torch.Tensor], block_mask: Any, sees: torch.Tensor) -> None:
    """Both passes, where a block mask's lists say something else than its mask_mod."""
    q, k, v, dout = tensors
    found = run(tensors, block_mask=block_mask)
    right = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out = (right[0] @ right[1].mT / 8).masked_fill(~sees, -torch.inf).softmax(-1) @ right[2]
    exact = (out.detach(), *torch.autograd.grad(out, right, dout.double()))
    for one, expected in zip((found.out, *found[2:]), exact):
        assert (one.double() - expected).abs().max() < 4e-3 * max(1.0, expected.abs().max().item())
    assert torch.isfinite(found.lse).all()


def test_the_order_of_blocks_changes_nothing_but_roundings() -> None:
    tensors = inputs(1, 1, 1, 256, 512, 64)
    indices = torch.tensor([3, 0, 2, 1]).int().expand(1, 1, 2, 4).contiguous()
    counts = torch.full((1, 1, 2), 4, dtype=torch.int32)
    everything = BlockMask.from_kv_blocks(
        torch.zeros_like(counts),
        indices,
        counts,
        indices,
        mask_mod=lambda b, h, q, k: k % 2 == 0,  # which nobody asks
        seq_lengths=(256, 512),
    )
    check_pairs_seen(tensors, everything, torch.ones(256, 512, dtype=torch.bool))


def test_the_last_block_may_be_listed_as_full_and_end_within() -> None:
    indices = torch.arange(3).int().expand(1, 1, 2, 3).contiguous()
    counts = torch.full((1, 1, 2), 3, dtype=torch.int32)
    everything = BlockMask.from_kv_blocks(
        torch.zeros_like(counts), indices, counts, indices, mask_mod=lambda b, h, q, k: q >= 0, seq_lengths=(200, 300)
    )
    compare(inputs(1, 1, 1, 200, 300, 64), block_mask=everything)


def test_a_mask_that_shows_everything() -> None:
    tensors = inputs(1, 2, 1, 256, 384, 64)
    compare(tensors, block_mask=block_mask_of(lambda b, h, q, k: q >= 0, None, None, 256, 384))


def test_torchs_mask_of_everything_is_none() -> None:
    from torch.nn.attention.flex_attention import _create_empty_block_mask

    q, k, v, _ = inputs(1, 2, 2, 100, 90, 64)
    assert torch.equal(flex_attention(q, k, v, block_mask=_create_empty_block_mask(q, k)), flex_attention(q, k, v))


def test_without_functions_it_is_flash_attn_func() -> None:
    q, k, v, _ = inputs(2, 4, 2, 70, 90, 64)
    plain: Any = flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    assert torch.equal(flex_attention(q, k, v, enable_gqa=True).transpose(1, 2), plain)


def test_keys_of_one_sequence_serve_all_with_a_block_mask_of_each() -> None:
    q, k, v, _ = inputs(2, 2, 2, 128, 300, 64)
    k, v = k[:1], v[:1]
    block_mask = block_mask_of(lambda b, h, q, k: k // 150 == b, 2, None, 128, 300)
    found = flex_attention(q, k, v, block_mask=block_mask)
    expected = flex_attention(q, k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1), block_mask=block_mask)
    assert torch.equal(found, expected)


# ---- the rest of the interface ----


def test_negative_and_zero_scales() -> None:
    tensors = inputs(1, 2, 2, 100, 90, 64)
    compare(tensors, softcap, scale=-0.2)
    compare(tensors, alibi, scale=-0.2)
    compare(tensors, softcap, scale=0.0)


def test_lse_has_a_gradient() -> None:
    q, k, v, _ = inputs(1, 2, 2, 100, 90, 64)
    dlse = torch.randn(1, 2, 100, generator=torch.Generator().manual_seed(1))
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    _, lse = flex_attention(*leaves, v, softcap, return_lse=True)
    lse.backward(dlse)
    right = [x.detach().double().requires_grad_() for x in (q, k)]
    scores = 2 * torch.tanh(right[0] @ right[1].mT / 8 / 2)
    scores.logsumexp(-1).backward(dlse.double())
    for one, exact in zip(leaves, right):
        assert one.grad is not None and exact.grad is not None
        assert (one.grad.double() - exact.grad).abs().max() < 2e-3 * exact.grad.abs().max()


def test_gradients_are_the_same_bits_every_time() -> None:
    tensors = inputs(2, 4, 2, 200, 200, 64)
    options = {"score_mod": softcapped_mixture, "block_mask": block_mask_of(causal, None, None, 200, 200)}
    first, second = (run(tensors, enable_gqa=True, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_only_wanted_gradients_are_made() -> None:
    q, k, v, dout = inputs(1, 2, 2, 100, 90, 64)
    all_of_them = run([q, k, v, dout], score_mod=softcap)
    for wanted in ((True, False, False), (False, True, False), (False, False, True)):
        leaves = [x.detach().requires_grad_(needed) for x, needed in zip((q, k, v), wanted)]
        flex_attention(*leaves, softcap).backward(dout)
        for leaf, needed, gradient in zip(leaves, wanted, all_of_them[2:]):
            assert (leaf.grad is not None) is needed
            assert leaf.grad is None or torch.equal(leaf.grad, gradient)


def test_head_dims_to_512_without_gradients() -> None:
    q, k, v, _ = inputs(1, 2, 1, 70, 90, 512)
    found = flex_attention(q, k, v, alibi, enable_gqa=True)
    exact = flex_reference.eager(q, k, v, torch.zeros_like(q), alibi, None, 512**-0.5)
    assert (found.double() - exact.out).abs().max() < 2e-3


@pytest.mark.parametrize("number", [-1e9, torch.finfo(torch.float32).min])
def test_numbers_in_the_place_of_infinity(number: float) -> None:
    """A row all of whose keys are put out of the way is the mean of those that are so alike."""

    def put_away(score, b, h, q_idx, kv_idx):
        return torch.where((kv_idx <= q_idx) & (q_idx >= 20), score, number)

    q, k, v, _ = inputs(1, 2, 2, 200, 200, 64)
    out = flex_attention(q, k, v, put_away)
    sees = torch.ones(200, 200).tril().bool() & (torch.arange(200) >= 20)[:, None]
    expected = torch.where(sees, q.double() @ k.double().mT / 8, number).softmax(-1) @ v.double()
    assert (out.double() - expected).abs().max() < 2e-3
    bias = torch.where(sees, 0.0, number)
    added = flex_attention(q, k, v, lambda score, b, h, q_idx, kv_idx: score + bias[q_idx, kv_idx])
    assert (added.double() - expected).abs().max() < 2e-3


def test_autocast() -> None:
    q, k, v, _ = (x.float() for x in inputs(1, 2, 2, 100, 90, 64))
    with torch.autocast("cpu", torch.float16):
        out = flex_attention(q, k, v, softcap)
    assert torch.equal(out, flex_attention(q.half(), k.half(), v.half(), softcap))


@pytest.mark.filterwarnings("error")
def test_a_compiled_model_breaks_its_graph_around_the_call() -> None:
    q, k, v, _ = inputs(1, 2, 2, 70, 70, 64)

    def model(q, k, v):
        return flex_attention(q * 2, k, v, softcap) + 1

    assert torch.equal(torch.compile(model, backend="eager")(q, k, v), model(q, k, v))


def test_kernels_are_kept_by_what_functions_compute() -> None:
    slope = 0.25
    one, other = (lambda score, b, h, q, k: score + slope * (k - q)), (lambda s, x, y, i, j: slope * (j - i) + s)
    assert trace(one, None, CPU).code == trace(other, None, CPU).code
    before = trace(one, None, CPU).code
    slope = 0.5
    assert trace(one, None, CPU).code != before


# ---- what is refused ----


@pytest.mark.parametrize(
    "change, message",
    [
        ({"query": "nothing"}, "query is a str"),
        ({"query": torch.zeros(2, 100, 64, dtype=HALF)}, r"query has 3 dimensions, shape \(2, 100, 64\)"),
        (
            {"key": torch.zeros(1, 1, 90, 64, dtype=HALF), "value": torch.zeros(1, 1, 90, 64, dtype=HALF)},
            "key has 1 heads and query 2; accepted: query's, or enable_gqa=True",
        ),
        ({"block_mask": "causal"}, "block_mask is a str; accepted: None, or a BlockMask"),
        ({"block_mask": block_mask_of(causal, None, None, 100, 91)}, "block_mask was made for 100 queries and 91 keys"),
        ({"block_mask": block_mask_of(causal, 3, None, 100, 90)}, "block_mask has 3 in its batch; accepted: 1"),
        ({"block_mask": block_mask_of(causal, None, 4, 100, 90)}, "block_mask has 4 in its heads; accepted: 2"),
        (
            {"block_mask": block_mask_of(causal, None, None, 100, 90, BLOCK_SIZE=16)},
            "block_mask has blocks of 16 queries",
        ),
        ({"scale": "none"}, "scale is a str"),
        ({"key": torch.zeros(1, 2, 90, 32, dtype=HALF)}, "key has head_dim 32 and query 64; accepted: query's"),
        (
            {"value": torch.zeros(1, 2, 91, 64, dtype=HALF)},
            r"value has shape \(1, 2, 91, 64\) and key \(1, 2, 90, 64\); accepted: key's",
        ),
        ({"value": torch.zeros(1, 2, 90, 64)}, "value has dtype torch.float32; accepted: torch.float16 or"),
        ({"query": torch.zeros(1, 2, 64, 100, dtype=HALF).mT}, "query has strides"),
        ({"key": torch.zeros(1, 2, 90, 64, dtype=HALF).to_sparse()}, "key is of layout torch.sparse_coo"),
        ({"query": torch.zeros(1, 2, 100, 64, dtype=HALF, device="meta")}, "key is on device cpu and query on meta"),
        ({"scale": 1e30}, r"^scale is 1e\+30; accepted: a number from"),
        ({"return_lse": "yes"}, "return_lse is 'yes'"),
        ({"query": torch.zeros(64, dtype=HALF).expand(1, 2, 2**24, 64)}, r"query has shape \(1, 2, 16777216, 64\)"),
    ],
)
def test_bad_inputs(change: dict[str, Any], message: str) -> None:
    q, k, v, _ = inputs(1, 2, 2, 100, 90, 64)
    arguments = {"query": q, "key": k, "value": v, **change}
    with pytest.raises(ValueError, match=message):
        flex_attention(**arguments)


def test_a_block_mask_above_head_dim_256() -> None:
    q, k, v, _ = inputs(1, 1, 1, 128, 128, 320)
    with pytest.raises(UnsupportedError, match="query has head_dim 320, and there is a block_mask; accepted: 1 to 256"):
        flex_attention(q, k, v, block_mask=block_mask_of(causal, None, None, 128, 128))


def test_a_captured_tensor_that_needs_a_gradient() -> None:
    table = torch.zeros(4, requires_grad=True)
    q, k, v, _ = inputs(1, 2, 2, 100, 90, 64)
    with pytest.raises(NotImplementedError, match=r"table.*attn_bias"):
        flex_attention(q, k, v, lambda score, b, h, q_idx, kv_idx: score + table[h])
    with torch.no_grad():
        flex_attention(q, k, v, lambda score, b, h, q_idx, kv_idx: score + table[h])


def test_second_derivatives_and_transforms() -> None:
    q, k, v, _ = inputs(1, 1, 1, 20, 20, 64)
    q.requires_grad_()
    out = flex_attention(q, k, v, softcap)
    with pytest.raises(NotImplementedError, match="create_graph"):
        torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.vmap(lambda x: flex_attention(x, x, x, softcap))(torch.zeros(2, 1, 1, 20, 64, dtype=HALF))


def test_tensors_that_are_negated_when_they_are_read() -> None:
    def negated(tensor: torch.Tensor) -> torch.Tensor:
        return torch._neg_view(-tensor)  # what .imag of a conjugate is

    def results(f: Any) -> tuple[torch.Tensor, ...]:
        q, k, v, dout = (f(tensor) for tensor in tensors)
        table = f(bias)
        leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
        out = flex_attention(*leaves, lambda score, b, h, q_idx, kv_idx: score + table[kv_idx])
        return (out, *torch.autograd.grad(out, leaves, dout))

    tensors = inputs(1, 1, 1, 20, 30, 64)
    bias = torch.linspace(-1, 1, 30)
    for plain, other in zip(results(torch.clone), results(negated)):
        assert torch.equal(plain, other)


def test_a_backward_pass_reads_the_blocks_of_keys() -> None:
    q, k, v, _ = inputs(1, 1, 1, 128, 128, 64)
    counts, blocks = torch.ones(1, 1, 1).int(), torch.zeros(1, 1, 1, 1).int()
    block_mask = BlockMask.from_kv_blocks(
        counts, blocks, mask_mod=causal, seq_lengths=(128, 128), compute_q_blocks=False
    )
    flex_attention(q, k, v, block_mask=block_mask)
    with pytest.raises(ValueError, match="q_num_blocks"):
        flex_attention(q.requires_grad_(), k, v, block_mask=block_mask)


def test_its_name() -> None:
    assert "flex_attention" in flash_attn_jit.__all__
