"""ComfyUI's attention: the override is called as ComfyUI calls it, and its nodes are loaded as ComfyUI loads them."""

import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from flash_attn_jit.integrations import comfyui

NODES = Path(__file__).resolve().parents[2] / "examples" / "comfyui" / "flash_attn_jit_node"
BATCH, HEADS, QUERIES, KEYS, DIM = 2, 4, 7, 9, 40


@pytest.fixture(autouse=True)
def _from_zero() -> None:
    comfyui.calls.reset()


# ---- What stands for ComfyUI


def wrapped(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The contract of overrides: a call that is not inside of another one, and has the options of a model with an
    override, is the override's, which gets the function first."""

    @wraps(function)
    def attention(*arguments: Any, **options: Any) -> torch.Tensor:
        if "_inside_attn_wrapper" in options:
            return function(*arguments, **options)
        options["_inside_attn_wrapper"] = True
        override = (options.get("transformer_options") or {}).get("optimized_attention_override")
        return override(function, *arguments, **options) if override else function(*arguments, **options)

    return attention


@wrapped
def attention_pytorch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None = None,
    attn_precision: Any = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **options: Any,
) -> torch.Tensor:
    """Float64's attention, with ComfyUI's shapes."""
    dtype = q.dtype
    q, k, v = q.double(), k.double(), v.double()
    if not skip_reshape:
        dim = q.shape[-1] // heads
        q, k, v = (tensor.unflatten(-1, (-1, dim)).transpose(1, 2) for tensor in (q, k, v))
    k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
    scores = q @ k.mT * options.get("scale", q.shape[-1] ** -0.5)
    if mask is not None:
        mask = mask[:, None] if mask.dim() == 3 else mask
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask.double()
    out = (scores.softmax(-1) @ v).to(dtype)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


class Patcher:
    """A MODEL."""

    def __init__(self) -> None:
        self.model_options: dict[str, Any] = {"transformer_options": {}}

    def clone(self) -> "Patcher":
        patcher = Patcher()
        patcher.model_options = deepcopy(self.model_options)
        return patcher


@pytest.fixture
def comfy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """comfy.ldm.modules.attention"""
    functions: dict[str, Any] = {}
    attention: Any = ModuleType("comfy.ldm.modules.attention")
    attention.wrap_attn, attention.attention_pytorch = wrapped, attention_pytorch
    attention.register_attention_function = functions.__setitem__
    attention.get_attention_function = functions.get
    for name in ("comfy", "comfy.ldm", "comfy.ldm.modules"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, attention.__name__, attention)
    return attention


@pytest.fixture
def nodes(comfy: ModuleType) -> Iterator[Any]:
    name = "custom_nodes.flash_attn_jit_node"
    spec = importlib.util.spec_from_file_location(name, NODES / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]


# ---- The override


def inputs(heads_first: bool = False, heads_k: int = HEADS, dtype: Any = torch.float16) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = (BATCH, QUERIES, HEADS, DIM), (BATCH, KEYS, heads_k, DIM), (BATCH, KEYS, heads_k, DIM)
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    return [tensor.transpose(1, 2) if heads_first else tensor.flatten(2) for tensor in tensors]


OVERRIDDEN = {"optimized_attention_override": comfyui.attention_override}


def assert_runs_here(tensors: list[torch.Tensor], *arguments: Any, **options: Any) -> None:
    expected = attention_pytorch(*(tensor.double() for tensor in tensors), *arguments, **options)
    actual = attention_pytorch(*tensors, *arguments, transformer_options=OVERRIDDEN, **options)
    assert actual.dtype is torch.float16
    torch.testing.assert_close(actual.double(), expected, atol=2e-3, rtol=2e-3)
    assert comfyui.calls.counts == {"flash_attn_jit": 1, "ComfyUI": 0}


@pytest.mark.parametrize("skip_reshape", [False, True])
@pytest.mark.parametrize("skip_output_reshape", [False, True])
def test_shapes(skip_reshape: bool, skip_output_reshape: bool) -> None:
    assert_runs_here(inputs(skip_reshape), HEADS, skip_reshape=skip_reshape, skip_output_reshape=skip_output_reshape)


