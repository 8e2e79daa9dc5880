#include "runtime/library/pack.h"

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>

#include "runtime/cache/cache_folder.h"
#include "runtime/system/files.h"

namespace flash_attn_jit {
namespace {

using nlohmann::ordered_json;

ordered_json entry_of(const CacheEntry& entry) {
  const KernelFile& file = *entry.file;
  const auto or_null = [](const std::optional<int>& number) { return number ? ordered_json(*number) : ordered_json(); };
  return {{"file", entry.path.filename().string()},
          {"bytes", entry.bytes},
          {"spec", file.id.spec},
          {"target", file.id.target},
          {"built_by", file.kernel.built_by},
          {"min_driver", file.kernel.min_driver},
          {"threads", file.kernel.threads},
          {"registers", or_null(file.kernel.resources.registers)},
          {"static_smem", file.kernel.resources.static_smem},
          {"dynamic_smem", file.kernel.dynamic_smem},
          {"spill_stores", or_null(file.kernel.resources.spill_stores)},
          {"spill_loads", or_null(file.kernel.resources.spill_loads)},
          {"seconds", file.kernel.seconds}};
}

}  // namespace

std::unique_ptr<KernelLibrary> open_pack_for_writing(const Config& config, const std::filesystem::path& out_dir) {
  create_folders(out_dir, 0755);
  if (const auto folder = TrustedFolder::open(out_dir, FolderUse::kPack))
    if (const auto reason = folder->distrust()) throw FileError(*reason);
  KernelCacheSettings settings{.dir = out_dir,
                               .max_bytes = std::numeric_limits<std::uint64_t>::max(),
                               .prebuilt = std::nullopt,
                               .use = FolderUse::kPack};
  return std::make_unique<KernelLibrary>(config, std::make_shared<KernelCache>(std::move(settings)), std::nullopt);
}

void write_manifest(const std::filesystem::path& out_dir) {
  // Listed under the lock: of several processes that build into one folder, the last to write saw what all had built.
  const KernelKey key = make_key({{"file", "manifest.json"}});
  const std::optional<FileLock> lock = lock_if_there_are_locks(out_dir, key);
  std::vector<CacheEntry> entries = list_cache(out_dir, FolderUse::kPack);
  std::sort(entries.begin(), entries.end(), [](const CacheEntry& a, const CacheEntry& b) { return a.path < b.path; });
  ordered_json kernels = ordered_json::array();
  for (const CacheEntry& entry : entries)
    if (entry.file) kernels.push_back(entry_of(entry));
  const ordered_json manifest = {{"library", FLASH_ATTN_JIT_VERSION}, {"kernels", kernels}};
  const std::string text = manifest.dump(2, ' ', false, ordered_json::error_handler_t::replace) + "\n";
  write_file(out_dir / "manifest.json", out_dir / temporary_name(key), text, 0644);
}

}  // namespace flash_attn_jit
