"""What is measured: one attention problem, its inputs and its cost."""

from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import torch

Inputs = Tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Problem:
    batch: int
    num_heads: int
    num_heads_k: int
    head_dim: int
    seqlen: int
    causal: bool

    @property
    def flops(self) -> int:
        """Two matrix products over every pair of positions; a causal mask counts as half of them."""
        pairs = self.seqlen * self.seqlen
        return 4 * self.batch * self.num_heads * pairs * self.head_dim // (2 if self.causal else 1)

    @property
    def input_bytes(self) -> int:
        heads = self.num_heads + 2 * self.num_heads_k
        return 2 * self.batch * self.seqlen * heads * self.head_dim

    def inputs(self, seed: int) -> Inputs:
        """q, k, v from N(0, 1), float16, (batch, seqlen, heads, head_dim), on the current CUDA device."""
        generator = torch.Generator("cuda").manual_seed(seed)

        def normal(heads: int) -> torch.Tensor:
            shape = (self.batch, self.seqlen, heads, self.head_dim)
            return torch.randn(shape, generator=generator, device="cuda", dtype=torch.float16)

        return normal(self.num_heads), normal(self.num_heads_k), normal(self.num_heads_k)

    def record(self) -> Dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        mask = "causal" if self.causal else "full"
        heads = (
            f"{self.num_heads}"
            if self.num_heads == self.num_heads_k
            else f"{self.num_heads}/{self.num_heads_k}"
        )
        return f"b{self.batch} h{heads} d{self.head_dim} s{self.seqlen} {mask}"


def sweep(
    batch: int, heads: Tuple[int, int], head_dims: Sequence[int], seqlens: Sequence[int], causal: List[bool]
) -> Iterator[Problem]:
    for head_dim, is_causal, seqlen in product(head_dims, causal, seqlens):
        yield Problem(batch, heads[0], heads[1], head_dim, seqlen, is_causal)
