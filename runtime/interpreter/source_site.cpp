#include "runtime/interpreter/source_site.h"

namespace flash_attn_jit {

SiteId SourceSites::find_or_add(const char* file, int line) {
  for (std::size_t i = 0; i < sites_.size(); ++i)
    if (sites_[i].line == line && sites_[i].file == file) return static_cast<SiteId>(i);
  sites_.push_back({file, line});
  return static_cast<SiteId>(sites_.size() - 1);
}

std::string SourceSites::text(SiteId id) const { return sites_[id].file + ":" + std::to_string(sites_[id].line); }

}  // namespace flash_attn_jit
