"""Whole models with PyTorch's attention, as far as a T4 has it, and with flash_attn_jit in its place, taking turns:

    python examples/end_to_end.py [--models llama-train,llama-generate,unet,vit] [--rounds 5] [--small]

- llama-train: forward, loss and backward of a Llama with grouped heads; needs transformers
- llama-generate: 32 tokens behind prompts of different lengths, padded on the left; needs transformers
- unet: a denoising step of 16 images in a UNet in the shape of Stable Diffusion 1.5; needs diffusers
- vit: a ViT-L at 384 x 384; needs transformers

Weights are random: nothing is downloaded. --small makes each model small enough for the interpreter, and is the default
without a GPU (set FLASH_ATTN_JIT_INTERPRET=1), where the times mean nothing.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# What PyTorch's attention has on a T4: its other backends need sm_80.
OF_A_T4 = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
NEW_TOKENS = 32


class Contest(NamedTuple):
    """One model's step in both ways. Each returns what the two are compared by."""

    torchs: Callable[[], torch.Tensor]
    ours: Callable[[], torch.Tensor]


def llama(small: bool) -> tuple[Any, Any]:
    """The same random weights twice: with PyTorch's attention, with ours."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from flash_attn_jit.integrations import transformers as turing

    config = LlamaConfig(
        vocab_size=512 if small else 32000,
        hidden_size=128 if small else 2048,
        intermediate_size=128 if small else 5632,
        num_hidden_layers=1 if small else 22,
        num_attention_heads=2 if small else 32,
        num_key_value_heads=1 if small else 4,
        max_position_embeddings=4096,
    )
    models = []
    for name in ("sdpa", turing.register()):
        torch.manual_seed(0)
        with torch.device(DEVICE):
            model = LlamaForCausalLM._from_config(copy.deepcopy(config), attn_implementation=name, dtype=torch.float16)
        models.append(model)
    return models[0], models[1]


def llama_train(small: bool) -> Contest:
    theirs, ours = llama(small)
    tokens = torch.randint(512, (1, 32) if small else (4, 2048), device=DEVICE)

    def step(model: Any) -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        loss = model(input_ids=tokens, labels=tokens).loss
        (loss * 1024).backward()
        return loss.detach()

    return Contest(lambda: step(theirs), lambda: step(ours))


def llama_generate(small: bool) -> Contest:
    theirs, ours = llama(small)
    batch, longest = (2, 12) if small else (8, 1024)
    tokens = torch.randint(3, 512, (batch, longest), device=DEVICE)
    mask = torch.ones_like(tokens)
    for row in range(batch):  # from no padding to half of the prompt
        mask[row, : row * longest // (2 * batch)] = 0
    new = 2 if small else NEW_TOKENS

    def step(model: Any) -> torch.Tensor:
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        return model.generate(input_ids=tokens, attention_mask=mask, **options)[:, longest:]

    return Contest(lambda: step(theirs.eval()), lambda: step(ours.eval()))


def unet(small: bool) -> Contest:
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_dispatch import attention_backend

    from flash_attn_jit.integrations import diffusers as turing

    options: dict[str, Any] = {"sample_size": 8 if small else 64, "cross_attention_dim": 32 if small else 768}
    if small:
        blocks = {"down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"]}
        options |= {**blocks, "block_out_channels": [64], "layers_per_block": 1, "attention_head_dim": 2}
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = UNet2DConditionModel(**options).half().eval()
    size, batch = model.config.sample_size, 2 if small else 16
    images = torch.randn(batch, 4, size, size, dtype=torch.float16, device=DEVICE)
    text = torch.randn(batch, 77, model.config.cross_attention_dim, dtype=torch.float16, device=DEVICE)

    @torch.inference_mode()
    def step(backend: str) -> torch.Tensor:
        with attention_backend(backend):
            return model(images, 500, encoder_hidden_states=text).sample

    return Contest(lambda: step("native"), lambda: step(turing.register()))


def vit(small: bool) -> Contest:
    from transformers import ViTConfig, ViTForImageClassification

    from flash_attn_jit.integrations import transformers as turing

    config = ViTConfig(
        hidden_size=128 if small else 1024,
        intermediate_size=128 if small else 4096,
        num_hidden_layers=1 if small else 24,
        num_attention_heads=2 if small else 16,
        image_size=32 if small else 384,
    )
    images = torch.randn(1 if small else 16, 3, config.image_size, config.image_size, device=DEVICE).half()

    def make(name: str) -> Callable[[], torch.Tensor]:
        torch.manual_seed(0)
        model = ViTForImageClassification._from_config(
            copy.deepcopy(config), attn_implementation=name, dtype=torch.float16
        )
        model = model.to(DEVICE).eval()
        return torch.inference_mode()(lambda: model(pixel_values=images).logits)

    return Contest(make("sdpa"), make(turing.register()))


MODELS: dict[str, Callable[[bool], Contest]] = {
    "llama-train": llama_train,
    "llama-generate": llama_generate,
    "unet": unet,
    "vit": vit,
}


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def timed_ms(step: Callable[[], torch.Tensor]) -> float:
    wait()
    start = time.perf_counter()
    step()
    wait()
    return 1e3 * (time.perf_counter() - start)


def difference(a: torch.Tensor, b: torch.Tensor) -> str:
    if a.is_floating_point():
        return f"differ by {float((a - b).abs().max()):.1e} of {float(a.abs().max()):.2g}"
    return f"{float((a == b).float().mean()):.0%} of tokens the same"


def compare(contest: Contest, rounds: int) -> tuple[float, float, str]:
    """Medians in milliseconds, PyTorch's and ours, and how the results differ."""

    def torchs() -> torch.Tensor:
        with sdpa_kernel(OF_A_T4):
            return contest.torchs()

    found = difference(torchs(), contest.ours())  # compiles our kernels
    times: list[list[float]] = [[], []]
    for _ in range(rounds):
        for samples, step in zip(times, (torchs, contest.ours)):
            samples.append(timed_ms(step))
    return statistics.median(times[0]), statistics.median(times[1]), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", default=DEVICE == "cpu")
    arguments = parser.parse_args()
    names = arguments.models.split(",")
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        parser.error(f"--models is {','.join(unknown)}; accepted: {','.join(MODELS)}")
    print(f"{torch.cuda.get_device_name() if DEVICE == 'cuda' else 'CPU'}, torch {torch.__version__}")
    print(f"{'model':16}{'PyTorch ms':>12}{'ours ms':>12}{'times as fast':>15}")
    for name in names:
        torchs, ours, found = compare(MODELS[name](arguments.small), arguments.rounds)
        print(f"{name:16}{torchs:12.1f}{ours:12.1f}{torchs / ours:15.2f}  {found}")


if __name__ == "__main__":
    main()
