#include "runtime/cuda/driver.h"

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <utility>

#include "runtime/system/errors.h"

namespace flash_attn_jit {

// Not in an anonymous namespace, where GCC 13 fails on Driver::Api if another file includes this one.
using CudaLinkState = struct CudaLinkStateTag*;

namespace {

// The numbers of cuda.h, from NVIDIA's driver API documentation.
constexpr int kSuccess = 0;
constexpr int kErrorNoDevice = 100;
constexpr int kAttributeClock = 13;
constexpr int kAttributeMultiprocessors = 16;
constexpr int kAttributeMemoryClock = 36;
constexpr int kAttributeMemoryBus = 37;
constexpr int kAttributeL2 = 38;
constexpr int kAttributeMajor = 75;
constexpr int kAttributeMinor = 76;
constexpr int kFunctionStaticSmem = 1;
constexpr int kFunctionRegisters = 4;
constexpr int kFunctionMaxDynamicSmem = 8;
constexpr int kJitInputPtx = 1;
constexpr int kJitErrorLogBuffer = 5;
constexpr int kJitErrorLogBytes = 6;
constexpr int kCaptureRelaxed = 2;

constexpr unsigned kStreamDefault = 0;  // in order with copies and fills

using DeviceHandle = int;
using DevicePointer = std::uint64_t;

DevicePointer device_pointer(const void* memory) { return reinterpret_cast<DevicePointer>(memory); }

}  // namespace

struct Driver::Api {
  DynamicLibrary library;
  int version = 0;
  std::mutex mutex;  // guards what is below
  bool initialised = false;
  std::map<int, CudaContext> contexts;

  int (*init)(unsigned flags);
  int (*driver_version)(int* version);
  int (*error_name)(int error, const char** name);
  int (*error_string)(int error, const char** text);
  int (*device_count)(int* count);
  int (*device_get)(DeviceHandle*, int ordinal);
  int (*device_name)(char* name, int bytes, DeviceHandle);
  int (*device_attribute)(int* value, int attribute, DeviceHandle);
  int (*primary_retain)(CudaContext*, DeviceHandle);
  int (*context_push)(CudaContext);
  int (*context_pop)(CudaContext*);
  int (*module_load)(CudaModule*, const void* image);
  int (*module_unload)(CudaModule);
  int (*module_function)(CudaFunction*, CudaModule, const char* name);
  int (*function_set)(CudaFunction, int attribute, int value);
  int (*function_get)(int* value, int attribute, CudaFunction);
  int (*launch)(CudaFunction, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                unsigned block_z, unsigned smem, StreamHandle, void** arguments, void** extra);
  int (*link_create)(unsigned options, int* keys, void** values, CudaLinkState*);
  int (*link_add)(CudaLinkState, int type, void* data, std::size_t bytes, const char* name, unsigned options, int* keys,
                  void** values);
  int (*link_complete)(CudaLinkState, void** cubin, std::size_t* bytes);
  int (*link_destroy)(CudaLinkState);
  int (*exchange_capture_mode)(int* mode);
  int (*device_bus_id)(char* id, int bytes, DeviceHandle);
  int (*occupancy)(int* blocks, CudaFunction, int threads, std::size_t dynamic_smem);
  int (*memory_info)(std::size_t* free, std::size_t* total);
  int (*memory_alloc)(DevicePointer*, std::size_t bytes);
  int (*memory_free)(DevicePointer);
  int (*copy_to_device)(DevicePointer, const void*, std::size_t bytes);
  int (*copy_to_host)(void*, DevicePointer, std::size_t bytes);
  int (*memory_set)(DevicePointer, unsigned char, std::size_t bytes);
  int (*copy_on_device)(DevicePointer to, DevicePointer from, std::size_t bytes, StreamHandle);
  int (*stream_create)(StreamHandle*, unsigned flags);
  int (*stream_destroy)(StreamHandle);
  int (*stream_synchronize)(StreamHandle);
  int (*event_create)(void** event, unsigned flags);
  int (*event_destroy)(void* event);
  int (*event_record)(void* event, StreamHandle);
  int (*event_synchronize)(void* event);
  int (*event_elapsed)(float* milliseconds, void* from, void* to);

