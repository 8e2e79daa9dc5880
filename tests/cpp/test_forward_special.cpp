// The forward kernel in the interpreter: NaN and infinity, empty and huge tensors.
#include <doctest/doctest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "containing.h"
#include "forward_case.h"
#include "fp16.h"
#include "generator/legality.h"
#include "generator/tile_chooser.h"
#include "runtime/interpreter/interpreter.h"
#include "runtime/launch/forward_launch.h"

using namespace flash_attn_jit;
using namespace flash_attn_jit::testing;

namespace {

constexpr std::uint16_t kNanBits = 0x7e00, kInfinityBits = 0x7c00;

struct Row {
  std::int64_t b, i, h;
};

// Runs the kernel on `t` and compares it with float64: what is finite there has to be finite and near, what
// is not has to be not. `may_spoil` names rows that are allowed to be anything.
// Returns how many elements are not finite.
int compare_with_float64(ForwardTensors& t, const std::function<bool(const Row&)>& may_spoil = {}) {
  forward_in_interpreter(t.request());
  const AttentionResult exact = attention_float64(t.problem()), emulated = attention_emulated(t.problem(), 0);
  double bound = 0;
  for (std::size_t i = 0; i < exact.out.size(); ++i)
    if (std::isfinite(exact.out[i]) && std::isfinite(emulated.out[i]))
      bound = std::max(bound, std::fabs(exact.out[i] - emulated.out[i]));
  bound = 2 * bound + 1e-5;

  const auto [batch, seqlen_q, heads, dim] = t.q.shape();
  int not_finite = 0;
  for (std::int64_t b = 0; b < batch; ++b)
    for (std::int64_t i = 0; i < seqlen_q; ++i)
      for (std::int64_t h = 0; h < heads; ++h) {
        INFO("batch " << b << ", row " << i << ", head " << h);
        if (may_spoil && may_spoil({b, i, h})) continue;
        for (std::int64_t d = 0; d < dim; ++d) {
          const double expected = exact.out[((b * seqlen_q + i) * heads + h) * dim + d];
          const double got = from_fp16(t.out.at(b, i, h, d));
          not_finite += !std::isfinite(expected);
          if (std::isfinite(expected))
            REQUIRE(std::fabs(got - expected) <= bound);
          else
            REQUIRE(!std::isfinite(got));
        }
        const double lse = exact.lse[(b * heads + h) * seqlen_q + i];
        const double got = t.lse[(b * heads + h) * seqlen_q + i];
        if (std::isfinite(lse))
          REQUIRE(std::fabs(got - lse) <= 1e-4);
        else
          REQUIRE(!std::isfinite(got));
      }
  return not_finite;
}

void check_against_float64(ForwardTensors& t, const std::function<bool(const Row&)>& may_spoil = {}) {
  CHECK(compare_with_float64(t, may_spoil) > 0);
}

ForwardCase small_case(Mask mask) {
  ForwardCase c;
  c.head_dim = 32;
  c.mask = mask;
  c.group_size = 2;
  c.batch = 2;
  c.num_heads_k = 2;
  c.seqlen_q = 150;
  c.seqlen_k = 170;
  c.tile = find_tile(c.head_dim, 64, 32);
  return c;
}

// Rows that do not see `key`, in a block that walks over its tile all the same: there 0 x NaN is NaN.
std::function<bool(const Row&)> own_tile(const ForwardCase& c, std::int64_t b, std::int64_t key, std::int64_t head_k) {
  return [=](const Row& row) {
    AttentionOptions options;
    options.mask = c.mask;
    const SequenceRows sequence{b, b, 0, c.seqlen_q, 0, c.seqlen_k};
    if (row.b != b || row.h / c.group_size != head_k || sees(options, sequence, row.i, key)) return false;
    const std::int64_t last_row = std::min((row.i / c.tile->block_m + 1) * c.tile->block_m, c.seqlen_q) - 1;
    return sees(options, sequence, last_row, key / c.tile->block_n * c.tile->block_n);
  };
}

}  // namespace

TEST_CASE("NaN and infinity in one element of q reach that row and no other") {
  for (const Mask mask : {Mask::kNone, Mask::kCausal})
    for (const std::uint16_t bits : {kNanBits, kInfinityBits}) {
      const ForwardCase c = small_case(mask);
      ForwardTensors t(c);
      t.q.at(1, 70, 2, 5) = bits;
      check_against_float64(t);
    }
}

