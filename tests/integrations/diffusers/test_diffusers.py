"""diffusers' models on these kernels: through the dispatcher's backend, and through route_sdpa()."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, attention_backend
from diffusers.models import attention_dispatch, attention_processor
from diffusers.models.attention_dispatch import dispatch_attention_fn
from integrations.diffusers.tiny_models import BATCH, TINY

import flash_attn_jit
from flash_attn_jit.integrations import diffusers

NAME = diffusers.register()
SAMPLE = ("sd15, text mask", "flux", "qwen image, text mask", "pixart, text mask", "autoencoder")


@pytest.fixture(autouse=True)
def _from_zero() -> Iterator[None]:
    diffusers.calls.reset()
    yield
    attention_dispatch._AttentionBackendRegistry.set_active_backend(attention_dispatch.AttentionBackendName.NATIVE)


def make(name: str) -> Any:
    torch.manual_seed(0)
    return TINY[name].make().eval()


def inputs_of(name: str, dtype: torch.dtype) -> dict[str, Any]:
    torch.manual_seed(1)
    return cast(TINY[name].inputs(), dtype)


def cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {key: cast(item, dtype) for key, item in value.items()}
    is_floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.to(dtype) if is_floating else value


def run(name: str, model: Any, dtype: torch.dtype) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model.to(dtype)(**inputs_of(name, dtype)).sample
    return out.double()


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to all that is expected; not finite where it is not."""
    return ((actual.double() - expected).norm() / expected.norm()).item()


def assert_as_good(actual: torch.Tensor, eager: torch.Tensor, expected: torch.Tensor) -> None:
    """With half as much again as what PyTorch's attention has in float16."""
    own = error(eager, expected)
    assert 0 < own < 0.02
    assert error(actual, expected) <= 1.5 * own


def counts_of(name: str) -> dict[str, int]:
    return {"flash_attn_jit": TINY[name].calls, "torch": 0}


# ---- Models


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.sample] if n in SAMPLE else []) for n in TINY])
def test_models_run_on_the_backend_and_inside_route_sdpa(name: str) -> None:
    model = make(name)
    expected = run(name, model, torch.float32)
    eager = run(name, model, torch.float16)
    with flash_attn_jit.route_sdpa() as router:
        routed = run(name, model, torch.float16)
    assert diffusers.calls.counts == {"flash_attn_jit": 0, "torch": 0}

    model.set_attention_backend(NAME)
    actual = run(name, model, torch.float16)

    assert_as_good(actual, eager, expected)
    assert_as_good(routed, eager, expected)
    assert diffusers.calls.counts == router.counts == counts_of(name)


def gradients(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    model.zero_grad()
    out = model(**inputs).sample
    (out.float() * torch.linspace(-1, 1, out.numel()).view_as(out)).mean().mul(256).backward()
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", ["sd15, text mask", pytest.param("flux", marks=pytest.mark.sample), "sdxl"])
@pytest.mark.parametrize("checkpoints", [False, True])
def test_training_steps(name: str, checkpoints: bool) -> None:
    model = make(name).train()
    expected = gradients(model, inputs_of(name, torch.float32))
    model.to(torch.float16)
    eager = gradients(model, inputs_of(name, torch.float16))
    model.set_attention_backend(NAME)
    if checkpoints:
        model.enable_gradient_checkpointing()

    assert_as_good(gradients(model, inputs_of(name, torch.float16)), eager, expected)

    calls = diffusers.calls.counts
    assert calls["torch"] == 0
    assert calls["flash_attn_jit"] > TINY[name].calls if checkpoints else calls["flash_attn_jit"] == TINY[name].calls


@pytest.mark.parametrize("name", ["sd15, text mask", "flux"])
def test_training_adapters_under_autocast(name: str) -> None:
    """As LoRA is trained: some float32 parameters, here the projections of the queries, autocast to float16."""
    model = make(name).train()
    model.requires_grad_(False)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_("to_q" in parameter_name)
    inputs = inputs_of(name, torch.float32)
    expected = gradients(model, inputs)
    with torch.autocast("cpu", torch.float16):
        eager = gradients(model, inputs)
        model.set_attention_backend(NAME)
        actual = gradients(model, inputs)
    assert_as_good(actual, eager, expected)
    assert diffusers.calls.counts == counts_of(name)


def test_a_whole_pipeline() -> None:
    unet, vae = make("sd15, text mask").half(), make("autoencoder").half()
    scheduler = DDIMScheduler(num_train_timesteps=10, steps_offset=1, clip_sample=False)
    pipe = StableDiffusionPipeline(vae, None, None, unet, scheduler, None, None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    text = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0)).half()

    def image() -> torch.Tensor:
        options: Any = {"prompt_embeds": text, "negative_prompt_embeds": -text, "output_type": "pt"}
        generator = torch.Generator().manual_seed(0)
        return pipe(num_inference_steps=2, height=8, width=8, generator=generator, **options).images

    eager = image()
    pipe.unet.set_attention_backend(NAME)
    assert (image() - eager).abs().max() < 0.02
    # Two steps of the UNet, and the decoder's one attention.
    assert diffusers.calls.counts == {"flash_attn_jit": 2 * TINY["sd15, text mask"].calls, "torch": 1}


