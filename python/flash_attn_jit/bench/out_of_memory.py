"""Running out of memory is a result: what it looks like, and what is done after it."""

import gc

import torch

OUT_OF_MEMORY = "out of memory"
# Of PyTorch's allocator, the CUDA runtime, the driver and cuBLAS, which all end in a RuntimeError.
_WORDS = ("out of memory", "OUT_OF_MEMORY", "ALLOC_FAILED")


def is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(word in str(error) for word in _WORDS)


def free_memory() -> None:
    """Outside of the except clause: an exception holds the frames that hold the tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
