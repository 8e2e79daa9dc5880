// What the model says of a compiled kernel: of its main loop, and of a block from entry to exit.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "generator/kernel_spec.h"
#include "runtime/compile/compiled_kernel.h"
#include "runtime/model/card.h"
#include "runtime/model/multiprocessor.h"

namespace flash_attn_jit {

// The steady main loop.
struct LoopPrediction {
  Usage usage;        // where blocks share a multiprocessor, the mean over the offsets between their starts
  double useful = 0;  // share of the tensor cores' peak that goes into products of the true head dim
  double lowest = 0, highest = 0;  // of the tensor pipe's share, over those offsets
  double under_stress = 0;         // `useful` with longer latencies
  std::string limit;               // what is busiest: "tensor", "lsu", ...
  int instructions = 0, tensor_instructions = 0, spill_instructions = 0;  // of an iteration
  int code_bytes = 0;
  Waits waits;
};

// Cycles of a multiprocessor for each block of those that share it: block + iteration x iterations.
struct BlockCost {
  double block = 0, iteration = 0, masked_iteration = 0;
};

// A kernel of sm_75 machine code, and the tensor instructions that an iteration of a warp needs. Throws
// MachineCodeError.
class KernelModel {
 public:
  KernelModel(const CompiledKernel& kernel, int useful_mma, const Card& card);

  int blocks_per_multiprocessor() const { return resident_; }
  int registers() const { return code_.registers; }

  // `profile`: with where its warps wait.
  std::optional<LoopPrediction> loop(bool profile = false) const;
  // [i] where i + 1 blocks share a multiprocessor.
  std::vector<BlockCost> costs() const;

 private:
  Usage settled(const MultiprocessorModel& model, const Stream& loop, int blocks, double* lowest = nullptr,
                double* highest = nullptr) const;
  BlockCost cost(int blocks) const;

  MachineCode code_;
  MultiprocessorModel model_;
  int useful_mma_, warps_, resident_;
};

}  // namespace flash_attn_jit
