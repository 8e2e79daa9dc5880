// How a kernel that was compiled for the host reaches the interpreter: a table of C functions, which the interpreter
// fills in once it has loaded the object. Both sides include this file, and nothing else of each other.
#pragma once

// The accesses that the interpreter checks and counts, one of primitives.cuh each.
enum class HostAccess : int {
  kLoadGlobal16B,
  kLoadGlobal8B,
  kLoadGlobal2B,
  kLoadGlobal1B,
  kLoadGlobalF32,
  kLoadGlobalI32,
  kStoreGlobal16B,
  kStoreGlobal2B,
  kStoreGlobalF32,
  kLoadShared16B,
  kLoadShared2B,
  kLoadSharedF32,
  kStoreShared16B,
  kStoreShared4B,
  kStoreShared2B,
  kLdmatrixX4,
  kLdmatrixX4Trans,
  kLdmatrixX2,
  kLdmatrixX2Trans,
  kLdmatrixX1,
  kLdmatrixX1Trans,
};
constexpr int kHostAccesses = 21;

// Every function takes the template's file and line last, so that a failing check names them.
struct HostEngine {
  int (*thread_in_block)();
  int (*block_in_grid)();
  // Copies between `value` (a register) and memory, as many bytes as the access says.
  void (*load_global)(HostAccess, void* value, const void* address, const char* file, int line);
  void (*store_global)(HostAccess, void* address, const void* value, const char* file, int line);
  void (*load_shared)(HostAccess, void* value, unsigned address, const char* file, int line);
  void (*store_shared)(HostAccess, unsigned address, const void* value, const char* file, int line);
  // Warp-wide; `r` has one word for each matrix.
  void (*ldmatrix)(HostAccess, unsigned* r, unsigned address, const char* file, int line);
  // c += A B, or c = A B where `accumulate` is 0; `c` has 4 floats.
  void (*mma)(int accumulate, float* c, unsigned a0, unsigned a1, unsigned b, const char* file, int line);
  unsigned (*shuffle)(unsigned bits, int from_lane, const char* file, int line);
  int (*any_in_warp)(int, const char* file, int line);
  int (*any_in_block)(int, const char* file, int line);
  void (*warp_barrier)(const char* file, int line);
  void (*block_barrier)(const char* file, int line);
  // The undefined-behaviour sanitizer found `what`.
  void (*undefined_behaviour)(const char* what, const char* file, int line);
};
