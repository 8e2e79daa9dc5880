"""Caches of keys and values, longer than their sequences: pages, used rows, padding on the left; out= and num_splits.

Whatever no sequence uses is NaN, so that a kernel that reads it is found out."""

import itertools
import random
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from attention_reference import check_attention, normal
from conftest import TESTS_ALL

import flash_attn_jit
from flash_attn_jit import flash_attn_func, flash_attn_varlen_func

NAN = float("nan")

# Pages: of one row, of less than a tile of 8 or 16 keys and no divisor of it, of a tile of 8 but not of 16, of tiles,
# and longer than what is used.
PAGE_SIZES = [1, 3, 8, 16, 48, 256]
# Rows that are read 16 bytes at a time and rows that are not; one and several chunks of 32 and 64 dims, full or not;
# queries in registers, and in shared memory too; those that the decode kernel has not.
HEAD_DIMS = [64, 17, 80, 128, 160, 256, 300, 512]
# A token, several (the decode kernel), a prompt (the forward kernel).
QUERIES = [1, 5, 270]
MASKS: list[dict[str, Any]] = [
    {"causal": True},
    {"causal": False},
    {"window_size": (20, 0)},
    {"causal": True, "softcap": 5.0},
]


@dataclass
class Cache:
    """Sequences of `used` rows each, with `leftpad` rows of padding in front, in pages of a shuffled table."""

    k: torch.Tensor  # (pages, page size, heads, head_dim)
    v: torch.Tensor
    table: torch.Tensor
    keys: list[tuple[torch.Tensor, torch.Tensor]]  # of each sequence, as it is


def lengths(capacity: int, dice: random.Random) -> tuple[list[int], list[int]]:
    """(used, leftpad) of sequences of every class: nothing, all, one, some; no padding, some, nothing but."""
    used = [capacity, 0, 1, dice.randint(1, capacity), dice.randint(1, capacity)]
    leftpad = [0, 0, 0, dice.randint(0, used[3]), used[4]]
    return used, leftpad


