"""transformers' models on these kernels: of 4.57 and 5, whatever calls transformers' attention interface.

from flash_attn_jit.integrations import transformers as turing

model = AutoModelForCausalLM.from_pretrained(..., dtype=torch.float16, attn_implementation=turing.register())
...
print(turing.calls)         # how many calls ran here, and how many in PyTorch and why
"""

from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface

from ...errors import Refusal
from ._attention import calls, turing_attention
from ._masks import turing_mask
from ._models import let_batches_be_continuous, names, watch_models

__all__ = ["calls", "register"]


def register(name: str = "turing") -> str:
    """Gives transformers an attention implementation of that name, for ``from_pretrained(attn_implementation=name)``,
    ``model.set_attn_implementation(name)`` and configs, in the whole process. May be called again.

    Runs here: padding on either side and holes in it; windows; softcap; sinks; dropout; position bias; chunks, images'
    tokens and other masks that are made for all pairs; caches that grow, slide or are static; packed sequences, by
    ``position_ids`` that begin anew or by ``cu_seq_lens_q``; checkpoints; continuous batching (of transformers 5);
    ``torch.compile(fullgraph=True)``; value head dims other than the keys', both to 256. A query that sees no key, as
    one of padding, has out 0.

    What goes beside it: a padding mask costs no copy and no wait. Waits for the device, once in a forward pass, are
    made for packed sequences (to learn whether there are some in a training pass without an ``attention_mask``, or a
    pass of a batch of 1 over several tokens) and for padding that goes into a static cache. While torch.compile traces,
    a pass without a cache and without an ``attention_mask`` has a mask for all pairs, as it has with ``sdpa``, because
    there may be packed sequences: give an ``attention_mask`` of ones, which costs less. Positions that begin anew in a
    pass that fills a cache are then not seen. Nor are they, as with transformers' own implementations, where a cache is
    filled by a batch of several rows, by layers with a mask for all pairs or by models that do not tell their layers
    the ``position_ids``: give ``use_cache=False`` where packed sequences are evaluated.

    What it replaces in transformers: ``PreTrainedModel.get_correct_attn_implementation``, to look at models that are
    made with such a name, and ``ContinuousBatchingManager.switch_to_cb_friendly_attn``, which refuses all names but its
    own. Other implementations run as before.

    ``calls`` counts what ran here, and in PyTorch with the reason: head dims over 512, over 256 with gradients or
    where value's is another than query's, which are an error with softcap, sinks or packed sequences. Calls in compiled
    graphs are not counted.

    Args:
        name: without "flash": transformers takes such names for packages and kernels that it has to load.

    Returns:
        name.

    Raises:
        ValueError: a name with "flash", or that another implementation has. When a model is made: its layers do not
            call the interface, as those of BERT and T5 in transformers 4.57. In a forward pass: an argument that does
            not fit.
        UnsupportedError: a ValueError for float32 models: load them with ``dtype=torch.float16`` or bfloat16, or train
            them under ``torch.autocast``. Layers of float32 in a model of these, as PEFT's norms, are cast.
        NotImplementedError: ``output_attentions``, head masks, sparse attention's indices, sinks of each query,
            position bias with packed sequences, continuous batching of transformers 4.57.
    """
    _check_name(name)
    names.add(name)
    watch_models()
    let_batches_be_continuous()
    AttentionInterface.register(name, turing_attention)
    AttentionMaskInterface.register(name, turing_mask)
    return name


def _check_name(name: Any) -> None:
    accepted, advice = "a name of its own, without 'flash'", ""
    if isinstance(name, str) and "flash" in name:
        advice = "transformers 5 takes such names for packages and kernels that it has to load"
    elif not isinstance(name, str) or not name:
        pass
    elif name == "eager" or (name not in names and name in AttentionInterface().valid_keys()):
        advice = "Another implementation has that name, which would be replaced for the whole process"
    else:
        return
    raise Refusal("name", f"is {name!r}", accepted, advice).exception()
