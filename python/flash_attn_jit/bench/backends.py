"""This library and PyTorch's scaled_dot_product_attention, one backend at a time, behind one call."""

import warnings
from contextlib import nullcontext
from typing import Callable, ContextManager, Dict, cast

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import flash_attn_func
from .problem import Inputs, Problem

OURS = "flash_attn_jit"
SDPA_FLASH = "sdpa_flash"
_SDPA: Dict[str, SDPBackend] = {
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    SDPA_FLASH: SDPBackend.FLASH_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
}
NAMES = (OURS, *_SDPA)


class Backend:
    """``selected()`` must be entered around calls: it picks SDPA's backend, outside of what is timed."""

    def __init__(self, name: str, problem: Problem):
        self.name = name
        self._problem = problem

    def selected(self) -> ContextManager[None]:
        return nullcontext() if self.name == OURS else sdpa_kernel(_SDPA[self.name])

    def call(self) -> Callable[[Inputs], torch.Tensor]:
        """A function of (q, k, v), each (batch, seqlen, heads, head_dim); so is its result."""
        return self._ours if self.name == OURS else self._sdpa

    def _ours(self, inputs: Inputs) -> torch.Tensor:
        return cast(torch.Tensor, flash_attn_func(*inputs, causal=self._problem.causal))

    def _sdpa(self, inputs: Inputs) -> torch.Tensor:
        q, k, v = (tensor.transpose(1, 2) for tensor in inputs)
        causal = self._problem.causal
        if self._problem.num_heads == self._problem.num_heads_k:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        else:  # an argument that torch has from 2.5 on
            out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        return out.transpose(1, 2)

    def why_not(self, inputs: Inputs) -> str:
        """Empty where the backend runs, else PyTorch's reasons."""
        if self.name == OURS:
            self._ours(inputs)
            return ""
        with warnings.catch_warnings(record=True) as caught, self.selected():
            warnings.simplefilter("always")
            try:
                self._sdpa(inputs)
            except RuntimeError as error:
                reasons = [str(warning.message).split(" (Triggered")[0] for warning in caught]
                return "; ".join(reasons) or str(error)
        return ""
