#include "runtime/library/pack_manifest.h"

#include <optional>
#include <set>

namespace flash_attn_jit {
namespace {

using Json = nlohmann::ordered_json;

Json or_null(const std::optional<int>& number) { return number ? Json(*number) : Json(); }

}  // namespace

Json manifest_entry(const std::string& name, std::string_view bytes, const KernelFile& file) {
  return {{"file", name},
          {"bytes", bytes.size()},
          {"sha256", to_hex(sha256(bytes))},
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

std::string manifest_text(const std::vector<Json>& kernels) {
  std::set<std::string> compilers;
  for (const Json& kernel : kernels) compilers.insert(kernel.at("built_by").get<std::string>());
  const Json manifest = {{"format", kPackFormat},
                         {"version", kPackVersion},
                         {"library", FLASH_ATTN_JIT_VERSION},
                         {"built_by", compilers},
                         {"kernels", kernels}};
  return manifest.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
}

}  // namespace flash_attn_jit
