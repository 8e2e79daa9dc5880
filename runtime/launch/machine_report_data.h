// The machine report as a value, for those who print it in other forms. A header of its own, so that only they need the
// JSON library.
#pragma once

#include <nlohmann/json.hpp>

namespace flash_attn_jit {

// What machine_report_json() writes; paths have their own bytes, UTF-8 or not.
nlohmann::ordered_json machine_report();

}  // namespace flash_attn_jit
