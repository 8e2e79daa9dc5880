// Everything a launch needs, made from a request without touching the driver.
#pragma once

#include <cstdint>

#include "generator/kernel_spec.h"
#include "generator/tile_chooser.h"

namespace flash_attn_jit {

// What a launch is planned for: a device, as far as it matters, and who chooses the tiles.
struct PlanTarget {
  ArchLimits arch;
  int multiprocessors;  // 1 or more
  const TileChooser& tiles;
};

template <class Params>
struct KernelLaunch {
  KernelSpec spec;
  Params params;
  std::int64_t blocks = 0;  // of the flat grid; 0: nothing to launch
};

}  // namespace flash_attn_jit
