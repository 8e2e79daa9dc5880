#include "runtime/tuner/dropout_bits.h"

#include <cstring>

#include "runtime/request/attention_options.h"

namespace flash_attn_jit {

std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> counter, std::array<std::uint32_t, 2> key) {
  for (int round = 0; round < 7; ++round) {
    const std::uint64_t a = std::uint64_t{0xd2511f53} * counter[0], b = std::uint64_t{0xcd9e8d57} * counter[2];
    counter = {static_cast<std::uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<std::uint32_t>(b),
               static_cast<std::uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<std::uint32_t>(a)};
    key[0] += 0x9e3779b9;
    key[1] += 0xbb67ae85;
  }
  return counter;
}

DropoutBits::DropoutBits(const void* bytes, double p) : kept(kept_pairs(p)) {
  std::memcpy(seed.data(), bytes, sizeof seed);
}

// Kernels go through the digits of `kept` for 32 pairs at once. Of one pair that is a comparison: it is kept where the
// number that has 1 - its bit of each random word as digits is less than `kept`.
bool DropoutBits::keep(std::int64_t batch_head, std::int64_t i, std::int64_t j) const {
  const auto cell = static_cast<std::uint32_t>(i / 16 * 8 + i % 8), keys = static_cast<std::uint32_t>(j / 16);
  const int bit = static_cast<int>(i % 16 / 8 * 16 + j % 16);
  int number = 0;
  for (std::uint32_t call = 0; call < 4; ++call) {
    const auto words = philox({keys, cell, static_cast<std::uint32_t>(batch_head), call}, seed);
    for (int w = 0; w < 4; ++w) number |= static_cast<int>(~words[w] >> bit & 1) << (4 * call + w);
  }
  return number < kept;
}

}  // namespace flash_attn_jit
