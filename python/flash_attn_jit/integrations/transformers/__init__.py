"""transformers' models on these kernels: 4.57 and 5, whatever dispatches through transformers' attention interface.

from flash_attn_jit.integrations import transformers as turing

model = AutoModelForCausalLM.from_pretrained(..., dtype=torch.float16, attn_implementation=turing.register())
...
print(turing.calls)         # how many calls ran here

"""

from transformers import AttentionInterface, AttentionMaskInterface

from ...errors import Refusal
from ._attention import calls, turing_attention
from ._masks import turing_mask
from ._models import let_batches_be_continuous, names, watch_models

__all__ = ["calls", "register"]


def register(name: str = "turing") -> str:
    """Makes ``attn_implementation=name`` run on these kernels."""
    if "flash" in name:
        advice = "transformers 5 takes such names for packages and kernels that it has to load"
        raise Refusal("name", f"is {name!r}", "a name without 'flash'", advice).exception()
    names.add(name)
    watch_models()
    let_batches_be_continuous()
    AttentionInterface.register(name, turing_attention)
    AttentionMaskInterface.register(name, turing_mask)
    return name
