"""What torch.compile's graphs break around: it would trace the tracing of functions. Imports the compiler."""

from collections.abc import Callable

import torch

from ._attention import call

call_outside_of_graphs: Callable[..., torch.Tensor | tuple[torch.Tensor, torch.Tensor]] = torch.compiler.disable(call)
