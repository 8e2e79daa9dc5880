// What the backward kernels are told, and which of them are launched.
#include <doctest/doctest.h>

#include <cmath>

#include "generator/errors.h"
#include "runtime/request/backward.h"
#include "tests/cpp/containing.h"

using namespace flash_attn_jit;
using flash_attn_jit::testing::Containing;

namespace {

enum Kernel { kPreprocess, kDkDv, kDq, kAllKeys, kBias };

TensorView contiguous(std::uintptr_t at, std::int64_t b, std::int64_t s, std::int64_t h, std::int64_t d) {
  return {reinterpret_cast<void*>(at), {b, s, h, d}, {s * h * d, h * d, d, 1}};
}

BackwardRequest request(std::int64_t b, std::int64_t sq, std::int64_t sk, std::int64_t h, std::int64_t hk,
                        std::int64_t d) {
  BackwardRequest r;
  r.q = contiguous(0x1000, b, sq, h, d);
  r.k = contiguous(0x2000, b, sk, hk, d);
  r.v = contiguous(0x3000, b, sk, hk, d);
  r.out = contiguous(0x4000, b, sq, h, d);
  r.dout = contiguous(0x5000, b, sq, h, d);
  r.dq = contiguous(0x6000, b, sq, h, d);
  r.dkdv = KeyGradients{contiguous(0x7000, b, sk, hk, d), contiguous(0x8000, b, sk, hk, d)};
  r.softmax_lse = reinterpret_cast<float*>(0x9000);
  r.delta = reinterpret_cast<float*>(0xa000);
  r.options.softmax_scale = 0.125f;
  return r;
}

// As whoever makes the kernels checks them.
BackwardPlan plan(const BackwardRequest& r) {
  const BackwardPlan made = plan_backward(r, {arch_limits(75), 40, default_tile_chooser()});
  for (const BackwardLaunch& launch : made)
    if (launch.blocks > 0)
      if (const auto reason = check(launch.spec, arch_limits(75))) throw UnsupportedError(*reason);
  return made;
}

template <typename Expected>
std::string refusal(const BackwardRequest& r) {
  try {
    plan(r);
  } catch (const Expected& error) {
    return error.what();
  }
  return "";
}

std::int64_t row_blocks(const BackwardLaunch& launch, std::int64_t rows) {
  return (rows + launch.spec.tile.block_m - 1) / launch.spec.tile.block_m;
}

}  // namespace

TEST_CASE("backward plan: each kernel has blocks for its own rows") {
  BackwardRequest r = request(2, 300, 500, 8, 2, 64);
  r.options.mask = Mask::kCausal;
  const BackwardPlan p = plan(r);
  CHECK(p[kPreprocess].spec.kind == KernelKind::kBackwardPreprocess);
  CHECK(p[kPreprocess].spec.mask == Mask::kNone);  // one kernel for all masks
  CHECK(p[kDkDv].spec.mask == Mask::kCausal);
  CHECK(p[kDkDv].spec.group_size == 4);
  CHECK(p[kPreprocess].blocks == 2 * 8 * row_blocks(p[kPreprocess], 300));
  CHECK(p[kDkDv].blocks == 2 * 2 * row_blocks(p[kDkDv], 500));
  CHECK(p[kDq].blocks == 2 * 8 * row_blocks(p[kDq], 300));
  CHECK(p[kDq].params.softmax_scale == 0.125f);
  CHECK(p[kDq].params.q_strides.batch == 300 * 8 * 64);
  CHECK(p[kDkDv].params.dk_strides.head == 64);
}

TEST_CASE("backward plan: what nobody wants is not launched") {
  BackwardRequest r = request(2, 300, 500, 8, 2, 64);
  r.dq.reset();
  CHECK(plan(r)[kDq].blocks == 0);
  CHECK(plan(r)[kDkDv].blocks > 0);
  CHECK(plan(r)[kPreprocess].blocks > 0);
  r = request(2, 300, 500, 8, 2, 64);
  r.dkdv.reset();
  CHECK(plan(r)[kDkDv].blocks == 0);
  CHECK(plan(r)[kDq].blocks > 0);
  r.dq.reset();
  for (const BackwardLaunch& launch : plan(r)) CHECK(launch.blocks == 0);
}

