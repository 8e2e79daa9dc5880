// Zip files as packs are: every file stored as it is, without compression. Only the plainest archives are read: one
// disk, no zip64, no encryption, no comments, names that lead nowhere else, and no byte that does not belong to a file
// or to the directory at the end, so that two readers of one archive cannot see different files.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/system/files.h"

namespace flash_attn_jit {

// A file of an archive, as the directory at its end tells.
struct ZippedFile {
  std::string name;  // "manifest.json", "tuning/tesla_t4/x.json"
  std::uint32_t bytes = 0;
  std::uint32_t crc = 0;
  std::uint64_t begin = 0;  // of its header, which the file itself follows
  std::uint64_t end = 0;    // where the next one, or the directory, begins
};

class StoredZip {
 public:
  // Reads the directory of an open archive, and nothing else. `path` is for errors. Throws FileError, which says what
  // is wrong.
  StoredZip(Descriptor file, std::filesystem::path path);

  // In the order of their names.
  const std::vector<ZippedFile>& files() const { return files_; }

  // The whole file, whose header and checksum have been compared; nothing where the archive has none of this name.
  // Throws FileError, also for one of more than `most_bytes`. Thread-safe.
  std::optional<std::string> read(std::string_view name, std::uint64_t most_bytes) const;

 private:
  struct Directory {
    std::size_t count = 0;
    std::uint64_t begin = 0;
    std::string bytes;
  };
  Directory find_directory() const;
  void read_entries(const Directory& directory);
  void find_ends(std::uint64_t directory_begin);
  void sort_by_name();
  std::string bytes_at(std::uint64_t begin, std::uint64_t count) const;
  [[noreturn]] void refuse(const std::string& reason) const;

  Descriptor file_;
  std::filesystem::path path_;
  std::vector<ZippedFile> files_;
};

// An archive of these files, by name: always the same bytes for the same files. Throws Error where they are more or
// larger than a zip file without zip64 can hold.
std::string stored_zip(const std::map<std::string, std::string>& files);

// Whether a name stays inside the folder that it is taken from: parts of plain letters between single slashes, none of
// them "." or "..".
bool is_plain_path(std::string_view name);

}  // namespace flash_attn_jit
