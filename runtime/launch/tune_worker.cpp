#include "runtime/launch/tune_worker.h"

#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <iostream>

#include "runtime/launch/measuring_device.h"
#include "runtime/launch/process.h"
#include "runtime/system/errors.h"

namespace flash_attn_jit {

int run_tune_worker() {
  // A kernel that hangs keeps the process from seeing that its stdin ended.
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  serve_tuning(std::cin, std::cout, [](const WorkerSetup& setup) -> std::unique_ptr<WorkerDevice> {
    if (process_driver() == nullptr) throw DriverError(process_driver_absence());
    return std::make_unique<GpuMeasuringDevice>(*process_driver(), setup);
  });
  // Without destructors: a broken context has nothing to give back.
  std::cout.flush();
  _exit(0);
}

}  // namespace flash_attn_jit
