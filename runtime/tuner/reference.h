// Attention in float64, a row at a time, with what fp16 may make of it: what candidates are checked against.
#pragma once

#include <vector>

#include "runtime/tuner/attention_case.h"

namespace flash_attn_jit {

// A row of an output, and how far fp16 operands may take each element from it: probabilities and gradients of scores
// are rounded to fp16, and so is the result; twice that, for float32's own rounding.
struct ReferenceRow {
  std::vector<double> value, bound;
};

// Of one query row, as the forward pass leaves it.
struct ForwardRow {
  ReferenceRow out;
  double lse = 0;  // +infinity where no key is seen
  double lse_bound = 0;
};

// What a backward kernel is given of the forward pass: softmax_lse and delta, as the device has them.
struct GivenStatistics {
  const float* lse = nullptr;
  const float* delta = nullptr;
};

struct KeyGradientRow {
  ReferenceRow dk, dv;
};

class CaseReference {
 public:
  CaseReference(const AttentionCase& attention, const CaseNumbers& numbers)
      : attention_(attention), numbers_(numbers), dropout_(attention.dropout()) {}

  ForwardRow forward(std::int64_t b, std::int64_t h, std::int64_t i) const;

  // Sum over the head dims of dout x out, of an `out` that is given.
  double delta(std::int64_t b, std::int64_t h, std::int64_t i, const std::vector<double>& out) const;

  ReferenceRow dq(std::int64_t b, std::int64_t h, std::int64_t i, const GivenStatistics& given) const;
  KeyGradientRow dkdv(std::int64_t b, std::int64_t head_k, std::int64_t j, const GivenStatistics& given) const;

 private:
  using Score = AttentionCase::Score;
  Score score(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) const;
  // What dropout multiplies a probability by.
  double kept(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) const;
  double dot(const float* x, const float* y) const;
  const float* query_row(CaseTensor tensor, std::int64_t b, std::int64_t h, std::int64_t i) const;
  const float* key_row(CaseTensor tensor, std::int64_t b, std::int64_t head_k, std::int64_t j) const;
  std::int64_t group() const { return attention_.num_heads / attention_.num_heads_k; }

  const AttentionCase& attention_;
  const CaseNumbers& numbers_;
  std::optional<DropoutBits> dropout_;
};

// How far `got` is from a row, at its worst element: the error that leaves its bound by most, or comes nearest to it.
struct WorstError {
  double error = 0, allowed = 0;
  bool is_within() const { return error <= allowed; }
  // Whether `other` is worse.
  bool is_outdone_by(const WorstError& other) const;
};
WorstError worst_error(const ReferenceRow& row, const std::uint16_t* got);

}  // namespace flash_attn_jit