TEST_CASE("rows whose last keys all score -inf take their weights from the others") {
  for (const Mask mask : {Mask::kNone, Mask::kCausal})
    for (const std::int64_t first_infinite : {1, 50, 96, 160}) {
      CAPTURE(first_infinite);
      const ForwardCase c = small_case(mask);
      ForwardTensors t(c);
      const auto [batch, seqlen_q, heads, dim] = t.q.shape();
      for (std::int64_t b = 0; b < batch; ++b) {
        for (std::int64_t i = 0; i < seqlen_q; ++i)
          for (std::int64_t h = 0; h < heads; ++h) t.q.at(b, i, h, 0) = to_fp16(-1);
        for (std::int64_t j = first_infinite; j < c.seqlen_k; ++j)
          for (std::int64_t h = 0; h < c.num_heads_k; ++h) t.k.at(b, j, h, 0) = kInfinityBits;
      }
      CHECK(compare_with_float64(t) == 0);
    }
}

TEST_CASE("NaN and infinity in one element of k reach every row that sees it") {
  for (const Mask mask : {Mask::kNone, Mask::kCausal})
    for (const std::uint16_t bits : {kNanBits, kInfinityBits})
      for (const std::int64_t key : {0, 100, 160}) {
        CAPTURE(key);
        const ForwardCase c = small_case(mask);
        ForwardTensors t(c);
        t.k.at(0, key, 1, 7) = bits;
        check_against_float64(t, own_tile(c, 0, key, 1));
      }
}

TEST_CASE("NaN and infinity in one element of v reach every row that sees it") {
  for (const Mask mask : {Mask::kNone, Mask::kCausal})
    for (const std::uint16_t bits : {kNanBits, kInfinityBits})
      for (const std::int64_t key : {0, 100, 160}) {
        CAPTURE(key);
        const ForwardCase c = small_case(mask);
        ForwardTensors t(c);
        t.v.at(0, key, 1, 7) = bits;
        check_against_float64(t, own_tile(c, 0, key, 1));
      }
}

TEST_CASE("a head, or a batch, full of NaN does not reach another") {
  for (const bool whole_batch : {false, true}) {
    const ForwardCase c = small_case(Mask::kNone);
    ForwardTensors t(c);
    for (WatchedTensor* tensor : {&t.q, &t.k, &t.v})
      for (std::int64_t s = 0; s < tensor->shape()[1]; ++s)
        for (std::int64_t h = 0; h < tensor->shape()[2]; ++h)
          for (std::int64_t d = 0; d < c.head_dim; ++d)
            if (whole_batch || h * c.num_heads_k / tensor->shape()[2] == 1) tensor->at(1, s, h, d) = kNanBits;
    check_against_float64(t);
  }
}

TEST_CASE("a row whose every score is minus infinity is NaN, not empty") {
  ForwardCase c = small_case(Mask::kNone);
  ForwardTensors t(c);
  for (std::int64_t key = 0; key < c.seqlen_k; ++key) t.k.at(0, key, 0, 0) = kInfinityBits;
  for (std::int64_t row = 0; row < c.seqlen_q; ++row) t.q.at(0, row, 0, 0) = to_fp16(-1);
  check_against_float64(t);
}

TEST_CASE("rows that see no key are 0 with lse +inf") {
  ForwardCase c = small_case(Mask::kCausal);
  c.seqlen_k = 70;
  ForwardTensors t(c);
  forward_in_interpreter(t.request());
  for (std::int64_t row = 0; row < c.seqlen_q - c.seqlen_k; ++row) {
    CHECK(t.lse[row] == INFINITY);
    for (std::int64_t d = 0; d < c.head_dim; ++d) CHECK(t.out.at(0, row, 0, d) == 0);
  }
  CHECK(std::isfinite(t.lse[c.seqlen_q - c.seqlen_k]));
}

TEST_CASE("the same inputs give the same bits") {
  const ForwardCase c = ForwardCase::parse("hdim72 causal gqa2 sq129 sk257 rising9");
  ForwardTensors first(c), second(c);
  forward_in_interpreter(first.request());
  forward_in_interpreter(second.request());
  CHECK(first.lse == second.lse);
  for (std::int64_t i = 0; i < c.seqlen_q; ++i)
    for (std::int64_t d = 0; d < c.head_dim; ++d) REQUIRE(first.out.at(0, i, 0, d) == second.out.at(0, i, 0, d));
}

