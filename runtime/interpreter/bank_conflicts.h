// Cycles that the 32 banks of shared memory, 4 bytes wide each, need for a warp's access.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "runtime/interpreter/access_kind.h"
#include "runtime/interpreter/report.h"
#include "runtime/interpreter/source_site.h"

namespace flash_attn_jit {

struct BankCycles {
  int cycles = 0;
  int ideal = 0;
};

// One access of a warp. Lanes go together as far as their bytes fill the 128 of all banks: all 32 for
// accesses of up to 4 bytes, 8 at a time for 16 bytes. Such a phase takes as many cycles as the fullest bank
// has distinct words. Lanes that are not in `lanes` take no part.
BankCycles bank_cycles(const std::array<std::uint32_t, 32>& addresses, std::uint32_t lanes, int bytes);

// Puts the single accesses of a warp's lanes together: those that a lane makes from one source line for the
// nth time since the last rendezvous belong with the other lanes' nth from that line.
class WarpAccesses {
 public:
  void add(int lane, HostAccess access, SiteId site, std::uint32_t address);

  // Counts and forgets them; to be called at each rendezvous.
  void flush(std::array<AccessCount, kHostAccesses>& counts) {
    if (!groups_.empty()) count_and_clear(counts);
  }

 private:
  struct Group {
    HostAccess access;
    SiteId site;
    std::uint32_t lanes;
    std::array<std::uint32_t, 32> addresses;
  };

  Group& group_for(int lane, HostAccess access, SiteId site);
  void count_and_clear(std::array<AccessCount, kHostAccesses>& counts);

  std::vector<Group> groups_;
  std::array<std::uint32_t, 32> next_{};  // where each lane's next access is likely to belong
};

}  // namespace flash_attn_jit
