"""What SGLang's model runner does with an attention backend: pools of slots, where the requests' tokens are, batches
that extend and batches that decode, and CUDA graphs. Written after SGLang 0.5.23; on a GPU, or in the interpreter."""

from types import SimpleNamespace
from typing import Any

import torch
from engine_steps import Sequence, check_rows, nothing_waits, tokens
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool


class Mode:
    """A forward_mode."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name

    def is_decode(self) -> bool:
        return self.name == "DECODE"

    def is_idle(self) -> bool:
        return self.name == "IDLE"

    def is_decode_or_idle(self) -> bool:
        return self.is_decode() or self.is_idle()

    def is_dllm_extend(self) -> bool:
        return self.name == "DLLM_EXTEND"

    def is_split_prefill(self) -> bool:
        return self.name == "SPLIT_PREFILL"


def layer_of(heads: int, heads_k: int, head_dim: int, **changes: Any) -> Any:
    """A RadixAttention."""
    fields = {
        "tp_q_head_num": heads, "tp_k_head_num": heads_k, "tp_v_head_num": heads_k, "qk_head_dim": head_dim,
        "v_head_dim": head_dim, "scaling": head_dim**-0.5, "layer_id": 0, "logit_cap": 0.0, "sliding_window_size": -1,
        "is_cross_attention": False, "use_irope": False, "k_scale": None, "v_scale": None,
        "attn_type": AttentionType.DECODER, "logit_capping_method": "tanh", "xai_temperature_len": -1,
    }  # fmt: skip
    return SimpleNamespace(**{**fields, **changes})


class Engine:
    """Layer 1 has the window of `layer`, and a pool of its own where `window_pool` is set; layer 0 has none."""

    def __init__(
        self,
        device: str = "cpu",
        *,
        heads: int = 4,
        heads_k: int = 2,
        head_dim: int = 32,
        page_size: int = 1,
        window_pool: bool = False,
        longest: int = 64,
        most: int = 6,
        sinks: torch.Tensor | None = None,
        **layer: Any,
    ) -> None:
        self.device, self.heads, self.heads_k, self.head_dim = device, heads, heads_k, head_dim
        self.page_size, self.longest = page_size, longest
        self.sinks = None if sinks is None else sinks.to(device)
        self.layer = layer_of(heads, heads_k, head_dim, layer_id=int(window_pool), **layer)
        slots = (most + 1) * longest  # page 0 is for padding
        self.pool: Any
        if window_pool:
            self.pool = SWAKVPool(slots, slots, heads_k, head_dim, device, {1})
            pages = torch.randperm(slots // page_size - 1, generator=torch.Generator().manual_seed(5)) + 1
            moved = pages[:, None] * page_size + torch.arange(page_size)
            self.pool.full_to_swa_index_mapping[page_size:slots] = moved.flatten().to(device)
        else:
            self.pool = MHATokenToKVPool(1, slots, heads_k, head_dim, device)
        for k_or_v in self.pool.get_kv_buffer(self.layer.layer_id):
            k_or_v[:page_size] = 0
        self.req_to_token = torch.zeros(most + 1, longest, dtype=torch.int32, device=device)
        self.pages = torch.randperm(most * longest // page_size, generator=torch.Generator().manual_seed(4)) + 1
        self.sequences = [Sequence(heads_k, head_dim, device) for _ in range(most)]
        self.backend = ATTENTION_BACKENDS["flash_attn_jit"](self.runner())
        self.seed = 0

    def runner(self, **changes: Any) -> Any:
        fields = {
            "token_to_kv_pool": self.pool,
            "req_to_token_pool": SimpleNamespace(req_to_token=self.req_to_token, size=len(self.req_to_token) - 1),
            "page_size": self.page_size,
            "device": self.device,
            "model_config": SimpleNamespace(context_len=self.longest, is_encoder_decoder=False),
            "use_mla_backend": False,
            "kv_cache_dtype": torch.float16,
            "kv_index_translator": SimpleNamespace(is_translating=False),
        }
        return SimpleNamespace(**{**fields, **changes})

    def prepare(self, new: dict[int, int], mode: str = "EXTEND", batch: int = 0) -> Any:
        """new: how many tokens each sequence gets. batch: what decode is padded to. Returns q, k, v (tokens, ...) and
        a ForwardBatch."""
        padding = max(batch - len(new), 0)
        total = sum(new.values()) + padding
        self.seed += 10
        q = tokens(total, self.heads, self.head_dim, self.device, self.seed)
        k, v = (tokens(total, self.heads_k, self.head_dim, self.device, self.seed + n) for n in (7, 8))
        slots, at, before = torch.zeros(total, dtype=torch.int64), 0, []
        for number, count in new.items():
            sequence = self.sequences[number]
            before.append(len(sequence))
            places = torch.arange(len(sequence), len(sequence) + count)
            pages = self.pages[number * (self.longest // self.page_size) + places // self.page_size]
            slots[at : at + count] = pages * self.page_size + places % self.page_size
            self.req_to_token[number + 1, len(sequence) : len(sequence) + count] = slots[at : at + count].int()
            sequence.append(k[at : at + count], v[at : at + count])
            at += count
        lengths = [len(self.sequences[number]) for number in new]
        fill = self.backend.get_cuda_graph_seq_len_fill_value()
        seq_lens = torch.tensor(lengths + [fill] * padding, dtype=torch.int64)
        requests = torch.tensor([number + 1 for number in new] + [0] * padding, dtype=torch.int64)
        return (
            q,
            k,
            v,
            SimpleNamespace(
                forward_mode=Mode(mode),
                batch_size=len(new) + padding,
                req_pool_indices=requests.to(self.device),
                seq_lens=seq_lens.to(self.device),
                seq_lens_cpu=seq_lens,
                out_cache_loc=slots.to(self.device),
                out_cache_loc_is_physical=False,
                extend_seq_lens=torch.tensor(list(new.values())).to(self.device),
                extend_seq_lens_cpu=list(new.values()),
                spec_info=None,
                _attn_output=None,
            ),
        )

    def run(self, q: torch.Tensor, k: Any, v: Any, forward_batch: Any, **others: Any) -> torch.Tensor:
        if self.sinks is not None:
            others["sinks"] = self.sinks
        with nothing_waits():
            out = self.backend.forward(q.flatten(1), k, v, self.layer, forward_batch, **others)
        assert out.shape == (len(q), self.heads * self.head_dim)
        return out.view(q.shape)

    def check(self, new: dict[int, int], q: torch.Tensor, out: torch.Tensor, **options: Any) -> None:
        at, window = 0, self.layer.sliding_window_size
        options = {
            "causal": True,
            "window_size": (-1, -1) if window < 0 else (window, 0),
            "softcap": self.layer.logit_cap,
            "s_aux": None if self.sinks is None else self.sinks.float(),
            **options,
        }
        for number, count in new.items():
            check_rows(out[at : at + count], q[at : at + count], self.sequences[number], **options)
            at += count

    def step(self, new: dict[int, int], mode: str = "EXTEND", **options: Any) -> None:
        q, k, v, forward_batch = self.prepare(new, mode)
        self.backend.init_forward_metadata(forward_batch)
        self.check(new, q, self.run(q, k, v, forward_batch), **options)
