"""What a Python call costs its thread: a problem too small to matter, and no waiting for the device inside."""

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F

from .. import flash_attn_func
from .backends import OURS
from .problem import BOTH, FORWARD

_CALLS = 100  # a burst: fewer launches than a stream's queue holds, with all kernels of a backward pass


class Mode(NamedTuple):
    which: str  # the pass
    grad_mode: bool
    inputs_need_gradients: bool

    def __str__(self) -> str:
        if not self.grad_mode:
            return "grad off"
        return "grad on, inputs need gradients" if self.inputs_need_gradients else "grad on"


_MODES = (
    Mode(FORWARD, False, False),
    Mode(FORWARD, True, False),
    Mode(FORWARD, True, True),
    Mode(BOTH, True, True),
)


def _burst_us(call: Callable[[], object], wait: Callable[[], object]) -> float:
    wait()
    start = perf_counter()
    for _ in range(_CALLS):
        call()
    elapsed = perf_counter() - start
    wait()
    return elapsed / _CALLS * 1e6


def _calls(mode: Mode, device: str) -> dict[str, Callable[[], object]]:
    # On the CPU a query of length 0 makes the whole way to the launch, and launches nothing.
    seqlen = 16 if device == "cuda" else 0
    q, k, v, dout = torch.randn(4, 1, seqlen, 8, 64, dtype=torch.float16, device=device).unbind()
    needed = mode.inputs_need_gradients
    q, k, v = (x.detach().requires_grad_(needed) for x in (q, k, v))
    # Leaves in SDPA's layout, so that its calls need no transpose.
    sq, sk, sv = (x.detach().transpose(1, 2).requires_grad_(needed) for x in (q, k, v))
    sdout = dout.transpose(1, 2)
    attend = cast(Callable[..., torch.Tensor], flash_attn_func)
    if mode.which == FORWARD:
        return {
            OURS: lambda: attend(q, k, v),
            "sdpa": lambda: F.scaled_dot_product_attention(sq, sk, sv),
        }
    return {
        OURS: lambda: torch.autograd.grad(attend(q, k, v), (q, k, v), dout),
        "sdpa": lambda: torch.autograd.grad(F.scaled_dot_product_attention(sq, sk, sv), (sq, sk, sv), sdout),
    }


def run(rounds: int) -> list[dict[str, Any]]:
    """Microseconds a call: forward with grad mode off and on, forward of inputs that need gradients, and forward and
    backward of them; bursts take turns."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    rows = []
    for mode in _MODES:
        calls = _calls(mode, device)
        with torch.set_grad_enabled(mode.grad_mode):
            samples: dict[str, list[float]] = {name: [] for name in calls}
            for call in calls.values():
                _burst_us(call, wait)
            for _ in range(rounds):
                for name, call in calls.items():
                    samples[name].append(_burst_us(call, wait))
        for name, values in samples.items():
            rows.append(
                {
                    "backend": name,
                    "device": device,
                    "pass": mode.which,
                    "grad_mode": "on" if mode.grad_mode else "off",
                    "inputs_need_gradients": mode.inputs_need_gradients,
                    "mode": str(mode),
                    "us_median": median(values),
                    "us_min": min(values),
                    "us_max": max(values),
                }
            )
    return rows
