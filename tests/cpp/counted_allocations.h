// Counts what a thread takes from operator new: counted_allocations.cpp replaces it in the whole test program. Under
// AddressSanitizer, which has an operator new of its own, nothing is counted.
#pragma once

#include <cstddef>

namespace flash_attn_jit::testing {

#if defined(__SANITIZE_ADDRESS__)
inline constexpr bool kCountsAllocations = false;
#else
inline constexpr bool kCountsAllocations = true;
#endif

std::size_t allocations_of_this_thread();

}  // namespace flash_attn_jit::testing
