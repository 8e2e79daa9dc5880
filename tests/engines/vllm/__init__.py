"""The part of vLLM's interfaces that flash_attn_jit's backend stands on, for tests on machines without vLLM: the names
and parameters of 0.33.0, which tests/integrations/vllm compares with the wheel's sources."""

__version__ = "0.33.0"
