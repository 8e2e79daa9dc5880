#include "runtime/interpreter/bank_conflicts.h"

#include <algorithm>

namespace flash_attn_jit {
namespace {

constexpr int kRowBytes = 128;  // of all banks together

// Cycles of lanes [begin, end), which go together. `unit` bytes from each: banks are looked at unit by unit.
int phase_cycles(const std::array<std::uint32_t, 32>& addresses, std::uint32_t lanes, int begin, int end, int unit) {
  const std::uint32_t units = kRowBytes / unit;
  std::array<std::array<std::uint32_t, 32>, 32> words;
  std::array<int, 32> count{};
  int fullest = 0;
  for (int lane = begin; lane < end; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    const std::uint32_t word = addresses[lane] / unit;
    auto& bank = words[word % units];
    int& used = count[word % units];
    if (std::find(bank.begin(), bank.begin() + used, word) == bank.begin() + used) bank[used++] = word;
    fullest = std::max(fullest, used);
  }
  return fullest;
}

}  // namespace

BankCycles bank_cycles(const std::array<std::uint32_t, 32>& addresses, std::uint32_t lanes, int bytes) {
  const int unit = std::max(bytes, 4);
  const int lanes_per_phase = std::min(32, kRowBytes / unit);
  BankCycles sum;
  for (int begin = 0; begin < 32; begin += lanes_per_phase) {
    const int cycles = phase_cycles(addresses, lanes, begin, begin + lanes_per_phase, unit);
    sum.cycles += cycles;
    sum.ideal += cycles > 0;
  }
  return sum;
}

void WarpAccesses::add(int lane, HostAccess access, SiteId site, std::uint32_t address) {
  Group& group = group_for(lane, access, site);
  group.lanes |= 1u << lane;
  group.addresses[lane] = address;
}

WarpAccesses::Group& WarpAccesses::group_for(int lane, HostAccess access, SiteId site) {
  const auto fits = [&](const Group& group) {
    return group.site == site && group.access == access && !(group.lanes >> lane & 1);
  };
  std::uint32_t& next = next_[lane];
  if (next >= groups_.size() || !fits(groups_[next])) {
    const auto found = std::find_if(groups_.begin(), groups_.end(), fits);
    next = static_cast<std::uint32_t>(found - groups_.begin());
    if (found == groups_.end()) groups_.push_back({access, site, 0, {}});
  }
  return groups_[next++];
}

void WarpAccesses::count_and_clear(std::array<AccessCount, kHostAccesses>& counts) {
  for (const Group& group : groups_) {
    const BankCycles banks = bank_cycles(group.addresses, group.lanes, access_kind(group.access).bytes);
    AccessCount& count = counts[static_cast<int>(group.access)];
    ++count.accesses;
    count.cycles += banks.cycles;
    count.ideal_cycles += banks.ideal;
  }
  groups_.clear();
  next_.fill(0);
}

}  // namespace flash_attn_jit
