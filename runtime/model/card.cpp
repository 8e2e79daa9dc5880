#include "runtime/model/card.h"

#include <algorithm>
#include <array>

#include "generator/errors.h"

namespace flash_attn_jit {
namespace {

// Multiprocessors, clocks and memory: NVIDIA's data sheets and "Turing GPU Architecture", appendices. GeForce RTX 20
// runs tensor instructions with float32 accumulators at half the rate of those with float16 ones: the same, table of
// peak rates. A T4's 70 W leave about 0.88 of its boost clock under tensor work: cuBLAS reaches 76 % of the peak there
// and 87 % of a Titan RTX at locked clocks. The others' power limits are taken not to bind.
//
// A T4's copies: NVIDIA's sample bandwidthTest, device to device, where its output was published: 239.6 GB/s
// (github.com/router-gao/cuda-demo, cuda-samples/02-cuda-bandwidth.md); another's goes from 239.4 for 32 MB to 241.4
// for 68 MB.
constexpr double kCopiedByT4 = 240e9;

constexpr std::array kCards = {
    Card{"t4", "Tesla T4", 40, 1590, 1400, 320e9, 8, kCopiedByT4},
    Card{"rtx2060", "NVIDIA GeForce RTX 2060", 30, 1680, 1680, 336e9, 16},
    Card{"rtx2070", "NVIDIA GeForce RTX 2070", 36, 1620, 1620, 448e9, 16},
    Card{"rtx2080", "NVIDIA GeForce RTX 2080", 46, 1710, 1710, 448e9, 16},
    Card{"rtx2080ti", "NVIDIA GeForce RTX 2080 Ti", 68, 1545, 1545, 616e9, 16},
    Card{"titanrtx", "NVIDIA TITAN RTX", 72, 1770, 1770, 672e9, 8},
    Card{"rtx6000", "Quadro RTX 6000", 72, 1770, 1770, 672e9, 8},
};

constexpr int round_up(int value, int step) { return (value + step - 1) / step * step; }

}  // namespace

std::span<const Card> cards() { return kCards; }

const Card& find_card(std::string_view word) {
  std::string known;
  for (const Card& card : kCards) {
    if (card.word == word) return card;
    known += (known.empty() ? "" : ", ") + std::string(card.word);
  }
  throw UnsupportedError({"the card", "is '" + std::string(word) + "'", known});
}

MultiprocessorModel MultiprocessorModel::stressed() const {
  MultiprocessorModel model = *this;
  model.mma_latency += 4;
  model.shared_latency = 30;
  model.global_latency = 450;
  model.barrier_latency = 25;
  return model;
}

MultiprocessorModel multiprocessor_of(const Card& card) {
  MultiprocessorModel model;
  model.mma_latency += card.mma_interval - model.mma_interval;
  model.mma_interval = card.mma_interval;
  return model;
}

int resident_blocks(int registers, int shared_bytes, int threads) {
  const int warps = (threads + 31) / 32;
  // Registers are given out by warp, 256 at a time, from the 16 K of a sub-partition.
  const int of_warp = round_up(std::max(registers, 1) * 32, 256);
  const int by_registers = warps >= 4 ? 65536 / 4 / of_warp * 4 / warps : 65536 / (of_warp * warps);
  const int by_shared = shared_bytes > 0 ? 65536 / round_up(shared_bytes, 256) : 16;
  return std::max(0, std::min({by_registers, by_shared, 1024 / (warps * 32), 16}));
}

}  // namespace flash_attn_jit
