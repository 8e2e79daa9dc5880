"""The attention backend for vLLM, over a stand-in of vLLM's interfaces (tests/engines): batches as vLLM's model runner
makes them, against float64, and what the plug-in does where vLLM is another."""

import importlib.metadata
import inspect
import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import run_python
from engine_steps import ENGINES, use_engine

SLOPES = [0.5, 0.25, 0.125, 0.0625]
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one head of keys, tokens before heads": {"heads_k": 1, "heads_first": False},
    "no groups, blocks of 32, head dim 20": {"heads_k": 4, "block_size": 32, "head_dim": 20},
    "window": {"sliding_window": 9},
    "softcap": {"logits_soft_cap": 5.0},
    "alibi": {"alibi_slopes": SLOPES},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float16)},
    "window, softcap and sinks in tokens before heads": {
        "sliding_window": 17,
        "logits_soft_cap": 9.0,
        "sinks": torch.tensor([1.0, 0.0, -2.0, 3.0]),
        "heads_first": False,
    },
}


@pytest.fixture
def vllm(monkeypatch):
    module = use_engine(monkeypatch, "vllm")
    monkeypatch.delitem(sys.modules, "vllm_engine", raising=False)
    module.register()
    module.calls.reset()
    yield module
    sys.modules.pop("vllm_engine", None)
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        del sys.modules[name]


def engine(*arguments: Any, **options: Any) -> Any:
    from vllm_engine import Engine

    return Engine(*arguments, **options)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_steps(vllm, layer):
    """Prompts, one of them in chunks, with decoding sequences among them; padded batches at last."""
    it = engine(**layer)
    it.step({0: 20, 1: 7})
    it.step({0: 1, 2: 18, 1: 1})
    it.step({2: 13, 0: 1, 3: 1}, rows=20)
    it.step({0: 1, 1: 1, 2: 1, 3: 1}, rows=6, requests=6)
    it.step({3: 2, 0: 2}, rows=8, requests=4)
    assert vllm.calls.counts == {"flash_attn_jit": 5, "vLLM": 0}


def test_one_graph_serves_every_later_length(vllm):
    """What a graph would hold: the metadata of its capture, which later batches write into."""
    it = engine()
    it.step({0: 60, 1: 3})
    q, k, v, output, captured = it.prepare({0: 1, 1: 1}, requests=3, rows=3, capture=True)
    assert captured.max_seq_len == it.longest and captured.max_query_len == 1
    it.run(q, k, v, output, captured)
    for new in ({0: 1, 1: 1}, {2: 1, 0: 1, 1: 1}, {1: 1}):
        before = captured.seq_lens.data_ptr(), captured.block_table.data_ptr(), captured.query_start_loc.data_ptr()
        q, k, v, output, metadata = it.prepare(new, requests=3, rows=3)
        after = metadata.seq_lens.data_ptr(), metadata.block_table.data_ptr(), metadata.query_start_loc.data_ptr()
        assert before == after
        it.run(q, k, v, output, captured)
        it.check(new, q, output)


def test_a_kv_cache_group_that_differs_in_its_blocks_alone(vllm):
    it = engine()
    metadata = it.prepare({0: 17})[-1]
    moved = metadata.block_table.flip(1).contiguous()
    changed = it.builder.update_block_table(metadata, moved, metadata.slot_mapping)
    assert changed.block_table is moved and metadata.block_table is not moved
    assert changed.seq_lens is metadata.seq_lens and changed.max_query_len == 17


@pytest.mark.parametrize("window", [None, 5])
def test_encoders_read_no_cache(vllm, window):
    from vllm.v1.attention.backend import AttentionType

    for kind in (AttentionType.ENCODER_ONLY, AttentionType.ENCODER):
        it = engine(attn_type=kind, sliding_window=window)
        new = {0: 19, 1: 3, 2: 8}
        q, k, v, output, metadata = it.prepare(new, rows=33, causal=False)
        it.run(q, k, v, output, metadata)
        it.check(new, q, output, causal=False, window_size=(-1, -1) if window is None else (4, 4))
        assert it.kv_cache.isnan().all()


