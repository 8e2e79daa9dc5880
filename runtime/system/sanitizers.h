// Which sanitizers this code is compiled with: GCC and Clang say it in different ways.
#pragma once

#if defined(__SANITIZE_ADDRESS__)
#define FLASH_ATTN_JIT_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FLASH_ATTN_JIT_ASAN 1
#endif
#endif

namespace flash_attn_jit {

#ifdef FLASH_ATTN_JIT_ASAN
inline constexpr bool kAddressSanitizer = true;
#else
inline constexpr bool kAddressSanitizer = false;
#endif

}  // namespace flash_attn_jit
