from typing import Any

ATTENTION_BACKENDS: dict[str, Any] = {}


def register_attention_backend(name):
    def decorator(fn):
        ATTENTION_BACKENDS[name] = fn
        return fn

    return decorator
