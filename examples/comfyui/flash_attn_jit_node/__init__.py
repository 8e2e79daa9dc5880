"""ComfyUI nodes: attention of a model on flash_attn_jit's kernels, and what ran where."""

import logging
from typing import Any

from flash_attn_jit.integrations import comfyui

comfyui.register()
_logger = logging.getLogger("flash_attn_jit")


class FlashAttnJIT:
    """Between a model's loader and the sampler."""

    CATEGORY = "model_patches"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",)}}

    def patch(self, model: Any) -> tuple[Any]:
        return (comfyui.patch(model),)


class FlashAttnJITCounts:
    """Behind the sampler: how many calls of attention have run here since it last ran, and why others have not."""

    CATEGORY = "model_patches"
    RETURN_TYPES = ("LATENT", "STRING")
    FUNCTION = "report"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"latent": ("LATENT",)}}

    def report(self, latent: Any) -> dict[str, Any]:
        text = repr(comfyui.calls)
        comfyui.calls.reset()
        _logger.info(text)
        return {"ui": {"text": [text]}, "result": (latent, text)}


NODE_CLASS_MAPPINGS = {"FlashAttnJIT": FlashAttnJIT, "FlashAttnJITCounts": FlashAttnJITCounts}
NODE_DISPLAY_NAME_MAPPINGS = {
    "FlashAttnJIT": "Attention: flash_attn_jit",
    "FlashAttnJITCounts": "Attention: flash_attn_jit's counts",
}
