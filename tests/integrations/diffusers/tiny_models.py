"""Tiny models of diffusers with random weights, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import (
    AutoencoderKL,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
)

BATCH = 2
_TEXT = 6  # tokens of the prompts
_PADDING = torch.tensor([[1] * _TEXT, [1] * (_TEXT - 2) + [0] * 2])


class Tiny(NamedTuple):
    make: Callable[[], Any]
    inputs: Callable[[], dict[str, Any]]
    calls: int  # of attention, in a forward pass


def _latents(channels: int, size: int = 8) -> torch.Tensor:
    return torch.randn(BATCH, channels, size, size)


def _unet(head_dims: tuple[int, ...], **options: Any) -> Any:
    """One block of two transformers down, two up and one in the middle for each size of heads, two heads each."""
    blocks = len(head_dims)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=tuple(2 * d for d in head_dims),
        norm_num_groups=8,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * blocks,
        up_block_types=("CrossAttnUpBlock2D",) * blocks,
        attention_head_dim=2,
        cross_attention_dim=32,
        **options,
    )


def _unet_inputs(**more: Any) -> dict[str, Any]:
    text = torch.randn(BATCH, _TEXT, 32)
    return {"sample": _latents(4), "timestep": torch.tensor(3), "encoder_hidden_states": text, **more}


def _sdxl() -> Any:
    return _unet(
        (32, 64),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
    )


def _sdxl_inputs() -> dict[str, Any]:
    conditions = {"text_embeds": torch.randn(BATCH, 32), "time_ids": torch.randn(BATCH, 6)}
    return _unet_inputs(added_cond_kwargs=conditions)


def _sd3() -> Any:
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=128,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )


def _sd3_inputs() -> dict[str, Any]:
    return {
        "hidden_states": _latents(4),
        "encoder_hidden_states": torch.randn(BATCH, _TEXT, 32),
        "pooled_projections": torch.randn(BATCH, 32),
        "timestep": torch.tensor([3.0] * BATCH),
    }


def _flux() -> Any:
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=128,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(16, 56, 56),
    )


def _flux_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(BATCH, 16, 4),
        "encoder_hidden_states": torch.randn(BATCH, _TEXT, 32),
        "pooled_projections": torch.randn(BATCH, 32),
        "timestep": torch.tensor([0.5] * BATCH),
        "img_ids": torch.cat([torch.zeros(16, 1), torch.cartesian_prod(*[torch.arange(4.0)] * 2)], dim=1),
        "txt_ids": torch.zeros(_TEXT, 3),
    }


def _pixart() -> Any:
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=72,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=144,
        sample_size=8,
        patch_size=2,
        caption_channels=32,
        use_additional_conditions=False,
    )


def _pixart_inputs() -> dict[str, Any]:
    return {
        "hidden_states": _latents(4),
        "encoder_hidden_states": torch.randn(BATCH, _TEXT, 32),
        "encoder_attention_mask": _PADDING,
        "timestep": torch.tensor([3] * BATCH),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _wan() -> Any:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        rope_max_seq_len=32,
    )


def _wan_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(BATCH, 4, 2, 4, 4),
        "encoder_hidden_states": torch.randn(BATCH, _TEXT, 32),
        "timestep": torch.tensor([3] * BATCH),
    }


def _qwen_image() -> Any:
    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=128,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(16, 56, 56),
    )


def _qwen_image_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(BATCH, 16, 16),
        "encoder_hidden_states": torch.randn(BATCH, _TEXT, 32),
        "encoder_hidden_states_mask": _PADDING.bool(),
        "timestep": torch.tensor([0.5] * BATCH),
        "img_shapes": [[(1, 4, 4)]] * BATCH,
    }


def _autoencoder() -> Any:
    return AutoencoderKL(
        block_out_channels=(512,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=8,
    )


# Of a UNet, a transformer has an attention to the image and one to the text.
TINY: dict[str, Tiny] = {
    "sd15": Tiny(lambda: _unet((40, 80, 160)), _unet_inputs, 2 * 10),
    "sd15, text mask": Tiny(lambda: _unet((40,)), lambda: _unet_inputs(encoder_attention_mask=_PADDING), 2 * 4),
    "sdxl": Tiny(_sdxl, _sdxl_inputs, 2 * 7),
    "sd3": Tiny(_sd3, _sd3_inputs, 2),
    "flux": Tiny(_flux, _flux_inputs, 2),
    "pixart, text mask": Tiny(_pixart, _pixart_inputs, 4),
    "wan": Tiny(_wan, _wan_inputs, 4),
    "qwen image, text mask": Tiny(_qwen_image, _qwen_image_inputs, 2),
    "autoencoder": Tiny(_autoencoder, lambda: {"sample": _latents(3, 4)}, 2),
}
