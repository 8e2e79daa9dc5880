"""Every refusal names the argument, what came and what is accepted, before any kernel runs."""

import re
from collections import namedtuple

import numpy as np
import pytest
import torch
from attention_reference import NO_OPTIONS, normal, normal_qkv

import flash_attn_jit
from flash_attn_jit import flash_attn_func
from flash_attn_jit._options import Options


def refused(error, *words, q=None, k=None, v=None, **arguments):
    """Calls with good tensors in the place of those not given; every word must stand in the message."""
    good = normal_qkv(1, 8, 8, 2, 2, 64)
    before = flash_attn_jit.interpreter_report()
    with pytest.raises(error) as raised:
        flash_attn_func(*(good[i] if given is None else given for i, given in enumerate((q, k, v))), **arguments)
    after = flash_attn_jit.interpreter_report()
    assert (before is None and after is None) or before.json() == after.json()
    for word in words:
        assert re.search(word, str(raised.value)), f"{word!r} is not in: {raised.value}"
    return raised.value


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"alibi_slopes": torch.ones(2, requires_grad=True)}, ["alibi_slopes", "detach"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_not_built(arguments, words):
    refused(NotImplementedError, *words, **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"dropout_p": None},
        {"dropout_p": torch.zeros(2)},
        {"dropout_p": 1.0},
        {"dropout_p": -0.1},
        {"dropout_p": float("nan")},
        {"softcap": "x"},
        {"softcap": -1.0},
        {"softcap": float("nan")},
        {"softcap": float("inf")},
        {"alibi_slopes": [0.5, 0.5]},
        {"softmax_scale": 10**400},
        {"causal": np.array([1, 1])},
        {"causal": 2},
        {"deterministic": "no"},
    ],
    ids=lambda value: f"{next(iter(value))}",
)
def test_arguments_of_another_kind(arguments):
    refused(ValueError, next(iter(arguments)), "accepted", **arguments)


@pytest.mark.parametrize(
    "window_size",
    [3, (1, 2, 3), "ab", None, (-1.5, -1), torch.ones(3), torch.ones(()), torch.ones(2)],
    ids=str,
)
def test_window_of_another_shape(window_size):
    refused(ValueError, "window_size", "two integers", window_size=window_size)


def test_forward_mode():
    primal = normal(1, 8, 2, 64)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(primal, torch.ones_like(primal))
        refused(NotImplementedError, "k carries", "tangent", k=dual)


@pytest.mark.parametrize("value", [True, False])
def test_a_bool_as_softmax_scale(value):
    refused(ValueError, "softmax_scale", str(value), f"causal={value}", softmax_scale=value)


@pytest.mark.parametrize("value", [torch.tensor(0.5), "0.5"], ids=["tensor", "text"])
def test_softmax_scale_of_another_type(value):
    refused(ValueError, "softmax_scale", type(value).__name__, "number", softmax_scale=value)


@pytest.mark.parametrize("value", [0.125, 1.0, None, "yes", 2, torch.tensor(True)], ids=str)
def test_causal_of_another_type(value):
    refused(ValueError, "causal", re.escape(repr(value)), "True or False", causal=value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300, -1e18])
def test_softmax_scale_out_of_range(value):
    refused(ValueError, rf"softmax_scale is {re.escape(f'{value:g}')}", r"-1e\+17 to 1e\+17", softmax_scale=value)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_no_tensor(name):
    refused(ValueError, f"{name} is a list", r"torch\.Tensor", **{name: [1.0]})


@pytest.mark.parametrize(
    "value, words",
    [(1, "an int"), (None, "None"), (np.ones(1), "an ndarray"), ("q", "a str"), (NO_OPTIONS, "an Options")],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_tensor_in_words(value, words):
    q = normal(1, 8, 2, 64)
    for attend in (flash_attn_func, flash_attn_jit._core.forward):
        more = (torch.empty_like(q), torch.empty(1, 2, 8), NO_OPTIONS) if attend is not flash_attn_func else ()
        with pytest.raises(ValueError, match=f"^q is {words}; accepted: a torch.Tensor$"):
            attend(value, q, q, *more)


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("shape", [(8, 2, 64), (1, 1, 8, 2, 64), ()], ids=str)
def test_rank(name, shape):
    refused(
        ValueError,
        f"{name} has {len(shape)} dimensions",
        re.escape(str(shape)),
        "4",
        **{name: normal(*shape)},
    )


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int8, torch.float8_e4m3fn], ids=str)
def test_dtype(name, dtype):
    words = [f"{name} has dtype {dtype}", r"torch\.float16", re.escape(f"{name}.to(torch.float16)")]
    refused(ValueError, *words, **{name: normal(1, 8, 2, 64).to(dtype)})


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_dtypes_that_differ(name):
    if name == "q":
        words = [r"^k has dtype torch\.float16 and q torch\.bfloat16", re.escape("k.to(torch.bfloat16)")]
    else:
        words = [f"^{name} has dtype torch.bfloat16 and q torch.float16", re.escape(f"{name}.to(torch.float16)")]
    refused(ValueError, *words, **{name: normal(1, 8, 2, 64).bfloat16()})


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_last_dimension_not_contiguous(name):
    words = [f"{name} has strides", r"\(1024, 128, 64, 2\)|\(2048, 256, 128, 2\)", "contiguous"]
    refused(ValueError, *words, **{name: normal(1, 8, 2, 128)[..., ::2]})


