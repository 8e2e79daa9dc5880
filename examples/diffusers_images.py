"""Image models of diffusers: a UNet in the manner of Stable Diffusion, and a Flux transformer. Needs diffusers.

Weights are random, so that nothing is downloaded; of a pipeline it is pipe.unet or pipe.transformer that is told:
    pipe.transformer.set_attention_backend(turing.register())
"""

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel

from flash_attn_jit.integrations import diffusers as turing

device = "cuda" if torch.cuda.is_available() else "cpu"
half = {"dtype": torch.float16, "device": device}
torch.manual_seed(0)

unet = UNet2DConditionModel(
    sample_size=8,
    block_out_channels=(64,),
    layers_per_block=1,
    attention_head_dim=2,
    cross_attention_dim=32,
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",),
)
unet = unet.to(**half).eval()
unet.set_attention_backend(turing.register())
with torch.inference_mode():
    print(unet(torch.randn(1, 4, 8, 8, **half), 500, torch.randn(1, 8, 32, **half)).sample.shape)

flux = FluxTransformer2DModel(
    in_channels=4,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=32,
    pooled_projection_dim=32,
    axes_dims_rope=(4, 4, 8),
)
flux = flux.to(**half).eval()
flux.set_attention_backend(turing.register())
with torch.inference_mode():
    image = flux(
        hidden_states=torch.randn(1, 16, 4, **half),
        encoder_hidden_states=torch.randn(1, 8, 32, **half),
        pooled_projections=torch.randn(1, 32, **half),
        timestep=torch.tensor([1.0], **half),
        img_ids=torch.zeros(16, 3, **half),
        txt_ids=torch.zeros(8, 3, **half),
    ).sample
print(image.shape)
print(turing.calls)
