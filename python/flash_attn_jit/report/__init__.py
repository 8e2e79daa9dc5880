"""``python -m flash_attn_jit.report``: a page that shows what tuning tried and why the winners won."""