@pytest.mark.parametrize("window", [None, 5])
def test_decoders_that_see_both_ways(vllm, window):
    """Cross attention, and drafts that are made at once."""
    it = engine(sliding_window=window)
    it.step({0: 20, 1: 4})
    new = {0: 3, 1: 5}
    q, k, v, output, metadata = it.prepare(new, causal=False)
    it.run(q, k, v, output, metadata)
    it.check(new, q, output, causal=False, window_size=(-1, -1) if window is None else (4, 4))


def test_keys_that_are_written_elsewhere(vllm):
    """A layer that shares another's cache, or whose keys a fused operator has written, gets none."""
    it = engine()
    it.step({0: 20})
    q, k, v, output, metadata = it.prepare({0: 1})
    it.impl.do_kv_cache_update(it.layer, k, v, it.kv_cache, metadata.slot_mapping)
    it.impl.forward(it.layer, q, None, None, it.kv_cache, metadata, output)
    it.check({0: 1}, q, output)


def test_vllm_measures_its_memory(vllm):
    it = engine()
    output = torch.full((5, 4, 32), 3.0).half()
    assert it.impl.forward(it.layer, None, None, None, torch.empty(0), None, output) is output
    assert (output == 0).all() and vllm.calls.counts["flash_attn_jit"] == 0


def test_sinks_are_read_after_loading_and_after_every_later_one(vllm):
    sinks = torch.zeros(4, dtype=torch.bfloat16)
    it = engine(sinks=sinks)
    place = it.impl.s_aux.data_ptr()
    sinks.copy_(torch.tensor([2.0, 1.0, -1.0, 0.5]))
    it.impl.process_weights_after_loading(torch.float16)
    assert it.impl.s_aux.data_ptr() == place and it.impl.s_aux.dtype is torch.float32
    it.options["sinks"] = sinks.float()
    it.step({0: 9})


def test_what_vllm_asks_before_it_chooses(vllm):
    from vllm.platforms.interface import DeviceCapability
    from vllm.v1.attention.backend import AttentionCGSupport, AttentionType, MultipleOf
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    backend = AttentionBackendEnum.CUSTOM.get_class()
    assert AttentionBackendEnum[backend.get_name()] is AttentionBackendEnum.CUSTOM
    assert backend.supports_dtype(torch.float16) and backend.supports_dtype(torch.bfloat16)
    assert all(backend.supports_kv_cache_dtype(dtype) for dtype in ("auto", "float16", "bfloat16"))
    assert not backend.supports_kv_cache_dtype("fp8")
    assert backend.supports_head_size(512) and not backend.supports_head_size(513)
    assert [backend.supports_compute_capability(DeviceCapability(*c)) for c in ((7, 0), (7, 5), (8, 6))] == [0, 1, 1]
    assert all(backend.supports_attn_type(kind) and backend.supports_attn_type(kind.value) for kind in AttentionType)
    assert not backend.supports_attn_type("other")
    assert backend.supports_sliding_window() and backend.supports_sink() and backend.supports_non_causal()
    for other in (backend.is_mla, backend.supports_mm_prefix, backend.supports_rswa, backend.supports_batch_invariance):
        assert not other()
    assert backend.get_supported_kernel_block_sizes() == [MultipleOf(16)]
    assert backend.forward_includes_kv_cache_update is False
    assert backend.get_builder_cls()._cudagraph_support is AttentionCGSupport.UNIFORM_BATCH


