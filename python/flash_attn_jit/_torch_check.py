"""The one place that asks whether torch is there and new enough."""

OLDEST_TORCH = (2, 4)


def require_torch() -> None:
    """Raises ImportError, with what to do, where torch is missing or too old."""
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError("flash_attn_jit needs PyTorch 2.4 or newer: pip install torch") from None
    version = torch.__version__
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) < OLDEST_TORCH:
        raise ImportError(f"flash_attn_jit needs PyTorch 2.4 or newer; this is {version}: pip install --upgrade torch")
