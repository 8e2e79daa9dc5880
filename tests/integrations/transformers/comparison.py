"""A model on these kernels beside transformers' eager attention in float32, and in float16 for what that costs."""

from collections.abc import Callable
from functools import cache
from typing import Any

import tiny_models
import torch

from flash_attn_jit.integrations import transformers as turing

NAME = turing.register()


def cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}


def logits_of(output: Any) -> torch.Tensor:
    return (output.logits_per_image if "logits_per_image" in output else output.logits).float()


Run = Callable[[str, str, torch.dtype], Any]  # a family, an implementation, a dtype


@cache
def reference(run: Run, family: str) -> tuple[Any, Any]:
    """Eager attention's, in float32 and float16."""
    return run(family, "eager", torch.float32), run(family, "eager", torch.float16)


def run_here(run: Run, family: str, calls: int) -> Any:
    turing.calls.reset()
    result = run(family, NAME, torch.float16)
    assert turing.calls.counts == {"flash_attn_jit": calls, "torch": 0}
    return result


def assert_close(ours: torch.Tensor, exact: torch.Tensor, eager: torch.Tensor, where: Any = slice(None)) -> None:
    """Within twice of what eager float16 is off, or a step of float16 where that had luck."""
    step = torch.finfo(torch.float16).eps * exact.abs().max()
    bound = 2 * torch.maximum((eager - exact)[where].abs().max(), step)
    error = (ours - exact)[where].abs().max()
    assert torch.isfinite(bound)
    assert error <= bound, f"{error:.2e} > {bound:.2e}"


def gradients_of(model: Any) -> torch.Tensor:
    found = [p.grad.float().flatten() for p in model.parameters() if p.grad is not None]
    assert found
    return torch.cat(found)


def assert_gradients_close(ours: torch.Tensor, exact: torch.Tensor, eager: torch.Tensor) -> None:
    bound = 2 * max((eager - exact).norm(), 1e-3 * exact.norm())
    error = (ours - exact).norm()
    assert torch.isfinite(torch.as_tensor(bound)) and exact.norm() > 0
    assert error <= bound, f"{error:.2e} > {bound:.2e}"


def padded(family: str, padding: str | None) -> Any:
    """Where the results of padded inputs mean something."""
    inputs = tiny_models.batch(family, padding)
    if padding is None or family in ("t5", "clip"):
        return slice(None)
    return inputs["attention_mask"].bool()
