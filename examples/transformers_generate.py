"""Text generation with prompts of different lengths, padded on the left. Needs transformers.

Weights are random, so that nothing is downloaded; with yours the two lines that matter are the same:
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation=turing.register(), dtype=torch.float16)
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flash_attn_jit.integrations import transformers as turing

device = "cuda" if torch.cuda.is_available() else "cpu"
config = LlamaConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)
torch.manual_seed(0)
model = LlamaForCausalLM._from_config(config, attn_implementation=turing.register(), dtype=torch.float16)
model = model.to(device).eval()

prompts = torch.randint(3, 512, (2, 12), device=device)
mask = torch.ones_like(prompts)
mask[1, :5] = 0  # the second prompt is shorter
tokens = model.generate(input_ids=prompts, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
print(tokens[:, 12:].tolist())
print(turing.calls)
