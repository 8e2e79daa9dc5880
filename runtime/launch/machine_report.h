// What this machine has: the driver, its GPUs, every NVRTC found and where it was looked for, the cache's folder,
// the pack installed with the library.
#pragma once

#include <string>

namespace flash_attn_jit {

// As JSON, the one text of `flash-attn-jit devices` and of Python's report. Where a variable has a bad value,
// "configuration_error" stands for what depends on the configuration. Compiles nothing, opens no NVRTC and makes
// no context. Bytes of a path that are not UTF-8 are replaced.
std::string machine_report_json();

}  // namespace flash_attn_jit
