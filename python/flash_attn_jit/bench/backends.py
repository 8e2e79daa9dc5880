"""This library and PyTorch's scaled_dot_product_attention, one backend at a time, behind one call."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import flash_attn_func
from .out_of_memory import OUT_OF_MEMORY, is_out_of_memory
from .problem import BACKWARD, FORWARD, Inputs, Problem

OURS = "flash_attn_jit"
SDPA_EFFICIENT, SDPA_FLASH, SDPA_MATH = "sdpa_efficient", "sdpa_flash", "sdpa_math"
# The last one takes the most memory: what is measured beside it is prepared before.
_SDPA: dict[str, SDPBackend] = {
    SDPA_EFFICIENT: SDPBackend.EFFICIENT_ATTENTION,
    SDPA_FLASH: SDPBackend.FLASH_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    SDPA_MATH: SDPBackend.MATH,
}
NAMES = (OURS, *_SDPA)
KNOWS_ENABLE_GQA = torch.__version__ >= "2.5"  # compared as a version


def default_names(problem: Problem) -> list[str]:
    """All, but PyTorch's math only where it is what PyTorch takes on a GPU without flash: for grouped heads."""
    grouped = problem.num_heads != problem.num_heads_k
    return [name for name in NAMES if grouped or name != SDPA_MATH]


class Backend:
    """``selected()`` must be entered around everything else: it picks SDPA's backend, outside of what is timed."""

    def __init__(self, name: str, problem: Problem):
        self.name = name
        self._problem = problem
        self._group_size = problem.num_heads // problem.num_heads_k
        self._takes_enable_gqa = self._group_size > 1 and name not in (OURS, SDPA_EFFICIENT)

    def selected(self) -> AbstractContextManager[None]:
        return nullcontext() if self.name == OURS else sdpa_kernel(_SDPA[self.name])

    def forward(self, inputs: Inputs) -> torch.Tensor:
        """The output, (batch, seqlen, heads, head_dim)."""
        return self._ours(inputs) if self.name == OURS else self._sdpa(inputs)

    def both(self, inputs: Inputs) -> tuple[torch.Tensor, ...]:
        """dq, dk and dv, by the forward pass and the backward pass."""
        return torch.autograd.grad(self.forward(inputs), inputs.qkv, inputs.dout)

    def calls(self, which: str, input_sets: Sequence[Inputs]) -> list[Callable[[], object]]:
        """One call of the pass for each input set. For the backward pass alone the graphs are made here, once, and a
        call walks its own and keeps it."""
        if which == FORWARD:
            return [partial(self.forward, inputs) for inputs in input_sets]
        if which == BACKWARD:
            return [
                partial(torch.autograd.grad, self.forward(inputs), inputs.qkv, inputs.dout, retain_graph=True)
                for inputs in input_sets
            ]
        return [partial(self.both, inputs) for inputs in input_sets]

    def _ours(self, inputs: Inputs) -> torch.Tensor:
        p, causal = self._problem.dropout_p, self._problem.causal
        return cast(torch.Tensor, flash_attn_func(*inputs.qkv, p, causal=causal, attn_bias=inputs.attn_mask))

    def _sdpa(self, inputs: Inputs) -> torch.Tensor:
        q, k, v = (tensor.transpose(1, 2) for tensor in inputs.qkv)
        mask = inputs.attn_mask
        given: dict[str, Any] = {"dropout_p": self._problem.dropout_p, "is_causal": self._problem.causal}
        if self._takes_enable_gqa:
            return F.scaled_dot_product_attention(q, k, v, mask, **given, enable_gqa=True).transpose(1, 2)
        # The memory-efficient kernel takes no grouped heads: programs repeat each key head for its group, and so does
        # this call.
        k, v = (x.repeat_interleave(self._group_size, 1) if self._group_size > 1 else x for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, mask, **given).transpose(1, 2)

    def _run_once(self, inputs: Inputs) -> None:
        if inputs.dout is None:
            self.forward(inputs)
        else:
            self.both(inputs)

    def why_not(self, inputs: Inputs) -> str:
        """Empty where the backend runs these (with their gradients where they need them), else PyTorch's reasons."""
        if self.name == OURS:
            self._run_once(inputs)
            return ""
        if self._takes_enable_gqa and not KNOWS_ENABLE_GQA:
            return f"enable_gqa came with torch 2.5, and this is {torch.__version__}"
        with warnings.catch_warnings(record=True) as caught, self.selected():
            warnings.simplefilter("always")
            try:
                self._run_once(inputs)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    return OUT_OF_MEMORY
                reasons = [str(warning.message).split(" (Triggered")[0] for warning in caught]
                return "; ".join(reasons) or str(error)
        return ""