_keys = torch.arange(KEYS) < torch.tensor([[5], [KEYS]])
_numbers = torch.linspace(-2, 2, BATCH * HEADS * QUERIES * KEYS).view(BATCH, HEADS, QUERIES, KEYS)
MASKS = {
    "pairs": torch.ones(QUERIES, KEYS, dtype=torch.bool).tril(2),
    "pairs, numbers": _numbers[0, 0],
    "keys": _keys[:, None],
    "keys, numbers": torch.where(_keys, 0.0, -torch.inf)[:, None].half(),
    "keys of a batch of one": _keys[:1, None],
    "pairs of a batch": _numbers[:, 0].half(),
    "keys, 4 dimensions": _keys[:, None, None],
    "pairs of heads": _numbers.half(),
    "pairs of heads, bool": (_numbers * 400).sin() > -0.5,
}


@pytest.mark.parametrize("skip_reshape", [False, True])
@pytest.mark.parametrize("kind", MASKS)
def test_masks(kind: str, skip_reshape: bool) -> None:
    assert_runs_here(inputs(skip_reshape), HEADS, MASKS[kind], skip_reshape=skip_reshape)


@pytest.mark.parametrize("skip_reshape", [False, True])
def test_grouped_heads(skip_reshape: bool) -> None:
    assert_runs_here(inputs(skip_reshape, heads_k=2), HEADS, skip_reshape=skip_reshape, enable_gqa=True)


@pytest.mark.parametrize(
    "options", [{"scale": 0.3}, {"attn_precision": torch.float32}, {"low_precision_attention": False}]
)
def test_options(options: dict[str, Any]) -> None:
    assert_runs_here(inputs(), HEADS, **options)


LEFT_TO_COMFYUI: dict[str, tuple[Any, dict[str, Any], str]] = {
    "float32": (inputs(dtype=torch.float32), {}, "query has dtype torch.float32"),
    "float64": (inputs(True, dtype=torch.float64), {"skip_reshape": True}, "query has dtype torch.float64"),
    "head dim": ([torch.zeros(1, 3, 520 * HEADS, dtype=torch.float16)] * 3, {}, "query has head_dim 520"),
    "bfloat16 mask": (inputs(), {"mask": _numbers.bfloat16()}, "attn_mask has dtype torch.bfloat16"),
    "keyword": (inputs(), {"sinks": None, "is_causal": False}, "is_causal, sinks is not known here"),
}


@pytest.mark.parametrize("kind", LEFT_TO_COMFYUI)
def test_what_cannot_run_here_runs_in_comfyui_and_is_counted(kind: str) -> None:
    tensors, options, reason = LEFT_TO_COMFYUI[kind]
    expected = attention_pytorch(*tensors, HEADS, **options)
    actual = attention_pytorch(*tensors, HEADS, transformer_options=OVERRIDDEN, **options)
    assert actual.equal(expected)
    assert comfyui.calls.counts == {"flash_attn_jit": 0, "ComfyUI": 1}
    (counted,) = comfyui.calls.reasons
    assert counted.startswith(reason)


@pytest.mark.parametrize(
    ("tensors", "options", "reason"),
    [
        (inputs(True), {}, "q, k and v have 4, 4 and 4 dimensions"),
        (inputs(heads_k=2), {}, "key has head_dim 20 and query 40"),
        ([tensor[..., :-2] for tensor in inputs()], {}, "q has a last dimension of 158 and 4 heads"),
        (
            [inputs()[0], *(t[..., :-4] for t in inputs()[1:])],
            {"enable_gqa": True},
            "k and v have last dimensions of 156",
        ),
        (inputs(), {"mask": torch.ones(3, KEYS, dtype=torch.bool)}, "attn_mask has shape (3, 9)"),
    ],
)
def test_shapes_that_do_not_fit_are_left_to_comfyui(tensors: Any, options: dict[str, Any], reason: str) -> None:
    came: list[Any] = []

    def of_comfyui(*arguments: Any, **options: Any) -> torch.Tensor:
        came.append((arguments, options))
        return tensors[0]

    override: Any = comfyui.attention_override
    assert override(of_comfyui, *tensors, HEADS, **options) is tensors[0]
    arguments, passed = came[0]
    assert all(one is other for one, other in zip(arguments, (*tensors, HEADS)))
    assert passed == {
        "mask": None,
        "attn_precision": None,
        "skip_reshape": False,
        "skip_output_reshape": False,
        **options,
    }
    (counted,) = comfyui.calls.reasons
    assert counted.startswith(reason)


