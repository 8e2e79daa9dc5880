// What the interpreter knows of each access of templates/host_engine.cuh.
#pragma once

#include <array>

#include "templates/host_engine.cuh"

namespace flash_attn_jit {

struct AccessKind {
  const char* name;  // the primitive's
  int bytes;         // one lane's; for ldmatrix, of one row
};

inline constexpr std::array<AccessKind, kHostAccesses> kAccessKinds = {{
    {"load_global_16B", 16},   {"load_global_8B", 8},   {"load_global_2B", 2},     {"load_global_1B", 1},
    {"load_global_f32", 4},    {"load_global_i32", 4},  {"store_global_16B", 16},  {"store_global_2B", 2},
    {"store_global_f32", 4},   {"load_shared_16B", 16}, {"load_shared_2B", 2},     {"load_shared_f32", 4},
    {"store_shared_16B", 16},  {"store_shared_4B", 4},  {"store_shared_2B", 2},    {"ldmatrix_x4", 16},
    {"ldmatrix_x4_trans", 16}, {"ldmatrix_x2", 16},     {"ldmatrix_x2_trans", 16}, {"ldmatrix_x1", 16},
    {"ldmatrix_x1_trans", 16},
}};

inline const AccessKind& access_kind(HostAccess access) { return kAccessKinds[static_cast<int>(access)]; }

}  // namespace flash_attn_jit
