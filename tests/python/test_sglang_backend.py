"""The attention backend for SGLang, over a stand-in of SGLang's interfaces (tests/engines): batches as SGLang's model
runner makes them, against float64, and what is refused."""

import sys
from typing import Any

import pytest
import torch
from engine_steps import use_engine

LAYERS: dict[str, dict[str, Any]] = {
    "pages of one": {},
    "pages of 16": {"page_size": 16},
    "one head of keys, pages of 4": {"heads_k": 1, "page_size": 4},
    "window": {"sliding_window_size": 6},
    "window with its own pool": {"sliding_window_size": 6, "window_pool": True},
    "window with its own pool, pages of 16": {"sliding_window_size": 20, "window_pool": True, "page_size": 16},
    "softcap": {"logit_cap": 5.0},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.bfloat16)},
}


@pytest.fixture
def sglang(monkeypatch):
    module = use_engine(monkeypatch, "sglang")
    sys.modules.pop("sglang_engine", None)
    module.register()
    module.calls.reset()
    yield module
    sys.modules.pop("sglang_engine", None)
    for name in [name for name in sys.modules if name.partition(".")[0] == "sglang"]:
        del sys.modules[name]


def engine(**options: Any) -> Any:
    from sglang_engine import Engine

    return Engine(**options)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_steps(sglang, layer):
    """Prompts, one of them in chunks and one behind a prefix, mixed batches, decode."""
    it = engine(**layer)
    it.step({0: 20, 1: 7})
    it.step({2: 18, 1: 4}, "EXTEND")
    it.step({2: 13, 0: 1, 1: 1}, "MIXED")
    it.step({0: 1, 1: 1, 2: 1}, "DECODE")
    assert sglang.calls.counts == {"flash_attn_jit": 4, "SGLang": 0}


@pytest.mark.parametrize("layer", [LAYERS["pages of 16"], LAYERS["window with its own pool"]], ids=["16", "window"])
def test_one_graph_serves_every_later_length(sglang, layer):
    """What a graph would hold: the metadata of its capture, which is filled before every replay."""
    it = engine(**layer)
    it.backend.init_cuda_graph_state(6, 6)
    it.step({0: 40, 1: 3})
    q, k, v, batch = it.prepare({0: 1, 1: 1}, "DECODE", 3)
    it.backend.init_forward_metadata_out_graph(batch, in_capture=True)
    it.backend.init_forward_metadata_in_graph(batch)
    captured = it.backend.forward_metadata
    assert captured.longest_k == it.longest and captured.longest_q == 1
    it.check({0: 1, 1: 1}, q, it.run(q, k, v, batch))
    for new in ({0: 1, 1: 1}, {0: 1}, {1: 1, 0: 1}):
        q, k, v, batch = it.prepare(new, "DECODE", 3)
        it.backend.init_forward_metadata_out_graph(batch)
        assert it.backend.forward_metadata is captured
        it.check(new, q, it.run(q, k, v, batch))


@pytest.mark.parametrize("kind", ["ENCODER_ONLY", "DECODER_BIDIRECTIONAL"])
@pytest.mark.parametrize("window", [-1, 4])
def test_layers_that_see_both_ways(sglang, kind, window):
    from sglang.srt.layers.radix_attention import AttentionType

    it = engine(attn_type=AttentionType[kind], sliding_window_size=window)
    it.step({0: 19, 1: 3}, causal=False, window_size=(window, window))


def test_outputs_and_keys_that_are_given_elsewhere(sglang):
    it = engine()
    it.step({0: 20})
    q, k, v, batch = it.prepare({0: 1}, "DECODE")
    it.backend.init_forward_metadata(batch)
    batch._attn_output = torch.zeros(1, 4 * 32, dtype=torch.float16)
    out = it.run(q, k, v, batch)
    assert out.data_ptr() == batch._attn_output.data_ptr()
    it.check({0: 1}, q, out)
    again = it.run(q, None, None, batch)
    assert torch.equal(again, out)
    keys, _ = it.pool.get_kv_buffer(0)
    before = keys.clone()
    it.run(q, k * 2, v, batch, save_kv_cache=False)
    assert torch.equal(keys.nan_to_num(), before.nan_to_num())


def test_a_rank_without_work(sglang):
    it = engine()
    q, k, v, batch = it.prepare({}, "IDLE")
    it.backend.init_forward_metadata(batch)
    assert it.run(q, k, v, batch).shape[0] == 0