def test_methods_take_what_vllm_passes(vllm):
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    backend = AttentionBackendEnum.CUSTOM.get_class()
    compared = 0
    for own in (backend, backend.get_impl_cls(), backend.get_builder_cls()):
        base = own.__mro__[1]
        for name, method in inspect.getmembers(own, inspect.isroutine):
            theirs = getattr(base, name, None)
            if name in vars(own) and theirs is not None and name != "__new__":
                mine, wanted = list(inspect.signature(method).parameters), list(inspect.signature(theirs).parameters)
                assert mine[: len(wanted)] == wanted, name
                compared += 1
    assert compared >= 12


def test_what_is_refused(vllm):
    it = engine()
    with pytest.raises(NotImplementedError, match=r"causal is a tensor.*another --attention-backend"):
        it.prepare({0: 3}, causal=torch.tensor([True]))
    q, k, v, output, metadata = it.prepare({1: 3})
    with pytest.raises(NotImplementedError, match=r"output_scale is given.*accepted: None"):
        it.impl.forward(it.layer, q, k, v, it.kv_cache, metadata, output, torch.ones(1))
    with pytest.raises(NotImplementedError, match="output_scale is given"):
        it.impl.forward(it.layer, q, k, v, it.kv_cache, metadata, output, None, torch.ones(1))


def test_registering_again_changes_nothing_and_replaces_nobody(vllm, caplog):
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    assert vllm.register() is vllm.calls
    path = AttentionBackendEnum.CUSTOM.get_path()
    assert not AttentionBackendEnum.FLASH_ATTN.is_overridden()
    register_backend(AttentionBackendEnum.CUSTOM, "another.Backend")
    with pytest.raises(RuntimeError, match=r"CUSTOM is another.Backend.*VLLM_PLUGINS"):
        vllm.register()
    with caplog.at_level(logging.WARNING, "flash_attn_jit"):
        vllm.plugin()
    assert "not registered with vLLM: vLLM's attention backend CUSTOM is another.Backend" in caplog.text
    assert AttentionBackendEnum.CUSTOM.get_path() == "another.Backend" != path


def test_another_vllm_names_the_version_that_is_wanted(vllm, monkeypatch):
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    monkeypatch.delitem(sys.modules, "flash_attn_jit.integrations.vllm._backend", raising=False)
    backend = sys.modules.get("vllm.v1.attention.backend") or __import__("vllm.v1.attention.backend", fromlist=["x"])
    monkeypatch.setattr(backend.AttentionBackend, "get_kv_cache_shape", lambda: (), raising=False)
    with pytest.raises(ImportError, match=r"vLLM 0.33.0 has other interfaces .*KV cache; accepted: vLLM 0.33\."):
        AttentionBackendEnum.CUSTOM.get_class()
    monkeypatch.undo()


def test_an_old_vllm_starts_all_the_same(vllm, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "vllm.v1.attention.backends.registry", SimpleNamespace())
    with pytest.raises(ImportError, match=r"has other interfaces .*accepted: vLLM 0.33\. .*TRITON_ATTN"):
        vllm.register()
    with caplog.at_level(logging.WARNING, "flash_attn_jit"):
        vllm.plugin()
    assert "not registered with vLLM" in caplog.text


def test_entry_points_lead_to_the_plugins():
    for group, name, attribute in (
        ("vllm.general_plugins", "vllm", "plugin"),
        ("sglang.srt.plugins", "sglang", "register"),
    ):
        (entry,) = [e for e in importlib.metadata.entry_points(group=group) if e.name == "flash_attn_jit"]
        assert (entry.module, entry.attr) == (f"flash_attn_jit.integrations.{name}", attribute)
        assert entry.load().__module__ == entry.module


def test_without_vllm_nothing_is_imported_and_the_error_is_pythons():
    done = run_python(
        "import sys\nfrom flash_attn_jit.integrations import vllm\nassert 'vllm' not in sys.modules\n"
        "try:\n    vllm.register()\nexcept ModuleNotFoundError as error:\n    print(error)\n",
        PYTHONPATH=None,
    )
    assert done.returncode == 0 and done.stdout.strip() == "No module named 'vllm'", done.stderr
    assert ENGINES.is_dir()
