// The folder of records: `tuning/` in the cache's folder or in a pack, be that a folder or a zip file; a folder in it
// for each device.
//
//   tuning/tesla-t4-sm75-40mp-native/fwd_hdim128_fp16_causal_gqa8_vec16_q1024_k1024_bh64.0123456789abcdef.json
//   tuning/tesla-t4-sm75-40mp-native/<64 hex digits>.<number>.tmp         being written
//
// A file's name follows from its record's key. There are no locks: a file is whole or not there, and of two that write
// one key the last stays. What is no record, another's or not to be trusted is passed over with one warning.
#pragma once

#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "runtime/cache/trusted_folder.h"
#include "runtime/system/fork.h"
#include "runtime/tuner/record.h"

namespace flash_attn_jit {

// Thread-safe.
class RecordStore {
 public:
  // `home` is the cache's folder, or the pack, a zip file of which is only read; empty: there is none, and memory
  // serves.
  RecordStore(std::filesystem::path home, FolderUse use);

  // Those of one device, or of all, of whatever templates, in the order of their files. Never throws for what lies
  // there.
  std::vector<TuningRecord> read(const TunedDevice& device) const;
  std::vector<TuningRecord> read_all() const;

  // Keeps it in the place of that of the same key. Throws RecordError where no reader would take it, and, in a pack,
  // FileError; a cache that cannot be written says so once, and memory serves.
  void publish(const TuningRecord& record);

  std::filesystem::path folder() const { return home_ / "tuning"; }

 private:
  // The names of a device's records and how one is read, by what holds them.
  struct Source {
    std::vector<std::string> names;
    std::function<std::optional<std::string>(const std::string& name)> read;
  };
  std::optional<Source> open(const std::string& slug) const;
  std::optional<Source> open_in_zip(const std::string& slug) const;
  std::vector<std::string> device_folders() const;
  bool is_zip() const;
  void read_folder(const std::string& slug, std::vector<TuningRecord>& records) const;
  void write(const TuningRecord& record, const std::string& text) const;

  std::filesystem::path home_;
  FolderUse use_;
  mutable ForkSafeMutex mutex_;                  // guards what is below; never held while reading or writing
  std::map<RecordKey, TuningRecord> in_memory_;  // what could not be written
};

// "fwd_hdim128_fp16_causal_gqa8_vec16_q1024_k1024_bh64.0123456789abcdef.json"
std::string record_file_name(const RecordKey& key);

// "tesla-t4-sm75-40mp-native"
std::string device_slug(const TunedDevice& device);

}  // namespace flash_attn_jit