TEST_CASE("backward plan: one kernel where a block can have all keys and all gradients are wanted") {
  BackwardRequest r = request(16, 300, 100, 8, 2, 64);
  BackwardPlan p = plan(r);
  CHECK(p[kAllKeys].spec.kind == KernelKind::kBackwardAllKeys);
  CHECK(p[kAllKeys].spec.group_size == 4);
  CHECK(p[kAllKeys].blocks == 16 * 2);
  CHECK(p[kAllKeys].params.num_row_blocks == 1);
  for (const Kernel other : {kPreprocess, kDkDv, kDq}) CHECK(p[other].blocks == 0);
  const auto takes_three = [&] {
    p = plan(r);
    return p[kAllKeys].blocks == 0 && p[kPreprocess].blocks > 0;
  };
  r.dq.reset();
  CHECK(takes_three());
  r = request(16, 300, 129, 8, 2, 64);
  CHECK(takes_three());
  r = request(16, 300, 0, 8, 2, 64);
  CHECK(takes_three());
  r = request(16, 300, 100, 8, 2, 64);
  r.dq_tile = default_tiles(p[kDq].spec).front();
  CHECK(takes_three());
  r = request(16, 300, 100, 8, 2, 64);
  r.all_keys_tile = TileConfig::parse("m64n16w4q64l0b8k8");
  CHECK(refusal<UnsupportedError>(r) == Containing{"has 64 keys a block, for 100"});
}

TEST_CASE("backward plan: a varlen grid follows from the longest sequence, and the preprocess kernel's from all rows") {
  BackwardRequest r = request(1, 700, 900, 8, 2, 64);
  r.options.varlen = Varlen{reinterpret_cast<int*>(0xb000), reinterpret_cast<int*>(0xc000), 5, 300, 400};
  const BackwardPlan p = plan(r);
  CHECK(p[kDkDv].spec.has(Feature::kVarlen));
  CHECK(!p[kPreprocess].spec.has(Feature::kVarlen));
  CHECK(p[kPreprocess].params.seqlen_q == 700);
  CHECK(p[kPreprocess].blocks == 8 * row_blocks(p[kPreprocess], 700));
  CHECK(p[kDkDv].blocks == 5 * 2 * row_blocks(p[kDkDv], 400));
  CHECK(p[kDq].blocks == 5 * 8 * row_blocks(p[kDq], 300));
  CHECK(p[kDq].params.total_q == 700);
  CHECK(p[kDq].params.cu_seqlens_k == reinterpret_cast<int*>(0xc000));
  r.options.varlen->max_seqlen_q = 5000;  // no sequence is longer than all of them
  CHECK(plan(r)[kDq].params.seqlen_q == 700);
  r.options.varlen->max_seqlen_q = -1;
  CHECK(refusal<ArgumentError>(r) == Containing{"max_seqlen_q is -1"});
}

TEST_CASE("backward plan: dout alone may lie apart in its last dimension, and is then read element by element") {
  BackwardRequest r = request(2, 30, 300, 4, 4, 64);
  CHECK(plan(r)[kDq].spec.access == GlobalAccess::kVector16B);
  CHECK(plan(r)[kDq].params.dout_dim_stride == 1);
  r.dout.strides = {0, 0, 0, 0};
  CHECK(plan(r)[kDq].spec.access == GlobalAccess::kElement2B);
  CHECK(plan(r)[kDq].params.dout_dim_stride == 0);
  r = request(2, 30, 300, 4, 4, 64);
  r.dkdv->dv.strides[3] = 2;
  CHECK(refusal<ArgumentError>(r) == Containing{"dv has strides"});
}

