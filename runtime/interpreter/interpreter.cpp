#include "runtime/interpreter/interpreter.h"

#include <cfenv>
#include <mutex>

#include "generator/errors.h"
#include "runtime/interpreter/block_engine.h"
#include "runtime/interpreter/host_object.h"
#include "runtime/system/fork.h"
#include "runtime/system/interrupt.h"

namespace flash_attn_jit {
namespace {

// Never destroyed: threads may still run kernels while the process ends.
struct LastReport {
  ForkSafeMutex mutex;
  InterpreterReport report;
};

LastReport& last_report() {
  static LastReport& last = *new LastReport;
  return last;
}

// Round to nearest, subnormals kept, whatever the process has set: kernels rely on both.
class DefaultFloatingPoint {
 public:
  DefaultFloatingPoint() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatingPoint() { std::fesetenv(&saved_); }

 private:
  std::fenv_t saved_;
};

void check_grid(const CompiledKernel& kernel, const GridShape& grid) {
  if (grid.threads <= 0 || grid.threads > 1024 || grid.threads % 32 != 0)
    throw ArgumentError(kernel.entry + ": a block has " + std::to_string(grid.threads) +
                        " threads; accepted: multiples of 32 up to 1024");
  if (grid.blocks < 0 || grid.blocks > 0x7fffffff)
    throw ArgumentError(kernel.entry + ": the grid has " + std::to_string(grid.blocks) +
                        " blocks; accepted: 0 to 2147483647");
  if (grid.dynamic_smem < 0)
    throw ArgumentError(kernel.entry + ": a block has " + std::to_string(grid.dynamic_smem) +
                        " bytes of shared memory");
}

InterpreterReport make_report(const CompiledKernel& kernel, const GridShape& grid, const BlockEngine& engine) {
  InterpreterReport report;
  report.kernel = kernel.entry;
  report.blocks = grid.blocks;
  for (int i = 0; i < kHostAccesses; ++i)
    if (engine.access_counts()[i].accesses > 0) report.shared[kAccessKinds[i].name] = engine.access_counts()[i];
  return report;
}

}  // namespace

InterpreterReport interpret(const CompiledKernel& kernel, const GridShape& grid, const void* params,
                            std::span<const TensorExtent> tensors) {
  check_grid(kernel, grid);
  const std::shared_ptr<const HostObject> object = HostObject::load(kernel.image, kernel.entry);
  GlobalMemory global(tensors);
  BlockEngine engine(kernel.entry, grid.threads, grid.dynamic_smem, global);
  {
    const DefaultFloatingPoint mode;
    for (std::int64_t block = 0; block < grid.blocks; ++block) {
      throw_if_interrupted();
      engine.run_block(block, object->thread(), params);
    }
  }
  InterpreterReport report = make_report(kernel, grid, engine);
  const std::lock_guard lock(last_report().mutex);
  last_report().report = report;
  return report;
}

InterpreterReport last_interpreter_report() {
  const std::lock_guard lock(last_report().mutex);
  return last_report().report;
}

}  // namespace flash_attn_jit
