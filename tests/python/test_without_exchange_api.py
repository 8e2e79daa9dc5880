"""torch without DLPack's C exchange interface: tensors are read through their Python attributes."""

from pathlib import Path

import torch
from conftest import needs_torch, run_python

HIDE = f"""
import sys
import torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
if hasattr(torch.Tensor, "__dlpack_c_exchange_api__"): del torch.Tensor.__dlpack_c_exchange_api__
"""


def run_hidden(code):
    done = run_python(HIDE + code)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_is_used_here():
    needs_torch("2.10", "tensors have DLPack's C exchange interface")
    import flash_attn_jit

    assert hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
    assert flash_attn_jit._core.uses_exchange_api()


def test_results_are_the_same():
    run_hidden(
        """
from attention_reference import *
from flash_attn_jit import flash_attn_func, _core
assert not _core.uses_exchange_api()
for shape in [(1, 20, 30, 2, 1, 64), (2, 5, 0, 2, 2, 64), (0, 5, 5, 1, 1, 64), (1, 9, 9, 1, 1, 33)]:
    q, k, v = normal_qkv(*shape)
    for t in (q, q.transpose(1, 2).contiguous().transpose(1, 2)):
        out, lse, _ = flash_attn_func(t, k, v, causal=True, return_attn_probs=True)
        check_attention(out, lse, t, k, v, causal=True)
wide = normal(1, 20, 2, 72)[..., 5:69]
check_attention(flash_attn_func(wide, wide, wide), None, wide, wide, wide)
"""
    )


def test_refusals_are_the_same():
    run_hidden(
        """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from attention_reference import *
from flash_attn_jit import flash_attn_func, _core
good = normal(1, 8, 2, 64)
def refused(error, words, *tensors):
    try:
        flash_attn_func(*tensors)
    except error as raised:
        assert all(word in str(raised) for word in words), raised
    else:
        raise AssertionError(words)
refused(ValueError, ["k has dtype torch.float32", "k.to(torch.float16)"], good, good.float(), good)
refused(ValueError, ["v has dtype torch.bfloat16", "q torch.float16"], good, good, good.bfloat16())
refused(ValueError, ["k has 3 dimensions"], good, good[0], good)
refused(ValueError, ["q has strides", "contiguous"], normal(1, 8, 2, 128)[..., ::2], good, good)
with FakeTensorMode():
    fake = torch.empty(1, 8, 2, 64, dtype=torch.float16)
try:
    _core.forward(fake, fake, fake, good, torch.empty(1, 2, 8), NO_OPTIONS)
except ValueError as error:
    assert str(error).startswith("q"), error
else:
    raise AssertionError("a fake tensor ran")
meta = good.to("meta")
try:
    _core.forward(meta, meta, meta, good, torch.empty(1, 2, 8), NO_OPTIONS)
except ValueError as error:
    assert str(error).startswith("q"), error
else:
    raise AssertionError("a meta tensor ran")
"""
    )


def test_without_private_names_every_call_goes_by_the_operators():
    done = run_python(
        f"""
import sys
import torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
del torch.autograd._profiler_enabled, torch._C._len_torch_function_stack
from attention_reference import *
import flash_attn_jit
from flash_attn_jit import ops
q, k, v = (t.requires_grad_() for t in normal_qkv(1, 20, 30, 2, 1, 64))
assert not ops.is_plain(q, k, v)
out = flash_attn_jit.flash_attn_func(q, k, v, causal=True)
assert "flash_attn_jit_forward" in out.grad_fn.name()
check_attention(out.detach(), None, q.detach(), k.detach(), v.detach(), causal=True)
dout = normal(*out.shape, seed=9)
check_gradients(torch.autograd.grad(out, (q, k, v), dout), exact_gradients(q, k, v, dout, causal=True))
"""
    )
    assert done.returncode == 0, done.stderr
