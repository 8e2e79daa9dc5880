"""xformers imports flash-attn where it finds one, and its operator "flash" calls the compiled module. Each test in a
process of its own: what is found by flash-attn's name stays found."""

import subprocess
import sys

BEGINNING = """
import torch
import flash_attn_jit

flash_attn_jit.as_flash_attn()
import xformers.ops
from xformers.ops.fmha import flash

assert flash.FLASH_VERSION == "2.8.3" and not flash._USE_PT_FLASH_ATTN
"""
# What the operator is on a GPU of sm_80 or newer; xformers has none of it for others.
PASSES = """
from flash_attn_jit import _core
calls, core_forward = [], _core.forward
_core.forward = lambda *arguments: calls.append(1) or core_forward(*arguments)

def attend(q, k, v):
    out = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(-2, -3) for x in (q, k, v)), is_causal=True)
    return out.transpose(-2, -3)

def check(expected, exact, dout, starts, longest):
    q, k, v = (x.half() for x in exact)
    options = longest, longest, 0.0, q.shape[-1] ** -0.5, True, -1, -1
    out, lse, state = flash._flash_fwd._init_fn(q, k, v, starts, starts, None, *options, False, None)
    torch.testing.assert_close(out.float(), expected, atol=2e-3, rtol=2e-3)
    dout = dout.half()
    found = flash._flash_bwd._init_fn(False, dout, q, k, v, out, lse, starts, starts, *options, state)
    for got, wanted in zip(found, torch.autograd.grad(expected, exact, dout.float())):
        torch.testing.assert_close(got.float(), wanted, atol=1e-2, rtol=1e-2)

torch.manual_seed(0)
exact = [torch.randn(2, 12, 2, 32).half().float().requires_grad_() for _ in range(3)]
check(attend(*exact), exact, torch.randn(2, 12, 2, 32), None, 12)

exact = [torch.randn(20, 2, 32).half().float().requires_grad_() for _ in range(3)]
parts = [attend(*(x[rows] for x in exact)) for rows in (slice(0, 7), slice(7, 20))]
check(torch.cat(parts), exact, torch.randn(20, 2, 32), torch.tensor([0, 7, 20], dtype=torch.int32), 13)
assert len(calls) == 2
"""


def check_runs(*code):
    done = subprocess.run([sys.executable, "-c", "\n".join(code)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def test_import():
    check_runs(BEGINNING)


def test_its_operators_passes():
    check_runs(BEGINNING, PASSES)