TEST_CASE("backward plan: the options as kernels see them") {
  BackwardRequest r = request(2, 30, 300, 4, 4, 64);
  r.options.softmax_scale = -0.5f;
  r.options.softcap = 10;
  r.options.mask = Mask::kWindow;
  r.options.window = {7, -1};
  const float slopes[4] = {};
  r.options.alibi = PerHead{slopes, 0};
  const FlashBwdParams params = plan(r)[kDkDv].params;
  CHECK(params.sign == 0x80008000u);
  CHECK(params.softmax_scale == -0.5f);
  CHECK(params.softcap.product_scale == doctest::Approx(0.05));
  CHECK(params.softmax_scale_log2 == doctest::Approx(10 * std::log2(std::exp(1.0))));
  CHECK(params.window_left == 7);
  CHECK(params.window_right >= 1 << 29);
  CHECK(params.alibi.slopes == slopes);
  const KernelSpec spec = plan(r)[kDkDv].spec;
  CHECK(spec.has(Feature::kSoftcap));
  CHECK(spec.has(Feature::kAlibi));
  for (const float bad : {-1.0f, 1e-7f, 1e18f, std::nanf(""), INFINITY}) {
    r.options.softcap = bad;
    CHECK(refusal<ArgumentError>(r) == Containing{"softcap is"});
  }
}

TEST_CASE("backward plan: every feature has an option that turns it on") {
  BackwardRequest r = request(1, 30, 300, 4, 4, 64);
  CHECK(plan(r)[kDkDv].spec.features.empty());
  const float slopes[4] = {};
  const int cu_seqlens[2] = {0, 30}, cu_seqlens_k[2] = {0, 300};
  r.options.softcap = 10;
  r.options.alibi = PerHead{slopes, 0};
  r.options.varlen = Varlen{cu_seqlens, cu_seqlens_k, 1, 30, 300};
  const int seed[2] = {};
  r.options.dropout = Dropout{0.5, seed};
  r.options.sinks = slopes;
  FeatureSet on;
  const float numbers[1] = {};
  for (const PairType type : {PairType::kFloat16, PairType::kFloat32, PairType::kBool}) {
    r.options.bias = PairTensor{numbers, type, {1, 1, 1, 1}, {1, 1, 1, 1}};
    const FeatureSet features = plan(r)[kDkDv].spec.features;
    CHECK(features.go_together());
    for (const FeatureInfo& info : kFeatures)
      if (features.has(info.feature)) on.set(info.feature);
  }
  for (const FeatureInfo& info : kFeatures) {
    CAPTURE(info.word);
    CHECK(on.has(info.feature) == !(info.forward_only || info.finishes_rows || info.is_users));
  }
}

TEST_CASE("backward plan: the gradient of attn_bias comes last, where it is wanted") {
  const float numbers[1] = {};
  BackwardRequest r = request(2, 130, 300, 8, 2, 64);
  r.options.bias = PairTensor{numbers, PairType::kFloat16, {1, 8, 130, 300}, {0, 130 * 300, 300, 1}};
  CHECK(plan(r)[kBias].blocks == 0);
  float gradient[1];
  r.dbias = BiasGradient{gradient, PairType::kFloat16, {1, 8, 130, 300}};
  BackwardPlan p = plan(r);
  CHECK(p[kBias].spec.kind == KernelKind::kBackwardBias);
  CHECK(!p[kBias].spec.has(Feature::kOneRow));
  const TileConfig& tile = p[kBias].spec.tile;
  CHECK(p[kBias].blocks == 8 * row_blocks(p[kBias], 300) * ((130 + tile.block_n - 1) / tile.block_n));
  CHECK(p[kBias].params.dbias.sequences == 2);
  CHECK(!p[kBias].params.dbias.is_float32);
  // It needs delta.
  r.dq.reset();
  r.dkdv.reset();
  p = plan(r);
  CHECK(p[kPreprocess].blocks > 0);
  CHECK(p[kBias].blocks > 0);
  for (const Kernel other : {kDkDv, kDq, kAllKeys}) CHECK(p[other].blocks == 0);
  r.dbias->type = PairType::kFloat32;
  r.dbias->shape = {2, 8, 130, 300};  // sums that the caller adds
  CHECK(plan(r)[kBias].blocks == 2 * p[kBias].blocks);
  // One row for all queries, and one that is expanded and has a gradient for each.
  r.options.bias->shape[2] = r.dbias->shape[2] = 1;
  CHECK(plan(r)[kBias].spec.has(Feature::kOneRow));
  CHECK(plan(r)[kBias].blocks == 2 * 8 * row_blocks(p[kBias], 300));
  r.options.bias->shape[2] = r.dbias->shape[2] = 130;
  r.options.bias->strides[2] = 0;
  r.dq = contiguous(0x6000, 2, 130, 8, 64);
  CHECK(!plan(r)[kBias].spec.has(Feature::kOneRow));
  CHECK(plan(r)[kDq].spec.has(Feature::kOneRow));
  // Where one kernel makes all else.
  r = request(16, 300, 100, 8, 2, 64);
  r.options.bias = PairTensor{numbers, PairType::kFloat32, {1, 1, 300, 100}, {0, 0, 100, 1}};
  r.dbias = BiasGradient{gradient, PairType::kFloat32, {1, 1, 300, 100}};
  CHECK(plan(r)[kAllKeys].blocks > 0);
  CHECK(plan(r)[kBias].blocks > 0);
}

