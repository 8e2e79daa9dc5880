"""What vLLM's model runner does with an attention backend: it keeps buffers, fills them for a batch, builds metadata of
them and calls every layer. Written after vLLM 0.33.0; on a GPU, or in the interpreter."""

from types import SimpleNamespace
from typing import Any

import torch
from engine_steps import Sequence, check_rows, nothing_waits, tokens
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum

NAN = float("nan")


class Engine:
    """One layer, whose sequences are numbered. `options` are those of the layer as vLLM names them."""

    def __init__(
        self,
        device: str = "cpu",
        *,
        heads: int = 4,
        heads_k: int = 2,
        head_dim: int = 32,
        block_size: int = 16,
        heads_first: bool = True,
        longest: int = 96,
        most: int = 6,
        **options: Any,
    ) -> None:
        self.device, self.heads, self.heads_k, self.head_dim = device, heads, heads_k, head_dim
        self.block_size, self.longest = block_size, longest
        self.options = {n: o.to(device) if isinstance(o, torch.Tensor) else o for n, o in options.items()}
        backend = AttentionBackendEnum.CUSTOM.get_class()
        columns = -(-longest // block_size)
        blocks = most * columns + 1  # the last one is nobody's
        shape = (blocks, heads_k, block_size, 2 * head_dim)
        if not heads_first:
            shape = (blocks, block_size, heads_k, 2 * head_dim)
        cache = torch.full(shape, NAN, dtype=torch.float16, device=device)
        self.kv_cache = cache if heads_first else cache.transpose(1, 2)
        self.table = torch.randperm(blocks - 1, generator=torch.Generator().manual_seed(3)).reshape(most, columns)
        with torch.device(device):
            self.impl = backend.get_impl_cls()(
                heads, head_dim, head_dim**-0.5, heads_k, options.get("alibi_slopes"), options.get("sliding_window"),
                "auto", options.get("logits_soft_cap"), options.get("attn_type", AttentionType.DECODER), None,
                **{name: self.options[name] for name in ("sinks",) if name in options},
            )  # fmt: skip
        self.impl.process_weights_after_loading(torch.float16)
        config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=longest))
        self.builder = backend.get_builder_cls()(None, ["layer"], config, torch.device(device))
        self.layer = SimpleNamespace(_k_scale=None, _v_scale=None)
        self.sequences = [Sequence(heads_k, head_dim, device) for _ in range(most)]
        self.seed = 0

        def numbers(*size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self.starts, self.used, self.block_table = numbers(most + 1), numbers(most), numbers(most, columns)
        self.slots = numbers(most * longest, dtype=torch.int64)

    def prepare(
        self, new: dict[int, int], rows: int = 0, requests: int = 0, capture: bool = False, **changes: Any
    ) -> Any:
        """new: how many tokens each sequence gets. rows and requests: what the batch is padded to. Returns q, k, v
        (tokens, ...), output, and the metadata."""
        counts = list(new.values())
        total, batch = sum(counts), len(counts)
        rows, requests = max(rows, total), max(requests, batch)
        self.seed += 10
        q, k, v = (
            tokens(rows, heads, self.head_dim, self.device, self.seed + i)
            for i, heads in enumerate((self.heads, self.heads_k, self.heads_k))
        )
        slots = torch.full((rows,), -1)
        starts = [0]
        for b, (number, count) in enumerate(new.items()):
            sequence, at = self.sequences[number], starts[-1]
            places = torch.arange(len(sequence), len(sequence) + count)
            blocks = self.table[number][places // self.block_size]
            slots[at : at + count] = blocks * self.block_size + places % self.block_size
            sequence.append(k[at : at + count], v[at : at + count])
            self.block_table[b] = self.table[number]
            starts.append(at + count)
        lengths = [len(self.sequences[number]) for number in new]
        self.starts[: requests + 1] = torch.tensor(starts + [total] * (requests - batch))
        self.used[:requests] = torch.tensor(lengths + [0] * (requests - batch))
        self.slots[:rows] = slots
        common = CommonAttentionMetadata(
            query_start_loc=self.starts[: requests + 1],
            query_start_loc_cpu=torch.tensor(starts),
            seq_lens=self.used[:requests],
            num_reqs=requests,
            num_actual_tokens=rows,
            max_query_len=max(counts),
            max_seq_len=max(lengths),
            block_table_tensor=self.block_table[:requests],
            slot_mapping=self.slots[:rows],
            **changes,
        )
        build = self.builder.build_for_cudagraph_capture if capture else lambda c: self.builder.build(0, c)
        return q, k, v, torch.full_like(q, 7.0), build(common)

    def run(self, q: Any, k: Any, v: Any, output: Any, metadata: Any) -> None:
        with nothing_waits():
            self.impl.do_kv_cache_update(self.layer, k, v, self.kv_cache, metadata.slot_mapping)
            assert self.impl.forward(self.layer, q, k, v, self.kv_cache, metadata, output=output) is output

    def check(self, new: dict[int, int], q: torch.Tensor, output: torch.Tensor, **options: Any) -> None:
        at = 0
        for number, count in new.items():
            rows = slice(at, at + count)
            check_rows(output[rows], q[rows], self.sequences[number], **{**self.meant(), **options})
            at += count

    def meant(self) -> dict[str, Any]:
        """The options, as the reference has them."""
        window, slopes = self.options.get("sliding_window"), self.options.get("alibi_slopes")
        return {
            "causal": True,
            "window_size": (-1, -1) if window is None else (window - 1, 0),
            "softcap": self.options.get("logits_soft_cap") or 0.0,
            "alibi_slopes": None if slopes is None else torch.tensor([slopes], device=self.device),
            "s_aux": self.options.get("sinks"),
        }

    def step(self, new: dict[int, int], rows: int = 0, requests: int = 0) -> None:
        batch = self.prepare(new, rows, requests)
        self.run(*batch)
        self.check(new, batch[0], batch[3])
