#include "tests/cpp/counted_allocations.h"

#include <cstdlib>
#include <new>

namespace {

// Zero-initialised, so that no guard is run inside of operator new.
thread_local std::size_t allocations = 0;

}  // namespace

// The array and nothrow forms of the library call these.
#ifndef FLASH_ATTN_JIT_ASAN
void* operator new(std::size_t bytes) {
  ++allocations;
  if (void* memory = std::malloc(bytes > 0 ? bytes : 1)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
#endif

std::size_t flash_attn_jit::testing::allocations_of_this_thread() { return allocations; }
