"""What a kernel has to do: the one place that counts floating-point operations and bytes of a problem."""

from .. import _core
from .records import Kernel, Record, Sizes

_FAMILIES = {family.word: family for family in _core.kernel_families()}


def _sum_of_clamped(offset: int, count: int, most: int) -> int:
    """The sum over i < count of offset + i, held between 0 and most."""

    def up_to(n: int) -> int:
        """The sum over 0 <= x < n of min(x, most)."""
        small = min(n, most + 1)
        return small * (small - 1) // 2 + (n - small) * most if n > 0 else 0

    return up_to(offset + count) - up_to(offset)


def visible_pairs(sizes: Sizes, mask: str) -> int | None:
    """Of a query and a key of one head that the mask leaves. Masks are aligned bottom-right. None where the record does
    not tell a window's widths."""
    queries, keys = sizes.seqlen_q, sizes.seqlen_k
    if mask == "full":
        return queries * keys
    left, right = (-1, 0) if mask == "causal" else (sizes.window_left, sizes.window_right)
    if left is None or right is None:
        return None
    # Query i sees the keys from first(i) to before end(i), both held between 0 and `keys`.
    diagonal = keys - queries
    ends = queries * keys if right < 0 else _sum_of_clamped(diagonal + right + 1, queries, keys)
    firsts = 0 if left < 0 else _sum_of_clamped(diagonal - left, queries, keys)
    return max(0, ends - firsts)


def flops(kernel: Kernel, sizes: Sizes) -> int | None:
    """That the problem needs of this kernel: what a tile pads or a mask cuts away is not counted."""
    heads = sizes.batch * sizes.num_heads
    products = _FAMILIES[kernel.kind].products
    if products == 0:
        return 2 * heads * sizes.seqlen_q * kernel.head_dim
    pairs = visible_pairs(sizes, kernel.mask)
    return None if pairs is None else 2 * products * heads * pairs * kernel.head_dim


def bytes_moved(kernel: Kernel, sizes: Sizes) -> int:
    """At least: every tensor once."""
    family = _FAMILIES[kernel.kind]
    of_queries = (
        sizes.num_heads
        * sizes.seqlen_q
        * (2 * (family.query_rows + family.query_value_rows) * kernel.head_dim + 4 * family.query_numbers)
    )
    of_keys = sizes.num_heads_k * sizes.seqlen_k * 2 * (family.key_rows + family.value_rows) * kernel.head_dim
    return sizes.batch * (of_queries + of_keys)


def tflops(record: Record, seconds: float | None) -> float | None:
    needed = flops(record.problem.kernel, record.sizes)
    return None if needed is None or seconds is None else needed / seconds * 1e-12
