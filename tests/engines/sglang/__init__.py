"""The part of SGLang's interfaces that flash_attn_jit's backend stands on, for tests on machines without SGLang: the
names and parameters of 0.5.23, which tests/integrations/sglang compares with the wheel's sources."""

__version__ = "0.5.23"
