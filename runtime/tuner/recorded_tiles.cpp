#include "runtime/tuner/recorded_tiles.h"

#include <mutex>

#include "generator/families/families.h"

namespace flash_attn_jit {

std::size_t RecordedTiles::bucket_of(const ProblemClass& problem) noexcept {
  const KernelSpec& spec = problem.spec;
  std::uint64_t hash = 0;
  for (const std::int64_t field :
       {std::int64_t{spec.head_dim}, std::int64_t{spec.head_dim_v}, std::int64_t{spec.group_size},
        static_cast<std::int64_t>(spec.kind), static_cast<std::int64_t>(spec.dtype),
        static_cast<std::int64_t>(spec.mask), static_cast<std::int64_t>(spec.features.bits()),
        static_cast<std::int64_t>(spec.access), problem.seqlen_q, problem.seqlen_k, problem.batch_heads})
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

bool RecordedTiles::takes_decode(const KernelSpec& spec, const Problem& problem) const {
  return otherwise_.takes_decode(spec, problem);
}

bool RecordedTiles::takes_all_keys(const KernelSpec& spec, const Problem& problem) const {
  const auto time_of = [&](KernelKind kind) {
    KernelSpec other = spec;
    other.kind = kind;
    const Entry* const entry = find(class_of(normalized(other), problem));
    return entry != nullptr ? entry->time : MeasuredTime{};
  };
  const MeasuredTime of_one = time_of(KernelKind::kBackwardAllKeys);
  if (of_one.seconds == 0) return otherwise_.takes_all_keys(spec, problem);
  double of_three = 0;
  for (const KernelKind kind : kSeparateBackwardKinds) {
    const MeasuredTime time = time_of(kind);
    if (time.seconds == 0 || time.problem != of_one.problem) return otherwise_.takes_all_keys(spec, problem);
    of_three += time.seconds;
  }
  return of_one.seconds <= of_three;
}

bool RecordedTiles::has_measured(const ProblemClass& problem) const noexcept {
  const Entry* const entry = find(problem);
  return entry != nullptr && entry->rank.measured;
}

void RecordedTiles::add(const ProblemClass& problem, const TileConfig& tile, const RecordRank& rank,
                        const MeasuredTime& time) {
  auto made = std::make_unique<Entry>(Entry{problem, tile, rank, time, nullptr});
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
