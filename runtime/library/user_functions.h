// Code that users give with a call, kept for the life of the process under a number that follows from the code alone: a
// spec, which is plain values, names it so. Thread-safe.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "generator/kernel_spec.h"

namespace flash_attn_jit {

// The number of a code, never 0. The same for the same code, in every process.
std::uint64_t keep_user_functions(std::string_view code);

// The code that a spec names; empty where it names none. Throws Error where the process was not given it.
std::string user_functions(const KernelSpec& spec);

}  // namespace flash_attn_jit
