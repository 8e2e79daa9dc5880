"""``python -m flash_attn_jit.bench``: speed, accuracy, memory and host cost beside PyTorch's own attention."""
