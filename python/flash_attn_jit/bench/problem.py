"""What is measured: one attention problem, its inputs and its cost."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, NamedTuple

import torch

FORWARD, BACKWARD, BOTH = PASSES = ("fwd", "bwd", "both")
# Of five matrix products the backward pass makes two anew: S = Q K^T and dP = dO V^T; dV, dQ and dK are the others.
_FLOPS_OVER_FORWARD = {FORWARD: 1.0, BACKWARD: 2.5, BOTH: 3.5}

_DEVICE = "cuda"


class Inputs(NamedTuple):
    """Each (batch, seqlen, heads, head_dim), float16."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor | None  # the gradient of the output; None where only the forward pass is wanted

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

    def flops(self, which: str) -> float:
        """Forward is two matrix products over every pair of positions, of which a causal mask takes half; the whole
        backward counts as 2.5 times that, both as 3.5."""
        pairs = self.seqlen * self.seqlen
        forward = 4 * self.batch * self.num_heads * pairs * self.head_dim // (2 if self.causal else 1)
        return _FLOPS_OVER_FORWARD[which] * forward

    def read_bytes(self, which: str) -> int:
        """Of the tensors that are there before a call of the pass and read by it."""
        heads = self.num_heads + 2 * self.num_heads_k  # q, k and v
        heads += self.num_heads * {FORWARD: 0, BACKWARD: 2, BOTH: 1}[which]  # dout, and backward's out
        return 2 * self.batch * self.seqlen * heads * self.head_dim

    def inputs(self, seed: int, which: str) -> Inputs:
        """From N(0, 1), on the current CUDA device. Where the pass has gradients, q, k and v need them."""
        generator = torch.Generator(_DEVICE).manual_seed(seed)

        def normal(heads: int) -> torch.Tensor:
            shape = (self.batch, self.seqlen, heads, self.head_dim)
            return torch.randn(shape, generator=generator, device=_DEVICE, dtype=torch.float16)

        q, k, v = normal(self.num_heads), normal(self.num_heads_k), normal(self.num_heads_k)
        if which == FORWARD:
            return Inputs(q, k, v, None)
        return Inputs(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), normal(self.num_heads))

    def record(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        mask = "causal" if self.causal else "full"
        heads = f"{self.num_heads}" if self.num_heads == self.num_heads_k else f"{self.num_heads}/{self.num_heads_k}"
        return f"b{self.batch} h{heads} d{self.head_dim} s{self.seqlen} {mask}"


def sweep(
    batch: int, heads: tuple[int, int], head_dims: Sequence[int], seqlens: Sequence[int], causal: list[bool]
) -> Iterator[Problem]:
    for head_dim, is_causal, seqlen in product(head_dims, causal, seqlens):
        yield Problem(batch, heads[0], heads[1], head_dim, seqlen, is_causal)
