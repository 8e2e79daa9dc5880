#include "runtime/model/instruction_cache.h"

#include <algorithm>

namespace flash_attn_jit {
namespace {

constexpr std::uint32_t kLineBytes = 128;

}  // namespace

std::int64_t InstructionCache::ready_at(std::uint32_t address, std::int64_t now) {
  const std::uint32_t number = address / kLineBytes;
  Lines& set = sets_[number % sets_.size()];
  if (const auto found = std::ranges::find(set, number, &Line::number); found != set.end()) {
    const std::int64_t arrival = found->arrival;
    if (arrival <= now) std::rotate(found, found + 1, set.end());
    return std::max(now, arrival);
  }
  std::int64_t arrival = now + model_.instruction_miss;
  if (const auto found = std::ranges::find(stream_, number, &Line::number); found != stream_.end()) {
    arrival = found->arrival;
    std::erase_if(stream_, [number](const Line& line) { return line.number <= number; });
    refill_stream(number + 1, now + model_.instruction_miss);
  } else {
    stream_.clear();
    refill_stream(number + 1, now + model_.instruction_miss + 1);
    for (std::size_t i = 0; i < stream_.size(); ++i) stream_[i].arrival += static_cast<std::int64_t>(i);
  }
  set.push_back({number, arrival});
  if (set.size() > static_cast<std::size_t>(model_.instruction_ways)) set.erase(set.begin());
  return std::max(now, arrival);
}

// With the lines from `next` on that it does not hold.
void InstructionCache::refill_stream(std::uint32_t next, std::int64_t arrival) {
  for (; stream_.size() < static_cast<std::size_t>(model_.stream_buffer_lines); ++next)
    if (std::ranges::find(stream_, next, &Line::number) == stream_.end()) stream_.push_back({next, arrival});
}

}  // namespace flash_attn_jit