REFUSED_LAYERS: dict[str, dict[str, Any]] = {
    "a layer is cross attention": {"is_cross_attention": True},
    "a layer attends to chunks": {"use_irope": True},
    "xai_temperature_len is 512": {"xai_temperature_len": 512},
    "attn_type is 'new'": {"attn_type": "new"},
    "logit_capping_method is 'other'": {"logit_cap": 3.0, "logit_capping_method": "other"},
}


@pytest.mark.parametrize("message", REFUSED_LAYERS)
def test_layers_that_are_refused(sglang, message):
    it = engine()
    q, k, v, batch = it.prepare({0: 3})
    it.backend.init_forward_metadata(batch)
    vars(it.layer).update(REFUSED_LAYERS[message])
    with pytest.raises(NotImplementedError, match=f"{message}.*another --attention-backend"):
        it.backend.forward(q, k, v, it.layer, batch)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_mla_backend": True}, "multi-head latent attention"),
        ({"kv_cache_dtype": torch.float8_e5m2}, "the KV cache has dtype torch.float8_e5m2"),
    ],
)
def test_models_that_are_refused(sglang, changes, message):
    from flash_attn_jit.integrations.sglang._backend import FlashAttnJitBackend

    it = engine()
    runner = it.runner(**changes)
    with pytest.raises(NotImplementedError, match=f"{message}.*another --attention-backend"):
        FlashAttnJitBackend(runner)


def test_more_models_that_are_refused(sglang):
    from sglang.srt.runtime_context import get_parallel

    from flash_attn_jit.integrations.sglang._backend import FlashAttnJitBackend

    it = engine()
    runner = it.runner()
    runner.model_config.is_encoder_decoder = True
    with pytest.raises(NotImplementedError, match="the model has cross attention"):
        FlashAttnJitBackend(runner)
    runner.model_config.is_encoder_decoder = False
    runner.kv_index_translator.is_translating = True
    with pytest.raises(NotImplementedError, match="memory is unified"):
        FlashAttnJitBackend(runner)
    runner.kv_index_translator.is_translating = False
    get_parallel().attn_dcp_size = 2
    with pytest.raises(NotImplementedError, match="contexts are spread over GPUs"):
        FlashAttnJitBackend(runner)


def test_batches_that_are_refused(sglang):
    it = engine()
    it.backend.init_cuda_graph_state(4, 4)
    _, _, _, batch = it.prepare({0: 3})
    with pytest.raises(NotImplementedError, match=r"a CUDA graph of a prompt.*graphs of decode"):
        it.backend.init_forward_metadata_out_graph(batch, in_capture=True)
    batch.spec_info = object()
    with pytest.raises(NotImplementedError, match="decoding is speculative"):
        it.backend.init_forward_metadata(batch)
    _, _, _, batch = it.prepare({1: 3}, "DLLM_EXTEND")
    with pytest.raises(NotImplementedError, match="forward_mode DLLM_EXTEND"):
        it.backend.init_forward_metadata(batch)


def test_arguments_that_are_refused(sglang):
    it = engine()
    q, k, v, batch = it.prepare({0: 3})
    it.backend.init_forward_metadata(batch)
    for name, value in {"k_rope": torch.ones(1), "return_lse": True, "score_mod": max}.items():
        with pytest.raises(NotImplementedError, match=f"{name} is given.*None"):
            it.backend.forward(q, k, v, it.layer, batch, **{name: value})
    it.backend.forward(q, k, v, it.layer, batch, k_rope=None, return_lse=False)


def test_registering_again_changes_nothing(sglang):
    from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    before = dict(ATTENTION_BACKENDS)
    assert sglang.register() is sglang.calls
    assert before == ATTENTION_BACKENDS and ATTENTION_BACKEND_CHOICES.count("flash_attn_jit") == 1


def test_another_sglang_names_the_version_that_is_wanted(sglang, monkeypatch):
    monkeypatch.setitem(sys.modules, "sglang.srt.mem_cache.layout.paged_view", None)
    monkeypatch.delitem(sys.modules, "flash_attn_jit.integrations.sglang._backend", raising=False)
    with pytest.raises(ImportError, match=r"SGLang 0.5.23 has other interfaces .*; accepted: SGLang 0.5.23\. .*triton"):
        engine()
    monkeypatch.setitem(sys.modules, "sglang.srt.arg_groups.choices", None)
    with pytest.raises(ImportError, match=r"accepted: SGLang 0\.5\.23"):
        sglang.register()
