"""The module ``flash_attn``, version 2, on flash_attn_jit, whose files its submodules are."""

from flash_attn_jit.integrations import flash_attn_module as _files
from flash_attn_jit.integrations.flash_attn import refuse_other_submodules
from flash_attn_jit.integrations.flash_attn_module import *  # noqa: F403
from flash_attn_jit.integrations.flash_attn_module import __all__ as __all__

__path__ = _files.__path__
refuse_other_submodules()

from . import bert_padding, flash_attn_interface  # noqa: E402, F401  found by what stands above
