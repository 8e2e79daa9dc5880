#include "runtime/model/kernel_model.h"

#include <algorithm>
#include <array>
#include <set>

#include "runtime/model/control_flow.h"

namespace flash_attn_jit {
namespace {

// Between the starts of resident blocks, in turns of the loop: in which phase to one another they settle is luck.
constexpr std::array kOffsets = {.17, .31, .47, .63, .81};

// Iterations of the run that tells what a block costs beside them, and its blocks for every block that is resident.
constexpr int kFewIterations = 3, kBlocksEach = 3;

Stream repeated(const Stream& before, const Stream& loop, int times, const Stream& after) {
  Stream stream = before;
  for (int i = 0; i < times; ++i) stream.insert(stream.end(), loop.begin(), loop.end());
  stream.insert(stream.end(), after.begin(), after.end());
  return stream;
}

std::string limit_of(const Usage& usage) {
  std::string limit = "lsu";
  double most = usage.load_store;
  for (const Pipe pipe : {Pipe::kTensor, Pipe::kFma, Pipe::kAlu, Pipe::kXu, Pipe::kFp16, Pipe::kFp64})
    if (const double busy = usage.busy[static_cast<std::size_t>(pipe)]; busy > most) {
      most = busy;
      limit = to_text(pipe);
    }
  return limit;
}

// Adds a run to the sum that a mean over runs is made of, each weighed by its time.
void add_weighed(Usage& sum, const Usage& run, double weight) {
  for (std::size_t i = 0; i < sum.busy.size(); ++i) sum.busy[i] += run.busy[i] * weight;
  sum.load_store += run.load_store * weight;
  sum.issue += run.issue * weight;
  sum.cycles += run.cycles * weight;
}

}  // namespace

KernelModel::KernelModel(const CompiledKernel& kernel, int useful_mma, const Card& card)
    : code_(read_machine_code(kernel.image, kernel.entry)),
      model_(multiprocessor_of(card)),
      useful_mma_(useful_mma),
      warps_((kernel.threads + 31) / 32),
      resident_(resident_blocks(code_.registers, code_.static_smem + kernel.dynamic_smem, kernel.threads)) {
  if (resident_ < 1) throw MachineCodeError("a block of the kernel does not fit on a Turing multiprocessor");
}

Usage KernelModel::settled(const MultiprocessorModel& model, const Stream& loop, int blocks, double* lowest,
                           double* highest) const {
  constexpr auto kTensor = static_cast<std::size_t>(Pipe::kTensor);
  std::vector<Usage> runs = {play_loop(model, loop, {blocks, warps_})};
  if (blocks > 1)
    for (const double offset : kOffsets)
      runs.push_back(play_loop(model, loop, {blocks, warps_},
                               {.offset = static_cast<std::int64_t>(runs.front().cycles * offset)}));
  double cycles = 0;
  for (const Usage& run : runs) cycles += run.cycles;
  Usage mean;
  for (const Usage& run : runs) add_weighed(mean, run, run.cycles / cycles);
  mean.cycles = cycles / static_cast<double>(runs.size());
  const auto share = [](const Usage& run) { return run.busy[kTensor]; };
  if (lowest != nullptr) *lowest = share(*std::ranges::min_element(runs, {}, share));
  if (highest != nullptr) *highest = share(*std::ranges::max_element(runs, {}, share));
  return mean;
}

std::optional<LoopPrediction> KernelModel::loop(bool profile) const {
  const std::vector<CodeLoop> loops = tensor_loops(code_);
  if (loops.empty()) return std::nullopt;
  const Stream stream = stream_of(code_, loops.front());
  LoopPrediction prediction;
  prediction.instructions = static_cast<int>(stream.size());
  prediction.tensor_instructions = loops.front().tensor;
  std::set<std::uint32_t> lines;
  for (const Instruction* instruction : stream) {
    prediction.spill_instructions += instruction->is("LDL") || instruction->is("STL");
    lines.insert(instruction->address / 128);
  }
  prediction.code_bytes = static_cast<int>(lines.size()) * 128;
  // Products of padded dims are work, but not useful.
  const double share = std::min(1.0, static_cast<double>(useful_mma_) / prediction.tensor_instructions);
  constexpr auto kTensor = static_cast<std::size_t>(Pipe::kTensor);
  prediction.usage = settled(model_, stream, resident_, &prediction.lowest, &prediction.highest);
  prediction.useful = prediction.usage.busy[kTensor] * share;
  prediction.under_stress = settled(model_.stressed(), stream, resident_).busy[kTensor] * share;
  prediction.limit = limit_of(prediction.usage);
  if (profile) play_loop(model_, stream, {resident_, warps_}, {}, &prediction.waits);
  return prediction;
}

BlockCost KernelModel::cost(int blocks) const {
  const ResidentBlocks resident{blocks, warps_};
  const std::vector<CodeLoop> loops = tensor_loops(code_);
  if (loops.empty()) return {play_blocks(model_, path_through(code_), resident, kBlocksEach * blocks).cycles, 0, 0};
  const Stream loop = stream_of(code_, loops.front());
  const Stream before = path_to(code_, loops.front()), after = path_from(code_, loops.front());
  const Stream whole = repeated(before, loop, kFewIterations, after);
  BlockCost cost;
  cost.iteration = settled(model_, loop, blocks).cycles / blocks;
  cost.block = play_blocks(model_, whole, resident, kBlocksEach * blocks).cycles - kFewIterations * cost.iteration;
  // The loop for tiles that the mask cuts stands first in the code.
  cost.masked_iteration = cost.iteration;
  for (const CodeLoop& other : loops)
    if (other.last < loops.front().first)
      cost.masked_iteration =
          std::max(cost.masked_iteration, settled(model_, stream_of(code_, other), blocks).cycles / blocks);
  return cost;
}

std::vector<BlockCost> KernelModel::costs() const {
  std::vector<BlockCost> costs;
  for (int blocks = 1; blocks <= resident_; ++blocks) costs.push_back(cost(blocks));
  return costs;
}

}  // namespace flash_attn_jit
