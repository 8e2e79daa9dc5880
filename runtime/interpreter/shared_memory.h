// A block's shared memory, and what is known of every two bytes of it: who wrote and read them last, and
// when.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "runtime/interpreter/source_site.h"

namespace flash_attn_jit {

// Barriers that lie behind an access. Between two accesses lies a barrier that both threads took part in
//   - in threads of one warp, when their `warp` differs (block barriers count as well),
//   - in threads of different warps, when their `block` differs.
struct BarrierCount {
  std::uint32_t block = 0;
  std::uint32_t warp = 0;
};

struct SharedAccess {
  std::uint32_t address = 0;
  int bytes = 0;
  int warp = 0;
  int lane = 0;
  BarrierCount barriers;
  SiteId site = 0;
};

class SharedMemory {
 public:
  SharedMemory(int bytes, const SourceSites& sites);

  // Forgets every write, and fills the memory with a pattern of NaNs. `barriers.block` of all later accesses
  // must be at least `first_barrier`, that of all earlier ones below it.
  void begin_block(std::uint32_t first_barrier);

  // Reads or writes; on false a check failed, `error` says which, and nothing was copied.
  bool read(const SharedAccess& access, void* value, std::string& error);
  bool write(const SharedAccess& access, const void* value, std::string& error);

 private:
  // Of two bytes, since no primitive touches fewer. Only the reads since the last write are kept.
  struct Cell {
    std::uint32_t write_block_barrier = 0;  // below first_barrier_: not written in this block
    std::uint32_t write_warp_barrier = 0;
    std::uint16_t writer = 0;  // thread
    SiteId write_site = 0;

    SiteId read_site = 0;  // of the last read
    std::uint16_t read_warp = 0;
    std::uint32_t read_block_barrier = 0;  // the readers below are those since this barrier
    std::uint32_t read_warp_barrier = 0;
    std::uint32_t read_warps = 0;  // bit for each warp
    std::uint32_t read_lanes = 0;  // of read_warp since read_warp_barrier
  };

  bool check_place(const SharedAccess& access, std::string& error) const;
  bool races_with_write(const SharedAccess& access, const Cell& cell) const;
  bool races_with_reads(const SharedAccess& access, const Cell& cell) const;
  static void note_read(const SharedAccess& access, Cell& cell);
  void explain_write_race(const SharedAccess& access, const Cell& cell, const char* what, std::string& error) const;
  void explain_read_race(const SharedAccess& access, const Cell& cell, std::string& error) const;
  std::string place_of(const SharedAccess& access, const Cell& cell) const;

  const SourceSites& sites_;
  std::vector<std::uint32_t> words_;
  int bytes_;
  std::vector<Cell> cells_;
  std::uint32_t first_barrier_ = 1;
};

}  // namespace flash_attn_jit
