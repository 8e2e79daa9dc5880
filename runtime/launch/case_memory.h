// The tensors of a problem that is tuned, on a device: their own numbers in them, some copies of all, and requests on
// them.
#pragma once

#include <vector>

#include "runtime/cuda/driver.h"
#include "runtime/request/backward.h"
#include "runtime/request/forward.h"
#include "runtime/tuner/attention_case.h"

namespace flash_attn_jit {

// In the current context.
class CaseMemory {
 public:
  // As many copies as make a launch find nothing in a second-level cache of `l2_bytes` that an earlier one left there:
  // twice the cache. Throws DriverError where the memory does not hold one copy.
  CaseMemory(Driver& driver, const AttentionCase& attention, const CaseNumbers& numbers, std::int64_t l2_bytes);

  int copies() const { return static_cast<int>(copies_.size()); }
  ForwardRequest forward(int copy) const;
  BackwardRequest backward(int copy) const;  // with every gradient

  // Of copy 0: outputs filled with what no kernel writes, and outputs as they are.
  void spoil_outputs();
  std::vector<std::uint16_t> out() const { return halves(copies_[0].out, q_elements_); }
  std::vector<std::uint16_t> dq() const { return halves(copies_[0].dq, q_elements_); }
  std::vector<std::uint16_t> dk() const { return halves(copies_[0].dk, k_elements_); }
  std::vector<std::uint16_t> dv() const { return halves(copies_[0].dv, k_elements_); }
  std::vector<float> lse() const { return floats(copies_[0].lse); }
  std::vector<float> delta() const { return floats(copies_[0].delta); }

  // What a kernel is given of those before it, in every copy.
  void set_out(const std::vector<std::uint16_t>& out);
  void set_lse(const std::vector<float>& lse);
  void set_delta(const std::vector<float>& delta);

  // Bytes of one copy.
  static std::int64_t bytes_of(const AttentionCase& attention);

 private:
  struct Copy {
    Driver::Memory q, k, v, out, lse, dout, delta, dq, dk, dv;
  };
  Copy make_copy() const;
  void fill(const Driver::Memory& memory, CaseTensor tensor, std::int64_t elements, const CaseNumbers& numbers);
  void* first(const Driver::Memory& memory) const;
  TensorView view(const Driver::Memory& memory, bool is_query) const;
  AttentionOptions options() const;
  std::vector<std::uint16_t> halves(const Driver::Memory& memory, std::int64_t elements) const;
  std::vector<float> floats(const Driver::Memory& memory) const;

  Driver& driver_;
  AttentionCase attention_;
  std::int64_t q_elements_, k_elements_;
  Driver::Memory head_numbers_, pairs_, cu_seqlens_q_, cu_seqlens_k_, key_lengths_, page_table_;
  std::vector<Copy> copies_;
};

}  // namespace flash_attn_jit
