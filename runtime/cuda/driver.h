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

// What measuring has to know of a device.
struct DeviceFigures {
  std::int64_t l2_bytes = 0;
  int clock_khz = 0, memory_clock_khz = 0;  // the highest
  int memory_bus_bits = 0;
  std::string pci_bus_id;  // "0000:00:1E.0"
};

struct DeviceMemoryInfo {
  std::size_t free = 0, total = 0;  // bytes
};

struct LaunchShape {
  unsigned blocks = 0;
  unsigned threads = 0;
  unsigned dynamic_smem = 0;  // bytes
};

// Shared memory that a block gets without asking for more, bytes: CUDA C++ programming guide, "Shared memory".
inline constexpr int kSmemWithoutOptIn = 48 * 1024;

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
  DeviceFigures device_figures(int ordinal);

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

  // Blocks of a kernel that one multiprocessor holds at a time.
  int blocks_per_multiprocessor(CudaFunction function, int threads, int dynamic_smem);

  // ---- memory and time, in the current context: what tuning takes, and nothing else ----

  DeviceMemoryInfo memory_info();

  // Memory of the device, freed when destroyed.
  class Memory {
   public:
    Memory(Driver& driver, std::size_t bytes);
    Memory(Memory&& other) noexcept;
    Memory& operator=(Memory&& other) noexcept;
    ~Memory();

    void* data() const { return data_; }
    std::size_t bytes() const { return bytes_; }

   private:
    Driver* driver_;
    void* data_ = nullptr;
    std::size_t bytes_ = 0;
  };

  void copy_to_device(void* device, const void* host, std::size_t bytes);
  void copy_to_host(void* host, const void* device, std::size_t bytes);
  void fill(void* device, unsigned char byte, std::size_t bytes);
  void copy_on_device(void* to, const void* from, std::size_t bytes, StreamHandle stream);  // does not wait

  // Waits for what the stream was given, and throws what became of it.
  void synchronize(StreamHandle stream);

  // Whether what the stream is given goes into a graph, or the driver will not tell because another stream's does.
  bool is_capturing(StreamHandle stream) const;

  class Stream {
   public:
    explicit Stream(Driver& driver);
    ~Stream();
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;

    StreamHandle get() const { return stream_; }

   private:
    Driver& driver_;
    StreamHandle stream_ = nullptr;
  };

  // A place in a stream, with the time when the device passed it.
  class Event {
   public:
    explicit Event(Driver& driver);
    ~Event();
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;

    void record(StreamHandle stream);
    void synchronize();
    double seconds_since(const Event& earlier) const;  // of two that were passed

   private:
    Driver& driver_;
    void* event_ = nullptr;
  };

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
