"""SGLang with these kernels, on a GPU of compute capability 7.5 or newer. Needs sglang 0.5.23 and a model:

    python examples/sglang_generate.py Qwen/Qwen3-0.6B

SGLang finds the backend by itself; as a server: `python -m sglang.launch_server --model MODEL --dtype half
--attention-backend flash_attn_jit --page-size 16`.
"""

import sys

import sglang

if __name__ == "__main__":  # SGLang starts processes that import this file again
    engine = sglang.Engine(
        model_path=sys.argv[1], dtype="half", attention_backend="flash_attn_jit", page_size=16, context_length=4096
    )
    prompts = ["A T4 is", "FlashAttention is"]
    for prompt, answer in zip(prompts, engine.generate(prompts, {"max_new_tokens": 32})):
        print(prompt, answer["text"])
