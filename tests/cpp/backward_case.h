// One backward problem of the numerics tests: what it is, and how far the kernels' gradients lie from float64.
#pragma once

#include <optional>
#include <string>

#include "forward_case.h"
#include "runtime/request/backward.h"

namespace flash_attn_jit::testing {

enum class DoutLayout {
  kLikeQ,
  kApart,     // its head dims lie apart: the last stride is not 1
  kExpanded,  // one element for all: every stride is 0
};

struct BackwardCase {
  ForwardCase forward;
  // None: the library chooses.
  std::optional<TileConfig> preprocess_tile = {}, dkdv_tile = {}, dq_tile = {}, all_keys_tile = {}, dbias_tile = {};
  double dout_factor = 1;  // dout is N(0, 1) times this
  DoutLayout dout_layout = DoutLayout::kLikeQ;
  bool has_dlse = false;    // softmax_lse has a gradient, N(0, 1) times dout_factor
  bool shares_out = false;  // attn_bias's gradient comes as sums over half of the sequences or heads, where it can

  // The forward case's words, then "preprocess:m64n0w4q0l0b0k0 dkdv:m64n16w4q64l0b8k8 dq:m64n16w4q64l0b8k8 dout64
  // doutapart" or "doutexpanded", "dlse", "sharesout".
  std::string text() const;
  // Words in any order; those left out keep their defaults. Throws SpecError.
  static BackwardCase parse(std::string_view text);
};

inline const ForwardCase& problem_of(const BackwardCase& c) { return c.forward; }

// The tensors of a case: inputs freshly drawn, out and softmax_lse as float64 has them, rounded: a forward kernel would
// take as long to compile as a backward one, and has tests of its own.
struct BackwardTensors {
  explicit BackwardTensors(const BackwardCase& c);

  BackwardRequest request();

  ForwardTensors forward;
  WatchedTensor dout;
  TensorView dout_view;  // of its memory, or of a copy of it
  std::vector<std::uint16_t> dout_copy;
  WatchedTensor dq, dk, dv;
  std::vector<float> delta;
  std::vector<float> peaks;           // empty: the dtype needs none
  std::vector<float> dlse;            // empty: softmax_lse has no gradient
  std::optional<BiasGradient> dbias;  // where attn_bias has numbers
  std::optional<TileConfig> preprocess_tile, dkdv_tile, dq_tile, all_keys_tile, dbias_tile;

  // attn_bias's gradient in attn_bias's shape, what is shared out summed.
  std::vector<double> dbias_values() const;

 private:
  void make_room_for_dbias(bool shares_out);
  void fill_results();
  void lay_out_dout(DoutLayout layout);

  std::vector<std::uint8_t> dbias_bytes_;
};

// Runs a case in the interpreter. Returns "" where every gradient is within twice the error that any kernel with fp16
// operands has to make, plus 1e-5, else what went wrong, with the case.
std::string run_backward_case(const BackwardCase& c);

}  // namespace flash_attn_jit::testing
