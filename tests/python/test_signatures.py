"""Callers find out what is supported by reading signatures and probing for names."""

import importlib.metadata
import inspect

import flash_attn_jit

# Of flash-attn 2's interface, in its order and with its defaults.
FLASH_ATTN_FUNC = {
    "q": inspect.Parameter.empty,
    "k": inspect.Parameter.empty,
    "v": inspect.Parameter.empty,
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
}

NOT_BUILT = [
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]


def test_flash_attn_func():
    parameters = inspect.signature(flash_attn_jit.flash_attn_func).parameters
    assert {name: parameter.default for name, parameter in parameters.items()} == FLASH_ATTN_FUNC
    assert list(parameters) == list(FLASH_ATTN_FUNC)
    assert {parameter.kind for parameter in parameters.values()} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


def test_what_is_not_built_is_not_exported():
    assert [name for name in NOT_BUILT if hasattr(flash_attn_jit, name)] == []


def test_exports_exist():
    assert [name for name in flash_attn_jit.__all__ if not hasattr(flash_attn_jit, name)] == []


def test_version_is_the_distributions():
    assert flash_attn_jit.__version__ == importlib.metadata.version("flash-attn-jit")


def test_error_classes():
    assert issubclass(flash_attn_jit.UnsupportedError, ValueError)
    for name in ("CompileError", "ConfigError", "DriverError", "InterpreterError", "MissingKernelError"):
        assert issubclass(getattr(flash_attn_jit, name), RuntimeError)
