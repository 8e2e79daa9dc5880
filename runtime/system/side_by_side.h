// Several pieces of work at once, such as the kernels of one call that have to be compiled.
#pragma once

#include <cstddef>
#include <functional>

namespace flash_attn_jit {

// Calls work(0) to work(count - 1), on the calling thread and as many others as are useful and can be had, and returns
// when all have ended. Throws what one of them threw, the first in their order; Interrupted where the user has asked to
// stop, which every thread's throw_if_interrupted() then tells.
void run_side_by_side(std::size_t count, const std::function<void(std::size_t)>& work);

}  // namespace flash_attn_jit
