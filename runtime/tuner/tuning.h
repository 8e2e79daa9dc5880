// What tuning has found, as a process uses it: the records of the cache and of a pack, and each device's chooser of
// tiles.
#pragma once

#include <array>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "generator/render.h"
#include "runtime/system/fork.h"
#include "runtime/tuner/record_store.h"
#include "runtime/tuner/recorded_tiles.h"

namespace flash_attn_jit {

// Thread-safe.
class Tuning {
 public:
  struct Settings {
    std::filesystem::path home;                 // of the cache; empty: there is none
    std::optional<std::filesystem::path> pack;  // asked after it
    const TemplateSet& templates;               // those in use: records of others are kept and not used
    const TileChooser& otherwise;               // chooses where there is no record; has to outlive this object
  };
  explicit Tuning(const Settings& settings);

  // Reads the device's records at the first call. The chooser lives as long as this object.
  const TileChooser& tiles_of(const TunedDevice& device);

  // What chooses where there is no record.
  const TileChooser& otherwise() const { return otherwise_; }

  // Whether a choice for this class follows a record of what was measured.
  bool has_measured(const TunedDevice& device, const ProblemClass& problem);

  // Keeps a record, as RecordStore::publish(), and every later choice on its device uses it.
  void publish(const TuningRecord& record);

  const RecordStore& store() const { return own_; }

  // What a record of this kind of kernel has as its key's `templates`.
  const std::string& templates_of(KernelKind kind) const { return digests_[static_cast<std::size_t>(kind)]; }
  bool has_templates_in_use(const RecordKey& key) const { return key.templates == templates_of(key.problem.spec.kind); }

 private:
  RecordedTiles& recorded_tiles(const TunedDevice& device);
  void use(RecordedTiles& tiles, const TuningRecord& record, bool own) const;

  RecordStore own_;
  std::unique_ptr<RecordStore> pack_;  // null: none
  std::array<std::string, kKernelKinds.size()> digests_;
  const TileChooser& otherwise_;
  ForkSafeMutex mutex_;  // guards what is below; not held while records are read
  std::map<TunedDevice, std::unique_ptr<RecordedTiles>> devices_;
};

// Why the tile of a record cannot be launched on its device, or nothing where it can.
std::optional<std::string> check_winner(const TuningRecord& record);

}  // namespace flash_attn_jit