def test_no_gradients_are_lost() -> None:
    q, k, v = (tensor.requires_grad_() for tensor in inputs())
    attention_pytorch(q, k, v, HEADS, transformer_options=OVERRIDDEN).float().square().sum().backward()
    mine = [q.grad, k.grad, v.grad]
    q.grad = k.grad = v.grad = None
    attention_pytorch(q, k, v, HEADS).float().square().sum().backward()
    for actual, expected in zip(mine, (q.grad, k.grad, v.grad)):
        torch.testing.assert_close(actual, expected, atol=1e-2, rtol=1e-2)


# ---- Nodes


def test_the_node_patches_a_clone_of_the_model(nodes: Any) -> None:
    model = Patcher()
    model.model_options["transformer_options"]["patches"] = {"attn1_patch": []}
    node = nodes.NODE_CLASS_MAPPINGS["FlashAttnJIT"]()
    (patched,) = getattr(node, node.FUNCTION)(model=model)

    options = patched.model_options["transformer_options"]
    assert options == {"patches": {"attn1_patch": []}, **OVERRIDDEN}
    assert model.model_options == {"transformer_options": {"patches": {"attn1_patch": []}}}
    with torch.inference_mode():
        attention_pytorch(*inputs(), HEADS, transformer_options=options)
    assert comfyui.calls.counts == {"flash_attn_jit": 1, "ComfyUI": 0}


def test_replacing_another_override_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = comfyui.patch(comfyui.patch(Patcher()))
    assert not caplog.records
    model.model_options["transformer_options"]["optimized_attention_override"] = "another node's"
    assert comfyui.patch(model).model_options["transformer_options"] == OVERRIDDEN
    assert 'override of another node ("another node\'s"), which is replaced' in caplog.text


def test_the_node_of_counts(nodes: Any, caplog: pytest.LogCaptureFixture) -> None:
    attention_pytorch(*inputs(), HEADS, transformer_options=OVERRIDDEN)
    attention_pytorch(*inputs(dtype=torch.float32), HEADS, transformer_options=OVERRIDDEN)
    node = nodes.NODE_CLASS_MAPPINGS["FlashAttnJITCounts"]()
    with caplog.at_level(logging.INFO):
        shown = getattr(node, node.FUNCTION)(latent="a latent")
    latent, text = shown["result"]
    assert latent == "a latent"
    assert text.splitlines()[0] == "ComfyUI: 1 calls ran in flash_attn_jit, 1 in ComfyUI"
    assert "1 x query has dtype torch.float32" in text
    assert shown["ui"]["text"] == [text] and text in caplog.text
    assert comfyui.calls.counts == {"flash_attn_jit": 0, "ComfyUI": 0}


def test_nodes_are_what_comfyui_reads(nodes: Any) -> None:
    assert nodes.NODE_DISPLAY_NAME_MAPPINGS.keys() == nodes.NODE_CLASS_MAPPINGS.keys()
    for node in nodes.NODE_CLASS_MAPPINGS.values():
        assert set(node.INPUT_TYPES()) == {"required"}
        assert node.RETURN_TYPES and node.CATEGORY and callable(getattr(node, node.FUNCTION))


# ---- The function by name


def test_the_registered_function(nodes: Any, comfy: Any) -> None:
    function = comfy.get_attention_function("flash_attn_jit", None)
    comfyui.register()
    assert comfy.get_attention_function("flash_attn_jit", None) is function

    expected = attention_pytorch(*inputs(), HEADS)
    torch.testing.assert_close(function(*inputs(), HEADS), expected, atol=2e-3, rtol=2e-3)
    assert comfyui.calls.counts == {"flash_attn_jit": 1, "ComfyUI": 0}
    single = inputs(dtype=torch.float32)
    assert function(*single, HEADS).equal(attention_pytorch(*single, HEADS))
    assert comfyui.calls.counts == {"flash_attn_jit": 1, "ComfyUI": 1}


def test_a_comfyui_without_overrides_is_refused(comfy: Any) -> None:
    del comfy.register_attention_function
    with pytest.raises(ImportError, match="no attention overrides; accepted: a newer one"):
        comfyui.register()
