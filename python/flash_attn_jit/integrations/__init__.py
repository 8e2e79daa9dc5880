"""One module for each library that these kernels can stand behind. None is imported with flash_attn_jit, nor imports
its library before it is itself imported or asked to register:

    from flash_attn_jit.integrations import transformers as turing
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation=turing.register())

| module | behind what |
| --- | --- |
| transformers | ``attn_implementation=``: register() gives the name |
| diffusers | ``set_attention_backend()``: register() gives the name |
| comfyui | the node of examples/comfyui |
| xformers | ``xformers.ops.memory_efficient_attention`` |
| sdpa | ``torch.nn.functional.scaled_dot_product_attention``, in the whole process |
| torch_attention | torch's registry of flash attention, ``torch.nn.attention.varlen`` |
| vllm, sglang | the engines' ``--attention-backend``, which find these by entry points |
| flash_attn | ``flash_attn_jit.as_flash_attn()`` |

Each counts: ``calls`` of the module, a ``CallCounts``; of sdpa what register() returns.
"""
