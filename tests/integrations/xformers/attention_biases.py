"""Biases of every type that xformers has, with the float64 attention that they stand for."""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from xformers.ops.fmha import attn_bias as ab

CPU = torch.device("cpu")


class Case(NamedTuple):
    """A bias and the inputs that it is for. What varlen biases say of rows fixes the numbers; others take any."""

    bias: Any
    batch: int
    rows_q: int
    rows_k: int
    has_backward: bool = True

    def mask(self, heads: int) -> torch.Tensor:
        """(batch, heads, rows_q, rows_k), float64, 0 or -inf or what is added."""
        whole = self.batch, heads, self.rows_q, self.rows_k
        if self.bias is None:
            return torch.zeros(whole, dtype=torch.float64)
        if type(self.bias) is torch.Tensor:
            return self.bias.double()
        if hasattr(self.bias, "block_tables"):
            # Rows of its mask, before they are brought into pages, are those that the table has room for.
            room = self.bias.block_tables.numel() * self.bias.page_size
            known = self.bias.materialize((self.rows_q, room), torch.float64)
            hidden = torch.full((self.rows_q, self.rows_k), float("-inf"), dtype=torch.float64)
            hidden[:, : known.shape[1]] = known
            return hidden.expand(whole)
        return self.bias.materialize(whole, torch.float64)


def _lengths(rng: random.Random, count: int, least: int, most: int) -> list[int]:
    return [rng.randint(least, most) for _ in range(count)]


def whole(make: Callable[[random.Random], Any], longer: str = "any") -> Callable[[random.Random, int], Case]:
    """`longer`: which of queries and keys may be more."""

    def case(rng: random.Random, heads: int) -> Case:
        rows_q, rows_k = sorted(_lengths(rng, 2, 5, 19))
        if longer == "any" and rng.random() < 0.5:
            rows_q, rows_k = rows_k, rows_q
        return Case(make(rng), rng.randint(1, 2), rows_q, rows_k)

    return case


def added(make: Callable[[torch.Tensor], Any]) -> Callable[[random.Random, int], Case]:
    def case(rng: random.Random, heads: int) -> Case:
        batch, rows_q, rows_k = rng.randint(1, 2), rng.randint(5, 19), rng.randint(5, 19)
        torch.manual_seed(rng.randint(0, 1000))
        dtype = rng.choice((torch.float16, torch.float32))
        return Case(make(torch.randn(batch, heads, rows_q, rows_k).to(dtype)), batch, rows_q, rows_k)

    return case


def blocks(make: Callable[[Any, random.Random], Any], kind: str = "any") -> Callable[[random.Random, int], Case]:
    """`kind`: "any" numbers of queries and keys, "same" ones, or "more" keys."""

    def case(rng: random.Random, heads: int) -> Case:
        count = rng.randint(1, 3)
        queries = _lengths(rng, count, 1, 9)
        keys = _lengths(rng, count, 1, 9) if kind == "any" else queries
        if kind == "more":
            keys = [length + rng.randint(0, 6) for length in queries]
        bias = ab.BlockDiagonalMask.from_seqlens(queries, keys, device=CPU)
        return Case(make(bias, rng), 1, sum(queries), sum(keys))

    return case


def _padded(rng: random.Random) -> tuple[list[int], list[int], int]:
    """Queries, keys and padding."""
    count, padding = rng.randint(1, 3), rng.randint(6, 12)
    keys = _lengths(rng, count, 1, padding)
    return [rng.randint(1, length) for length in keys], keys, padding


def padded(make: Callable[[list[int], list[int], int], Any]) -> Callable[[random.Random, int], Case]:
    def case(rng: random.Random, heads: int) -> Case:
        queries, keys, padding = _padded(rng)
        return Case(make(queries, keys, padding), 1, sum(queries), padding * len(keys), False)

    return case


def gappy(type_: Any) -> Callable[[random.Random, int], Case]:
    def case(rng: random.Random, heads: int) -> Case:
        queries, keys, _ = _padded(rng)
        starts = [0]
        for length in keys:
            starts.append(starts[-1] + length + rng.randint(0, 3))
        starts = [start + 1 for start in starts]
        bias = type_.from_seqlens(queries, starts, keys, device=CPU)
        return Case(bias, 1, sum(queries), starts[-1], False)

    return case


