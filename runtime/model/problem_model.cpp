#include "runtime/model/problem_model.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <queue>
#include <string>

#include "generator/errors.h"
#include "generator/families/families.h"
#include "generator/integers.h"
#include "generator/kernel_traffic.h"
#include "generator/key_splits.h"
#include "generator/tile_layout.h"

namespace flash_attn_jit {
namespace {

constexpr double kElementBytes = 2;  // fp16
constexpr std::int64_t kNoEnd = std::int64_t{1} << 40;

// Where the columns (keys, or queries for a kernel that owns keys) that a row sees begin and end, as offsets from the
// row.
struct Band {
  std::int64_t first = -kNoEnd, last = kNoEnd;
};

Band band_of(const KernelSpec& spec, const ProblemSize& size) {
  const std::int64_t shift = size.seqlen_k - size.seqlen_q;
  std::int64_t left = kNoEnd, right = kNoEnd;
  if (spec.mask == Mask::kCausal) right = 0;
  if (spec.mask == Mask::kWindow) {
    if (size.window_left >= 0) left = size.window_left;
    if (size.window_right >= 0) right = size.window_right;
  }
  // Query i sees keys i + shift - left to i + shift + right; key j is seen by queries j - shift - right to j - shift +
  // left.
  if (family_of(spec.kind).rows == RowSide::kQueries) return {shift - left, shift + right};
  return {-shift - right, -shift + left};
}

struct Iterations {
  double whole = 0, masked = 0;
};

// Of the block that owns rows [begin, end): tiles whose every score is seen, and tiles that the mask or the sequence's
// end cuts. Of the latter a warp leaves out those that none of its rows sees: about half of them at a diagonal.
Iterations iterations_of(const KernelSpec& spec, const Band& band, std::int64_t begin, std::int64_t end,
                         std::int64_t columns) {
  const std::int64_t n = spec.tile.block_n;
  const auto clamp = [columns](std::int64_t at) { return std::clamp<std::int64_t>(at, 0, columns); };
  const std::int64_t seen_from = clamp(begin + band.first), seen_to = clamp(end - 1 + band.last + 1);
  if (seen_from >= seen_to) return {};
  const std::int64_t tiles = ceil_div(seen_to, n) - seen_from / n;
  const std::int64_t all_from = ceil_div(clamp(end - 1 + band.first), n);
  const std::int64_t all_to = clamp(begin + band.last + 1) / n;
  const std::int64_t whole = std::max<std::int64_t>(0, all_to - all_from);
  const bool cut_by_mask = band.first > -columns - end || band.last < columns;
  const double working = cut_by_mask ? 0.5 + 0.5 / spec.tile.warps : 1.0;
  return {static_cast<double>(whole), static_cast<double>(tiles - whole) * working};
}

double cycles_of(const BlockCost& cost, const Iterations& iterations) {
  return cost.block + cost.iteration * iterations.whole + cost.masked_iteration * iterations.masked;
}

// Scores that are seen, of all heads and batches.
double seen_scores(const KernelSpec& spec, const ProblemSize& size) {
  const bool owns_keys = family_of(spec.kind).rows == RowSide::kKeys;
  const std::int64_t rows = owns_keys ? size.seqlen_k : size.seqlen_q,
                     columns = owns_keys ? size.seqlen_q : size.seqlen_k;
  const Band band = band_of(spec, size);
  double seen = 0;
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int64_t from = std::clamp<std::int64_t>(row + band.first, 0, columns);
    const std::int64_t to = std::clamp<std::int64_t>(row + band.last + 1, 0, columns);
    seen += static_cast<double>(std::max<std::int64_t>(0, to - from));
  }
  return seen * static_cast<double>(size.batch * size.num_heads);
}

// Equal blocks: rounds of as many as the card holds, the last of which shares multiprocessors with fewer.
double uniform_cycles(std::int64_t blocks, const Iterations& each, const std::vector<BlockCost>& costs,
                      const Card& card, double extra) {
  const auto resident = static_cast<std::int64_t>(costs.size());
  const std::int64_t at_once = card.multiprocessors * resident;
  const auto round = [&](std::int64_t sharing) {
    const BlockCost& cost = costs[static_cast<std::size_t>(sharing - 1)];
    return static_cast<double>(sharing) * (cycles_of(cost, each) + extra);
  };
  const std::int64_t rest = blocks % at_once;
  return static_cast<double>(blocks / at_once) * round(resident) +
         (rest > 0 ? round(ceil_div(rest, card.multiprocessors)) : 0.0);
}

// Blocks of different length: each goes, in the order of the launch, to the place that is free first.
double scheduled_cycles(const std::vector<Iterations>& of_head, std::int64_t heads, const std::vector<BlockCost>& costs,
                        const Card& card, double extra) {
  const std::int64_t blocks = static_cast<std::int64_t>(of_head.size()) * heads;
  const std::int64_t sharing =
      std::clamp<std::int64_t>(ceil_div(blocks, card.multiprocessors), 1, static_cast<std::int64_t>(costs.size()));
  const BlockCost& cost = costs[static_cast<std::size_t>(sharing - 1)];
  std::priority_queue<double, std::vector<double>, std::greater<>> free_at;
  for (std::int64_t i = 0; i < card.multiprocessors * sharing; ++i) free_at.push(0);
  double end = 0;
  for (std::int64_t head = 0; head < heads; ++head)
    for (const Iterations& block : of_head) {
      const double done = free_at.top() + static_cast<double>(sharing) * (cycles_of(cost, block) + extra);
      free_at.pop();
      free_at.push(done);
      end = std::max(end, done);
    }
  return end;
}

void require_size(const ProblemSize& size) {
  for (const auto& [name, value] : {std::pair("batch", size.batch),
                                    {"num_heads", size.num_heads},
                                    {"num_heads_k", size.num_heads_k},
                                    {"seqlen_q", size.seqlen_q},
                                    {"seqlen_k", size.seqlen_k}})
    if (value < 1) throw UnsupportedError({name, "is " + std::to_string(value), "1 or more"});
  if (size.num_heads % size.num_heads_k != 0)
    throw UnsupportedError({"num_heads_k", "is " + std::to_string(size.num_heads_k),
                            "a divisor of num_heads, " + std::to_string(size.num_heads)});
}

// From blocks and cycles, with DRAM's floors.
void take_seconds(ProblemPrediction& prediction, const KernelSpec& spec, const ProblemSize& size, const Card& card,
                  double bytes) {
  prediction.dram_seconds = bytes / card.dram_bytes_per_second;
  prediction.copy_seconds = bytes / card.attainable_bytes_per_second();
  prediction.seconds = std::max(prediction.cycles / card.sustained_mhz / 1e6, prediction.copy_seconds);
  prediction.seconds_at_boost = std::max(prediction.cycles / card.boost_mhz / 1e6, prediction.copy_seconds);
  if (family_of(spec.kind).products == 0) return;
  prediction.useful_flops = seen_scores(spec, size) * 2.0 * product_dims(spec);
  // An m16n8k8 is 16 x 8 x 8 multiply-adds.
  const double flops_per_cycle = 4.0 * 2 * 16 * 8 * 8 / card.mma_interval * card.multiprocessors;
  prediction.share_of_peak = prediction.useful_flops / (prediction.cycles * flops_per_cycle);
}

// Elements of an attn_bias: those of pairs that see each other, or a key's where all queries have the same.
double bias_elements(const KernelSpec& spec, const ProblemSize& size) {
  if (size.bias_heads == 0 || !spec.features.read_pairs()) return 0;
  const double of_a_head = spec.has(Feature::kOneRow)
                               ? static_cast<double>(size.seqlen_k)
                               : seen_scores(spec, size) / static_cast<double>(size.batch * size.num_heads);
  return static_cast<double>(size.bias_heads) * of_a_head;
}

double traffic_of(const KernelSpec& spec, const ProblemSize& size) {
  return kernel_traffic(spec, static_cast<double>(size.batch * size.seqlen_q * size.num_heads),
                        static_cast<double>(size.batch * size.seqlen_k * size.num_heads_k), bias_elements(spec, size));
}

// Of the decode kernel, without what puts its splits together.
ProblemPrediction predict_splits(const KernelSpec& spec, const ProblemSize& size, const std::vector<BlockCost>& costs,
                                 const Card& card) {
  const std::int64_t rows = size.batch * size.num_heads;
  const Problem problem{size.seqlen_q, size.seqlen_k, rows, card.multiprocessors, size.seqlen_k};
  const KeySplits splits = split_keys(spec, problem);
  std::int64_t seen = std::min<std::int64_t>(splits.keys, size.seqlen_k);
  if (spec.mask == Mask::kWindow && size.window_left >= 0 && size.window_right >= 0)
    seen = std::min(seen, size.window_left + size.window_right + size.seqlen_q);
  ProblemPrediction prediction;
  prediction.iterations = static_cast<double>(ceil_div(seen, columns_of_iteration(spec)));
  prediction.blocks = decode_row_blocks(spec, problem) * splits.count;
  prediction.blocks_per_multiprocessor = static_cast<int>(costs.size());
  prediction.waves =
      static_cast<double>(prediction.blocks) / (card.multiprocessors * static_cast<double>(costs.size()));
  prediction.cycles = uniform_cycles(prediction.blocks, {prediction.iterations, 0}, costs, card, 0);
  const double of_parts =
      splits.count > 1 ? 4.0 * splits.count * static_cast<double>(rows * size.seqlen_q) * (kernel_value_dims(spec) + 2)
                       : 0.0;
  take_seconds(prediction, spec, size, card, traffic_of(spec, size) + of_parts);
  return prediction;
}

// Of what appends to a cache: seqlen_k new rows of k and v for each sequence. No query is turned.
ProblemPrediction predict_append(const KernelSpec& spec, const ProblemSize& size, const std::vector<BlockCost>& costs,
                                 const Card& card) {
  ProblemPrediction prediction;
  prediction.blocks = ceil_div(2 * size.batch * size.seqlen_k * size.num_heads_k, spec.tile.block_m);
  prediction.blocks_per_multiprocessor = static_cast<int>(costs.size());
  prediction.waves =
      static_cast<double>(prediction.blocks) / (card.multiprocessors * static_cast<double>(costs.size()));
  prediction.cycles = uniform_cycles(prediction.blocks, {}, costs, card, 0);
  take_seconds(prediction, spec, size, card, traffic_of(spec, size));
  return prediction;
}

}  // namespace

