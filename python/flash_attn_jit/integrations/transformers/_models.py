"""What a model's own code does with an attention implementation: read when the model is made, before its first call."""

import functools
import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

import transformers
from transformers import PreTrainedModel

from ...errors import Refusal

names: set[str] = set()  # registered ones

# Configs of models that need whole masks.
whole_masks: set[type] = set()

_ATTENTION_CLASS = re.compile(r"^class \w*Attention\w*\(nn\.Module\):", re.MULTILINE)
_DISPATCH = "ALL_ATTENTION_FUNCTIONS"
_MAKES_WINDOWS = re.compile(r"create_(bidirectional_)?sliding_window(_causal)?_mask\(")
_TELLS_LAYERS_WINDOWS = "sliding_window="
_WORKS_ON_MASKS = re.compile(r"allow_is_(causal|bidirectional)_skip|mask\.dtype == torch\.bool|mask = torch\.cat\(")


def look_at(model: PreTrainedModel, name: str) -> None:
    """Refuses a model whose layers do not call the attention interface, which would run something else or fail in
    transformers. Remembers one whose layers do not make of masks what _kinds has them say."""
    source = _source_of(type(model).__module__)
    if source is not None and _ATTENTION_CLASS.search(source) and _DISPATCH not in source:
        came = f"is {name!r}, and {type(model).__name__} of transformers {transformers.__version__} does not call it"
        advice = (
            'Use a newer transformers, or attn_implementation="sdpa" inside of flash_attn_jit.route_sdpa(), which runs '
            'its calls here, or "eager" where the model has no "sdpa". Of a model of several parts only the one that '
            f'is named: attn_implementation={{"text_config": "{name}", "vision_config": "sdpa"}}'
        )
        accepted = "models whose layers call transformers' AttentionInterface"
        raise Refusal("attn_implementation", came, accepted, advice).exception()
    if source is None or _WORKS_ON_MASKS.search(source) or _has_windows_of_its_own(source):
        whole_masks.add(type(model.config))


def _has_windows_of_its_own(source: str) -> bool:
    return _MAKES_WINDOWS.search(source) is not None and _TELLS_LAYERS_WINDOWS not in source


@functools.cache
def _source_of(module: str) -> str | None:
    try:
        return inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return None


def watch_models() -> None:
    """Has every model that is made with a registered name looked at, or is given one later."""
    theirs = PreTrainedModel.get_correct_attn_implementation
    if getattr(theirs, "_looks_for_flash_attn_jit", False):
        return

    @functools.wraps(theirs)
    def get_correct_attn_implementation(self: Any, requested_attention: str | None, *args: Any, **options: Any) -> Any:
        if requested_attention in names:
            look_at(self, requested_attention)
        return theirs(self, requested_attention, *args, **options)

    replacement: Any = get_correct_attn_implementation
    replacement._looks_for_flash_attn_jit = True
    PreTrainedModel.get_correct_attn_implementation = replacement


def let_batches_be_continuous() -> None:
    """transformers 5 asks for "flash" in the names that it takes for continuous batching, where such names would have
    to be of packages and kernels that it loads."""
    try:
        from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
    except ImportError:
        return
    theirs: Callable[..., None] | None = getattr(ContinuousBatchingManager, "switch_to_cb_friendly_attn", None)
    if theirs is None or getattr(theirs, "_knows_flash_attn_jit", False):
        return
    switch: Callable[..., None] = theirs

    @functools.wraps(switch)
    def switch_to_cb_friendly_attn(self: Any, model: Any, *args: Any, **options: Any) -> None:
        if model.config._attn_implementation not in names:
            switch(self, model, *args, **options)

    replacement: Any = switch_to_cb_friendly_attn
    replacement._knows_flash_attn_jit = True
    ContinuousBatchingManager.switch_to_cb_friendly_attn = replacement
