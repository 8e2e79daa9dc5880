"""``python -m flash_attn_jit.bench``: speed, accuracy and host cost beside PyTorch's own attention."""