def cache_of(
    page_size: int, heads: int, head_dim: int, used: list[int], leftpad: list[int], columns: int, dice: random.Random
) -> Cache:
    pages = columns * len(used) + 3
    both = torch.full((pages, page_size, heads, 2 * head_dim), NAN, dtype=torch.float16)  # k and v side by side
    k, v = both[..., :head_dim], both[..., head_dim:]
    table = torch.tensor(dice.sample(range(pages), columns * len(used))).reshape(len(used), columns).int()
    keys = []
    for b, (end, begin) in enumerate(zip(used, leftpad)):
        own = [normal(end, heads, head_dim, seed=100 * b + i) for i in (1, 2)]
        for tensor, values in zip((k, v), own):
            for row in range(begin, end):
                tensor[table[b, row // page_size], row % page_size] = values[row]
        keys.append((own[0][begin:], own[1][begin:]))
    return Cache(k, v, table, keys)


def check_sequences(
    out: torch.Tensor, lse: torch.Tensor | None, q: torch.Tensor, keys: Any, slopes: Any = None, **options: Any
) -> None:
    """out and q (batch, seqlen_q, heads, head_dim)."""
    for b, (k, v) in enumerate(keys):
        own = {**options, "alibi_slopes": slopes[None]} if slopes is not None else options
        own_lse = None if lse is None else lse[b : b + 1]
        check_attention(out[b : b + 1], own_lse, q[b : b + 1], k[None], v[None], **own)


def int32(numbers: list[int]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def pick(grid: list[Any], dice: random.Random, count: int) -> list[Any]:
    """Some of a grid, with every value of every factor."""
    dice.shuffle(grid)
    kept: list[Any] = []
    seen: set[Any] = set()
    for case in grid:
        values = {(i, repr(value)) for i, value in enumerate(case)}
        if not values <= seen or len(kept) < count:
            kept.append(case)
            seen |= values
        if len(kept) >= count and len(seen) == sum(len({repr(c[i]) for c in grid}) for i in range(len(grid[0]))):
            break
    return kept


PAGED = pick(list(itertools.product(PAGE_SIZES, HEAD_DIMS, QUERIES, MASKS, [0, 1, 3])), random.Random(1), 30)


@pytest.mark.parametrize(("page_size", "head_dim", "queries", "mask", "splits"), PAGED)
def test_pages(page_size, head_dim, queries, mask, splits):
    dice = random.Random(str((page_size, head_dim, queries)))
    columns = max(1, dice.randint(40, 130) // page_size)
    used, leftpad = lengths(columns * page_size, dice)
    cache = cache_of(page_size, 2, head_dim, used, leftpad, columns, dice)
    q = normal(len(used), queries, 4, head_dim)
    cu_seqlens_q = int32([queries * b for b in range(len(used) + 1)])
    out, lse, _ = flash_attn_varlen_func(
        q.flatten(0, 1),
        cache.k,
        cache.v,
        cu_seqlens_q,
        None,
        queries,
        columns * page_size,
        block_table=cache.table,
        seqused_k=int32(used),
        leftpad_k=int32(leftpad),
        num_splits=splits,
        return_attn_probs=True,
        **mask,
    )
    check_sequences(out.unflatten(0, q.shape[:2]), lse.unflatten(1, q.shape[:2]).transpose(0, 1), q, cache.keys, **mask)


@pytest.mark.parametrize("queries", QUERIES)
def test_pages_whose_lengths_cu_seqlens_k_says(queries):
    used, dice = [33, 0, 70], random.Random(2)
    cache = cache_of(16, 2, 64, used, [0, 0, 0], 5, dice)
    q = normal(3, queries, 4, 64)
    cu_seqlens_q = int32([0, queries, 2 * queries, 3 * queries])
    cu_seqlens_k = int32([0, 33, 33, 103])
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.0])
    out = flash_attn_varlen_func(
        q.flatten(0, 1),
        cache.k,
        cache.v,
        cu_seqlens_q,
        cu_seqlens_k,
        queries,
        70,
        causal=True,
        alibi_slopes=slopes,
        block_table=cache.table,
    )
    check_sequences(out.unflatten(0, q.shape[:2]), None, q, cache.keys, slopes, causal=True)


def test_pages_that_sequences_share():
    """A common prefix, as prefix caching has it."""
    cache = cache_of(16, 2, 64, [48], [0], 3, random.Random(3))
    ((k, v),) = cache.keys
    q, table = normal(2, 1, 4, 64), cache.table.expand(2, 3).contiguous()
    out = flash_attn_varlen_func(
        q.flatten(0, 1),
        cache.k,
        cache.v,
        int32([0, 1, 2]),
        None,
        1,
        48,
        causal=True,
        block_table=table,
        seqused_k=int32([48, 17]),
    )
    check_sequences(out[:, None], None, q, [(k, v), (k[:17], v[:17])], causal=True)


FIXED = pick(list(itertools.product(HEAD_DIMS, QUERIES, MASKS, [0, 2])), random.Random(4), 16)


@pytest.mark.parametrize(("head_dim", "queries", "mask", "splits"), FIXED)
def test_used_rows_and_padding_of_fixed_lengths(head_dim, queries, mask, splits):
    dice = random.Random(str((head_dim, queries, splits)))
    rows = dice.randint(20, 150)
    used, leftpad = lengths(rows, dice)
    k, v = (torch.full((len(used), rows, 2, head_dim), NAN, dtype=torch.float16) for _ in range(2))
    keys = []
    for b, (end, begin) in enumerate(zip(used, leftpad)):
        for tensor, seed in ((k, 1), (v, 2)):
            tensor[b, begin:end] = normal(end - begin, 2, head_dim, seed=10 * b + seed)
        keys.append((k[b, begin:end], v[b, begin:end]))
    q, into = normal(len(used), queries, 4, head_dim), torch.empty(len(used), queries, 4, head_dim).half()
    out, lse, _ = flash_attn_func(
        q,
        k,
        v,
        seqused_k=int32(used),
        leftpad_k=int32(leftpad),
        num_splits=splits,
        out=into,
        return_attn_probs=True,
        **mask,
    )
    assert out is into
    check_sequences(out, lse, q, keys, **mask)


def test_the_same_bits_with_every_number_of_splits_asked_for_twice():
    q, k, v = normal(1, 1, 4, 64), normal(1, 900, 2, 64, seed=1), normal(1, 900, 2, 64, seed=2)
    for splits in (0, 1, 2, 7, 1000):
        first, second = (flash_attn_func(q, k, v, num_splits=splits) for _ in range(2))
        assert torch.equal(first, second)
        check_attention(first, None, q, k, v)


def refused(error, match, **arguments):
    cache = cache_of(16, 2, 64, [40, 3], [0, 0], 3, random.Random(5))
    q = normal(2, 4, 64)
    given = {"block_table": cache.table, "seqused_k": int32([40, 3]), "k": cache.k, "v": cache.v, "q": q, **arguments}
    q, k, v = given.pop("q"), given.pop("k"), given.pop("v")
    cu_seqlens_k, max_seqlen_k = given.pop("cu_seqlens_k", None), given.pop("max_seqlen_k", 48)
    with pytest.raises(error, match=match):
        flash_attn_varlen_func(q, k, v, int32([0, 1, 2]), cu_seqlens_k, 1, max_seqlen_k, **given)


@pytest.mark.parametrize(
    ("match", "arguments"),
    [
        (r"^seqused_k\[0\] is 49; accepted: 0 to 48", {"seqused_k": int32([49, 3])}),
        (r"^seqused_k\[1\] is -1; accepted: 0 to 48", {"seqused_k": int32([1, -1])}),
        (r"^seqused_k\[0\] is 40; accepted: 0 to max_seqlen_k, 20$", {"max_seqlen_k": 20}),
        (r"^leftpad_k\[1\] is 4; accepted: 0 to 3", {"leftpad_k": int32([0, 4])}),
        (r"^block_table\[1\]\[0\] is 9; accepted: 0 to 8", {"block_table": int32([0, 1, 2, 9, 1, 2]).reshape(2, 3)}),
        (r"^block_table\[0\]\[2\] is -1; accepted: 0 to 8", {"block_table": int32([0, 1, -1, 4, 1, 2]).reshape(2, 3)}),
        (r"^block_table has shape \(1, 3\)", {"block_table": int32([0, 1, 2]).reshape(1, 3)}),
        (r"^k has 3 dimensions.*: 4, \(pages, page size, heads, head_dim\)", {"k": normal(48, 2, 64)}),
        (r"^seqused_k has shape \(3,\)", {"seqused_k": int32([1, 2, 3])}),
        (r"^seqused_k .*int64", {"seqused_k": torch.tensor([1, 2])}),
        (r"^cu_seqlens_k is None, and so is seqused_k; accepted: with a block_table one of them", {"seqused_k": None}),
        (r"^cu_seqlens_k is None; accepted: a torch.Tensor", {"block_table": None}),
        (r"^num_splits is -1", {"num_splits": -1}),
        (r"^num_splits is a float", {"num_splits": 1.0}),
        (r"^out has shape \(1, 4, 64\)", {"out": normal(1, 4, 64)}),
        (r"^out is a list", {"out": []}),
        (r"^out has strides .*Allocate it so", {"out": normal(2, 4, 128)[..., ::2]}),
    ],
)
def test_what_does_not_fit_is_named(match, arguments):
    refused(ValueError, match, **arguments)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_out_in_the_memory_of_an_input_is_refused(name):
    base = normal(1, 12, 2, 64)
    inputs = {"q": normal(1, 8, 2, 64), "k": normal(1, 8, 2, 64), "v": normal(1, 8, 2, 64), name: base[:, :8]}
    before = base.clone()
    for first_row in (0, 4):
        with pytest.raises(ValueError, match=f"^out shares memory with {name}; accepted: memory"):
            flash_attn_func(**inputs, out=base[:, first_row : first_row + 8])
    assert torch.equal(base, before)


@pytest.mark.parametrize("dim", range(4))
def test_out_beside_the_inputs_in_one_tensor(dim):
    """In front of the batch, of the rows, of the heads, of the head dims."""
    shape = [2, 8, 2, 64]
    q, k, v, out = normal(*shape[:dim], 4, *shape[dim:]).unbind(dim)
    assert flash_attn_func(q, k, v, out=out) is out
    check_attention(out, None, q, k, v)


@pytest.mark.parametrize("name", ["block_table", "seqused_k", "leftpad_k", "out"])
def test_no_gradient_comes_through(name):
    q = normal(2, 4, 64).requires_grad_()
    k, v = normal(48, 2, 64), normal(48, 2, 64)
    given = {
        "block_table": int32([0, 1]).reshape(2, 1),
        "seqused_k": int32([3, 4]),
        "leftpad_k": int32([1, 2]),
        "out": torch.empty(2, 4, 64).half(),
    }[name]
    with pytest.raises(NotImplementedError, match=f"^{name} comes with inputs that require a gradient"):
        flash_attn_varlen_func(q, k, v, int32([0, 1, 2]), int32([0, 24, 48]), 1, 24, **{name: given})
    with torch.no_grad():
        if name != "block_table":
            flash_attn_varlen_func(q, k, v, int32([0, 1, 2]), int32([0, 24, 48]), 1, 24, **{name: given})


def test_through_the_compiler():
    q, k, v = normal(2, 1, 4, 64), normal(2, 40, 2, 64, seed=1), normal(2, 40, 2, 64, seed=2)
    used, out = int32([40, 11]), torch.empty(2, 1, 4, 64).half()

    def attend(q, k, v, used, out):
        return flash_attn_func(q, k, v, causal=True, seqused_k=used, out=out)

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)(q, k, v, used, out)
    assert torch.equal(compiled, out)
    check_sequences(out, None, q, [(k[b, :end], v[b, :end]) for b, end in enumerate((40, 11))], causal=True)


def test_the_kernel_that_few_queries_take():
    q, k, v = normal(1, 1, 4, 64), normal(1, 300, 2, 64), normal(1, 300, 2, 64)
    flash_attn_func(q, k, v, causal=True, num_splits=1)
    assert flash_attn_jit.interpreter_report().kernel.startswith("flash_decode_hdim64")
    flash_attn_func(q.requires_grad_(), k, v, causal=True)
    assert flash_attn_jit.interpreter_report().kernel.startswith("flash_fwd_hdim64")


# ---- flash_attn_with_kvcache ----


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, places: torch.Tensor, interleaved: bool) -> Any:
    """x (rows, heads, head_dim) in float64."""
    x, half = x.double().clone(), cos.shape[1]
    cos, sin = cos.double()[places][:, None], sin.double()[places][:, None]
    first, second = slice(half), slice(half, 2 * half)
    if interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    a, b = x[..., first].clone(), x[..., second].clone()
    x[..., first], x[..., second] = a * cos - b * sin, b * cos + a * sin
    return x


