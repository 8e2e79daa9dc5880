"""A LoRA fine-tuning step as it fits on 16 GB: float16 weights, float32 adapters, autocast, checkpointed layers, a
padded batch. Needs transformers and peft. Weights are random, so that nothing is downloaded."""

import torch
from peft import LoraConfig, get_peft_model
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
model = LlamaForCausalLM._from_config(config, attn_implementation=turing.register(), dtype=torch.float16).to(device)
model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
model.gradient_checkpointing_enable({"use_reentrant": False})
model.enable_input_require_grads()
adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
for parameter in adapters:
    parameter.data = parameter.data.float()

tokens = torch.randint(3, 512, (2, 16), device=device)
mask = torch.ones_like(tokens)
mask[1, 10:] = 0
labels = tokens.masked_fill(mask == 0, -100)
optimizer = torch.optim.AdamW(adapters, lr=1e-3)
scaler = torch.amp.GradScaler(device, enabled=device == "cuda")
for _ in range(2):
    with torch.autocast(device, torch.float16):
        loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    print(f"loss {loss.item():.4f}")
print(turing.calls)