@pytest.mark.parametrize("name", ["sd15, text mask", "flux"])
def test_a_compiled_model_has_these_kernels_in_its_graph(name: str) -> None:
    model = make(name)
    expected = run(name, model, torch.float32)
    eager = run(name, model, torch.float16)
    model.set_attention_backend(NAME)
    targets: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        actual = compiled(**inputs_of(name, torch.float16)).sample
    assert_as_good(actual, eager, expected)
    assert sum("flash_attn_jit" in target for target in targets) == TINY[name].calls
    assert not any("scaled_dot_product_attention" in target for target in targets)


def test_a_compiled_model_that_cannot_run_here_runs_in_the_native_backend() -> None:
    model, inputs = make("flux").float(), inputs_of("flux", torch.float32)
    with torch.no_grad():
        expected = model(**inputs).sample
        model.set_attention_backend(NAME)
        assert torch.compile(model, backend="eager", fullgraph=True)(**inputs).sample.equal(expected)
    assert diffusers.calls.counts == {"flash_attn_jit": 0, "torch": 0}  # they are not counted in graphs


# ---- The active backend


@pytest.mark.sample
def test_unets_follow_the_active_backend() -> None:
    name = "sd15, text mask"
    model, calls = make(name), TINY["sd15, text mask"].calls
    with attention_backend(NAME):
        run(name, model, torch.float16)
    assert diffusers.calls.counts["flash_attn_jit"] == calls
    run(name, model, torch.float16)
    model.set_attention_backend("native")
    run(name, model, torch.float16)
    assert diffusers.calls.counts == {"flash_attn_jit": calls, "torch": 0}


def test_registering_again_changes_nothing() -> None:
    backends = dict(attention_dispatch._AttentionBackendRegistry._backends)
    names = list(attention_dispatch.AttentionBackendName)
    assert diffusers.register() == NAME == "flash_attn_jit"
    assert attention_dispatch._AttentionBackendRegistry._backends == backends
    assert list(attention_dispatch.AttentionBackendName) == names
    assert (
        names[-1]
        is attention_dispatch.AttentionBackendName(NAME)
        is attention_dispatch.AttentionBackendName[NAME.upper()]
    )


