"""The class that SGLang's model runner makes of the attention backend ``flash_attn_jit``."""

from dataclasses import dataclass
from typing import Any

import torch

from ..._arguments import UNBOUNDED
from ..._dtypes import HALVES
from ...interface import flash_attn_varlen_func
from . import calls, wrong_version

try:
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.layers.radix_attention import AttentionType
    from sglang.srt.mem_cache.layout.paged_view import paged_kv_view
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc
    from sglang.srt.runtime_context import get_parallel
except ImportError as error:
    raise wrong_version(error) from error


def _refuse(what: str, accepted: str) -> None:
    advice = "Choose another --attention-backend, such as triton"
    raise NotImplementedError(f"{what}; accepted by the attention backend flash_attn_jit: {accepted}. {advice}")


@dataclass
class Metadata:
    """A batch."""

    starts: torch.Tensor  # (batch + 1), int32: where each sequence's queries start
    used: torch.Tensor  # (batch), int32: how many keys it has, those of this step among them
    table: torch.Tensor  # (batch, pages), int32
    longest_q: int
    longest_k: int  # or more
    # Of layers with a window, where these have a pool of their own.
    window_table: torch.Tensor | None = None
    window_slots: torch.Tensor | None = None


class FlashAttnJitBackend(AttentionBackend):  # type: ignore[misc]
    # The longest sequence is known without a wait for the device.
    needs_cpu_seq_lens: bool = True

    def __init__(self, model_runner: Any) -> None:
        super().__init__()
        _check_runner(model_runner)
        self.pool = model_runner.token_to_kv_pool
        self.req_to_token = model_runner.req_to_token_pool.req_to_token
        self.page_size = int(model_runner.page_size or 1)
        self.device = model_runner.device
        self.longest = int(model_runner.model_config.context_len)
        self.has_window_pool = getattr(self.pool, "swa_layer_nums", 0) > 0
        self.forward_metadata: Metadata | None = None
        self.graph_metadata: dict[int, Metadata] = {}
        self.starts_of_decode = self._count(model_runner.req_to_token_pool.size)
        self.paged_caches: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def _count(self, batch: int) -> torch.Tensor:
        return torch.arange(batch + 1, dtype=torch.int32, device=self.device)

    # -- a batch --------------------------------------------------------------

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Of a batch that no graph replays."""
        mode, batch = forward_batch.forward_mode, forward_batch.batch_size
        _check_batch(forward_batch)
        longest_k = self._longest(forward_batch)
        if mode.is_decode_or_idle():
            if batch >= self.starts_of_decode.shape[0]:
                self.starts_of_decode = self._count(batch)
            starts, longest_q = self.starts_of_decode[: batch + 1], 1
        else:
            lengths = forward_batch.extend_seq_lens
            starts = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
            longest_q = max(forward_batch.extend_seq_lens_cpu)
        rows = self.req_to_token[forward_batch.req_pool_indices, :longest_k]
        window_table = window_slots = None
        if self.has_window_pool:
            window_table = self._pages(self.pool.translate_loc_from_full_to_swa(rows))
            window_slots = self.pool.translate_loc_from_full_to_swa(forward_batch.out_cache_loc)
        self.forward_metadata = Metadata(
            starts,
            forward_batch.seq_lens.to(torch.int32),
            self._pages(rows),
            longest_q,
            longest_k,
            window_table,
            window_slots,
        )

    def _longest(self, forward_batch: Any) -> int:
        lengths = forward_batch.seq_lens_cpu
        if lengths is None or lengths.numel() == 0:
            return self.longest
        return int(lengths.max())

    def _pages(self, slots: torch.Tensor) -> torch.Tensor:
        """(batch, keys), where each key is, -> (batch, pages)."""
        if self.page_size > 1:
            slots = slots[:, :: self.page_size] // self.page_size
        return slots.to(torch.int32)

    # -- CUDA graphs of decode ------------------------------------------------

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        pages = -(-self.longest // self.page_size)

        def numbers(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        self.graph_metadata.clear()
        self.graph_buffers = Metadata(
            starts=self._count(max_bs),
            used=numbers(max_bs),
            table=numbers(max_bs, pages),
            longest_q=1,
            longest_k=self.longest,
            window_table=numbers(max_bs, pages) if self.has_window_pool else None,
            window_slots=numbers(max_num_tokens, dtype=torch.int64) if self.has_window_pool else None,
        )

    def _of_graph(self, batch: int) -> Metadata:
        """Parts of the buffers, the same for every replay."""
        if batch not in self.graph_metadata:
            whole = self.graph_buffers
            self.graph_metadata[batch] = Metadata(
                whole.starts[: batch + 1],
                whole.used[:batch],
                whole.table[:batch],
                whole.longest_q,
                whole.longest_k,
                None if whole.window_table is None else whole.window_table[:batch],
                None if whole.window_slots is None else whole.window_slots[:batch],
            )
        return self.graph_metadata[batch]

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Fills what a graph reads, before its capture and before every replay."""
        _check_batch(forward_batch)
        if not forward_batch.forward_mode.is_decode_or_idle():
            _refuse("a CUDA graph of a prompt is to be captured", "graphs of decode")
        batch = forward_batch.batch_size
        metadata = self._of_graph(batch)
        longest = self.longest if in_capture else self._longest(forward_batch)
        metadata.used.copy_(forward_batch.seq_lens[:batch])
        rows = self.req_to_token[forward_batch.req_pool_indices[:batch], :longest]
        pages = self._pages(rows)
        metadata.table[:, : pages.shape[1]].copy_(pages)
        if metadata.window_table is not None and metadata.window_slots is not None:
            metadata.window_table[:, : pages.shape[1]].copy_(
                self._pages(self.pool.translate_loc_from_full_to_swa(rows))
            )
            slots = self.pool.translate_loc_from_full_to_swa(forward_batch.out_cache_loc)
            metadata.window_slots[: slots.shape[0]].copy_(slots)
        self.forward_metadata = metadata

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    # -- a layer --------------------------------------------------------------

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
        **others: Any,
    ) -> torch.Tensor:
        """q: (tokens, num_heads * head_dim) or (tokens, num_heads, head_dim); the result: (tokens, num_heads *
        v's head_dim)."""
        if others:
            _check_others(others)
        metadata = self.forward_metadata
        assert metadata is not None
        if k is not None and v is not None and save_kv_cache:
            where = KVWriteLoc.for_layer(forward_batch, layer, swa_loc=metadata.window_slots)
            self.pool.set_kv_buffer(layer, where, k, v, layer.k_scale, layer.v_scale)
        causal, window, table = _is_causal(layer), UNBOUNDED, metadata.table
        if layer.sliding_window_size > -1:
            width = layer.sliding_window_size  # without the query's own place
            window = (width, 0 if causal else width)
            if metadata.window_table is not None:
                table = metadata.window_table
        heads, dim = layer.tp_q_head_num, layer.v_head_dim
        q = q.reshape(-1, heads, layer.qk_head_dim)
        given = forward_batch._attn_output
        keys, values = self._paged_cache(layer)
        out = flash_attn_varlen_func(
            q,
            keys,
            values,
            metadata.starts,
            None,
            metadata.longest_q,
            metadata.longest_k,
            softmax_scale=layer.scaling,
            causal=causal,
            window_size=window,
            softcap=float(layer.logit_cap or 0.0),
            block_table=table,
            s_aux=None if sinks is None else sinks.detach().float(),
            out=None if given is None else given.view(-1, heads, dim),
            seqused_k=metadata.used,
        )
        calls.count()
        assert isinstance(out, torch.Tensor)
        return out.view(-1, heads * dim)

    def _paged_cache(self, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v, (pages, page size, heads, head_dim). Views are made once: a step has many layers."""
        keys, values = self.pool.get_kv_buffer(layer.layer_id)
        known = self.paged_caches.get(layer.layer_id)
        if known is not None and known[0] is keys and known[1] is values:
            return known[2], known[3]
        paged = (
            paged_kv_view(keys, self.page_size, layer.tp_k_head_num, layer.qk_head_dim),
            paged_kv_view(values, self.page_size, layer.tp_v_head_num, layer.v_head_dim),
        )
        self.paged_caches[layer.layer_id] = (keys, values, *paged)
        return paged

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
        **others: Any,
    ) -> torch.Tensor:
        """As forward_extend(), of one token per sequence."""
        return self.forward_extend(q, k, v, layer, forward_batch, save_kv_cache, sinks, **others)


def _is_causal(layer: Any) -> bool:
    """Raises where the layer has what these kernels have not."""
    if layer.is_cross_attention:
        _refuse("a layer is cross attention", "self attention")
    if layer.use_irope:
        _refuse("a layer attends to chunks of its text (use_irope)", "whole texts, and sliding windows")
    if layer.xai_temperature_len > 0:
        _refuse(f"xai_temperature_len is {layer.xai_temperature_len}", "-1")
    if layer.logit_cap and layer.logit_capping_method != "tanh":
        _refuse(f"logit_capping_method is {layer.logit_capping_method!r}", "'tanh'")
    if layer.attn_type is AttentionType.DECODER:
        return True
    if layer.attn_type not in (AttentionType.ENCODER_ONLY, AttentionType.DECODER_BIDIRECTIONAL):
        _refuse(f"attn_type is {layer.attn_type!r}", "DECODER, DECODER_BIDIRECTIONAL and ENCODER_ONLY")
    return False


def _check_others(others: dict[str, Any]) -> None:
    for name, value in others.items():
        if value is not None and value is not False:
            _refuse(f"{name} is given", "None")


def _check_runner(runner: Any) -> None:
    if runner.use_mla_backend:
        _refuse("the model has multi-head latent attention", "other models")
    if runner.kv_cache_dtype not in HALVES:
        _refuse(
            f"the KV cache has dtype {runner.kv_cache_dtype}", "torch.float16 or torch.bfloat16: --kv-cache-dtype auto"
        )
    if runner.model_config.is_encoder_decoder:
        _refuse("the model has cross attention", "models of decoders or encoders")
    if runner.kv_index_translator.is_translating:
        _refuse("memory is unified (--enable-unified-memory)", "memory that is not")
    parallel = get_parallel()
    if parallel.attn_cp_size > 1 or parallel.attn_dcp_size > 1:
        _refuse("contexts are spread over GPUs", "context parallelism of 1")


def _check_batch(forward_batch: Any) -> None:
    if forward_batch.spec_info is not None:
        _refuse("decoding is speculative", "--speculative-algorithm not given")
    mode = forward_batch.forward_mode
    if mode.is_dllm_extend() or mode.is_split_prefill():
        _refuse(f"the batch has forward_mode {mode!r}", "EXTEND, DECODE, MIXED and IDLE")
