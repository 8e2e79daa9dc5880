from dataclasses import dataclass

import torch


@dataclass
class KVWriteLoc:
    loc: torch.Tensor
    swa_loc: torch.Tensor | None = None
    full_loc: torch.Tensor | None = None
    physical: bool = False

    @classmethod
    def for_layer(cls, forward_batch, layer, *, swa_loc=None, full_loc=None):
        return cls(forward_batch.out_cache_loc, swa_loc, full_loc, physical=forward_batch.out_cache_loc_is_physical)


class MHATokenToKVPool:
    """k and v of every layer, (slots, heads, head_dim)."""

    def __init__(self, layers, slots, heads, head_dim, device):
        shape, nan = (slots, heads, head_dim), float("nan")
        self.k = [torch.full(shape, nan, dtype=torch.float16, device=device) for _ in range(layers)]
        self.v = [torch.full(shape, nan, dtype=torch.float16, device=device) for _ in range(layers)]

    def get_kv_buffer(self, layer_id):
        return self.k[layer_id], self.v[layer_id]

    def set_kv_buffer(
        self,
        layer,
        loc_info,
        cache_k,
        cache_v,
        k_scale=None,
        v_scale=None,
        layer_id_override=None,
        dcp_kv_mask=None,
    ):
        assert isinstance(loc_info, KVWriteLoc) and k_scale is None and v_scale is None
        self.k[layer.layer_id][loc_info.loc] = cache_k
        self.v[layer.layer_id][loc_info.loc] = cache_v