@pytest.mark.parametrize(("module", "name"), [(attention_dispatch, "_check_shape"), (attention_processor, "F")])
def test_another_dispatcher_is_refused(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
    monkeypatch.delattr(module, name)
    with pytest.raises(RuntimeError, match=r"diffusers 0\.42.* has another attention dispatcher .*; accepted: 0\.42"):
        diffusers.register()


# ---- Calls of the dispatcher

HEADS, QUERIES, KEYS, DIM = 4, 7, 9, 32


def tensors(heads_k: int = HEADS, dtype: torch.dtype = torch.float16) -> list[torch.Tensor]:
    torch.manual_seed(2)
    shapes = ((BATCH, QUERIES, HEADS, DIM), (BATCH, KEYS, heads_k, DIM), (BATCH, KEYS, heads_k, DIM))
    return [torch.randn(shape).to(dtype) for shape in shapes]


def dispatch(backend: str, inputs: Any, mask: Any = None, **options: Any) -> torch.Tensor:
    name = attention_dispatch.AttentionBackendName(backend)
    out: torch.Tensor = dispatch_attention_fn(*inputs, attn_mask=mask, backend=name, **options)
    return out


def assert_like_native(inputs: list[torch.Tensor], mask: Any = None, **options: Any) -> None:
    """Output and gradients: the native backend's in float64."""
    of_64 = [tensor.double().requires_grad_() for tensor in inputs]
    of_16 = [tensor.detach().requires_grad_() for tensor in inputs]
    mask_64 = mask.double() if mask is not None and mask.is_floating_point() else mask
    expected, actual = dispatch("native", of_64, mask_64, **options), dispatch(NAME, of_16, mask, **options)
    dout = torch.randn(expected.shape, dtype=torch.float64)
    expected.backward(dout)
    actual.backward(dout.to(actual.dtype))
    results = (actual, *(tensor.grad for tensor in of_16)), (expected, *(tensor.grad for tensor in of_64))
    for mine, theirs in zip(*results):
        assert mine is not None and theirs is not None
        most = max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(mine.double(), theirs, atol=4e-3 * most, rtol=0)


HIDDEN = torch.tensor([0.0] * 5 + [-math.inf] * 4)
MASKS = {
    "none": None,
    "keys, 2 dimensions": (torch.arange(KEYS) < torch.tensor([[5], [KEYS]])),
    "keys": (torch.arange(KEYS) < torch.tensor([5, KEYS]).view(BATCH, 1, 1, 1)),
    "keys, numbers": torch.stack([HIDDEN, torch.linspace(-1, 1, KEYS)]).view(BATCH, 1, 1, KEYS).half(),
    "pairs": torch.ones(QUERIES, KEYS, dtype=torch.bool).tril(3),
    "pairs of heads": torch.linspace(-2, 2, BATCH * HEADS * QUERIES * KEYS).view(BATCH, HEADS, QUERIES, KEYS).half(),
}


@pytest.mark.sample
@pytest.mark.parametrize("kind", MASKS)
def test_masks(kind: str) -> None:
    assert_like_native(tensors(), MASKS[kind])
    assert diffusers.calls.counts == {"flash_attn_jit": 1, "torch": 0}


@pytest.mark.parametrize("options", [{"is_causal": True}, {"scale": 0.5}, {"scale": 1}])
def test_options(options: dict[str, Any]) -> None:
    assert_like_native(tensors(), **options)
    assert diffusers.calls.counts == {"flash_attn_jit": 1, "torch": 0}


def test_grouped_heads_and_strides() -> None:
    assert_like_native(tensors(heads_k=2), enable_gqa=True)
    q, k, v = tensors()
    packed = torch.cat([k, v], dim=-1)
    assert_like_native([q.transpose(1, 2).contiguous().transpose(1, 2), *packed.chunk(2, dim=-1)])
    assert diffusers.calls.counts == {"flash_attn_jit": 2, "torch": 0}


def test_autocast() -> None:
    expected = dispatch("native", tensors(dtype=torch.float64))
    with torch.autocast("cpu", torch.float16):
        actual = dispatch(NAME, tensors(dtype=torch.float32))
    torch.testing.assert_close(actual.double(), expected, atol=4e-3, rtol=4e-3)
    assert diffusers.calls.counts == {"flash_attn_jit": 1, "torch": 0}


LEFT_TO_NATIVE = {
    "float32": (lambda: tensors(dtype=torch.float32), "query has dtype torch.float32"),
    "broadcast": (lambda: [tensors()[0], *(t[:1] for t in tensors()[1:])], "batch"),
    "last dimension": (lambda: [t.mT.contiguous().mT for t in tensors()], "has strides"),
}


@pytest.mark.sample
@pytest.mark.parametrize("kind", LEFT_TO_NATIVE)
def test_what_cannot_run_here_runs_in_the_native_backend_and_is_counted(kind: str) -> None:
    make, reason = LEFT_TO_NATIVE[kind]
    torch.testing.assert_close(dispatch(NAME, make()), dispatch("native", make()))
    assert diffusers.calls.counts == {"flash_attn_jit": 0, "torch": 1}
    (text,) = diffusers.calls.reasons
    assert reason in text
    assert "1 x " in repr(diffusers.calls)


def test_what_the_native_backend_refuses_is_refused() -> None:
    with pytest.raises(ValueError, match="return_lse"):
        dispatch(NAME, tensors(), attention_kwargs={"return_lse": True})
    with pytest.raises(AttributeError, match="context_parallel_config"):
        dispatch(NAME, tensors(), parallel_config=SimpleNamespace())
    with pytest.raises(RuntimeError, match="size"):
        dispatch(NAME, tensors(heads_k=2))
    assert diffusers.calls.reasons == {
        "return_lse is True": 1,
        "_parallel_config is given": 1,
        "key has 2 heads and query 4": 1,
    }
