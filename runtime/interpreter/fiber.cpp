#include "runtime/interpreter/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <new>
#include <string>

#include "generator/errors.h"
#include "runtime/system/sanitizers.h"

#ifdef FLASH_ATTN_JIT_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef FLASH_ATTN_JIT_UCONTEXT_FIBERS
// Saves the callee-saved registers on the running stack, its pointer in *save, and continues at `load`. The
// floating point modes are left alone: kernels do not change them.
extern "C" void flash_attn_jit_switch_stack(void** save, void* load);

#if defined(__x86_64__)
asm(R"(
.text
.p2align 4
.globl flash_attn_jit_switch_stack
.hidden flash_attn_jit_switch_stack
.type flash_attn_jit_switch_stack, @function
flash_attn_jit_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size flash_attn_jit_switch_stack, . - flash_attn_jit_switch_stack
)");
#elif defined(__aarch64__)
asm(R"(
.text
.p2align 4
.globl flash_attn_jit_switch_stack
.hidden flash_attn_jit_switch_stack
.type flash_attn_jit_switch_stack, %function
flash_attn_jit_switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x2, sp
  str x2, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size flash_attn_jit_switch_stack, . - flash_attn_jit_switch_stack
)");
#endif
#endif

namespace flash_attn_jit {
namespace {

std::size_t page_bytes() { return static_cast<std::size_t>(sysconf(_SC_PAGESIZE)); }

#ifndef FLASH_ATTN_JIT_UCONTEXT_FIBERS
// A stack as flash_attn_jit_switch_stack leaves one, of a function that is about to return to `entry`.
void* first_frame(std::byte* top, void (*entry)()) {
#if defined(__x86_64__)
  // 6 registers, the address, and what entry() takes for its own return address.
  constexpr int kSlots = 8, kReturnAddress = 6;
#else
  constexpr int kSlots = 20, kReturnAddress = 11;  // x30
#endif
  std::uintptr_t slots[kSlots] = {};
  slots[kReturnAddress] = reinterpret_cast<std::uintptr_t>(entry);
  std::byte* frame = top - sizeof slots;
  std::memcpy(frame, slots, sizeof slots);
  return frame;
}
#endif

}  // namespace

FiberStacks::FiberStacks(int count) {
  const std::size_t page = page_bytes();
  mapped_bytes_ = static_cast<std::size_t>(count) * (kBytes + page);
  void* memory =
      mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<std::byte*>(memory);
  for (int i = 0; i < count; ++i) {
    if (mprotect(bottom(i) - page, page, PROT_NONE) == 0) continue;
    const std::string reason = std::strerror(errno);
    munmap(memory_, mapped_bytes_);
    throw Error("the interpreter cannot protect the stacks of " + std::to_string(count) + " threads (" + reason +
                "): the process has too many memory mappings; free some, or raise vm.max_map_count");
  }
}

FiberStacks::~FiberStacks() {
#ifdef FLASH_ATTN_JIT_ASAN
  __asan_unpoison_memory_region(memory_, mapped_bytes_);
#endif
  munmap(memory_, mapped_bytes_);
}

std::byte* FiberStacks::bottom(int index) const {
  const std::size_t page = page_bytes();
  return memory_ + static_cast<std::size_t>(index) * (kBytes + page) + page;
}

void Fiber::prepare(std::byte* stack_bottom, std::size_t stack_bytes, std::size_t stagger, void (*entry)()) {
#ifdef FLASH_ATTN_JIT_ASAN
  __asan_unpoison_memory_region(stack_bottom, stack_bytes);  // frames of a fiber that was never continued
#endif
  stack_bottom_ = stack_bottom;
  stack_bytes_ = stack_bytes;
  fake_stack_ = nullptr;
  const std::size_t used = stack_bytes - stagger / 64 * 64;
#ifdef FLASH_ATTN_JIT_UCONTEXT_FIBERS
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_bottom;
  context_.uc_stack.ss_size = used;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#else
  stack_pointer_ = first_frame(stack_bottom + used, entry);
#endif
}

void Fiber::transfer(Fiber& next) {
#ifdef FLASH_ATTN_JIT_UCONTEXT_FIBERS
  swapcontext(&context_, &next.context_);
#else
  flash_attn_jit_switch_stack(&stack_pointer_, next.stack_pointer_);
#endif
}

void Fiber::switch_to(Fiber& next) {
#ifdef FLASH_ATTN_JIT_ASAN
  __sanitizer_start_switch_fiber(&fake_stack_, next.stack_bottom_, next.stack_bytes_);
  transfer(next);
  __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#else
  transfer(next);
#endif
}

void Fiber::leave_to(Fiber& next) {
#ifdef FLASH_ATTN_JIT_ASAN
  __sanitizer_start_switch_fiber(nullptr, next.stack_bottom_, next.stack_bytes_);
#endif
  transfer(next);
  __builtin_unreachable();
}

void Fiber::entered([[maybe_unused]] Fiber& from) {
#ifdef FLASH_ATTN_JIT_ASAN
  const void* bottom = nullptr;
  std::size_t bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (from.stack_bottom_ == nullptr) {  // the thread's own stack, whose bounds only the sanitizer knows
    from.stack_bottom_ = bottom;
    from.stack_bytes_ = bytes;
  }
#endif
}

}  // namespace flash_attn_jit
