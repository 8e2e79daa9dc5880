"""vLLM's sources of the version that the backend is written against: all that it overrides, calls and reads is as the
stand-in of tests/engines has it, over which the backend itself is tested."""

import ast

import pytest
from interfaces import attributes, calls, class_of, differences, names, stand_in_modules
from wheel_sources import Wheel

VERSION = "0.33.0"

# How the stand-in does what it does.
OWN = {"AttentionBackendEnum.get_class", "_ATTN_OVERRIDES"}


@pytest.fixture(scope="module")
def wheel():
    return Wheel("vllm", VERSION)


@pytest.mark.parametrize("module", stand_in_modules("vllm"))
def test_the_stand_in_is_as_vllm(wheel, module):
    assert differences(stand_in_modules("vllm")[module].read_text(), wheel.source(module), OWN) == []


def test_the_entry_points_group(wheel):
    assert 'DEFAULT_PLUGINS_GROUP = "vllm.general_plugins"' in wheel.source("vllm.plugins")


def test_how_a_layer_makes_and_calls_its_implementation(wheel):
    source = wheel.source("vllm.model_executor.layers.attention.attention")
    (made,) = calls(source, "impl_cls")
    assert [ast.unparse(a) for a in made.args] == [
        "num_heads", "head_size", "scale", "num_kv_heads", "alibi_slopes", "sliding_window", "kv_cache_dtype",
        "logits_soft_cap", "attn_type", "kv_sharing_target_layer_name",
    ]  # fmt: skip
    assert [k.arg for k in made.keywords] == [None]  # of which sinks are for us
    (called,) = calls(source, "self.impl.forward")
    assert [ast.unparse(a) for a in called.args] == ["self", "query", "key", "value", "kv_cache", "attn_metadata"]
    assert {k.arg for k in called.keywords} == {"output", "output_scale", "output_block_scale"}
    (updated,) = calls(source, "attn_layer.impl.do_kv_cache_update")
    assert [ast.unparse(a) for a in updated.args] == ["attn_layer", "key", "value", "kv_cache", "layer_slot_mapping"]
    assert "AttentionBackendEnum[self.attn_backend.get_name()]" in source
    assert calls(source, "self.impl.process_weights_after_loading")


def test_keys_and_values_lie_side_by_side(wheel):
    """(blocks, heads, block, 2 * head_size): other backends read it as ours does."""
    for backend in ("flash_attn", "triton_attn"):
        source = wheel.source(f"vllm.v1.attention.backends.{backend}")
        assert "kv_cache.transpose(1, 2).split(self.head_size, dim=-1)" in source
    base = class_of(wheel.source("vllm.v1.attention.backend"), "AttentionBackend")
    assert "get_kv_cache_shape" not in names(base.body)


def test_what_is_read_of_vllms_objects(wheel):
    assert {"_k_scale", "_v_scale"} <= attributes(class_of(wheel.source("vllm.v1.attention.backend"), "AttentionLayer"))
    assert "max_model_len" in attributes(class_of(wheel.source("vllm.config.model"), "ModelConfig"))
    for kind in ("cross_attention", "encoder_only_attention"):
        assert ".causal = False" in wheel.source(f"vllm.model_executor.layers.attention.{kind}")


def test_windows_and_padding_are_as_the_emulation_has_them(wheel):
    assert "(sliding_window - 1, 0)" in wheel.source("vllm.v1.attention.backends.flash_attn")
    runner = wheel.source("vllm.v1.worker.gpu_model_runner")
    assert "self.query_start_loc.np[num_reqs + 1 :].fill(cu_num_tokens[-1])" in runner
    assert "self.seq_lens[num_reqs:].fill_(0)" in runner
