// The tiles that tuning found for a device, before whatever chooses otherwise.
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "generator/tile_chooser.h"
#include "runtime/system/fork.h"
#include "runtime/tuner/problem_class.h"

namespace flash_attn_jit {

// Which of several records of one class is used: the greatest.
struct RecordRank {
  bool measured = false;  // and not predicted
  bool own = false;       // of the cache, and not of a pack
  std::string when;

  friend auto operator<=>(const RecordRank&, const RecordRank&) = default;
};

// How long a class's tile took, on one problem of the class.
struct MeasuredTime {
  double seconds = 0;  // 0: not measured
  Problem problem;
};

// Chooses without a lock while tiles are added: launches go on while the same process tunes.
class RecordedTiles final : public TileChooser {
 public:
  // `otherwise` chooses for classes without a record.
  explicit RecordedTiles(const TileChooser& otherwise) : otherwise_(otherwise) {}

  TileConfig choose(const KernelSpec& spec, const Problem& problem) const override;
  // By the times of the four kernels, where all were measured on one problem.
  bool takes_all_keys(const KernelSpec& spec, const Problem& problem) const override;
  bool takes_decode(const KernelSpec& spec, const Problem& problem) const override;

  // Whether the class has a tile that was measured, and not predicted.
  bool has_measured(const ProblemClass& problem) const noexcept;

  // From now on `tile` is the class's, unless there is one of a greater rank. `tile` is one that check() allows.
  void add(const ProblemClass& problem, const TileConfig& tile, const RecordRank& rank, const MeasuredTime& time = {});

 private:
  struct Entry {
    ProblemClass problem;
    TileConfig tile;
    RecordRank rank;
    MeasuredTime time;
    const Entry* next;  // of the same bucket, older
  };
  static constexpr std::size_t kBuckets = 1024;
  static std::size_t bucket_of(const ProblemClass& problem) noexcept;
  const Entry* find(const ProblemClass& problem) const noexcept;

  const TileChooser& otherwise_;
  // What is added stands before what it replaces, which stays: somebody may be reading it.
  std::array<std::atomic<const Entry*>, kBuckets> buckets_{};
  ForkSafeMutex mutex_;  // of add()
  std::vector<std::unique_ptr<const Entry>> owned_;
};

}  // namespace flash_attn_jit
