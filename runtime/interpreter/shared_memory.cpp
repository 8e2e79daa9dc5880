#include "runtime/interpreter/shared_memory.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace flash_attn_jit {
namespace {

constexpr std::uint32_t kPoison = 0xffffffffu;  // a NaN as fp16 and as fp32

std::string thread_text(int warp, int lane) { return "warp " + std::to_string(warp) + " lane " + std::to_string(lane); }

}  // namespace

SharedMemory::SharedMemory(int bytes, const SourceSites& sites)
    : sites_(sites), words_((bytes + 3) / 4), bytes_(bytes), cells_((bytes + 1) / 2) {}

void SharedMemory::begin_block(std::uint32_t first_barrier) {
  first_barrier_ = first_barrier;
  std::fill(words_.begin(), words_.end(), kPoison);
}

bool SharedMemory::check_place(const SharedAccess& access, std::string& error) const {
  if (access.address % access.bytes != 0) {
    error = "shared memory address " + std::to_string(access.address) + " is no multiple of " +
            std::to_string(access.bytes);
    return false;
  }
  if (access.address > static_cast<std::uint32_t>(bytes_) ||
      access.address + access.bytes > static_cast<std::uint32_t>(bytes_)) {
    error = "shared memory address " + std::to_string(access.address) + " lies outside the block's " +
            std::to_string(bytes_) + " bytes";
    return false;
  }
  return true;
}

bool SharedMemory::races_with_write(const SharedAccess& access, const Cell& cell) const {
  if (cell.write_block_barrier < first_barrier_) return false;
  if (cell.writer / 32 != access.warp) return cell.write_block_barrier == access.barriers.block;
  return cell.writer % 32 != access.lane && cell.write_warp_barrier == access.barriers.warp;
}

bool SharedMemory::races_with_reads(const SharedAccess& access, const Cell& cell) const {
  if (cell.read_block_barrier != access.barriers.block) return false;
  const std::uint32_t own_warp = 1u << access.warp;
  if (cell.read_warps & ~own_warp) return true;
  return (cell.read_warps & own_warp) && cell.read_warp_barrier == access.barriers.warp &&
         (cell.read_lanes & ~(1u << access.lane));
}

void SharedMemory::note_read(const SharedAccess& access, Cell& cell) {
  if (cell.read_block_barrier != access.barriers.block) {
    cell.read_block_barrier = access.barriers.block;
    cell.read_warps = 0;
    cell.read_lanes = 0;
  }
  cell.read_warps |= 1u << access.warp;
  if (cell.read_warp != access.warp || cell.read_warp_barrier != access.barriers.warp) {
    cell.read_warp = static_cast<std::uint16_t>(access.warp);
    cell.read_warp_barrier = access.barriers.warp;
    cell.read_lanes = 0;
  }
  cell.read_lanes |= 1u << access.lane;
  cell.read_site = access.site;
}

bool SharedMemory::read(const SharedAccess& access, void* value, std::string& error) {
  if (!check_place(access, error)) return false;
  Cell* cell = &cells_[access.address / 2];
  for (Cell* end = cell + access.bytes / 2; cell != end; ++cell) {
    if (cell->write_block_barrier < first_barrier_) {
      error = "read of shared memory that was never written: " + place_of(access, *cell);
      return false;
    }
    if (races_with_write(access, *cell)) {
      explain_write_race(access, *cell, "read", error);
      return false;
    }
    note_read(access, *cell);
  }
  std::memcpy(value, reinterpret_cast<const char*>(words_.data()) + access.address, access.bytes);
  return true;
}

bool SharedMemory::write(const SharedAccess& access, const void* value, std::string& error) {
  if (!check_place(access, error)) return false;
  Cell* cell = &cells_[access.address / 2];
  for (Cell* end = cell + access.bytes / 2; cell != end; ++cell) {
    if (races_with_write(access, *cell)) {
      explain_write_race(access, *cell, "write", error);
      return false;
    }
    if (races_with_reads(access, *cell)) {
      explain_read_race(access, *cell, error);
      return false;
    }
    cell->write_block_barrier = access.barriers.block;
    cell->write_warp_barrier = access.barriers.warp;
    cell->writer = static_cast<std::uint16_t>(access.warp * 32 + access.lane);
    cell->write_site = access.site;
    cell->read_block_barrier = 0;
  }
  std::memcpy(reinterpret_cast<char*>(words_.data()) + access.address, value, access.bytes);
  return true;
}

std::string SharedMemory::place_of(const SharedAccess& access, const Cell& cell) const {
  const auto byte = (&cell - cells_.data()) * 2;
  return "bytes " + std::to_string(byte) + " and " + std::to_string(byte + 1) + " (access of " +
         std::to_string(access.bytes) + " bytes at " + std::to_string(access.address) + ")";
}

void SharedMemory::explain_write_race(const SharedAccess& access, const Cell& cell, const char* what,
                                      std::string& error) const {
  error = std::string("race in shared memory: ") + what + " of " + place_of(access, cell) + ", which " +
          thread_text(cell.writer / 32, cell.writer % 32) + " wrote at " + sites_.text(cell.write_site) +
          "; no barrier between the two that both threads took part in";
}

void SharedMemory::explain_read_race(const SharedAccess& access, const Cell& cell, std::string& error) const {
  const std::uint32_t other_warps = cell.read_warps & ~(1u << access.warp);
  std::string reader;
  if (other_warps == 0)
    reader = thread_text(access.warp, std::countr_zero(cell.read_lanes & ~(1u << access.lane))) + " read at " +
             sites_.text(cell.read_site);
  else if (cell.read_warp != access.warp)
    reader = thread_text(cell.read_warp, std::countr_zero(cell.read_lanes)) + " read at " + sites_.text(cell.read_site);
  else
    reader = "warp " + std::to_string(std::countr_zero(other_warps)) + " read";
  error = "race in shared memory: write of " + place_of(access, cell) + ", which " + reader +
          "; no barrier between the two that both threads took part in";
}

}  // namespace flash_attn_jit
