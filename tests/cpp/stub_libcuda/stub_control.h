// How tests steer the libcuda that plays a driver and its devices.
#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <vector>

#include "templates/flash_fwd_params.cuh"

struct StubDevice {
  std::string name;
  int sm = 75;
  int multiprocessors = 40;
  std::size_t memory = std::size_t{1} << 34;
};

// What a kernel does when the stub launches it: memory of the stub's devices is the process's own. What it returns is
// how long the device was busy, in seconds.
using StubKernel = std::function<double(const std::string& function, const void* params)>;

struct StubLaunch {
  int device = 0;
  std::string function;
  unsigned blocks = 0, threads = 0, dynamic_smem = 0;
  void* stream = nullptr;
  FlashFwdParams params{};
};

class StubControl {
 public:
  // Forgets everything; contexts and modules of before are no longer valid.
  virtual void reset(int driver_version, const std::vector<StubDevice>& devices) = 0;

  // The next `times` calls of this entry point return `code`.
  virtual void fail(const std::string& call, int code, int times = 1) = 0;

  // Calls of this entry point since the reset, failed ones included; of all entry points for "".
  virtual int calls(const std::string& call) const = 0;

  // Until the next reset. Without one a launch takes no time and does nothing.
  virtual void run_kernels_with(StubKernel kernel) = 0;

  // This stream is being captured, until the next call.
  virtual void capture(void* stream) = 0;

  // Bytes that cuMemAlloc gave and cuMemFree did not get back.
  virtual std::size_t allocated() const = 0;

  virtual std::vector<StubLaunch> launches() const = 0;
  virtual void record_launches(bool record) = 0;

  // Shared memory beyond 48 KiB that a function was allowed on a device; 0 where nobody asked.
  virtual int allowed_smem(int device, const std::string& function) const = 0;

  // The context that is current on this thread, as its device; -1 for none. As a framework does it:
  virtual void make_current(int device) = 0;
  virtual int current() const = 0;

 protected:
  ~StubControl() = default;
};

extern "C" StubControl* stub_control();
