"""vLLM's attention on these kernels, for GPUs of compute capability 7.5: an attention backend that vLLM finds by itself
(entry point ``vllm.general_plugins``) and uses where it is asked to::

    vllm serve MODEL --dtype half --attention-backend CUSTOM

Written against vLLM 0.33. FLASH_ATTN is not replaced: vLLM asks that backend's class, too, whether images may go to
flash-attn's own kernels, which do not run on these GPUs.
"""

import logging

from ..._call_counts import CallCounts

__all__ = ["calls", "plugin", "register"]

_WANTED = "0.33"
_BACKEND = "flash_attn_jit.integrations.vllm._backend.FlashAttnJitBackend"

# Of this process: each of vLLM's workers has its own. What a CUDA graph replays is counted when it is captured.
calls = CallCounts("vLLM", elsewhere="vLLM")


def wrong_version(what: object) -> ImportError:
    """what: in which way the installed vLLM is another than the one this is written against."""
    import vllm

    version = getattr(vllm, "__version__", "of an unknown version")
    return ImportError(
        f"vLLM {version} has other interfaces than flash_attn_jit's backend is written against: {what}; accepted: "
        f"vLLM {_WANTED}. Install it, or choose another --attention-backend, such as TRITON_ATTN"
    )


def register() -> CallCounts:
    """Makes the backend vLLM's ``CUSTOM``. Once is enough, and more often changes nothing. In a script before the
    engine is made, where the plug-in is switched off by ``VLLM_PLUGINS``::

        from flash_attn_jit.integrations import vllm
        vllm.register()
        LLM(MODEL, dtype="half", attention_backend="CUSTOM")

    The backend takes decoder, encoder and cross attention in float16 and bfloat16 with head dims 1 to 512, grouped
    heads, sliding windows, softcap, ALiBi and sinks, KV caches of the same dtype with any layout of pages of a multiple
    of 16 tokens, and full CUDA graphs of batches with one number of queries per sequence (decode, verification of
    drafts). Everything else (MLA, quantized caches, prefixes that see both ways, context parallelism, batch invariance)
    vLLM refuses with the reason when it starts.

    A full CUDA graph splits a sequence's keys as the longest that the model takes: the shorter its own text, the fewer
    of the splits have work. ``--max-model-len`` as low as it may be helps.

    Returns:
        `calls`, this process's counts: of the model's, where ``VLLM_ENABLE_V1_MULTIPROCESSING=0`` keeps it here.

    Raises:
        ImportError: there is no vLLM, or one with other interfaces; names the version that is wanted.
        RuntimeError: something else is registered as ``CUSTOM``.
    """
    import vllm  # noqa: F401  where there is none, its own error says so

    try:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        custom = AttentionBackendEnum.CUSTOM
    except (ImportError, AttributeError) as error:
        raise wrong_version(error) from error
    if custom.is_overridden() and custom.get_path() != _BACKEND:
        raise RuntimeError(
            f"vLLM's attention backend CUSTOM is {custom.get_path()}; accepted: nothing registered, or flash_attn_jit. "
            "Switch one of the two plug-ins off: VLLM_PLUGINS names those that are loaded"
        )
    register_backend(custom, _BACKEND)
    return calls


def plugin() -> None:
    """The entry point. Where register() raises this warns: an error would keep vLLM from starting with any backend."""
    try:
        register()
    except (ImportError, RuntimeError) as error:
        logging.getLogger("flash_attn_jit").warning("not registered with vLLM: %s", error)
