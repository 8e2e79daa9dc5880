"""What this package asks of torch's private names, in one place, each with what serves where a version lacks it.

The questions of ops.is_plain() fall back to "yes": every call then goes by the operators, which is slower and as right.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode


def _yes() -> bool:
    return True


def _question(owner: Any, name: str) -> Callable[[], Any]:
    return getattr(owner, name, _yes)


# Each is true while ...
dispatch_modes_are_on = _question(torch._C, "_len_torch_dispatch_stack")
function_modes_are_on = _question(torch._C, "_len_torch_function_stack")
profiler_is_on = _question(torch.autograd, "_profiler_enabled")
jit_trace_is_on = _question(torch._C, "_get_tracing_state")
# A transform of torch.func: grad, vmap, jvp, functionalize.
transforms_are_active = _question(torch._C, "_are_functorch_transforms_active")


if hasattr(forward_ad, "_current_level"):

    def forward_mode_is_on() -> bool:
        """Whether forward-mode differentiation may have given tensors tangents."""
        return forward_ad._current_level >= 0

else:
    forward_mode_is_on = _yes


def is_exporting() -> bool:
    """True while torch.export traces; old versions do not tell. torch.compiler.is_exporting() would say so of what
    torch.compile traces, too, before torch 2.13."""
    return bool(getattr(torch.compiler, "_is_exporting_flag", False))


# What Library.impl() has to be told so that it replaces a kernel that another library registered: torch 2.13 does so
# untold, before that it is an error, and old versions cannot be told.
replacing_kernels: dict[str, Any] = (
    {"allow_override": True} if "allow_override" in inspect.signature(torch.library.Library.impl).parameters else {}
)


def take_function_mode_off(mode: Any) -> None:
    """Takes a mode off this thread's stack wherever it lies in it; nothing where it does not."""
    stack = getattr(torch.overrides, "_get_current_function_mode_stack", lambda: [mode])()
    if not any(each is mode for each in stack):
        return
    above = stack[len(stack) - stack[::-1].index(mode) :]
    for _ in range(len(above) + 1):
        TorchFunctionMode.__exit__(mode, None, None, None)
    for each in above:
        TorchFunctionMode.__enter__(each)


# Of torch.utils.checkpoint with use_reentrant=False: what remembers a forward pass, what is on while that runs, and
# what is on while it runs again. Without them such a recomputation runs as the backward pass finds it.
CheckpointFrame: Any = getattr(torch.utils.checkpoint, "_CheckpointFrame", None)
CheckpointForward: Any = getattr(torch.utils.checkpoint, "_checkpoint_hook", None)
CheckpointRecomputation: Any = getattr(torch.utils.checkpoint, "_recomputation_hook", None)
has_checkpoint_hooks = None not in (CheckpointFrame, CheckpointForward, CheckpointRecomputation)


def register_flop_formula(packet: torch._ops.OpOverloadPacket, formula: Callable[..., int]) -> None:
    """What FlopCounterMode counts for an operator: formula(*arguments, out_val=result)."""
    from torch.utils import flop_counter

    register: Callable[..., Any] = flop_counter.register_flop_formula(packet, get_raw=True)
    register(formula)
    # torch 2.4 files it under the operator's overloads and looks for the packet.
    getattr(flop_counter, "flop_registry", {}).setdefault(packet, formula)
