"""timm's models call scaled_dot_product_attention: route_sdpa() runs it here. Beside timm's own eager attention in
float32."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import timm
import torch
from timm.layers import set_fused_attn
from timm.models.maxxvit import MaxxVit, MaxxVitCfg

from flash_attn_jit import route_sdpa


class Model(NamedTuple):
    make: Callable[[], torch.nn.Module]
    image_size: int
    calls: int


def named(name, image_size, calls, **options):
    def make():
        return timm.create_model(name, img_size=image_size, num_classes=10, **options)

    return Model(make, image_size, calls)


def maxxvit(image_size, calls, **options):
    def make():
        config = MaxxVitCfg(embed_dim=(32, 32, 64, 64), depths=(1, 1, 1, 1), stem_width=32, **options)
        return MaxxVit(config, img_size=image_size, num_classes=10)

    return Model(make, image_size, calls)


SMALL = {"depth": 2, "embed_dim": 128, "num_heads": 2}
MODELS = {
    "ViT": named("vit_tiny_patch16_224", 64, 2, **SMALL),
    "ViT with registers and a class token": named("vit_small_patch14_reg4_dinov2", 56, 2, **SMALL),
    "DeiT3": named("deit3_small_patch16_224", 64, 2, **SMALL),
    "SigLIP, whose pooling attends too": named("vit_base_patch16_siglip_224", 64, 3, **SMALL),
    "EVA02, rotary": named("eva02_tiny_patch14_224", 56, 2, **SMALL),
    "CoAtNet, relative bias": maxxvit(64, 2, block_type=("C", "C", "T", "T")),
    "MaxViT, relative bias": maxxvit(64, 8, block_type=("M", "M", "M", "M")),
    "Swin, relative bias and shifted windows": named(
        "swin_tiny_patch4_window7_224", 64, 4, window_size=4, depths=(2, 2), num_heads=(1, 2), embed_dim=32
    ),
}


@contextmanager
def attention_of(kind):
    """For models that are made meanwhile: "eager" or "fused", which is SDPA, also where timm asks twice."""
    before = timm.layers.config._USE_FUSED_ATTN
    set_fused_attn(kind == "fused", experimental=True)
    try:
        yield
    finally:
        timm.layers.config._USE_FUSED_ATTN = before


def make(name, kind, dtype):
    with attention_of(kind):
        torch.manual_seed(0)
        model = MODELS[name].make()
    for parameter_name, parameter in model.named_parameters():  # such that attention weighs something
        if is_bias_of_places(parameter_name):
            torch.nn.init.normal_(parameter)
        elif parameter_name.endswith("gamma"):
            torch.nn.init.ones_(parameter)
        elif parameter.dim() == 2:
            torch.nn.init.xavier_normal_(parameter)
    return model.to(dtype).eval()


def is_bias_of_places(parameter_name):
    return "relative_position" in parameter_name or "bias_table" in parameter_name


def images(name):
    torch.manual_seed(1)
    return torch.randn(2, 3, MODELS[name].image_size, MODELS[name].image_size)


def error(got, exact):
    """The greatest, as a share of the greatest number."""
    return ((got.float() - exact).abs().max() / exact.abs().max()).item()


def check_error(got, eager, exact):
    """As far from float32 as timm's own eager attention in float16 is, roughly."""
    assert exact.abs().max() > 0
    assert error(got, exact) <= 2 * error(eager, exact) + 2e-3


@pytest.mark.parametrize("name", MODELS)
def test_inference(name):
    x = images(name)
    with torch.no_grad():
        exact = make(name, "eager", torch.float32)(x)
        eager = make(name, "eager", torch.float16)(x.half())
        model = make(name, "fused", torch.float16)
        with route_sdpa() as router:
            out = model(x.half())
    assert router.counts == {"flash_attn_jit": MODELS[name].calls, "torch": 0}
    check_error(out, eager, exact)


def gradients(model, x):
    model(x).float().square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", ["ViT", "MaxViT, relative bias", "Swin, relative bias and shifted windows"])
def test_training(name):
    x = images(name)
    exact = gradients(make(name, "eager", torch.float32), x)
    eager = gradients(make(name, "eager", torch.float16), x.half())
    model = make(name, "fused", torch.float16)
    with route_sdpa() as router:
        found = gradients(model, x.half())
    assert router.counts == {"flash_attn_jit": MODELS[name].calls, "torch": 0}
    with_bias = [key for key in found if is_bias_of_places(key)]
    assert bool(with_bias) == ("bias" in name)
    for key in [*with_bias, *(key for key in found if "qkv.weight" in key)]:
        assert error(found[key], exact[key]) <= 3 * error(eager[key], exact[key]) + 1e-2, key