TEST_CASE("backward plan: a gradient that attn_bias has not is named") {
  const float numbers[1] = {};
  float gradient[1];
  BackwardRequest r = request(2, 130, 300, 8, 2, 64);
  r.dbias = BiasGradient{gradient, PairType::kFloat16, {1, 8, 130, 300}};
  CHECK(refusal<ArgumentError>(r) == Containing{"dbias is given without an attn_bias that has a gradient"});
  r.options.bias = PairTensor{numbers, PairType::kBool, {1, 8, 130, 300}, {0, 130 * 300, 300, 1}};
  CHECK(refusal<ArgumentError>(r) == Containing{"dbias is given without"});
  r.options.bias->type = PairType::kFloat16;
  CHECK(plan(r)[kBias].blocks > 0);
  for (const std::array<std::int64_t, 4> shape : {std::array<std::int64_t, 4>{3, 8, 130, 300},
                                                  {0, 8, 130, 300},
                                                  {1, 1, 130, 300},
                                                  {1, 8, 1, 300},
                                                  {1, 8, 130, 301}}) {
    r.dbias->shape = shape;
    CHECK(refusal<ArgumentError>(r) == Containing{"; accepted: attn_bias's, (1, 8, 130, 300), with 300 keys"});
  }
  r.dbias = BiasGradient{nullptr, PairType::kFloat16, {1, 8, 130, 300}};
  CHECK(refusal<ArgumentError>(r) == Containing{"dbias has elements but no memory"});
}

TEST_CASE("backward plan: gradients of another shape are named") {
  BackwardRequest r = request(2, 30, 40, 4, 2, 64);
  r.dq = contiguous(0x6000, 2, 31, 4, 64);
  CHECK(refusal<ArgumentError>(r) == Containing{"dq has shape (2, 31, 4, 64); accepted: (2, 30, 4, 64)"});
  r = request(2, 30, 40, 4, 2, 64);
  r.dkdv->dk = contiguous(0x7000, 2, 40, 4, 64);
  CHECK(refusal<ArgumentError>(r) == Containing{"dk has shape"});
  r = request(2, 30, 40, 4, 2, 64);
  r.delta = nullptr;
  CHECK(refusal<ArgumentError>(r) == Containing{"delta"});
}

TEST_CASE("backward plan: a window over more rows than 32 bits can add") {
  BackwardRequest r = request(1, 1 << 30, 8, 1, 1, 64);
  r.options.mask = Mask::kWindow;
  r.options.window = {5, 5};
  CHECK(refusal<UnsupportedError>(r) == Containing{"window_size comes with a sequence of 1073741824 rows"});
}
