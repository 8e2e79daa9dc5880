"""What a Python call costs its thread: a problem too small to matter, and no waiting for the device inside."""

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F

from .. import flash_attn_func, flash_attn_with_kvcache, flex_attention
from .backends import OURS
from .integration_cost import INTEGRATIONS, Inputs
from .problem import BOTH, FORWARD

_CALLS = 100  # a burst: fewer launches than a stream's queue holds, with all kernels of a backward pass
_CACHED_KEYS, _PAGE_SIZE = 4096, 16


class Mode(NamedTuple):
    which: str  # the pass
    grad_mode: bool
    inputs_need_gradients: bool
    cache: bool = False
    appends: bool = False  # to a cache in pages, with rotary turns

    def __str__(self) -> str:
        if not self.grad_mode:
            return "grad off" + (", a cache" if self.cache else "") + (", appending" if self.appends else "")
        return "grad on, inputs need gradients" if self.inputs_need_gradients else "grad on"


_MODES = (
    Mode(FORWARD, False, False),
    Mode(FORWARD, True, False),
    Mode(FORWARD, True, True),
    Mode(BOTH, True, True),
    Mode(FORWARD, False, False, cache=True),
    Mode(FORWARD, False, False, cache=True, appends=True),
)


def _burst_us(call: Callable[[], object], wait: Callable[[], object]) -> float:
    wait()
    start = perf_counter()
    for _ in range(_CALLS):
        call()
    elapsed = perf_counter() - start
    wait()
    return elapsed / _CALLS * 1e6


def _queries(device: str) -> int:
    """On the CPU none: such a call makes the whole way to the launch, and launches nothing."""
    return 1 if device == "cuda" else 0


def _cache_calls(mode: Mode, device: str) -> dict[str, Callable[[], object]]:
    """A token over a cache of one sequence, beside SDPA's over as many keys, each head's in one piece."""
    half: dict[str, Any] = {"dtype": torch.float16, "device": device}
    q, new = torch.randn(2, 1, _queries(device), 8, 64, **half).unbind()
    k, v = torch.randn(2, 1, _CACHED_KEYS, 8, 64, **half).unbind()
    sq, sk, sv = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    given: dict[str, Any] = {"cache_seqlens": torch.full((1,), _CACHED_KEYS - 1, dtype=torch.int32, device=device)}
    if mode.appends:
        k, v = (x.view(-1, _PAGE_SIZE, 8, 64) for x in (k, v))
        cos, sin = torch.randn(2, _CACHED_KEYS, 32, **half).unbind()
        table = torch.randperm(k.shape[0], device=device, dtype=torch.int32)[None]
        given.update(k=new, v=new, rotary_cos=cos, rotary_sin=sin, block_table=table)
    return {
        OURS: lambda: flash_attn_with_kvcache(q, k, v, causal=True, **given),
        "sdpa": lambda: F.scaled_dot_product_attention(sq, sk, sv),
    }


def _calls(mode: Mode, device: str) -> dict[str, Callable[[], object]]:
    if mode.cache:
        return _cache_calls(mode, device)
    seqlen = 16 * _queries(device)
    q, k, v, dout = torch.randn(4, 1, seqlen, 8, 64, dtype=torch.float16, device=device).unbind()
    needed = mode.inputs_need_gradients
    q, k, v = (x.detach().requires_grad_(needed) for x in (q, k, v))
    # Leaves in SDPA's layout, so that its calls need no transpose.
    sq, sk, sv = (x.detach().transpose(1, 2).requires_grad_(needed) for x in (q, k, v))
    sdout = dout.transpose(1, 2)
    attend = cast(Callable[..., torch.Tensor], flash_attn_func)
    flex = cast(Callable[..., torch.Tensor], flex_attention)
    slopes = torch.randn(8, device=device)

    def alibi(score: torch.Tensor, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score + slopes[h] * (kv_idx - q_idx)

    if mode.which == FORWARD:
        return {
            OURS: lambda: attend(q, k, v),
            "sdpa": lambda: F.scaled_dot_product_attention(sq, sk, sv),
            "flex_attention": lambda: flex(sq, sk, sv, alibi),
        }
    return {
        OURS: lambda: torch.autograd.grad(attend(q, k, v), (q, k, v), dout),
        "sdpa": lambda: torch.autograd.grad(F.scaled_dot_product_attention(sq, sk, sv), (sq, sk, sv), sdout),
        "flex_attention": lambda: torch.autograd.grad(flex(sq, sk, sv, alibi), (sq, sk, sv), sdout),
    }


def _measure(calls: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """Microseconds a call. Bursts take turns."""
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    for call in calls.values():
        _burst_us(call, wait)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(_burst_us(call, wait))
    return samples


def _rows(mode: Mode, title: str, samples: dict[str, list[float]], device: str) -> list[dict[str, Any]]:
    return [
        {
            "backend": name,
            "device": device,
            "pass": mode.which,
            "grad_mode": "on" if mode.grad_mode else "off",
            "inputs_need_gradients": mode.inputs_need_gradients,
            "mode": title,
            "us_median": median(values),
            "us_min": min(values),
            "us_max": max(values),
        }
        for name, values in samples.items()
    ]


def _integration_rows(rounds: int, device: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    mode = Mode(FORWARD, False, False)
    given = Inputs.of(16 * _queries(device), device)
    for name, make in INTEGRATIONS.items():
        try:
            integration = make(given)
        except (ImportError, RuntimeError) as error:
            rows.append({"backend": name, "pass": FORWARD, "skipped": str(error)})
            continue
        with torch.no_grad():
            samples = _measure({name: integration.call, OURS: integration.plain}, rounds, device)
        integration.end()
        of_integration, plain = _rows(mode, f"integrations.{name}", samples, device)
        of_integration["us_over_plain"] = of_integration["us_median"] - plain["us_median"]
        rows += of_integration, plain
    return rows


def run(rounds: int) -> list[dict[str, Any]]:
    """Microseconds a call: forward with grad mode off and on, forward of inputs that need gradients, and forward and
    backward of them, the same through flex_attention with a function of the user; a token over a cache; and through
    each integration whose library is installed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for mode in _MODES:
        calls = _calls(mode, device)
        with torch.set_grad_enabled(mode.grad_mode):
            rows += _rows(mode, str(mode), _measure(calls, rounds, device), device)
    return rows + _integration_rows(rounds, device)
