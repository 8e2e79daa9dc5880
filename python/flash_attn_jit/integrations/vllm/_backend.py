"""The classes that vLLM makes of its attention backend ``CUSTOM``. vLLM imports this module when it is chosen."""

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch

from ..._arguments import UNBOUNDED
from ..._sdpa import MOST_HEAD_DIM
from ...interface import flash_attn_varlen_func
from . import calls, wrong_version

try:
    from vllm._custom_ops import reshape_and_cache_flash
    from vllm.platforms.interface import DeviceCapability
    from vllm.v1.attention.backend import (
        AttentionBackend,
        AttentionCGSupport,
        AttentionImpl,
        AttentionMetadata,
        AttentionMetadataBuilder,
        AttentionType,
        CommonAttentionMetadata,
        MultipleOf,
    )
except ImportError as error:
    raise wrong_version(error) from error

_READ = {
    "num_actual_tokens",
    "max_query_len",
    "max_seq_len",
    "query_start_loc",
    "seq_lens",
    "block_table_tensor",
    "slot_mapping",
    "causal",
}


def _check_interfaces() -> None:
    """What would otherwise be found out in the middle of a batch, or not at all."""
    missing = _READ - {field.name for field in fields(CommonAttentionMetadata)}
    if missing:
        raise wrong_version(f"CommonAttentionMetadata has no {', '.join(sorted(missing))}")
    if hasattr(AttentionBackend, "get_kv_cache_shape"):
        raise wrong_version("backends choose the shape of the KV cache")


_check_interfaces()


@dataclass
class Metadata(AttentionMetadata):  # type: ignore[misc]
    """A batch. Its tensors are vLLM's own, which keep their place between the replays of a CUDA graph."""

    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    causal: bool


class MetadataBuilder(AttentionMetadataBuilder):  # type: ignore[misc]
    # Lengths are read on the device, and max_query_len chooses the kernel: a graph is for one length of queries.
    _cudagraph_support: ClassVar[Any] = AttentionCGSupport.UNIFORM_BATCH
    supports_update_block_table: bool = True

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Metadata:
        common = common_attn_metadata
        if isinstance(common.causal, torch.Tensor):
            raise NotImplementedError(
                "causal is a tensor, one value for each sequence; accepted: True or False for all of a batch. "
                "Choose another --attention-backend"
            )
        return Metadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            max_seq_len=common.max_seq_len,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            causal=bool(common.causal),
        )

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Metadata:
        """max_seq_len is a constant of the graph, which replays with every length."""
        metadata = self.build(0, common_attn_metadata)
        longest = int(self.vllm_config.model_config.max_model_len)
        return replace(metadata, max_seq_len=max(metadata.max_seq_len, longest))

    def update_block_table(self, metadata: Metadata, blk_table: torch.Tensor, slot_mapping: torch.Tensor) -> Metadata:
        return replace(metadata, block_table=blk_table, slot_mapping=slot_mapping)


class FlashAttnJitBackend(AttentionBackend):  # type: ignore[misc]
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16"]
    forward_includes_kv_cache_update: bool = False
    supports_kv_cache_update_bypass: bool = True

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type["Impl"]:
        return Impl

    @staticmethod
    def get_builder_cls() -> type[MetadataBuilder]:
        return MetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(16)]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return 1 <= head_size <= MOST_HEAD_DIM

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return bool(capability >= DeviceCapability(7, 5))

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type in list(AttentionType)  # or the word for one

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True


class Impl(AttentionImpl):  # type: ignore[misc]
    """A layer's attention."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.attn_type = attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.reads_cache = attn_type not in (AttentionType.ENCODER, AttentionType.ENCODER_ONLY)
        # Of attention that is causal, and that is not.
        self.windows = (UNBOUNDED, UNBOUNDED)
        if sliding_window is not None:
            self.windows = ((sliding_window - 1, 0), (sliding_window - 1, sliding_window - 1))
        self.softcap = float(logits_soft_cap or 0.0)
        # On the device that vLLM makes the model's tensors on.
        self.alibi_slopes = None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32)
        self.sinks = None if sinks is None else sinks.detach()
        self.s_aux = self.sinks

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Sinks are read in float32, from a place that CUDA graphs know."""
        if self.sinks is None or self.s_aux is None:
            return
        if self.s_aux is self.sinks:
            self.s_aux = torch.empty_like(self.sinks, dtype=torch.float32)
        self.s_aux.copy_(self.sinks)

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """kv_cache: (blocks, num_kv_heads, block size, 2 * head_size)."""
        if not self.reads_cache:
            return
        keys, values = kv_cache.transpose(1, 2).split(self.head_size, -1)
        reshape_and_cache_flash(
            key, value, keys, values, slot_mapping, self.kv_cache_dtype, layer._k_scale, layer._v_scale
        )

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Metadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query and output: (tokens, num_heads, head_size), with rows at the end that may belong to no sequence: those
        of output may hold anything afterwards, NaN too. kv_cache: (blocks, num_kv_heads, block size, 2 * head_size)."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("output_scale is given, for a quantized output; accepted: None")
        batch = attn_metadata
        if batch is None:  # vLLM measures how much memory a model takes
            return output.fill_(0)
        starts = batch.query_start_loc
        if self.reads_cache:
            keys, values = kv_cache.transpose(1, 2).split(self.head_size, -1)
            causal, table, used = batch.causal, batch.block_table, batch.seq_lens
            starts_k, longest_k = None, batch.max_seq_len
        else:
            keys, values, causal, table, used = key, value, False, None, None
            starts_k, longest_k = starts, batch.max_query_len
        flash_attn_varlen_func(
            query,
            keys,
            values,
            starts,
            starts_k,
            batch.max_query_len,
            longest_k,
            softmax_scale=self.scale,
            causal=causal,
            window_size=self.windows[0 if causal else 1],
            softcap=self.softcap,
            alibi_slopes=self.alibi_slopes,
            block_table=table,
            s_aux=self.s_aux,
            out=output,
            seqused_k=used,
        )
        calls.count()
        return output