def _pages(rng: random.Random, count: int, longest: int) -> tuple[torch.Tensor, int, int]:
    """block_tables, the page size and all pages' rows; no page is another sequence's."""
    size = rng.choice((1, 4, 16))
    columns = -(-longest // size) + rng.randint(0, 1)
    pages = count * columns + rng.randint(0, 2)
    numbers = rng.sample(range(pages), count * columns)
    return torch.tensor(numbers, dtype=torch.int32).view(count, columns), size, pages * size


def paged(type_: Any) -> Callable[[random.Random, int], Case]:
    def case(rng: random.Random, heads: int) -> Case:
        queries, keys, _ = _padded(rng)
        table, size, rows = _pages(rng, len(keys), max(keys))
        bias = type_.from_seqlens(queries, keys, table, size, device=CPU)
        return Case(bias, 1, sum(queries), rows, False)

    return case


def paged_gappy(type_: Any) -> Callable[[random.Random, int], Case]:
    def case(rng: random.Random, heads: int) -> Case:
        queries, keys, _ = _padded(rng)
        starts = _lengths(rng, len(keys), 0, 5)
        table, size, rows = _pages(rng, len(keys), max(map(sum, zip(starts, keys))))
        room = size * (max(map(sum, zip(starts, keys))) // size + 1)  # of a sequence, before pages are given
        starts = [i * room + start for i, start in enumerate(starts)]
        gappy = ab.BlockDiagonalGappyKeysMask.from_seqlens(queries, [*starts, room * len(keys)], keys, device=CPU)
        return Case(gappy.make_paged(table, size, room, type_), 1, sum(queries), rows, False)

    return case


def _local_padded(queries: list[int], keys: list[int], padding: int) -> Any:
    return ab.BlockDiagonalPaddedKeysMask.from_seqlens(queries, padding, keys, device=CPU).make_local_attention(3, 2)


def _causal_local_padded(queries: list[int], keys: list[int], padding: int) -> Any:
    return ab.BlockDiagonalCausalLocalAttentionPaddedKeysMask.from_seqlens_local(queries, padding, keys, 4)


# By the bias's type: a function of (rng, heads of the query) -> Case.
CASES: dict[type, Callable[[random.Random, int], Case]] = {
    type(None): whole(lambda rng: None),
    torch.Tensor: added(lambda bias: bias),
    ab.LowerTriangularMask: whole(lambda rng: ab.LowerTriangularMask()),
    ab.LowerTriangularMaskWithTensorBias: added(lambda bias: ab.LowerTriangularMask().add_bias(bias)),
    ab.LowerTriangularFromBottomRightMask: whole(lambda rng: ab.LowerTriangularFromBottomRightMask(), "keys"),
    ab.LowerTriangularFromBottomRightLocalAttentionMask: whole(
        lambda rng: ab.LowerTriangularFromBottomRightMask().make_local_attention(rng.randint(1, 9)), "keys"
    ),
    ab.LocalAttentionFromBottomRightMask: whole(
        lambda rng: ab.LocalAttentionFromBottomRightMask(rng.randint(0, 6), rng.randint(0, 6)), "keys"
    ),
    ab.BlockDiagonalMask: blocks(lambda bias, rng: bias),
    ab.BlockDiagonalCausalMask: blocks(lambda bias, rng: bias.make_causal()),
    ab.BlockDiagonalCausalLocalAttentionMask: blocks(
        lambda bias, rng: bias.make_local_attention(10 if bias.q_seqinfo is not bias.k_seqinfo else 3)
    ),
    ab.BlockDiagonalCausalFromBottomRightMask: blocks(lambda bias, rng: bias.make_causal_from_bottomright(), "more"),
    ab.BlockDiagonalCausalLocalAttentionFromBottomRightMask: blocks(
        lambda bias, rng: bias.make_local_attention_from_bottomright(rng.randint(1, 9)), "more"
    ),
    ab.BlockDiagonalPaddedKeysMask: padded(
        lambda q, k, padding: ab.BlockDiagonalPaddedKeysMask.from_seqlens(q, padding, k, device=CPU)
    ),
    ab.BlockDiagonalCausalWithOffsetPaddedKeysMask: padded(
        lambda q, k, padding: ab.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(q, padding, k, device=CPU)
    ),
    ab.BlockDiagonalLocalAttentionPaddedKeysMask: padded(_local_padded),
    ab.BlockDiagonalCausalLocalAttentionPaddedKeysMask: padded(_causal_local_padded),
    ab.BlockDiagonalGappyKeysMask: gappy(ab.BlockDiagonalGappyKeysMask),
    ab.BlockDiagonalCausalWithOffsetGappyKeysMask: gappy(ab.BlockDiagonalCausalWithOffsetGappyKeysMask),
    ab.PagedBlockDiagonalPaddedKeysMask: paged(ab.PagedBlockDiagonalPaddedKeysMask),
    ab.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask: paged(ab.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask),
    ab.PagedBlockDiagonalGappyKeysMask: paged_gappy(ab.PagedBlockDiagonalGappyKeysMask),
    ab.PagedBlockDiagonalCausalWithOffsetGappyKeysMask: paged_gappy(ab.PagedBlockDiagonalCausalWithOffsetGappyKeysMask),
}

# Cases that a type has beside those.
SAME_LENGTHS = {
    "BlockDiagonalCausalMask, same lengths": blocks(lambda bias, rng: bias.make_causal(), "same"),
    "BlockDiagonalCausalLocalAttentionMask, same lengths": blocks(
        lambda bias, rng: bias.make_local_attention(rng.randint(1, 9)), "same"
    ),
}
ALL = {**{type_.__name__: make for type_, make in CASES.items()}, **SAME_LENGTHS}
WITH_BACKWARD = [name for name, make in ALL.items() if make(random.Random(0), 2).has_backward]


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of (batch, rows, heads, head_dim) and a mask in their dtype. A query that sees no key gives 0; its lse
    is -inf."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale) + mask
    sees = (mask > float("-inf")).any(-1, keepdim=True)
    weights = torch.where(sees, scores, 0.0).softmax(-1)
    weights = torch.where(sees, weights, 0.0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v), scores.logsumexp(-1)
