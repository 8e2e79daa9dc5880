"""SGLang's sources of the version that the backend is written against: all that it overrides, calls and reads is as the
stand-in of tests/engines has it, over which the backend itself is tested."""

import ast
import sys

import pytest
from engine_steps import use_engine
from interfaces import attributes, class_of, differences, names, stand_in_modules
from wheel_sources import Wheel

VERSION = "0.5.23"

# How the stand-in does what it does.
OWN = {
    "AttentionBackend.forward",  # its parameters are below
    "MHATokenToKVPool.__init__",
    "SWAKVPool.__init__",
    "_parallel",
}


@pytest.fixture(scope="module")
def wheel():
    return Wheel("sglang", VERSION)


@pytest.fixture
def it(monkeypatch):
    """The emulation's engine."""
    use_engine(monkeypatch, "sglang").register()
    sys.modules.pop("sglang_engine", None)
    from sglang_engine import Engine

    yield Engine()
    for name in [name for name in sys.modules if name.partition(".")[0] in ("sglang", "sglang_engine")]:
        del sys.modules[name]


@pytest.mark.parametrize("module", stand_in_modules("sglang"))
def test_the_stand_in_is_as_sglang(wheel, module):
    assert differences(stand_in_modules("sglang")[module].read_text(), wheel.source(module), OWN) == []


def test_the_entry_points_group(wheel):
    assert 'GENERAL_PLUGINS_GROUP = "sglang.srt.plugins"' in wheel.source("sglang.srt.plugins")


def test_how_a_backend_is_chosen_and_made(wheel):
    assert "ATTENTION_BACKENDS[" in wheel.source("sglang.srt.model_executor.model_runner") + wheel.source(
        "sglang.srt.layers.attention.attention_registry"
    )


def test_what_the_backend_reads_of_sglangs_objects(wheel, it):
    """All that the emulation gives it, where SGLang has it."""
    batch = it.prepare({0: 3})[3]
    source = wheel.source("sglang.srt.model_executor.forward_batch_info")
    assert vars(batch).keys() <= attributes(class_of(source, "ForwardBatch"))
    modes = {name for name in dir(batch.forward_mode) if name.startswith("is_")}
    assert modes <= attributes(class_of(source, "ForwardMode"))
    radix = class_of(wheel.source("sglang.srt.layers.radix_attention"), "RadixAttention")
    assert vars(it.layer).keys() <= attributes(radix)
    runner = class_of(wheel.source("sglang.srt.model_executor.model_runner"), "ModelRunner")
    assert vars(it.runner()).keys() <= attributes(runner)
    config = class_of(wheel.source("sglang.srt.configs.model_config"), "ModelConfig")
    assert vars(it.runner().model_config).keys() <= attributes(config)
    assert "swa_layer_nums" in wheel.source("sglang.srt.mem_cache.swa_memory_pool")
    assert "self.is_translating" in wheel.source("sglang.srt.mem_cache.kv_index_translator")
    source = wheel.source("sglang.srt.layers.attention.triton_backend")
    assert "get_parallel().attn_dcp_size" in source
    source = wheel.source("sglang.srt.layers.attention.flashattention_backend")
    assert "get_parallel().attn_cp_size" in source


def test_arguments_of_a_layer(wheel):
    base = class_of(wheel.source("sglang.srt.layers.attention.base_attn_backend"), "AttentionBackend")
    forward = names(base.body)["forward"]
    assert isinstance(forward, ast.FunctionDef) and forward.args.kwarg is not None
    assert [a.arg for a in forward.args.args] == ["self", "q", "k", "v", "layer", "forward_batch", "save_kv_cache"]
    flash = class_of(wheel.source("sglang.srt.layers.attention.flashattention_backend"), "FlashAttentionBackend")
    extend = names(flash.body)["forward_extend"]
    assert isinstance(extend, ast.FunctionDef) and "sinks" in [a.arg for a in extend.args.args]


def test_windows_are_without_the_querys_own_place(wheel):
    source = wheel.source("sglang.srt.layers.attention.flashattention_backend")
    assert "(layer.sliding_window_size, 0 if causal else layer.sliding_window_size)" in source
