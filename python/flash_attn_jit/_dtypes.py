"""What q, k, v and out are made of. The compiled module checks it at every call; this is what is asked before."""

import torch

from . import _core

HALVES = (torch.float16, torch.bfloat16)


def takes(dtype: torch.dtype) -> bool:
    return dtype is torch.float16 or (dtype is torch.bfloat16 and not _refuses_bfloat16())


def _refuses_bfloat16() -> bool:
    return _core.refuses_bfloat16()


# What torch.compiler.assume_constant_result() does, which imports the compiler.
_refuses_bfloat16._dynamo_marked_constant = True  # type: ignore[attr-defined]
