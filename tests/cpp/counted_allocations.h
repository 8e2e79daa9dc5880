// Counts what a thread takes from operator new: counted_allocations.cpp replaces it in the whole test program.
#pragma once

#include <cstddef>

namespace flash_attn_jit::testing {

std::size_t allocations_of_this_thread();

}  // namespace flash_attn_jit::testing
