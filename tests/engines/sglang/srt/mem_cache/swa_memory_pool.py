import torch

from .memory_pool import MHATokenToKVPool


class SWAKVPool:
    """Layers with a window have a pool of their own, whose slots are numbered otherwise."""

    def __init__(self, slots, swa_slots, heads, head_dim, device, windowed_layers):
        self.full = MHATokenToKVPool(1, slots, heads, head_dim, device)
        self.swa = MHATokenToKVPool(1, swa_slots, heads, head_dim, device)
        self.windowed_layers = windowed_layers
        self.swa_layer_nums = len(windowed_layers)
        self.full_to_swa_index_mapping = torch.zeros(slots + 1, dtype=torch.int64, device=device)

    def get_kv_buffer(self, layer_id):
        pool = self.swa if layer_id in self.windowed_layers else self.full
        return pool.get_kv_buffer(0)

    def translate_loc_from_full_to_swa(self, kv_indices):
        return self.full_to_swa_index_mapping[kv_indices]

    def set_kv_buffer(self, layer, loc_info, cache_k, cache_v, k_scale=1.0, v_scale=1.0):
        windowed = layer.layer_id in self.windowed_layers
        k, v = self.get_kv_buffer(layer.layer_id)
        loc = loc_info.swa_loc if windowed else loc_info.loc
        k[loc], v[loc] = cache_k, cache_v
