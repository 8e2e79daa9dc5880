// The CUDA driver, opened at run time: the few entry points that the library calls, with errors as
// exceptions.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "runtime/system/dynamic_library.h"

namespace flash_attn_jit {

struct DeviceInfo {
  int ordinal = 0;
  std::string name;  // "Tesla T4"
  int sm = 0;        // compute capability x 10
  int multiprocessors = 0;
};

// Opaque handles of the driver.
using CudaContext = struct CudaContextTag*;
using CudaModule = struct CudaModuleTag*;
using CudaFunction = struct CudaFunctionTag*;
using StreamHandle = void*;  // CUstream, as frameworks hand it over

struct FunctionAttributes {
  int registers = 0;
  int static_smem = 0;  // bytes
};

struct LaunchShape {
  unsigned blocks = 0;
  unsigned threads = 0;
  unsigned dynamic_smem = 0;  // bytes
};

class Driver {
 public:
  // Opens the library and asks its version, nothing more. Throws DriverError where it cannot be opened.
  explicit Driver(const std::filesystem::path& library = "libcuda.so.1");
  ~Driver();
  Driver(const Driver&) = delete;
  Driver& operator=(const Driver&) = delete;

  int version() const;  // 12040 is 12.4
  std::filesystem::path path() const;

  // Initialises the driver; 0 where it sees no device.
  int device_count();
  DeviceInfo device_info(int ordinal);

  // The device's primary context, retained for the life of the process.
  CudaContext primary_context(int ordinal);

  // Unloads a module when destroyed, in the context in which it was loaded: that has to be current then.
  class Module {
   public:
    Module(Driver& driver, const std::string& image);
    ~Module();
    Module(const Module&) = delete;
    Module& operator=(const Module&) = delete;

    CudaFunction find_function(const std::string& name) const;
    void keep() { kept_ = true; }  // loaded for the life of the process

   private:
    Driver& driver_;
    CudaModule module_ = nullptr;
    bool kept_ = false;
  };

  void allow_dynamic_smem(CudaFunction function, int bytes);
  FunctionAttributes attributes(CudaFunction function);

  // Machine code for the current context's device, from PTX.
  std::string link_ptx(const std::string& ptx, const std::string& name);

  // What cuLaunchKernel returned; 0 is success. `params` is the kernel's one argument.
  int launch(CudaFunction function, const LaunchShape& shape, StreamHandle stream, const void* params) const;

  // Throws DriverError with the driver's name and words for `code`, unless it is 0.
  void require(int code, const std::string& what) const;

  // Makes a context current on this thread while it lives, then restores what was.
  class CurrentContext {
   public:
    CurrentContext(Driver& driver, CudaContext context);
    ~CurrentContext();
    CurrentContext(const CurrentContext&) = delete;
    CurrentContext& operator=(const CurrentContext&) = delete;

   private:
    Driver& driver_;
  };

  // Lets this thread load modules while one of its streams is being captured.
  class CaptureTolerance {
   public:
    explicit CaptureTolerance(Driver& driver);
    ~CaptureTolerance();
    CaptureTolerance(const CaptureTolerance&) = delete;
    CaptureTolerance& operator=(const CaptureTolerance&) = delete;

   private:
    Driver& driver_;
    int previous_mode_ = 0;
  };

 private:
  struct Api;
  std::unique_ptr<Api> api_;
};

}  // namespace flash_attn_jit
