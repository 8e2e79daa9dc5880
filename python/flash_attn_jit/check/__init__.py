"""``python -m flash_attn_jit.check``: is it right and how fast is it on this GPU; one JSON to attach to an issue."""