  explicit Api(const std::filesystem::path& path) : library(DynamicLibrary::open(path)) {
    resolve("cuInit", init);
    resolve("cuDriverGetVersion", driver_version);
    resolve("cuGetErrorName", error_name);
    resolve("cuGetErrorString", error_string);
    resolve("cuDeviceGetCount", device_count);
    resolve("cuDeviceGet", device_get);
    resolve("cuDeviceGetName", device_name);
    resolve("cuDeviceGetAttribute", device_attribute);
    resolve("cuDevicePrimaryCtxRetain", primary_retain);
    resolve("cuCtxPushCurrent_v2", context_push);
    resolve("cuCtxPopCurrent_v2", context_pop);
    resolve("cuModuleLoadData", module_load);
    resolve("cuModuleUnload", module_unload);
    resolve("cuModuleGetFunction", module_function);
    resolve("cuFuncSetAttribute", function_set);
    resolve("cuFuncGetAttribute", function_get);
    resolve("cuLaunchKernel", launch);
    resolve("cuLinkCreate_v2", link_create);
    resolve("cuLinkAddData_v2", link_add);
    resolve("cuLinkComplete", link_complete);
    resolve("cuLinkDestroy", link_destroy);
    resolve("cuThreadExchangeStreamCaptureMode", exchange_capture_mode);
    resolve("cuDeviceGetPCIBusId", device_bus_id);
    resolve("cuOccupancyMaxActiveBlocksPerMultiprocessor", occupancy);
    resolve("cuMemGetInfo_v2", memory_info);
    resolve("cuMemAlloc_v2", memory_alloc);
    resolve("cuMemFree_v2", memory_free);
    resolve("cuMemcpyHtoD_v2", copy_to_device);
    resolve("cuMemcpyDtoH_v2", copy_to_host);
    resolve("cuMemsetD8_v2", memory_set);
    resolve("cuMemcpyDtoDAsync_v2", copy_on_device);
    resolve("cuStreamCreate", stream_create);
    resolve("cuStreamDestroy_v2", stream_destroy);
    resolve("cuStreamSynchronize", stream_synchronize);
    resolve("cuEventCreate", event_create);
    resolve("cuEventDestroy_v2", event_destroy);
    resolve("cuEventRecord", event_record);
    resolve("cuEventSynchronize", event_synchronize);
    resolve("cuEventElapsedTime", event_elapsed);
  }

