"""Programs that import flash-attn by its name: here transformers' own attn_implementation="flash_attention_2".

as_flash_attn() comes first, before what looks for flash-attn is imported. Needs transformers and a GPU: transformers
asks for one before it takes that name.
"""

import torch

import flash_attn_jit

flash_attn_jit.as_flash_attn()

from flash_attn import __version__, flash_attn_func  # noqa: E402  the module of that name is flash_attn_jit's now

device = "cuda" if torch.cuda.is_available() else "cpu"
q = torch.randn(1, 32, 2, 64, dtype=torch.float16, device=device)
print(__version__, flash_attn_func(q, q, q, causal=True).shape)

if device == "cuda":
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = LlamaForCausalLM._from_config(config, attn_implementation="flash_attention_2", dtype=torch.float16)
    tokens = torch.randint(512, (1, 32), device=device)
    print(model.to(device)(input_ids=tokens).logits.shape)
