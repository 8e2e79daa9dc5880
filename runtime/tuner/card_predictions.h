// The card's model as the tuner asks it: how long a candidate takes on a Turing card, from its machine code.
#pragma once

#include <optional>

#include "runtime/model/card.h"
#include "runtime/tuner/record.h"
#include "runtime/tuner/search_parts.h"

namespace flash_attn_jit {

// The card of a device, from the model's table, or one like a T4 with the device's multiprocessors; nothing where the
// device does not run sm_75 machine code.
std::optional<Card> card_of(const TunedDevice& device);

class CardPredictions final : public CandidateModel {
 public:
  explicit CardPredictions(const Card& card) : card_(card) {}

  // Nothing before the kernel is compiled, and for machine code that cannot be read.
  std::optional<Prediction> predict(const KernelSpec& spec, const Problem& problem,
                                    const CompiledKernel* kernel) const override;

 private:
  const Card card_;
};

}  // namespace flash_attn_jit
