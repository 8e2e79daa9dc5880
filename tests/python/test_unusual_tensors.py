"""Tensors that are not simply memory: negated when they are read, zeros without memory, subclasses, nested."""

import pytest
import torch
from attention_reference import normal, normal_qkv
from torch.utils._python_dispatch import TorchDispatchMode

import flash_attn_jit
from flash_attn_jit import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_qkvpacked_func,
)


def negated(tensor):
    """Equal to `tensor`, which lies in memory with the other sign."""
    view = torch._neg_view(-tensor)
    assert view.is_neg() and torch.equal(view, tensor)
    return view


class Wrapped(torch.Tensor):
    """A tensor whose memory only its own dispatch can find."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = torch.utils._pytree.tree_map_only(Wrapped, lambda t: t.inner, (args, kwargs or {}))
        return func(*args, **kwargs)


class Doubled(torch.Tensor):
    """Counts for twice what lies in memory, wherever an operator reads it."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if "flash_attn_jit" not in str(func):
            return super().__torch_function__(func, types, args, kwargs or {})
        doubled = torch.utils._pytree.tree_map_only(
            Doubled, lambda t: t.as_subclass(torch.Tensor) * 2, (args, kwargs or {})
        )
        return func(*doubled[0], **doubled[1])


SLOPES = torch.tensor([0.5, 0.0625])
LENGTHS = torch.tensor([0, 3, 8], dtype=torch.int32)


def call_with(name, make):
    """A call in which `make` has changed one argument; the out and the gradients."""
    q, k, v = normal_qkv(1, 8, 8, 2, 2, 16)
    arguments = {
        "q": q, "k": k, "v": v, "kv": torch.stack((k, v), 2), "qkv": torch.stack((q, k, v), 2),
        "alibi_slopes": SLOPES, "cu_seqlens_q": LENGTHS, "cu_seqlens_k": LENGTHS,
        "max_seqlen_q": torch.tensor(5), "window_size": torch.tensor([2, 1]),
    }  # fmt: skip
    arguments[name] = make(arguments[name])
    window = arguments["window_size"] if name == "window_size" else (2, 1)
    if name == "kv":
        function, inputs, options = flash_attn_kvpacked_func, ["q", "kv"], {}
    elif name == "qkv":
        function, inputs, options = flash_attn_qkvpacked_func, ["qkv"], {}
    elif "seqlen" in name:
        function, inputs = flash_attn_varlen_func, ["q", "k", "v"]
        for tensor in inputs:
            arguments[tensor] = arguments[tensor][0]
        options = {key: arguments[key] for key in ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q")}
        options["max_seqlen_k"] = 5
    else:
        function, inputs = flash_attn_func, ["q", "k", "v"]
        options = {"alibi_slopes": arguments["alibi_slopes"]}
    tensors = [arguments[key].detach().requires_grad_() for key in inputs]
    out = function(*tensors, window_size=window, **options)
    with torch.no_grad():
        assert torch.equal(function(*tensors, window_size=window, **options), out)
    return [out, *torch.autograd.grad(out, tensors, normal(*out.shape, seed=9))]


EVERY_ARGUMENT = [
    "q", "k", "v", "kv", "qkv", "alibi_slopes", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "window_size"
]  # fmt: skip


@pytest.mark.parametrize("name", EVERY_ARGUMENT)
def test_negated_when_it_is_read(name):
    for result, expected in zip(call_with(name, negated), call_with(name, lambda t: t)):
        assert torch.equal(result, expected)


def test_slopes_that_are_an_imaginary_part():
    slopes = torch.complex(torch.zeros(2), -SLOPES).conj().imag
    assert slopes.is_neg()
    q, k, v = normal_qkv(1, 8, 8, 2, 2, 16)
    assert torch.equal(flash_attn_func(q, k, v, alibi_slopes=slopes), flash_attn_func(q, k, v, alibi_slopes=SLOPES))


def zeros_without_memory(tensor):
    return torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype)


@pytest.mark.parametrize(
    "name, words",
    [
        ("q", "q has strides"),
        ("k", "k has strides"),
        ("v", "v has strides"),
        ("kv", "k has strides.*k is kv"),
        ("qkv", "q has strides.*q is qkv"),
        ("alibi_slopes", "alibi_slopes has .*strides"),
        ("max_seqlen_q", "cu_seqlens_q.*max_seqlen_q, 0"),
    ],
)
def test_zeros_without_memory(name, words):
    """torch makes one element of them, repeated in every dimension, which none of these may be."""
    with pytest.raises(ValueError, match=f"^{words}"):
        call_with(name, zeros_without_memory)


@pytest.mark.parametrize("name", ["q", "k", "v", "alibi_slopes", "cu_seqlens_q", "cu_seqlens_k"])
def test_a_subclass_is_asked_for_its_memory(name):
    q, k, v = (t[0] for t in normal_qkv(1, 8, 8, 2, 2, 16))
    arguments = {"q": q, "k": k, "v": v, "cu_seqlens_q": LENGTHS, "cu_seqlens_k": LENGTHS, "alibi_slopes": SLOPES}
    expected = flash_attn_varlen_func(**arguments, max_seqlen_q=5, max_seqlen_k=5)
    arguments[name] = Wrapped(arguments[name])
    assert torch.equal(flash_attn_varlen_func(**arguments, max_seqlen_q=5, max_seqlen_k=5), expected)


