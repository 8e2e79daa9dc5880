"""integrations.sdpa: route_sdpa() without a `with`. What is routed is test_router.py's and test_sdpa.py's."""

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.attention.bias
import torch.nn.functional as F
from attention_reference import normal
from conftest import needs_traced_function_modes, run_python
from test_router import state_of_torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from flash_attn_jit import flash_attn_func, ops, route_sdpa
from flash_attn_jit.integrations import sdpa

Q, K, V = (normal(1, 2, 8, 16, seed=seed) for seed in (1, 2, 3))


@pytest.fixture(autouse=True)
def nothing_stays():
    torch.compiler.reset()
    before = state_of_torch()
    yield
    sdpa.unregister()
    assert state_of_torch() == before


def attend(q=Q, k=K, v=V, **arguments):
    return F.scaled_dot_product_attention(q, k, v, **arguments)


def in_a_thread(function, *arguments):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result()


@pytest.mark.parametrize("torch_compile", [False, True])
def test_from_registering_on(torch_compile):
    expected = attend(Q.float(), K.float(), V.float())
    router = sdpa.register(torch_compile=torch_compile)
    out = attend()
    attend(Q.float(), K.float(), V.float())
    torch.testing.assert_close(out.float(), expected, atol=2e-3, rtol=2e-3)
    assert router.counts == {"flash_attn_jit": 1, "torch": 1}
    assert repr(router).startswith("sdpa: 1 calls ran in flash_attn_jit, 1 in PyTorch\n  1 x query has dtype")
    sdpa.unregister()
    attend()
    assert router.counts == {"flash_attn_jit": 1, "torch": 1}


def test_it_may_be_registered_again():
    router = sdpa.register()
    assert sdpa.register() is router
    attend()
    assert router.counts == {"flash_attn_jit": 1, "torch": 0}
    with pytest.raises(RuntimeError, match=r"torch_compile is True.* with False; accepted: the same\. Call unregister"):
        sdpa.register(torch_compile=True)
    sdpa.unregister()
    sdpa.unregister()
    assert sdpa.register(torch_compile=True) is not router


@pytest.mark.parametrize("torch_compile", [False, True])
def test_other_threads(torch_compile):
    router = sdpa.register(torch_compile=torch_compile)
    torch.testing.assert_close(in_a_thread(attend), attend(), atol=0, rtol=0)
    assert router.counts == {"flash_attn_jit": 2, "torch": 0}


@pytest.mark.parametrize("torch_compile", [False, True])
def test_registered_in_one_thread_and_unregistered_in_another(torch_compile):
    with ThreadPoolExecutor(1) as pool:
        router = pool.submit(sdpa.register, torch_compile=torch_compile).result()
        attend()
        sdpa.unregister()
        pool.submit(attend).result()
    assert router.counts == {"flash_attn_jit": 1, "torch": 0}


def test_a_router_inside_of_it_counts_its_own():
    router = sdpa.register()
    with route_sdpa() as inner:
        attend()
        in_a_thread(attend)
    attend()
    assert inner.counts == {"flash_attn_jit": 2, "torch": 0}
    assert router.counts == {"flash_attn_jit": 1, "torch": 0}


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_a_transformer_layer(train):
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True).train(train)
    x = torch.randn(2, 12, 32)
    with torch.no_grad():
        expected, router = layer(x), sdpa.register()
        out = layer.half()(x.half())
    assert router.counts == {"flash_attn_jit": 1, "torch": 0}
    torch.testing.assert_close(out.float(), expected, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant):
    def gradients(q):
        q = q.detach().clone().requires_grad_()
        out = checkpoint(lambda q: attend(q, K.to(q.dtype), V.to(q.dtype)), q, use_reentrant=use_reentrant)
        return torch.autograd.grad(out.float().sum(), q)[0].float() if not use_reentrant else backward_of(out, q)

    def backward_of(out, q):
        out.float().sum().backward()
        return q.grad.float()

    expected, router = gradients(Q.float()), sdpa.register()
    torch.testing.assert_close(gradients(Q), expected, atol=1e-2, rtol=1e-2)
    assert router.counts == {"flash_attn_jit": 2, "torch": 0}


def test_a_causal_mask_aligned_bottom_right():
    bias = torch.nn.attention.bias.causal_lower_right(8, 12)
    k, v = normal(1, 2, 12, 16, seed=4), normal(1, 2, 12, 16, seed=5)
    expected, router = attend(Q.float(), k.float(), v.float(), attn_mask=bias), sdpa.register()
    torch.testing.assert_close(attend(Q, k, v, attn_mask=bias).float(), expected, atol=2e-3, rtol=2e-3)
    assert router.counts == {"flash_attn_jit": 1, "torch": 0}


def test_such_masks_where_another_router_was_there_before():
    """On a GPU PyTorch has operators of their own for them, which are not SDPA's."""
    done = run_python(
        "import torch\n"
        "from flash_attn_jit import route_sdpa\n"
        "from flash_attn_jit.integrations import sdpa\n"
        "with route_sdpa():\n"
        "    sdpa.register()\n"
        "print(torch.nn.attention.bias.CausalBias._dispatch.__module__)"
    )
    assert done.stdout.strip() == "flash_attn_jit._router", done.stderr


def test_compiled_calls_are_routed_where_that_was_asked_for(monkeypatch):
    needs_traced_function_modes()
    router = sdpa.register(torch_compile=True)
    seen = []
    forward = ops.SEPARATE.forward
    monkeypatch.setattr(ops.SEPARATE, "forward", lambda *arguments: seen.append(1) or forward(*arguments))
    out = torch.compile(attend, backend="aot_eager", fullgraph=True)()
    assert seen and router.counts == {"flash_attn_jit": 0, "torch": 0}
    torch.testing.assert_close(out, attend(), atol=2e-3, rtol=2e-3)


def test_what_a_tracer_leaves_to_torch_is_told_once(caplog):
    router = sdpa.register()
    with caplog.at_level(logging.WARNING, "flash_attn_jit"), FakeTensorMode() as mode:
        fake = mode.from_tensor(Q)
        attend(fake, fake, fake)
        attend(fake, fake, fake)
    (record,) = caplog.records
    assert "sdpa.register(torch_compile=True)" in record.message
    assert router.counts == {"flash_attn_jit": 0, "torch": 0}


def test_other_functions_make_no_detour():
    sdpa.register()
    assert torch._C._len_torch_function_stack() == 0
    flash_attn_func(*(x.transpose(1, 2) for x in (Q, K, V)))
    in_a_thread(attend)
    assert torch._C._len_torch_function_stack() == 0


def test_a_process_may_end_registered():
    done = run_python(
        "import torch\n"
        "from flash_attn_jit.integrations import sdpa\n"
        "router = sdpa.register()\n"
        "q = torch.ones(1, 1, 4, 16, dtype=torch.float16, requires_grad=True)\n"
        "out = torch.nn.functional.scaled_dot_product_attention(q, q, q)\n"
        "print(router.counts)"
    )
    assert done.returncode == 0 and not done.stderr
    assert done.stdout.strip() == "{'flash_attn_jit': 1, 'torch': 0}"
