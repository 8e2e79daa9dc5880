"""SGLang's attention on these kernels, for GPUs of compute capability 7.5: an attention backend that SGLang finds by
itself (entry point ``sglang.srt.plugins``) and uses where it is asked to::

    python -m sglang.launch_server --model MODEL --dtype half --attention-backend flash_attn_jit --page-size 16

Written against SGLang 0.5.23. Pages of one token, which are SGLang's default, work; those of a multiple of 16 are read
faster.
"""

from typing import Any

from ..._call_counts import CallCounts

__all__ = ["calls", "register"]

_WANTED = "0.5.23"
_NAME = "flash_attn_jit"

# Of this process. What a CUDA graph replays is counted when it is captured.
calls = CallCounts("SGLang", elsewhere="SGLang")


def wrong_version(what: object) -> ImportError:
    """what: in which way the installed SGLang is another than the one this is written against."""
    import sglang

    version = getattr(sglang, "__version__", "of an unknown version")
    return ImportError(
        f"SGLang {version} has other interfaces than flash_attn_jit's backend is written against: {what}; accepted: "
        f"SGLang {_WANTED}. Install it, or choose another --attention-backend, such as triton"
    )


def _make(runner: Any) -> Any:
    """runner: SGLang's ModelRunner."""
    from ._backend import FlashAttnJitBackend

    return FlashAttnJitBackend(runner)


def register() -> CallCounts:
    """Adds ``flash_attn_jit`` to the values of ``--attention-backend``; the entry point. Once is enough, and more often
    changes nothing.

    The backend takes attention in float16 and bfloat16 with head dims 1 to 512, grouped heads, sliding windows (with a
    pool of their own or without), softcap and sinks, prompts in chunks, mixed batches, encoders, and CUDA graphs of
    decode. Everything else raises NotImplementedError that names what it was: MLA, quantized caches, cross attention,
    speculative decoding, context parallelism.

    A CUDA graph splits a sequence's keys as the longest that the model takes: the shorter its own text, the fewer of
    the splits have work. ``--context-length`` as low as it may be helps.

    Returns:
        `calls`, this process's counts. SGLang's schedulers, which run the models, are processes of their own.

    Raises:
        ImportError: there is no SGLang, or one with other interfaces; names the version that is wanted.
    """
    import sglang  # noqa: F401  where there is none, its own error says so

    try:
        from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES, add_attention_backend_choices
        from sglang.srt.layers.attention.attention_registry import register_attention_backend
    except ImportError as error:
        raise wrong_version(error) from error
    register_attention_backend(_NAME)(_make)
    if _NAME not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([_NAME])
    return calls
