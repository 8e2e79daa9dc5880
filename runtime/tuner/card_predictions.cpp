#include "runtime/tuner/card_predictions.h"

#include "generator/tile_layout.h"
#include "runtime/model/kernel_model.h"
#include "runtime/model/problem_model.h"

namespace flash_attn_jit {
namespace {

constexpr int kModelledSm = 75;

// A group's query heads are apart in the batch where they do not go into it.
ProblemSize size_of(const KernelSpec& spec, const Problem& problem) {
  const std::int64_t group = problem.batch_heads % spec.group_size == 0 ? spec.group_size : 1;
  ProblemSize size{.batch = problem.batch_heads / group,
                   .num_heads = group,
                   .num_heads_k = 1,
                   .seqlen_q = problem.seqlen_q,
                   .seqlen_k = problem.seqlen_k};
  if (spec.mask == Mask::kWindow) size.window_left = size.window_right = problem.window / 2;
  return size;
}

}  // namespace

std::optional<Card> card_of(const TunedDevice& device) {
  if (device.sm != kModelledSm) return std::nullopt;
  for (const Card& card : cards())
    if (card.name == device.name && card.multiprocessors == device.multiprocessors) return card;
  Card card = find_card("t4");
  card.multiprocessors = device.multiprocessors;
  return card;
}

std::optional<Prediction> CardPredictions::predict(const KernelSpec& spec, const Problem& problem,
                                                   const CompiledKernel* kernel) const {
  if (kernel == nullptr) return std::nullopt;
  try {
    const KernelModel model(*kernel, useful_mma_per_iteration(spec), card_);
    const auto loop = model.loop();
    const ProblemPrediction predicted = flash_attn_jit::predict(spec, size_of(spec, problem), model.costs(), card_);
    return Prediction{predicted.seconds, loop ? loop->limit : "dram"};
  } catch (const MachineCodeError&) {
    return std::nullopt;
  }
}

}  // namespace flash_attn_jit