@pytest.mark.parametrize("head_dim", [0, 513])
def test_head_dim(head_dim):
    q = normal(1, 8, 2, head_dim)
    refused(flash_attn_jit.UnsupportedError, "head_dim", str(head_dim), "512", q=q, k=q, v=q)


@pytest.mark.parametrize(
    "shapes, words",
    [
        ({"k": (2, 8, 2, 64), "v": (2, 8, 2, 64)}, ["k", "2", "1"]),
        ({"k": (1, 8, 2, 32), "v": (1, 8, 2, 32)}, ["k", "32", "64"]),
        ({"v": (1, 9, 2, 64)}, ["v", "9", "8"]),
        ({"v": (1, 8, 1, 64)}, ["v", "1", "2"]),
        ({"k": (1, 8, 3, 64), "v": (1, 8, 3, 64)}, ["heads", "2", "3", "multiple"]),
        ({"k": (1, 8, 0, 64), "v": (1, 8, 0, 64)}, ["heads", "0", "multiple"]),
    ],
    ids=["batch", "head_dim", "seqlen", "heads of v", "no multiple", "no heads"],
)
def test_shapes_that_do_not_go_together(shapes, words):
    refused(ValueError, *words, **{name: normal(*shape) for name, shape in shapes.items()})


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_meta_device_beside_the_cpu(name):
    with pytest.raises(ValueError, match=r"on device meta|no memory|cannot be read"):
        tensors = dict(zip("qkv", normal_qkv(1, 8, 8, 2, 2, 64)))
        tensors[name] = tensors[name].to("meta")
        flash_attn_jit._core.forward(*tensors.values(), normal(1, 8, 2, 64), torch.empty(1, 2, 8), NO_OPTIONS)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_one_tensor_on_the_meta_device(name):
    tensors = dict(zip("qkv", normal_qkv(1, 8, 8, 2, 2, 64)))
    tensors[name] = tensors[name].to("meta")
    with pytest.raises(ValueError, match=r"is on device .*accepted: all on one device"):
        flash_attn_jit.flash_attn_func(*tensors.values())


def test_fake_tensor_has_no_memory():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.empty(1, 8, 2, 64, dtype=torch.float16)
    out, softmax_lse = normal(1, 8, 2, 64), torch.empty(1, 2, 8)
    with pytest.raises(ValueError, match=r"^q.*(fake|memory)"):
        flash_attn_jit._core.forward(fake, fake, fake, out, softmax_lse, NO_OPTIONS)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_sparse_tensor(name):
    refused(ValueError, f"^{name}", "dense", **{name: normal(1, 8, 2, 64).to_sparse()})


def test_a_tile_that_is_not_legal():
    q = normal(1, 8, 2, 64)
    with pytest.raises(ValueError, match="m7"):
        flash_attn_jit._core.forward(
            q, q, q, torch.empty_like(q), torch.empty(1, 2, 8), NO_OPTIONS, tile="m7n32w4q64l2b8k8"
        )


def test_a_refusal_carries_its_parts():
    q, k = normal(1, 8, 2, 64), normal(1, 8, 2, 32)
    error = refused(ValueError, "^k has shape", k=k, v=k)
    assert error.refusal[:2] == ("k", "has shape (1, 8, 2, 32)")
    assert error.refusal.accepted.startswith("(1, 8, 2, 64)")
    errors = [error, refused(ValueError, "^q has dtype", q=q.float()), refused(ValueError, "^softcap", softcap=-1.0)]
    errors.append(refused(ValueError, "^v has dtype", v=q.bfloat16()))
    for error in errors:
        again = error.refusal.exception()
        assert (type(again), str(again)) == (type(error), str(error))


def test_options_of_another_type():
    q = normal(1, 8, 2, 64)
    with pytest.raises(ValueError, match=r"^options is a tuple; accepted: an Options"):
        flash_attn_jit._core.forward(q, q, q, torch.empty_like(q), torch.empty(1, 2, 8), tuple(NO_OPTIONS))


@pytest.mark.parametrize("fields, name", [(("causal",), "has no field"), ((*Options._fields, "more"), "more")])
def test_the_two_sides_have_the_same_fields(fields, name):
    with pytest.raises(RuntimeError, match=name):
        flash_attn_jit._core.connect_options(namedtuple("Options", fields))
