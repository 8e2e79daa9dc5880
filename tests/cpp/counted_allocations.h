// Counts what a thread takes from operator new: counted_allocations.cpp replaces it in the whole test program. Under
// AddressSanitizer, which has an operator new of its own, nothing is counted.
#pragma once

#include <cstddef>

#include "runtime/system/sanitizers.h"

namespace flash_attn_jit::testing {

inline constexpr bool kCountsAllocations = !kAddressSanitizer;

std::size_t allocations_of_this_thread();

}  // namespace flash_attn_jit::testing
