"""vLLM with these kernels, on a GPU of compute capability 7.5 or newer. Needs vllm 0.33 and a model:

    python examples/vllm_generate.py Qwen/Qwen3-0.6B

vLLM finds the backend by itself; `vllm serve MODEL --dtype half --attention-backend CUSTOM` is the same as a server.
"""

import sys

from vllm import LLM, SamplingParams

engine = LLM(sys.argv[1], dtype="half", attention_backend="CUSTOM", max_model_len=4096)
for answer in engine.generate(["A T4 is", "FlashAttention is"], SamplingParams(max_tokens=32)):
    print(answer.prompt, answer.outputs[0].text)