TEST_CASE("the report names the kernel and counts its accesses") {
  ForwardCase c = ForwardCase::parse("hdim64 sq64 sk64");
  c.tile = find_tile(64, 64, 32);
  REQUIRE(run_forward_case(c).fault == "");
  const InterpreterReport report = last_interpreter_report();
  CHECK(report.kernel == "flash_fwd_hdim64_fp16_full_gqa1_vec16_" + c.tile->text());
  CHECK(report.blocks == 1);
  // Each warp reads 2 K tiles of 32 keys x 64 dims, 256 elements an access.
  CHECK(report.shared.at("ldmatrix_x4").accesses >= c.tile->warps * 2 * 8);
}

TEST_CASE("element offsets beyond 2^31, in batch, head and row strides") {
  constexpr std::int64_t kElements = (std::int64_t{1} << 32) + (std::int64_t{1} << 20);
  void* memory =
      mmap(nullptr, kElements * 2, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    MESSAGE("this machine gives no 8 GiB of address space: not tested");
    return;
  }
  ForwardCase c = ForwardCase::parse("hdim16 batch2 headsk2 sq40 sk40");
  c.tile = find_tile(16, 64, 32);
  // Which stride is huge: it takes the last index of its dim beyond 2^31 elements, and rows a tile beyond 4
  // GiB.
  const std::int64_t huge = (std::int64_t{1} << 31) + 64, huge_row = (std::int64_t{1} << 26) + 64;
  for (const auto& strides : std::vector<std::array<std::int64_t, 4>>{
           {huge, 32, 16, 1}, {40 * 16, 16, huge, 1}, {16, huge_row, 64, 1}, {17, huge_row + 1, 64, 1}}) {
    CAPTURE(strides[0]);
    CAPTURE(strides[1]);
    ForwardTensors t(c), expected(c);
    forward_in_interpreter(expected.request());
    const auto spread = [&](const TensorView& from, std::int64_t offset) {
      TensorView to = from;
      to.data = static_cast<std::uint16_t*>(memory) + offset;
      to.strides = strides;
      return to;
    };
    const auto copy = [&](WatchedTensor& from, const TensorView& to, auto move) {
      for (std::int64_t b = 0; b < 2; ++b)
        for (std::int64_t s = 0; s < 40; ++s)
          for (std::int64_t h = 0; h < 2; ++h)
            for (std::int64_t d = 0; d < 16; ++d)
              move(from.at(b, s, h, d),
                   static_cast<std::uint16_t*>(to.data)[b * strides[0] + s * strides[1] + h * strides[2] + d]);
    };
    ForwardRequest request = t.request();
    WatchedTensor* tensors[] = {&t.q, &t.k, &t.v, &t.out};
    TensorView* views[] = {&request.q, &request.k, &request.v, &request.out};
    for (int i = 0; i < 4; ++i) {
      *views[i] = spread(*views[i], i * 4096);
      copy(*tensors[i], *views[i], [](std::uint16_t own, std::uint16_t& far) { far = own; });
    }
    forward_in_interpreter(request);
    copy(expected.out, request.out, [](std::uint16_t own, std::uint16_t& far) { REQUIRE(far == own); });
    CHECK(t.lse == expected.lse);
  }
  munmap(memory, kElements * 2);
}

TEST_CASE("a softcap far above the scores changes nothing, one far below makes all keys equal") {
  for (const char* text : {"hdim64 full softcap1e6 sq70 sk130", "hdim64 full softcap1e17 sq70 sk130",
                           "hdim64 causal softcap1e-6 sq70 sk130", "hdim64 full softcap1000 sq70 sk130 thousand"}) {
    CAPTURE(text);
    CHECK(run_forward_case(ForwardCase::parse(text)).fault == "");
  }
}

TEST_CASE("a window visits only the tiles that it touches") {
  const auto loads_of_v = [](const char* text) {
    CHECK(run_forward_case(ForwardCase::parse(text)).fault == "");
    return last_interpreter_report().shared.at("ldmatrix_x4_trans").accesses;
  };
  const auto full = loads_of_v("hdim64 full sq64 sk640 m64n16w4q64l2b4k7");
  const auto narrow = loads_of_v("hdim64 window0,0 sq64 sk640 m64n16w4q64l2b4k7");
  const auto wide = loads_of_v("hdim64 window999,999 sq64 sk640 m64n16w4q64l2b4k7");
  CHECK(wide == full);
  // Of 40 tiles of 16 keys, the 16 rows of a warp see one.
  CHECK(narrow == full / 40);
}
