"""One module for each library that these kernels can stand behind. None is imported with flash_attn_jit, and each
imports its library when it is asked to register:

    from flash_attn_jit.integrations import transformers
    transformers.register()
"""