@dataclass
class Appended:
    """A call with new rows: what it is given, and which cache rows are to change."""

    cache: torch.Tensor  # k and v side by side
    arguments: dict[str, Any]
    rows: Any  # of sequence b and row i: the place in the cache


def appended_to(
    kind: str, heads: int, head_dim: int, lengths: tuple[list[int], list[int]], new: int, dice: random.Random
) -> Appended:
    """A cache with room for `new` rows more; `lengths` are (used, leftpad). What no sequence uses is NaN."""
    used, leftpad = lengths
    batch, capacity = len(used), max(used) + new + 3
    arguments: dict[str, Any] = {}
    shape, place = (batch, capacity), lambda b, i: (b, i)
    if kind == "batch_idx":
        order = dice.sample(range(batch + 2), batch)
        shape, place = (batch + 2, capacity), lambda b, i: (order[b], i)
        arguments = {"cache_batch_idx": int32(order)}
    elif kind != "batch":
        page_size = int(kind.removeprefix("pages of "))
        columns = -(-capacity // page_size)
        table = torch.tensor(dice.sample(range(batch * columns + 2), batch * columns)).reshape(batch, columns).int()
        shape, place = (batch * columns + 2, page_size), lambda b, i: (int(table[b, i // page_size]), i % page_size)
        arguments = {"block_table": table}
    values = normal(*shape, heads, 2 * head_dim, seed=7)
    cache = torch.full_like(values, NAN)
    for b in range(batch):
        for i in range(leftpad[b], used[b]):
            cache[place(b, i)] = values[place(b, i)]
    return Appended(cache, arguments, place)


class Rotary(NamedTuple):
    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool

    def arguments(self) -> dict[str, Any]:
        return {f"rotary_{name}": value for name, value in self._asdict().items()}


def rotary_of(dims: int, places: int, interleaved: bool) -> Rotary:
    angles = torch.rand(places, max(1, dims // 2), generator=torch.Generator().manual_seed(3)) * 6
    return Rotary(angles.cos().half(), angles.sin().half(), interleaved)


@dataclass
class CacheCall:
    """A call of flash_attn_with_kvcache. `options` are those that attention() has too."""

    given: Appended
    q: torch.Tensor
    new: tuple[torch.Tensor, ...]  # k and v, or nothing
    rotary: Rotary | None
    used: list[int]
    leftpad: list[int]
    options: dict[str, Any]
    slopes: torch.Tensor | None = None  # (batch, heads)

    @property
    def count(self) -> int:
        return self.new[0].shape[1] if self.new else 0

    def run(self, device: str = "cpu", **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
        cache = self.given.cache.to(device)
        k_cache, v_cache = cache.chunk(2, -1)
        arguments: dict[str, Any] = {
            "q": self.q,
            "k_cache": k_cache,
            "v_cache": v_cache,
            "cache_seqlens": int32(self.used),
            "cache_leftpad": int32(self.leftpad),
            "alibi_slopes": self.slopes,
            "return_softmax_lse": True,
            **dict(zip("kv", self.new)),
            **(self.rotary.arguments() if self.rotary else {}),
            **self.given.arguments,
            **self.options,
            **more,
        }
        there: dict[str, Any] = {
            name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()
        }
        out, lse = flash_attn_jit.flash_attn_with_kvcache(**there)
        if device != "cpu":
            self.given.cache.copy_(cache)
        return out.cpu(), lse.cpu()

    def turned(self, x: torch.Tensor, b: int, advances: bool) -> torch.Tensor:
        """Rows (rows, heads, head_dim) of sequence b, at the places behind those that are used."""
        if not self.rotary:
            return x.double()
        places = self.used[b] + torch.arange(x.shape[0]) * advances
        return turned(x, self.rotary.cos, self.rotary.sin, places, self.rotary.interleaved)

    def turned_q(self, b: int) -> torch.Tensor:
        advances = self.options.get("causal", False) or max(self.options.get("window_size", (-1, -1))) >= 0
        return self.turned(self.q[b], b, advances).half()


def check_call(call: CacheCall, **more: Any) -> None:
    """What was appended, what was attended to, and that nothing else in the cache has changed."""
    before, head_dim = call.given.cache.clone(), call.q.shape[3]
    out, lse = call.run(**more)
    for b, n in enumerate(call.used):
        for i in range(call.count):
            k_new, v_new = call.turned(call.new[0][b], b, True)[i], call.new[1][b, i]
            at = call.given.rows(b, n + i)
            got = call.given.cache[at]
            assert (got[..., :head_dim].double() - k_new).abs().max() <= 4e-3
            assert torch.equal(got[..., head_dim:], v_new)
            before[at] = got
        own = [call.given.cache[call.given.rows(b, i)] for i in range(call.leftpad[b], n + call.count)]
        k, v = (torch.stack(own) if own else call.given.cache[:0, 0])[None].chunk(2, -1)
        slopes: dict[str, Any] = {} if call.slopes is None else {"alibi_slopes": call.slopes[b : b + 1]}
        check_attention(out[b : b + 1], lse[b : b + 1], call.turned_q(b)[None], k, v, **call.options, **slopes)
    assert torch.equal(call.given.cache.view(torch.int16), before.view(torch.int16))  # which knows NaN


CACHES = ["batch", "batch_idx", "pages of 1", "pages of 16"]
# (rotary dims, interleaved): none, all, some; of 17 dims 16 at the most.
ROTARY = [(0, True), (1, True), (1, False), (0.5, True), (0.5, False)]
APPENDED = pick(
    list(itertools.product(CACHES, [64, 17, 80, 256], [(1, 1), (4, 4), (3, 6), (1, 0)], ROTARY, [False, True])),
    random.Random(6),
    28,
)


@pytest.mark.parametrize(("kind", "head_dim", "sizes", "rotary", "causal"), APPENDED)
def test_what_is_appended_and_what_is_attended_to(kind, head_dim, sizes, rotary, causal):
    queries, count = sizes
    used, dice = [37, 0, 15], random.Random(str((kind, head_dim, sizes)))
    leftpad = [5, 0, 0] if kind != "pages of 1" else [0, 0, 0]
    given = appended_to(kind, 2, head_dim, (used, leftpad), count, dice)
    new = tuple(normal(3, count, 2, head_dim, seed=seed) for seed in (1, 2)) if count else ()
    dims = int(head_dim * rotary[0]) // 2 * 2
    turns = rotary_of(dims, 50, rotary[1]) if dims and count else None
    check_call(CacheCall(given, normal(3, queries, 4, head_dim), new, turns, used, leftpad, {"causal": causal}))


def random_options(dice: random.Random) -> dict[str, Any]:
    return {
        "causal": dice.random() < 0.5,
        "window_size": dice.choice([(-1, -1), (-1, -1), (dice.randint(-1, 60), dice.randint(-1, 60))]),
        "softcap": dice.choice([0.0, 0.0, 5.0, 30.0]),
        "softmax_scale": dice.choice([None, None, 0.25, -0.125]),
    }


def random_call(dice: random.Random) -> CacheCall:
    step = dice.choice([1, 8, 16])
    head_dim, heads_k, group = step * dice.randint(1, 256 // step), dice.randint(1, 3), dice.randint(1, 5)
    used = [dice.choice([0, 1, dice.randint(0, 150)]) for _ in range(dice.randint(1, 4))]
    leftpad = [dice.choice([0, dice.randint(0, length)]) for length in used]
    queries = dice.choice([1, 1, dice.randint(2, 9), dice.randint(60, 150)])  # a token, some of them, a prompt
    count = dice.choice([None, queries, queries, dice.randint(0, queries + 3)])
    kind = dice.choice(["batch", "batch_idx", *(f"pages of {size}" for size in (1, 16, 32, dice.randint(2, 70)))])
    given = appended_to(kind, heads_k, head_dim, (used, leftpad), count or 0, dice)
    new: tuple[torch.Tensor, ...] = ()
    rotary = None
    if count is not None:
        new = tuple(normal(len(used), count, heads_k, head_dim, seed=seed) for seed in (1, 2))
        dims = dice.choice([0, head_dim // 2 * 2, 2 * dice.randint(0, head_dim // 2)])
        places = max(used) + max(queries, count) + dice.randint(0, 9)
        rotary = rotary_of(dims, places, dice.random() < 0.5) if dims else None
    q = normal(len(used), queries, heads_k * group, head_dim)
    slopes = torch.rand(q.shape[0], q.shape[2], generator=torch.Generator().manual_seed(4))
    options = random_options(dice)
    return CacheCall(given, q, new, rotary, used, leftpad, options, slopes if dice.random() < 0.3 else None)


@pytest.mark.parametrize("number", range(160 if TESTS_ALL else 16))
def test_random_calls(number):
    dice = random.Random(number)
    check_call(random_call(dice), num_splits=dice.choice([0, 1, 2, 5]))


def test_an_int_for_all_sequences():
    q, cache = normal(2, 1, 4, 64), normal(2, 40, 2, 128, seed=1)
    k, v = cache[..., :64], cache[..., 64:]
    out = flash_attn_jit.flash_attn_with_kvcache(q, k, v, cache_seqlens=23)
    check_attention(out, None, q, k[:, :23], v[:, :23])
    check_attention(flash_attn_jit.flash_attn_with_kvcache(q, k, v), None, q, k, v)


def test_a_longer_cache_gives_its_first_sequences():
    q, k, v = normal(2, 1, 4, 64), normal(5, 40, 2, 64, seed=1), normal(5, 40, 2, 64, seed=2)
    new, rest = normal(2, 1, 2, 64, seed=3), k[2:].clone()
    out = flash_attn_jit.flash_attn_with_kvcache(q, k, v, new, new, cache_seqlens=11)
    assert torch.equal(k[:2, 11], new[:, 0]) and torch.equal(k[2:], rest)
    check_attention(out, None, q, k[:2, :12], v[:2, :12])


def kvcache(**arguments):
    given = {"q": normal(2, 1, 4, 64), "k_cache": normal(2, 40, 2, 64), "v_cache": normal(2, 40, 2, 64), **arguments}
    return flash_attn_jit.flash_attn_with_kvcache(**given)


NEW = {"k": normal(2, 3, 2, 64), "v": normal(2, 3, 2, 64), "cache_seqlens": int32([1, 2])}
COS = normal(50, 32)
TOO_MANY = {"k": normal(2, 41, 2, 64), "v": normal(2, 41, 2, 64)}
WITH_GRADIENT = {"rotary_cos": normal(50, 32).requires_grad_(), "rotary_sin": COS}
ONE_PAGE = torch.tensor([[0], [1]], dtype=torch.int32)
ROWS = normal(2, 2, 64)


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (ValueError, r"^cache_seqlens\[1\] is 41; accepted: 0 to 40", {"cache_seqlens": int32([1, 41])}),
        (ValueError, r"^cache_seqlens\[1\] is 38, and 3 rows come behind", {**NEW, "cache_seqlens": int32([1, 38])}),
        (ValueError, r"^k has 41 rows for each sequence; accepted: at most 40, .*k_cache", {**NEW, **TOO_MANY}),
        (ValueError, r"^k_cache has strides .*Allocate it so", {**NEW, "k_cache": normal(2, 40, 2, 128)[..., ::2]}),
        (ValueError, r"^v_cache has strides .*Allocate it so", {**NEW, "v_cache": normal(2, 40, 2, 128)[..., ::2]}),
        (ValueError, r"^v_cache has strides .*Use v_cache.contiguous", {"v_cache": normal(2, 40, 2, 128)[..., ::2]}),
        (ValueError, r"^cache_leftpad\[0\] is 3", {"cache_seqlens": 2, "cache_leftpad": int32([3, 0])}),
        (ValueError, r"^v is None", {**NEW, "v": None}),
        (ValueError, r"^cache_seqlens is None, and k is given", {**NEW, "cache_seqlens": None}),
        (ValueError, r"^k is None, and rotary_cos is given", {"rotary_cos": COS, "rotary_sin": COS}),
        (ValueError, r"^rotary_sin is None", {**NEW, "rotary_cos": COS}),
        (ValueError, r"^rotary_cos turns 66 dims", {**NEW, "rotary_cos": normal(50, 33), "rotary_sin": normal(50, 33)}),
        (ValueError, r"^rotary_cos has 4 rows", {**NEW, "rotary_cos": normal(4, 8), "rotary_sin": normal(4, 8)}),
        (ValueError, r"^rotary_sin has shape", {**NEW, "rotary_cos": COS, "rotary_sin": normal(50, 31)}),
        (ValueError, r"^k has shape \(2, 3, 1, 64\)", {**NEW, "k": normal(2, 3, 1, 64)}),
        (ValueError, r"^k_cache has 3 .*: 4, \(pages, page size,", {"k_cache": ROWS, "block_table": ONE_PAGE}),
        (ValueError, r"^v_cache has 3 .*: 4, \(pages, page size,", {**NEW, "v_cache": ROWS, "block_table": ONE_PAGE}),
        (ValueError, r"^k_cache has 3 .*: 4, \(batch, seqlen,", {"k_cache": ROWS}),
        (ValueError, r"^k_cache has 3 .*: 4, \(batch, seqlen,", {"k_cache": ROWS, "cache_batch_idx": int32([0, 1])}),
        (ValueError, r"^cache_batch_idx .*block_table", {"cache_batch_idx": int32([0, 1]), "block_table": ONE_PAGE}),
        (ValueError, r"^cache_batch_idx\[1\] is 2; accepted: 0 to 1", {"cache_batch_idx": int32([0, 2])}),
        (ValueError, r"^cache_batch_idx has shape \(3,\)", {"cache_batch_idx": int32([0, 1, 0])}),
        (ValueError, r"^cache_batch_idx .*int64", {"cache_batch_idx": torch.tensor([0, 1])}),
        (ValueError, r"^cache_leftpad is a list", {"cache_leftpad": [1, 2]}),
        (ValueError, r"^cache_seqlens is -1", {"cache_seqlens": -1}),
        (ValueError, r"^cache_seqlens is 1099511627776", {"cache_seqlens": 2**40}),
        (ValueError, r"^k has shape \(3, 3, 2, 64\); accepted: q's batch, 2", {**NEW, "k": normal(3, 3, 2, 64)}),
        (ValueError, r"^k has 2 dimensions", {**NEW, "k": normal(3, 64)}),
        (ValueError, r"^q has 0 dimensions", {"q": torch.tensor(1.0).half(), "cache_seqlens": 3}),
        (ValueError, r"^rotary_cos is a list", {**NEW, "rotary_cos": [1], "rotary_sin": COS}),
        (ValueError, r"^rotary_interleaved is 'no'", {"rotary_interleaved": "no"}),
        (NotImplementedError, r"^rotary_cos requires", {**NEW, **WITH_GRADIENT}),
        (ValueError, r"^cache_seqlens is a str", {"cache_seqlens": "3"}),
        (ValueError, r"^k_cache has dtype torch.float32", {"k_cache": normal(2, 40, 2, 64).float()}),
        (NotImplementedError, r"^q requires a gradient", {"q": normal(2, 1, 4, 64).requires_grad_()}),
    ],
)  # fmt: skip
def test_what_does_not_fit_a_cache_is_named(error, match, arguments):
    with pytest.raises(error, match=match):
        kvcache(**arguments)


def test_vmap_is_refused_where_it_would_append():
    q, cache, new = normal(3, 1, 1, 4, 64), normal(1, 8, 2, 64), normal(3, 1, 1, 2, 64)
    attend = flash_attn_jit.flash_attn_with_kvcache
    for k_cache, dims in ((cache, (0, None, 0)), (cache.expand(3, 1, 8, 2, 64).clone(), (0, 0, 0))):
        before = k_cache.clone()
        with pytest.raises(NotImplementedError, match=r"^flash_attn_with_kvcache appends .* inside of torch\.vmap"):
            torch.vmap(lambda q, cache, k: attend(q, cache, cache, k, k, cache_seqlens=3), dims)(q, k_cache, new)
        assert torch.equal(k_cache, before)


def test_the_cache_through_the_compiler():
    q, k, v = normal(2, 1, 4, 64), normal(2, 1, 2, 64, seed=1), normal(2, 1, 2, 64, seed=2)
    cache, used = normal(2, 40, 2, 128, seed=3), int32([11, 39])
    plain, traced = cache.clone(), cache.clone()

    def step(cache, used):
        return flash_attn_jit.flash_attn_with_kvcache(
            q, cache[..., :64], cache[..., 64:], k, v, cos, cos, cache_seqlens=used, causal=True
        )

    cos = normal(50, 32, seed=4)
    expected = step(plain, used)
    assert torch.equal(torch.compile(step, backend="aot_eager", fullgraph=True)(traced, used), expected)
    assert torch.equal(traced, plain) and not torch.equal(plain, cache)


# ---- a model ----


class Model:
    """A small transformer with random weights: embeddings, one layer of attention with rotary embedding, the logits."""

    dim, heads, heads_k, head_dim, words = 64, 4, 2, 16, 97

    def __init__(self, device: str = "cpu"):
        def weights(*shape: int, seed: int) -> torch.Tensor:
            return (normal(*shape, seed=seed).float() / shape[0] ** 0.5).to(device)

        self.embedding = weights(self.words, self.dim, seed=1) * self.words**0.5
        self.q = weights(self.dim, self.heads * self.head_dim, seed=2)
        self.kv = weights(self.dim, 2 * self.heads_k * self.head_dim, seed=3)
        self.out = weights(self.heads * self.head_dim, self.dim, seed=4) * 3
        self.logits = weights(self.dim, self.words, seed=5)
        angles = torch.arange(64)[:, None] / 100 ** (torch.arange(self.head_dim // 2) / (self.head_dim // 2))
        self.cos, self.sin = (f(angles).half().to(device) for f in (torch.cos, torch.sin))

    def qkv(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = self.embedding[tokens]
        q = (x @ self.q).unflatten(-1, (self.heads, self.head_dim)).half()
        k, v = (x @ self.kv).unflatten(-1, (2, self.heads_k, self.head_dim)).half().unbind(-3)
        return q, k, v

    def next_tokens(self, tokens: torch.Tensor, attended: Any) -> torch.Tensor:
        x = self.embedding[tokens] + attended.flatten(-2).float() @ self.out
        return (x @ self.logits).argmax(-1)[:, -1:]

    def without_cache(self, prompt: torch.Tensor, count: int) -> torch.Tensor:
        """Keys and queries are turned in float64, all of them anew for each token."""
        tokens = prompt
        for _ in range(count):
            q, k, v = self.qkv(tokens)
            places = torch.arange(tokens.shape[1], device=prompt.device)
            q, k = (torch.stack([turned(x, self.cos, self.sin, places, True).half() for x in each]) for each in (q, k))
            tokens = torch.cat([tokens, self.next_tokens(tokens, flash_attn_func(q, k, v, causal=True))], 1)
        return tokens

    def with_cache(self, prompt: torch.Tensor, count: int, page_size: int | None) -> torch.Tensor:
        batch, rows = prompt.shape[0], prompt.shape[1] + count
        table = None
        if page_size is None:
            shape: tuple[int, ...] = (batch, rows)
        else:
            columns = -(-rows // page_size)
            shape = (batch * columns, page_size)
            table = torch.randperm(shape[0]).reshape(batch, columns).int().to(prompt.device)
        cache = torch.full((*shape, self.heads_k, 2 * self.head_dim), NAN, dtype=torch.float16, device=prompt.device)
        used = torch.zeros(batch, dtype=torch.int32, device=prompt.device)
        tokens = new = prompt
        for _ in range(count):
            q, k, v = self.qkv(new)
            attended = flash_attn_jit.flash_attn_with_kvcache(
                q,
                cache[..., : self.head_dim],
                cache[..., self.head_dim :],
                k,
                v,
                self.cos,
                self.sin,
                cache_seqlens=used,
                block_table=table,
                causal=True,
            )
            used += new.shape[1]
            new = self.next_tokens(new, attended)
            tokens = torch.cat([tokens, new], 1)
        return tokens


def test_a_model_generates_the_same_tokens_with_every_cache():
    model, prompt = Model(), torch.arange(14).reshape(2, 7) * 5 % 97
    expected = model.without_cache(prompt, 12)
    assert len(set(expected[:, 7:].flatten().tolist())) > 4
    for page_size in (None, 1, 16):
        assert torch.equal(model.with_cache(prompt, 12, page_size), expected)


# ---- what a reading of the code found ----


def test_no_pages_at_all():
    empty = torch.empty(0, 16, 2, 64, dtype=torch.float16)
    for queries in (1, 300):
        out, lse, _ = flash_attn_varlen_func(
            normal(queries, 4, 64),
            empty,
            empty,
            int32([0, queries]),
            None,
            queries,
            32,
            block_table=int32([0, 0]).reshape(1, 2),
            seqused_k=int32([0]),
            return_attn_probs=True,
        )
        assert not out.any() and (lse == float("inf")).all()
    no_rows = torch.empty(2, 0, 2, 64, dtype=torch.float16)
    out = flash_attn_jit.flash_attn_with_kvcache(normal(2, 1, 4, 64), no_rows, no_rows, cache_batch_idx=int32([1, 0]))
    assert not out.any()


def test_lengths_that_a_table_has_no_room_for():
    cache = cache_of(16, 2, 64, [32], [0], 2, random.Random(7))
    q = normal(1, 4, 64)
    with pytest.raises(ValueError, match=r"^cu_seqlens_k\[1\] is 100"):
        flash_attn_varlen_func(q, cache.k, cache.v, int32([0, 1]), int32([0, 100]), 1, 100, block_table=cache.table)
    # Where seqused_k says how many keys there are, cu_seqlens_k is not asked.
    out = flash_attn_varlen_func(
        q, cache.k, cache.v, int32([0, 1]), int32([0, 0]), 1, 32, block_table=cache.table, seqused_k=int32([32])
    )
    check_sequences(out[None], None, q[None], cache.keys)


def test_what_autograd_saved_is_known_to_have_changed():
    k, v, new = normal(1, 8, 2, 64), normal(1, 8, 2, 64), normal(1, 1, 2, 64)
    factor = torch.ones((), requires_grad=True)
    for changed in (k, v):
        product = (changed * factor.half()).sum()
        flash_attn_jit.flash_attn_with_kvcache(new, k, v, new, new, cache_seqlens=3)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()
    out = torch.empty(1, 1, 2, 64).half()
    product = (out * factor.half()).sum()
    with torch.no_grad():
        flash_attn_func(new, k, v, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_autocast_casts_what_is_appended():
    k_cache, v_cache = normal(1, 8, 2, 64), normal(1, 8, 2, 64)
    q, new = normal(1, 1, 4, 64).float(), normal(1, 1, 2, 64).float()
    with torch.autocast("cpu", torch.float16):
        out = flash_attn_jit.flash_attn_with_kvcache(q, k_cache, v_cache, new, new, cache_seqlens=7)
    assert out.dtype is torch.float16 and torch.equal(k_cache[:, 7], new[:, 0].half())
