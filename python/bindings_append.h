// The append call: torch tensors in, checked, on to the runtime.
#pragma once

#include <pybind11/pybind11.h>

namespace flash_attn_jit::bindings {

// Writes k and v behind the `cache_seqlens` rows that each sequence has in the cache, keys turned by their places, and
// q, turned, into `q_turned`. q, q_turned, rotary_cos and rotary_sin: all or None; block_table may be None. As
// forward().
void append(pybind11::handle k, pybind11::handle v, pybind11::handle k_cache, pybind11::handle v_cache,
            pybind11::handle cache_seqlens, pybind11::handle block_table, pybind11::handle q, pybind11::handle q_turned,
            pybind11::handle rotary_cos, pybind11::handle rotary_sin, bool interleaved, bool queries_advance);

}  // namespace flash_attn_jit::bindings