 private:
  template <typename Function>
  void resolve(const char* symbol, Function*& pointer) {
    pointer = library.function<Function>(symbol);
  }
};

Driver::Driver(const std::filesystem::path& library) {
  try {
    api_ = std::make_unique<Api>(library);
  } catch (const Error& error) {
    throw DriverError(std::string("no CUDA driver: ") + error.what());
  }
  require(api_->driver_version(&api_->version), "cuDriverGetVersion");
}

Driver::~Driver() = default;

int Driver::version() const { return api_->version; }

std::filesystem::path Driver::path() const { return api_->library.path(); }

void Driver::require(int code, const std::string& what) const {
  if (code == kSuccess) return;
  const char* name = nullptr;
  const char* text = nullptr;
  api_->error_name(code, &name);
  api_->error_string(code, &text);
  throw DriverError("the CUDA driver refused " + what + ": " + (name != nullptr ? name : "unknown error") + " (" +
                    std::to_string(code) + ")" + (text != nullptr ? std::string(": ") + text : ""));
}

int Driver::device_count() {
  const std::lock_guard lock(api_->mutex);
  if (!api_->initialised) {
    const int code = api_->init(0);
    if (code == kErrorNoDevice) return 0;
    require(code, "cuInit");
    api_->initialised = true;
  }
  int count = 0;
  const int code = api_->device_count(&count);
  require(code, "cuDeviceGetCount");
  return count;
}

DeviceInfo Driver::device_info(int ordinal) {
  if (const int count = device_count(); ordinal < 0 || ordinal >= count)
    throw DriverError("there is no CUDA device " + std::to_string(ordinal) + "; the driver sees " +
                      std::to_string(count));
  DeviceHandle device = 0;
  require(api_->device_get(&device, ordinal), "cuDeviceGet");
  std::array<char, 256> name{};
  require(api_->device_name(name.data(), static_cast<int>(name.size()), device), "cuDeviceGetName");
  const auto attribute = [&](int which) {
    int value = 0;
    require(api_->device_attribute(&value, which, device), "cuDeviceGetAttribute");
    return value;
  };
  return {.ordinal = ordinal,
          .name = name.data(),
          .sm = attribute(kAttributeMajor) * 10 + attribute(kAttributeMinor),
          .multiprocessors = attribute(kAttributeMultiprocessors)};
}

DeviceFigures Driver::device_figures(int ordinal) {
  device_info(ordinal);
  DeviceHandle device = 0;
  require(api_->device_get(&device, ordinal), "cuDeviceGet");
  std::array<char, 64> bus_id{};
  require(api_->device_bus_id(bus_id.data(), static_cast<int>(bus_id.size()), device), "cuDeviceGetPCIBusId");
  const auto attribute = [&](int which) {
    int value = 0;
    require(api_->device_attribute(&value, which, device), "cuDeviceGetAttribute");
    return value;
  };
  return {.l2_bytes = attribute(kAttributeL2),
          .clock_khz = attribute(kAttributeClock),
          .memory_clock_khz = attribute(kAttributeMemoryClock),
          .memory_bus_bits = attribute(kAttributeMemoryBus),
          .pci_bus_id = bus_id.data()};
}

CudaContext Driver::primary_context(int ordinal) {
  device_info(ordinal);
  const std::lock_guard lock(api_->mutex);
  CudaContext& context = api_->contexts[ordinal];
  if (context == nullptr) {
    DeviceHandle device = 0;
    require(api_->device_get(&device, ordinal), "cuDeviceGet");
    require(api_->primary_retain(&context, device), "cuDevicePrimaryCtxRetain");
  }
  return context;
}

Driver::Module::Module(Driver& driver, const std::string& image) : driver_(driver) {
  driver.require(driver.api_->module_load(&module_, image.data()), "cuModuleLoadData");
}

Driver::Module::~Module() {
  if (!kept_) driver_.api_->module_unload(module_);
}

CudaFunction Driver::Module::find_function(const std::string& name) const {
  CudaFunction function = nullptr;
  driver_.require(driver_.api_->module_function(&function, module_, name.c_str()), "cuModuleGetFunction of " + name);
  return function;
}

void Driver::allow_dynamic_smem(CudaFunction function, int bytes) {
  require(api_->function_set(function, kFunctionMaxDynamicSmem, bytes),
          std::to_string(bytes) + " bytes of dynamic shared memory");
}

FunctionAttributes Driver::attributes(CudaFunction function) {
  const auto attribute = [&](int which) {
    int value = 0;
    require(api_->function_get(&value, which, function), "cuFuncGetAttribute");
    return value;
  };
  return {.registers = attribute(kFunctionRegisters), .static_smem = attribute(kFunctionStaticSmem)};
}

int Driver::blocks_per_multiprocessor(CudaFunction function, int threads, int dynamic_smem) {
  int blocks = 0;
  require(api_->occupancy(&blocks, function, threads, static_cast<std::size_t>(dynamic_smem)),
          "cuOccupancyMaxActiveBlocksPerMultiprocessor");
  return blocks;
}

DeviceMemoryInfo Driver::memory_info() {
  DeviceMemoryInfo info;
  require(api_->memory_info(&info.free, &info.total), "cuMemGetInfo");
  return info;
}

Driver::Memory::Memory(Driver& driver, std::size_t bytes) : driver_(&driver), bytes_(bytes) {
  DevicePointer pointer = 0;
  driver.require(driver.api_->memory_alloc(&pointer, std::max<std::size_t>(bytes, 1)),
                 std::to_string(bytes) + " bytes of the device's memory");
  data_ = reinterpret_cast<void*>(pointer);
}

Driver::Memory::Memory(Memory&& other) noexcept
    : driver_(other.driver_), data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

Driver::Memory& Driver::Memory::operator=(Memory&& other) noexcept {
  std::swap(driver_, other.driver_);
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

Driver::Memory::~Memory() {
  if (data_ != nullptr) driver_->api_->memory_free(device_pointer(data_));
}

void Driver::copy_to_device(void* device, const void* host, std::size_t bytes) {
  require(api_->copy_to_device(device_pointer(device), host, bytes), "a copy to the device");
}

void Driver::copy_to_host(void* host, const void* device, std::size_t bytes) {
  require(api_->copy_to_host(host, device_pointer(device), bytes), "a copy from the device");
}

void Driver::fill(void* device, unsigned char byte, std::size_t bytes) {
  require(api_->memory_set(device_pointer(device), byte, bytes), "cuMemsetD8");
}

void Driver::copy_on_device(void* to, const void* from, std::size_t bytes, StreamHandle stream) {
  require(api_->copy_on_device(device_pointer(to), device_pointer(from), bytes, stream), "a copy on the device");
}

void Driver::synchronize(StreamHandle stream) { require(api_->stream_synchronize(stream), "what a stream was given"); }

Driver::Stream::Stream(Driver& driver) : driver_(driver) {
  driver.require(driver.api_->stream_create(&stream_, kStreamDefault), "cuStreamCreate");
}

Driver::Stream::~Stream() { driver_.api_->stream_destroy(stream_); }

Driver::Event::Event(Driver& driver) : driver_(driver) {
  driver.require(driver.api_->event_create(&event_, 0), "cuEventCreate");
}

Driver::Event::~Event() { driver_.api_->event_destroy(event_); }

void Driver::Event::record(StreamHandle stream) {
  driver_.require(driver_.api_->event_record(event_, stream), "cuEventRecord");
}

void Driver::Event::synchronize() {
  driver_.require(driver_.api_->event_synchronize(event_), "what came before an event");
}

double Driver::Event::seconds_since(const Event& earlier) const {
  float milliseconds = 0;
  driver_.require(driver_.api_->event_elapsed(&milliseconds, earlier.event_, event_), "cuEventElapsedTime");
  return milliseconds / 1e3;
}

std::string Driver::link_ptx(const std::string& ptx, const std::string& name) {
  std::array<char, 8192> log{};
  std::array<int, 2> keys = {kJitErrorLogBuffer, kJitErrorLogBytes};
  std::array<void*, 2> values = {log.data(), reinterpret_cast<void*>(log.size())};
  CudaLinkState created = nullptr;
  require(api_->link_create(keys.size(), keys.data(), values.data(), &created), "cuLinkCreate");
  const auto destroy = [this](CudaLinkState* state) { api_->link_destroy(*state); };
  const std::unique_ptr<CudaLinkState, decltype(destroy)> state(&created, destroy);
  const auto check = [&](int code, const std::string& call) {
    require(code, call + " of " + name + (log[0] != '\0' ? ", whose log says: " + std::string(log.data()) : ""));
  };
  // The driver reads PTX as a C string.
  check(api_->link_add(created, kJitInputPtx, const_cast<char*>(ptx.c_str()), ptx.size() + 1, name.c_str(), 0, nullptr,
                       nullptr),
        "cuLinkAddData");
  void* cubin = nullptr;
  std::size_t bytes = 0;
  check(api_->link_complete(created, &cubin, &bytes), "cuLinkComplete");
  return {static_cast<const char*>(cubin), bytes};
}

int Driver::launch(CudaFunction function, const LaunchShape& shape, StreamHandle stream, const void* params) const {
  void* arguments[] = {const_cast<void*>(params)};
  return api_->launch(function, shape.blocks, 1, 1, shape.threads, 1, 1, shape.dynamic_smem, stream, arguments,
                      nullptr);
}

Driver::CurrentContext::CurrentContext(Driver& driver, CudaContext context) : driver_(driver) {
  driver.require(driver.api_->context_push(context), "cuCtxPushCurrent");
}

Driver::CurrentContext::~CurrentContext() {
  CudaContext popped = nullptr;
  driver_.api_->context_pop(&popped);
}

Driver::CaptureTolerance::CaptureTolerance(Driver& driver) : driver_(driver), previous_mode_(kCaptureRelaxed) {
  driver.require(driver.api_->exchange_capture_mode(&previous_mode_), "cuThreadExchangeStreamCaptureMode");
}

Driver::CaptureTolerance::~CaptureTolerance() { driver_.api_->exchange_capture_mode(&previous_mode_); }

}  // namespace flash_attn_jit
