"""What a Python call costs its thread: a problem too small to matter, and no waiting for the device inside."""

from statistics import median
from time import perf_counter
from typing import Any, Callable, Dict, List

import torch
import torch.nn.functional as F

from .. import flash_attn_func
from .backends import OURS

_CALLS = 200  # a burst: far fewer launches than a stream's queue holds


def _burst_us(call: Callable[[], object], wait: Callable[[], object]) -> float:
    wait()
    start = perf_counter()
    for _ in range(_CALLS):
        call()
    elapsed = perf_counter() - start
    wait()
    return elapsed / _CALLS * 1e6


def _calls(device: str) -> Dict[str, Callable[[], object]]:
    # On the CPU a query of length 0 makes the whole way to the launch, and launches nothing.
    seqlen = 16 if device == "cuda" else 0
    q = torch.randn(1, seqlen, 8, 64, dtype=torch.float16, device=device)
    heads_first = q.transpose(1, 2)
    return {
        OURS: lambda: flash_attn_func(q, q, q),
        "sdpa": lambda: F.scaled_dot_product_attention(heads_first, heads_first, heads_first),
    }


def run(rounds: int = 50) -> List[Dict[str, Any]]:
    """Microseconds a call, with grad mode off and on, inputs that need no gradient; bursts take turns."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    calls = _calls(device)
    rows = []
    for grad_mode in (False, True):
        with torch.set_grad_enabled(grad_mode):
            samples: Dict[str, List[float]] = {name: [] for name in calls}
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
                    "grad_mode": "on" if grad_mode else "off",
                    "us_median": median(values),
                    "us_min": min(values),
                    "us_max": max(values),
                }
            )
    return rows
