// Lines of the templates, as small numbers.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace flash_attn_jit {

using SiteId = std::uint16_t;

class SourceSites {
 public:
  // `file` must stay valid; the same text may come by different pointers.
  SiteId id(const char* file, int line) {
    CacheEntry& entry = cache_[(reinterpret_cast<std::uintptr_t>(file) ^ static_cast<unsigned>(line)) % cache_.size()];
    if (entry.file != file || entry.line != line) entry = {file, line, find_or_add(file, line)};
    return entry.id;
  }

  std::string text(SiteId id) const;  // "flash_fwd.cuh:81"

 private:
  struct Site {
    std::string file;
    int line;
  };
  struct CacheEntry {
    const char* file = nullptr;
    int line = 0;
    SiteId id = 0;
  };

  SiteId find_or_add(const char* file, int line);

  std::vector<Site> sites_;
  std::array<CacheEntry, 512> cache_;
};

}  // namespace flash_attn_jit
