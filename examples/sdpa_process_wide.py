"""Every call of PyTorch's scaled_dot_product_attention in this process, whoever makes it and in which thread."""

import torch

from flash_attn_jit.integrations import sdpa

device = "cuda" if torch.cuda.is_available() else "cpu"
router = sdpa.register()

layer = torch.nn.TransformerEncoderLayer(128, 2, 128, batch_first=True).half().to(device)
x = torch.randn(2, 24, 128, dtype=torch.float16, device=device)
padding = torch.zeros(2, 24, dtype=torch.bool, device=device)
padding[1, 18:] = True
layer(x, src_key_padding_mask=padding).sum().backward()
print(router)