def test_slopes_of_a_subclass_with_memory():
    q, k, v = normal_qkv(1, 8, 8, 2, 2, 16)
    doubled = flash_attn_func(q, k, v, alibi_slopes=SLOPES.as_subclass(Doubled))
    assert torch.equal(doubled.as_subclass(torch.Tensor), flash_attn_func(q, k, v, alibi_slopes=SLOPES * 2))


class Gradient(torch.autograd.Function):
    """Gives a `dout` of one's own making to what comes before it."""

    @staticmethod
    def forward(ctx, x, dout):
        ctx.dout = dout
        return x.clone()

    @staticmethod
    def backward(ctx, _):
        return ctx.dout, None


@pytest.mark.parametrize("make", [negated, zeros_without_memory, Wrapped], ids=lambda f: f.__name__)
@pytest.mark.parametrize("packed", [False, True])
def test_an_unusual_dout(make, packed):
    dout = normal(1, 8, 2, 16, seed=9)
    expected = torch.zeros_like(dout) if make is zeros_without_memory else dout
    gradients = []
    for given in (make(dout), expected):
        if packed:
            inputs = [normal(1, 8, 3, 2, 16).requires_grad_()]
            out = flash_attn_qkvpacked_func(*inputs)
        else:
            inputs = [t.requires_grad_() for t in normal_qkv(1, 8, 8, 2, 2, 16)]
            out = flash_attn_func(*inputs)
        gradients.append(torch.autograd.grad(Gradient.apply(out, given).sum(), inputs))
    for got, wanted in zip(*gradients):
        assert torch.equal(got, wanted)


def test_saved_tensors_that_come_back_negated():
    """Each of them: hooks may give back what they like."""
    leaves = [t[0].requires_grad_() for t in normal_qkv(1, 8, 8, 2, 2, 16)]
    lengths = {"cu_seqlens_q": LENGTHS, "cu_seqlens_k": LENGTHS, "max_seqlen_q": 5, "max_seqlen_k": 5}
    out = flash_attn_varlen_func(*leaves, **lengths, alibi_slopes=SLOPES)
    dout = normal(*out.shape, seed=9)
    expected = torch.autograd.grad(out, leaves, dout)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: negated(t.detach())):
        out = flash_attn_varlen_func(*leaves, **lengths, alibi_slopes=SLOPES)
        for got, wanted in zip(torch.autograd.grad(out, leaves, dout), expected):
            assert torch.equal(got, wanted)


def test_a_graph_keeps_its_tensors_as_saved_ones_alone():
    """So that what frees saved tensors, or moves them away, reaches the options' as well."""
    leaves = [t[0].requires_grad_() for t in normal_qkv(1, 8, 8, 2, 2, 16)]
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(packed.append, lambda _: None):
        out = flash_attn_varlen_func(*leaves, LENGTHS, LENGTHS, 5, 5, alibi_slopes=SLOPES)
    assert sum(t is LENGTHS or t.data_ptr() == LENGTHS.data_ptr() for t in packed) == 2
    assert not any(isinstance(value, torch.Tensor) for value in out.grad_fn.options)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_tensors_are_named(layout):
    def nested(*shape):
        return torch.nested.nested_tensor([normal(8, *shape), normal(5, *shape)], layout=layout)

    q = normal(2, 8, 2, 16)
    for name, call in (
        ("q", lambda: flash_attn_func(nested(2, 16), nested(2, 16), nested(2, 16))),
        ("q", lambda: flash_attn_func(nested(2, 16).detach().requires_grad_(), q, q)),
        ("k", lambda: flash_attn_func(q, nested(2, 16), q)),
        ("v", lambda: flash_attn_func(q, q, nested(2, 16))),
        ("kv", lambda: flash_attn_kvpacked_func(q, nested(2, 2, 16))),
        ("q", lambda: flash_attn_kvpacked_func(nested(2, 16), normal(2, 8, 2, 2, 16))),
        ("qkv", lambda: flash_attn_qkvpacked_func(nested(3, 2, 16))),
        ("qkv", lambda: flash_attn_varlen_qkvpacked_func(nested(2, 16), LENGTHS, 5)),
    ):
        with pytest.raises(ValueError, match=f"^{name} is a nested tensor.*accepted: a strided tensor.*varlen"):
            call()


class Nothing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["q", "k", "v", "alibi_slopes"])
def test_negated_under_a_mode(name):
    with Nothing():
        results = call_with(name, negated)
    for result, expected in zip(results, call_with(name, lambda t: t)):
        assert torch.equal(result, expected)


def test_conjugated_tensors_are_refused_by_their_dtype():
    q, k, v = normal_qkv(1, 8, 8, 2, 2, 16)
    with pytest.raises(ValueError, match=r"^k has dtype torch\.complex64"):
        flash_attn_jit.flash_attn_func(q, torch.complex(k.float(), k.float()).conj(), v)
