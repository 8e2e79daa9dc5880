"""What is measured: one attention problem, its inputs and its cost."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch

FORWARD, BACKWARD, BOTH = PASSES = ("fwd", "bwd", "both")
# Products of every pair of positions over q's head dim and over v's: forward S = Q K^T, and O; backward S anew, dQ and
# dK, and dP = dO V^T and dV.
_PRODUCTS = {FORWARD: (1, 1), BACKWARD: (3, 2), BOTH: (4, 3)}

_DEVICE = "cuda"

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}  # as the program calls them
FP16 = "fp16"

NO_MASK = "none"
# The dimensions of (batch, heads, seqlen, seqlen) that an attn_mask has; those that it has not are broadcast.
# None: q's dtype.
_MASKS: dict[str, tuple[torch.dtype | None, str]] = {
    "padding": (torch.bool, "bk"),  # sequence i has no keys behind i / 16 of its rows from the end
    "holes": (torch.bool, "bk"),  # a tenth of the keys, at random
    "bool": (torch.bool, "bqk"),  # a tenth of the pairs, at random
    "blocks": (torch.bool, "qk"),  # eight sequences one behind the other, each of which sees itself
    "bias": (None, "hqk"),
    "batch-bias": (None, "bhqk"),
}
MASKS = (NO_MASK, *_MASKS)


class Inputs(NamedTuple):
    """Each (batch, seqlen, heads, head_dim), of one dtype; v and dout with v's head dim."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor | None  # the gradient of the output; None where only the forward pass is wanted
    attn_mask: torch.Tensor | None = None

    @property
    def qkv(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.q, self.k, self.v


@dataclass(frozen=True)
class Problem:
    batch: int
    num_heads: int
    num_heads_k: int
    head_dim: int
    seqlen: int
    causal: bool
    attn_mask: str = NO_MASK
    dropout_p: float = 0.0
    dtype: str = FP16
    head_dim_v: int = 0  # of v, where it is another one; 0: the same

    @property
    def value_head_dim(self) -> int:
        return self.head_dim_v or self.head_dim

    def flops(self, which: str) -> float:
        """Forward is two matrix products over every pair of positions, of which a causal mask takes half; the whole
        backward is five, both are seven."""
        pairs = self.seqlen * self.seqlen
        products, of_values = _PRODUCTS[which]
        dims = products * self.head_dim + of_values * self.value_head_dim
        return 2.0 * self.batch * self.num_heads * pairs * dims / (2 if self.causal else 1)

    def read_bytes(self, which: str) -> int:
        """Of the tensors that are there before a call of the pass and read by it."""
        dims = (self.num_heads + self.num_heads_k) * self.head_dim  # q and k
        heads = self.num_heads_k + self.num_heads * {FORWARD: 0, BACKWARD: 2, BOTH: 1}[which]  # v; dout, backward's out
        return 2 * self.batch * self.seqlen * (dims + heads * self.value_head_dim) + self._mask_bytes()

    def _mask_shape(self, dimensions: str) -> tuple[int, int, int, int]:
        whole = {"b": self.batch, "h": self.num_heads, "q": self.seqlen, "k": self.seqlen}
        b, h, q, k = (size if name in dimensions else 1 for name, size in whole.items())
        return b, h, q, k

    def _mask_bytes(self) -> int:
        if self.attn_mask == NO_MASK:
            return 0
        dtype, dimensions = _MASKS[self.attn_mask]
        return (dtype or DTYPES[self.dtype]).itemsize * prod(self._mask_shape(dimensions))

    def feature_flags(self) -> list[str]:
        """Dtype, mask and dropout as the program's command `model` takes them."""
        flags = ["--dtype", self.dtype] + (["--dropout"] if self.dropout_p else [])
        if self.attn_mask == NO_MASK:
            return flags
        dtype, dimensions = _MASKS[self.attn_mask]
        flags += ["--boolmask" if dtype is torch.bool else "--bias16"]
        flags += [] if "q" in dimensions else ["--onerow"]
        flags += ["--unpaired"] if self.seqlen % 8 else []
        flags += [] if "b" in dimensions else ["--bias-batch", "1"]
        return flags if "h" in dimensions else [*flags, "--bias-heads", "1"]

    def _mask(self, generator: torch.Generator) -> torch.Tensor | None:
        if self.attn_mask == NO_MASK:
            return None
        dtype, dimensions = _MASKS[self.attn_mask]
        shape = self._mask_shape(dimensions)
        if dtype is not torch.bool:
            return torch.randn(shape, generator=generator, device=_DEVICE, dtype=dtype or DTYPES[self.dtype])
        if self.attn_mask == "blocks":
            block = torch.arange(self.seqlen, device=_DEVICE) * 8 // self.seqlen
            return (block[:, None] == block).expand(shape)
        if self.attn_mask != "padding":
            return torch.rand(shape, generator=generator, device=_DEVICE) < 0.9
        ends = self.seqlen - self.seqlen * torch.arange(self.batch, device=_DEVICE) // 16
        return torch.arange(self.seqlen, device=_DEVICE) < ends[:, None, None, None]

    def inputs(self, seed: int, which: str) -> Inputs:
        """From N(0, 1), on the current CUDA device. Where the pass has gradients, q, k and v need them."""
        generator = torch.Generator(_DEVICE).manual_seed(seed)

        def normal(heads: int, dims: int) -> torch.Tensor:
            shape = (self.batch, self.seqlen, heads, dims)
            return torch.randn(shape, generator=generator, device=_DEVICE, dtype=DTYPES[self.dtype])

        q, k = (normal(heads, self.head_dim) for heads in (self.num_heads, self.num_heads_k))
        v = normal(self.num_heads_k, self.value_head_dim)
        dout = None if which == FORWARD else normal(self.num_heads, self.value_head_dim)
        if dout is not None:
            q, k, v = q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
        return Inputs(q, k, v, dout, self._mask(generator))

    def record(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        mask = "causal" if self.causal else "full"
        heads = f"{self.num_heads}" if self.num_heads == self.num_heads_k else f"{self.num_heads}/{self.num_heads_k}"
        masked = "" if self.attn_mask == NO_MASK else f" {self.attn_mask}"
        masked += f" dropout {self.dropout_p}" if self.dropout_p else ""
        dtype = "" if self.dtype == FP16 else f" {self.dtype}"
        dims = f"{self.head_dim}/{self.head_dim_v}" if self.head_dim_v else f"{self.head_dim}"
        return f"b{self.batch} h{heads} d{dims} s{self.seqlen} {mask}{masked}{dtype}"


def sweep(
    batch: int,
    heads: tuple[int, int],
    head_dims: Sequence[int],
    seqlens: Sequence[int],
    causal: list[bool],
    masks: Sequence[str] = (NO_MASK,),
    dropout: Sequence[float] = (0.0,),
    dtypes: Sequence[str] = (FP16,),
    head_dim_v: int = 0,
) -> Iterator[Problem]:
    """An attn_mask comes without causal: SDPA takes one of the two."""
    for head_dim, is_causal, seqlen, mask, dropout_p, dtype in product(
        head_dims, causal, seqlens, masks, dropout, dtypes
    ):
        if mask == NO_MASK or not is_causal:
            of_v = 0 if head_dim_v == head_dim else head_dim_v
            yield Problem(batch, heads[0], heads[1], head_dim, seqlen, is_causal, mask, dropout_p, dtype, of_v)
