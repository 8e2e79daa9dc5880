"""attn_implementation="flash_attention_2" by as_flash_attn(), beside transformers' eager attention in float32. Each
test in a process of its own: what is found by flash-attn's name stays found."""

import importlib.metadata
import subprocess
import sys

import pytest

VERSION = int(importlib.metadata.version("transformers").split(".")[0])

# transformers asks for a GPU before it asks for flash-attn.
BEGINNING = """
import torch
torch.cuda.is_available, torch.version.cuda = lambda: True, "12.8"
import flash_attn_jit
from flash_attn_jit import _core

calls, core_forward = [], _core.forward
_core.forward = lambda *arguments: calls.append(1) or core_forward(*arguments)
"""
AS_FLASH_ATTN = "flash_attn_jit.as_flash_attn()\nimport transformers\n"
ASKED_BEFORE = """
import transformers
from transformers import LlamaForCausalLM
from transformers.utils import is_flash_attn_2_available
assert not is_flash_attn_2_available()
flash_attn_jit.as_flash_attn()
assert is_flash_attn_2_available()
import sys
from flash_attn import flash_attn_varlen_func
paged = sys.modules.get("transformers.integrations.flash_paged")
assert getattr(paged, "FLASH_ATTN_VARLEN_FUNC", flash_attn_varlen_func) is flash_attn_varlen_func
"""
MODELS = """
import copy
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

SHAPE = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, head_dim=32, max_position_embeddings=64, pad_token_id=0)
llama = LlamaForCausalLM, LlamaConfig(**SHAPE)
gemma2 = Gemma2ForCausalLM, Gemma2Config(**SHAPE, sliding_window=8, query_pre_attn_scalar=8, attn_logit_softcapping=5.0,
                                         attention_dropout=0.0)

def make(model, implementation, dtype):
    kind, config = model
    torch.manual_seed(0)
    made = kind._from_config(copy.deepcopy(config), attn_implementation=implementation, dtype=torch.float32)
    for parameter in made.parameters():  # such that attention weighs something
        if parameter.dim() == 2:
            torch.nn.init.xavier_normal_(parameter)
    return made.to(dtype)

torch.manual_seed(1)
ids = torch.randint(3, 64, (2, 14))
mask = torch.ones_like(ids)

def run(model, **inputs):
    made = model(input_ids=ids, **inputs).logits
    shown = made if inputs.get("attention_mask") is None else made * inputs["attention_mask"][..., None]
    loss = shown.float().square().mean()
    loss.backward()
    gradient = model.model.layers[0].self_attn.q_proj.weight.grad
    return shown.detach().float(), gradient.float()

def error(got, exact):
    return ((got - exact).abs().max() / exact.abs().max()).item()

def check(model, **inputs):
    exact = run(make(model, "eager", torch.float32), **inputs)
    eager = run(make(model, "eager", torch.float16), **inputs)
    del calls[:]
    found = run(make(model, "flash_attention_2", torch.float16), **inputs)
    assert len(calls) == 2, calls
    for got, theirs, right in zip(found, eager, exact):
        assert right.abs().max() > 0
        assert error(theirs, right) < 2e-2  # else it is no bound
        assert error(got, right) <= 3 * error(theirs, right) + 2e-3, (error(got, right), error(theirs, right))
"""


def check_runs(*code):
    done = subprocess.run([sys.executable, "-c", "\n".join(code)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.mark.sample
def test_padding():
    check_runs(
        BEGINNING,
        AS_FLASH_ATTN,
        MODELS,
        "mask[1, :5] = 0\ncheck(llama, attention_mask=mask)\ncheck(gemma2, attention_mask=mask)\n"
        "mask[1, :5], mask[1, -4:] = 1, 0\ncheck(llama, attention_mask=mask)\ncheck(gemma2, attention_mask=mask)",
    )


def test_without_padding_where_transformers_has_asked_before():
    check_runs(BEGINNING, ASKED_BEFORE, MODELS, "check(llama)\ncheck(gemma2)")


def test_packed_sequences():
    check_runs(
        BEGINNING,
        AS_FLASH_ATTN,
        MODELS,
        "two = torch.cat([torch.arange(6), torch.arange(8)])[None]\n"
        "flash, eager = make(llama, 'flash_attention_2', torch.float16), make(llama, 'eager', torch.float32)\n"
        "with torch.no_grad():\n"
        "    packed = flash(input_ids=ids[:1], position_ids=two).logits\n"
        "    parts = [eager(input_ids=part).logits for part in (ids[:1, :6], ids[:1, 6:])]\n"
        "assert len(calls) == 2\n"
        "assert error(packed.float(), torch.cat(parts, 1)) < 2e-2, error(packed.float(), torch.cat(parts, 1))",
    )


def test_generate():
    check_runs(
        BEGINNING,
        AS_FLASH_ATTN,
        MODELS,
        "options = dict(max_new_tokens=4, do_sample=False)\nmask[1, :5] = 0\n"
        "inputs = dict(input_ids=ids, attention_mask=mask)\n"
        "expected = make(llama, 'eager', torch.float32).generate(**inputs, **options)\n"
        "found = make(llama, 'flash_attention_2', torch.float16).generate(**inputs, **options)\n"
        "assert len(calls) == 2 * 4\n"
        "assert torch.equal(found, expected), (found, expected)",
    )


def test_continuous_batching():
    if VERSION < 5:
        pytest.skip("transformers 4 has it for other names")
    check_runs(
        BEGINNING,
        AS_FLASH_ATTN,
        MODELS,
        "torch.cuda.is_available = lambda: False  # else graphs\n"
        "empty = torch.empty\n"
        "torch.empty = lambda *shape, pin_memory=False, **options: empty(*shape, **options)  # only a GPU can pin\n"
        "options = transformers.GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=63, pad_token_id=0)\n"
        "prompts = [ids[0, :length].tolist() for length in (5, 9, 14)]\n"
        "model, eager = make(llama, 'flash_attention_2', torch.float16), make(llama, 'eager', torch.float32)\n"
        "small = transformers.ContinuousBatchingConfig(page_size=32, num_blocks=4, max_batch_tokens=32)\n"
        "results = model.generate_batch(prompts, options, small, warmup=False)\n"
        "assert calls and len(results) == 3\n"
        "for prompt, (_, result) in zip(prompts, sorted(results.items())):\n"
        "    expected = eager.generate(input_ids=torch.tensor([prompt]), generation_config=options)[0, len(prompt):]\n"
        "    assert result.generated_tokens == expected.tolist(), (result.generated_tokens, expected)",
    )


def test_a_model_that_asks_for_more_of_flash_attn():
    check_runs(
        BEGINNING,
        AS_FLASH_ATTN,
        "try:\n    from transformers import ModernBertModel\n    error = ''\n"
        "except ImportError as wrapped:\n    error = str(wrapped.__cause__)\n"
        f"assert ('flash_attn.layers is not there' in error) == ({VERSION} < 5), error",
    )
