// New keys and values for a cache, and queries to be turned by their places: a request, and its launch as planned.
#pragma once

#include <cstdint>
#include <optional>

#include "generator/kernel_spec.h"
#include "runtime/request/attention_options.h"
#include "runtime/request/kernel_launch.h"
#include "runtime/request/tensor_view.h"
#include "templates/flash_append_params.cuh"

namespace flash_attn_jit {

// (rows, dims / 2) each, of the keys' dtype; row p is of place p.
struct Rotary {
  const void* cos = nullptr;
  const void* sin = nullptr;
  std::int64_t cos_stride = 0, sin_stride = 0, rows = 0;
  std::int64_t dims = 0;
  bool interleaved = true;
};

// Checked by the caller's language layer for rank, dtype and device, as ForwardRequest is.
struct AppendRequest {
  DType dtype = DType::kFloat16;  // of all tensors
  TensorView k_new, v_new;        // (batch, seqlen_new, num_heads_k, head_dim)
  TensorView q, q_turned;         // (batch, seqlen_q, num_heads, head_dim); read and written with `rotary`
  TensorView k, v;                // the cache: (batch, rows, num_heads_k, head_dim), or with `pages` the pages
  const int* used = nullptr;      // (batch): rows that each sequence has already; new row i becomes row used + i
  std::optional<PageTable> pages;
  std::optional<Rotary> rotary;
  bool queries_advance = false;  // query i has place used + i, or all have place used
};

using AppendLaunch = KernelLaunch<FlashAppendParams>;

// Throws ArgumentError where shapes contradict each other, UnsupportedError for a head dim that there is no kernel for.
AppendLaunch plan_append(const AppendRequest& request, const PlanTarget& target);

// Rows that a sequence has in the cache.
std::int64_t cache_rows(const AppendRequest& request);

}  // namespace flash_attn_jit
