"""An image classifier of timm, whose models call PyTorch's scaled_dot_product_attention. Needs timm."""

import timm
import torch

from flash_attn_jit.integrations import sdpa

device = "cuda" if torch.cuda.is_available() else "cpu"
router = sdpa.register()
model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=10).half().to(device).eval()
with torch.inference_mode():
    print(model(torch.randn(1, 3, 64, 64, dtype=torch.float16, device=device)).argmax(-1))
print(router)
