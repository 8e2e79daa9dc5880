"""torch's own attention over packed sequences, torch.nn.attention.varlen, from torch 2.11 on."""

import torch
from torch.nn.attention.varlen import varlen_attn

from flash_attn_jit.integrations import torch_attention as turing

device = "cuda" if torch.cuda.is_available() else "cpu"
turing.register()

q, k, v = torch.randn(3, 24, 2, 64, dtype=torch.float16, device=device).unbind()
starts = torch.tensor([0, 12, 19, 24], dtype=torch.int32, device=device)
print(varlen_attn(q, k, v, starts, starts, 12, 12, window_size=(-1, 0)).shape)
print(turing.calls)
