"""diffusers' "flash" and "flash_varlen" backends by as_flash_attn(), beside diffusers' native attention in float32.
Each test in a process of its own: what is found by flash-attn's name stays found."""

import subprocess
import sys

import pytest

BEGINNING = """
import torch
import flash_attn_jit
from flash_attn_jit import _core

calls, core_forward = [], _core.forward
_core.forward = lambda *arguments: calls.append(1) or core_forward(*arguments)
flash_attn_jit.as_flash_attn()
import diffusers
"""
FLUX = """
from diffusers import FluxTransformer2DModel

def make(dtype):
    torch.manual_seed(0)
    model = FluxTransformer2DModel(patch_size=1, in_channels=4, num_layers=1, num_single_layers=1,
                                   attention_head_dim=32, num_attention_heads=2, joint_attention_dim=16,
                                   pooled_projection_dim=16, axes_dims_rope=(8, 12, 12))
    for parameter in model.parameters():  # such that attention weighs something
        if parameter.dim() == 2:
            torch.nn.init.xavier_normal_(parameter)
    return model.to(dtype)

torch.manual_seed(1)
inputs = dict(hidden_states=torch.randn(2, 16, 4), encoder_hidden_states=torch.randn(2, 6, 16),
              pooled_projections=torch.randn(2, 16), timestep=torch.tensor([0.3, 0.8]))
ids = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))

def run(model, dtype):
    given = {name: x.to(dtype) for name, x in inputs.items()}
    out = model(**given, txt_ids=torch.zeros(6, 3), img_ids=ids, return_dict=False)[0]
    out.float().square().mean().backward()
    return out.detach().float(), model.transformer_blocks[0].attn.to_q.weight.grad.float()

def error(got, exact):
    return ((got - exact).abs().max() / exact.abs().max()).item()

exact, native = run(make(torch.float32), torch.float32), run(make(torch.float16), torch.float16)
assert not calls
model = make(torch.float16)
model.set_attention_backend(BACKEND)
found = run(model, torch.float16)
assert len(calls) == 2, calls
for got, theirs, right in zip(found, native, exact):
    assert right.abs().max() > 0 and error(theirs, right) < 2e-2
    assert error(got, right) <= 3 * error(theirs, right) + 2e-3, (error(got, right), error(theirs, right))
"""
# Context parallelism calls the two passes itself.
TWO_PASSES = """
from types import SimpleNamespace
from diffusers.models import attention_dispatch

q, k, v, dout = (torch.randn(2, 12, 2, 32, dtype=torch.float16) for _ in range(4))
exact = [x.float().requires_grad_() for x in (q, k, v)]
expected = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in exact)).transpose(1, 2)
gradients = torch.autograd.grad(expected, exact, dout.float())

ctx = SimpleNamespace()
ctx.save_for_backward = lambda *tensors: setattr(ctx, "saved_tensors", tensors)
out, lse = attention_dispatch._flash_attention_forward_op(ctx, q, k, v, return_lse=True)
assert len(calls) == 1
torch.testing.assert_close(out.float(), expected, atol=2e-3, rtol=2e-3)
for got, wanted in zip(attention_dispatch._flash_attention_backward_op(ctx, dout), gradients):
    torch.testing.assert_close(got.float(), wanted, atol=1e-2, rtol=1e-2)
"""


def check_runs(*code):
    done = subprocess.run([sys.executable, "-c", "\n".join(code)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("backend", ["flash", "flash_varlen"])
def test_flux(backend):
    check_runs(BEGINNING, f"BACKEND = {backend!r}", FLUX)


def test_the_passes_that_context_parallelism_calls():
    check_runs(BEGINNING, TWO_PASSES)