ProblemPrediction predict(const KernelSpec& spec, const ProblemSize& size, const std::vector<BlockCost>& costs,
                          const Card& card) {
  require_size(size);
  const KernelFamily& family = family_of(spec.kind);
  if (family.warps_share_rows) return predict_splits(spec, size, costs, card);
  if (family.results.cache) return predict_append(spec, size, costs, card);
  const bool owns_keys = family.rows == RowSide::kKeys;
  const std::int64_t rows = owns_keys ? size.seqlen_k : size.seqlen_q,
                     columns = owns_keys ? size.seqlen_q : size.seqlen_k;
  const std::int64_t group = owns_keys ? size.num_heads / size.num_heads_k : 1;
  const std::int64_t heads = size.batch * (owns_keys ? size.num_heads_k : size.num_heads) * family.output_splits(spec);
  const Band band = band_of(spec, size);

  std::vector<Iterations> of_head;
  ProblemPrediction prediction;
  for (std::int64_t begin = 0; begin < rows; begin += spec.tile.block_m) {
    Iterations block;
    if (family.products > 0)
      block = iterations_of(spec, band, begin, std::min<std::int64_t>(begin + spec.tile.block_m, rows), columns);
    block.whole *= static_cast<double>(group);
    block.masked *= static_cast<double>(group);
    of_head.push_back(block);
    prediction.iterations += block.whole;
    prediction.masked_iterations += block.masked;
  }
  // Forward and dQ begin with the last queries, which see the most keys.
  if (!owns_keys && spec.mask == Mask::kCausal) std::ranges::reverse(of_head);
  const auto per_head = static_cast<double>(of_head.size());
  prediction.iterations /= per_head;
  prediction.masked_iterations /= per_head;
  prediction.blocks = static_cast<std::int64_t>(of_head.size()) * heads;
  prediction.blocks_per_multiprocessor = static_cast<int>(costs.size());
  prediction.waves =
      static_cast<double>(prediction.blocks) / (card.multiprocessors * static_cast<double>(costs.size()));

  // What a block reads and writes once comes at its share of DRAM's bandwidth, where the cost of a block has it at the
  // load/store unit's: with equal blocks all multiprocessors do this at the same time.
  const int dims = spec.head_dim, value_dims = spec.value_head_dim();
  const double of_block = static_cast<double>(spec.tile.block_m) * kElementBytes *
                          (family.results.dkdv ? 2 * (dims + value_dims)
                           : family.results.dq ? 2 * dims + value_dims
                                               : dims + value_dims);
  const double bytes_per_cycle = card.dram_bytes_per_second / card.sustained_mhz / 1e6 / card.multiprocessors;
  const double extra =
      std::max(0.0, of_block / bytes_per_cycle - of_block / MultiprocessorModel().shared_bytes_per_cycle);

  const bool uniform = spec.mask == Mask::kNone || of_head.size() == 1;
  prediction.cycles = uniform ? uniform_cycles(prediction.blocks, of_head.front(), costs, card, extra)
                              : scheduled_cycles(of_head, heads, costs, card, extra);
  take_seconds(prediction, spec, size, card, traffic_of(spec, size));
  return prediction;
}

}  // namespace flash_attn_jit
