"""Callers find out what is supported by reading signatures and probing for names."""

import importlib.metadata
import inspect

import pytest

import flash_attention_interface
import flash_attn_jit

# Of flash-attn 2's interface, in its order and with its defaults.
OPTIONS = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
}
LENGTHS = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
FUNCTIONS = {
    "flash_attn_func": (["q", "k", "v"], OPTIONS),
    "flash_attn_kvpacked_func": (["q", "kv"], OPTIONS),
    "flash_attn_qkvpacked_func": (["qkv"], OPTIONS),
    "flash_attn_varlen_func": (["q", "k", "v", *LENGTHS], {**OPTIONS, "block_table": None}),
    "flash_attn_varlen_kvpacked_func": (["q", "kv", *LENGTHS], OPTIONS),
    "flash_attn_varlen_qkvpacked_func": (["qkv", "cu_seqlens", "max_seqlen"], OPTIONS),
}
# Of ssiu/flash-attention-turing.
REFERENCE_OPTIONS = {"softmax_scale": None, "causal": False}

KVCACHE_OPTIONS = {
    "k": None,
    "v": None,
    "rotary_cos": None,
    "rotary_sin": None,
    "cache_seqlens": None,
    "cache_batch_idx": None,
    "cache_leftpad": None,
    "block_table": None,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "rotary_interleaved": True,
    "alibi_slopes": None,
    "num_splits": 0,
    "return_softmax_lse": False,
}


# Ours, by keyword alone; the first of them are every function's.
KEYWORDS = ["attn_bias", "s_aux"]


def check_signature(function, required, defaults):
    parameters = inspect.signature(function).parameters
    positional = [name for name, each in parameters.items() if each.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert positional == [*required, *defaults]
    for name in positional:
        parameter = parameters[name]
        assert parameter.default == defaults.get(name, inspect.Parameter.empty)
        assert parameter.kind == inspect.Parameter.POSITIONAL_OR_KEYWORD


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    check_signature(getattr(flash_attn_jit, name), *FUNCTIONS[name])


@pytest.mark.parametrize("name", [*FUNCTIONS, "flash_attn_with_kvcache"])
def test_keywords_of_every_function(name):
    parameters = inspect.signature(getattr(flash_attn_jit, name)).parameters.values()
    keywords = [each for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY]
    assert [each.name for each in keywords[: len(KEYWORDS)]] == KEYWORDS
    assert all(each.default is None for each in keywords[: len(KEYWORDS)])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_the_reference_project(name):
    check_signature(getattr(flash_attention_interface, name), FUNCTIONS[name][0], REFERENCE_OPTIONS)


def test_the_reference_module_exports_its_six_functions():
    assert sorted(flash_attention_interface.__all__) == sorted(FUNCTIONS)


def test_sdpa():
    torchs = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}
    check_signature(flash_attn_jit.sdpa, ["query", "key", "value"], torchs)


@pytest.mark.parametrize("name", [*FUNCTIONS, "flash_attn_with_kvcache"])
def test_documentation_names_every_argument(name):
    text = inspect.getdoc(getattr(flash_attn_jit, name))
    assert "{" not in text
    for argument in inspect.signature(getattr(flash_attn_jit, name)).parameters:
        assert f"\n    {argument}: " in text


def test_the_cache():
    check_signature(flash_attn_jit.flash_attn_with_kvcache, ["q", "k_cache", "v_cache"], KVCACHE_OPTIONS)


def test_exports_exist():
    assert [name for name in flash_attn_jit.__all__ if not hasattr(flash_attn_jit, name)] == []


def test_version_is_the_distributions():
    assert flash_attn_jit.__version__ == importlib.metadata.version("flash-attn-jit")


def test_error_classes():
    assert issubclass(flash_attn_jit.UnsupportedError, ValueError)
    for name in ("CompileError", "ConfigError", "DriverError", "InterpreterError", "MissingKernelError"):
        assert issubclass(getattr(flash_attn_jit, name), RuntimeError)
