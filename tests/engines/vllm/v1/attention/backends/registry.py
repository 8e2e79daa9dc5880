import importlib
from enum import Enum


class AttentionBackendEnum(Enum):
    FLASH_ATTN = "vllm.v1.attention.backends.flash_attn.FlashAttentionBackend"
    CUSTOM = None

    def get_path(self, include_classname=True):
        path = _ATTN_OVERRIDES.get(self, self.value)
        if not path:
            raise ValueError(f"nothing is registered as {self.name}")
        return path

    def get_class(self):
        module, _, name = self.get_path().rpartition(".")
        return getattr(importlib.import_module(module), name)

    def is_overridden(self):
        return self in _ATTN_OVERRIDES


_ATTN_OVERRIDES: dict[AttentionBackendEnum, str] = {}


def register_backend(backend, class_path=None, is_mamba=False):
    _ATTN_OVERRIDES[backend] = class_path
    return lambda cls: cls
