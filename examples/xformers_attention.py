"""What calls xformers' memory_efficient_attention: Unsloth on a T4, kohya's trainers, sd-webui. Needs xformers."""

import torch
import xformers.ops
from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

from flash_attn_jit.integrations import xformers as turing

device = "cuda" if torch.cuda.is_available() else "cpu"
turing.register()

# Sequences of 12, 7 and 5 tokens, packed one after the other.
q, k, v = torch.randn(3, 1, 24, 2, 64, dtype=torch.float16, device=device).unbind()
out = xformers.ops.memory_efficient_attention(q, k, v, BlockDiagonalCausalMask.from_seqlens([12, 7, 5]))
print(out.shape)
print(turing.calls)
