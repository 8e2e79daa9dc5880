#include "runtime/tuner/recorded_tiles.h"

#include <mutex>

namespace flash_attn_jit {

std::size_t RecordedTiles::bucket_of(const ProblemClass& problem) noexcept {
  const KernelSpec& spec = problem.spec;
  std::uint64_t hash = 0;
  for (const std::int64_t field :
       {std::int64_t{spec.head_dim}, std::int64_t{spec.group_size}, static_cast<std::int64_t>(spec.kind),
        static_cast<std::int64_t>(spec.dtype), static_cast<std::int64_t>(spec.mask),
        static_cast<std::int64_t>(spec.features.bits()), static_cast<std::int64_t>(spec.access), problem.seqlen_q,
        problem.seqlen_k, problem.batch_heads})
    hash = (hash ^ static_cast<std::uint64_t>(field)) * 0x9e3779b97f4a7c15u;  // powers of two differ in high bits
  return hash >> 54;
}

const RecordedTiles::Entry* RecordedTiles::find(const ProblemClass& problem) const noexcept {
  const Entry* entry = buckets_[bucket_of(problem)].load(std::memory_order_acquire);
  while (entry != nullptr && entry->problem != problem) entry = entry->next;
  return entry;
}

TileConfig RecordedTiles::choose(const KernelSpec& spec, const Problem& problem) const {
  if (const Entry* const entry = find(class_of(spec, problem))) return entry->tile;
  return otherwise_.choose(spec, problem);
}

void RecordedTiles::add(const ProblemClass& problem, const TileConfig& tile, const RecordRank& rank) {
  auto made = std::make_unique<Entry>(Entry{problem, tile, rank, nullptr});
  const std::lock_guard guard(mutex_);
  if (const Entry* const known = find(problem);
      known != nullptr && (known->rank > rank || (known->rank == rank && known->tile == tile)))
    return;
  std::atomic<const Entry*>& bucket = buckets_[bucket_of(problem)];
  made->next = bucket.load(std::memory_order_relaxed);
  bucket.store(made.get(), std::memory_order_release);
  owned_.push_back(std::move(made));
}

}  // namespace flash_attn_jit
