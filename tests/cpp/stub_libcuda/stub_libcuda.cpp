// A libcuda for tests: as much of a driver as the library calls. It loads only what a real one would: machine
// code of the device's architecture, made by a CUDA major not above the driver's, and PTX of a version that
// the driver knows.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string_view>
#include <utility>

#include "tests/cpp/stub_libcuda/stub_control.h"

namespace {

// cuda.h
enum Result {
  kSuccess = 0,
  kInvalidValue = 1,
  kOutOfMemory = 2,
  kNotInitialised = 3,
  kNoDevice = 100,
  kInvalidDevice = 101,
  kInvalidImage = 200,
  kInvalidContext = 201,
  kNoBinaryForGpu = 209,
  kUnsupportedPtxVersion = 222,
  kInvalidHandle = 400,
  kNotFound = 500,
};

constexpr std::string_view kElfMagic =
    "\x7f"
    "ELF";

struct Module {
  int device = 0;
  std::string image;
};

struct Function {
  int device = 0;
  std::string name;
};

struct Link {
  int device = 0;
  std::string entry, cubin;
};

struct State {
  mutable std::mutex mutex;
  int driver_version = 12040;
  std::vector<StubDevice> devices;
  bool initialised = false;
  std::atomic<bool> recording = true;
  std::vector<StubLaunch> launches;
  std::map<std::string, std::pair<int, int>> failures;  // call -> code, times
  std::map<std::string, std::unique_ptr<std::atomic<int>>> calls;
  std::map<std::pair<int, std::string>, int> allowed_smem;
  std::vector<std::unique_ptr<Module>> modules;
  std::vector<std::unique_ptr<Function>> functions;
  std::atomic<int> pending_failures = 0;
  StubKernel kernel;
  std::map<std::uint64_t, std::size_t> allocations;
  double busy_until = 0;  // of the device's own time, in seconds; events take it
};

struct Event {
  double seconds = -1;
};

State& state() {
  static State the_state;
  return the_state;
}

// A context is its device's ordinal plus one, as a pointer.
thread_local std::vector<int> context_stack;

int current_device() { return context_stack.empty() ? -1 : context_stack.back(); }

std::atomic<int>& counter(const char* call) {
  const std::lock_guard lock(state().mutex);
  auto& count = state().calls[call];
  if (!count) count = std::make_unique<std::atomic<int>>(0);
  return *count;
}

// The failure that a test ordered, if any.
int ordered_failure(const char* call) {
  if (state().pending_failures == 0) return kSuccess;
  const std::lock_guard lock(state().mutex);
  const auto failure = state().failures.find(call);
  if (failure == state().failures.end() || failure->second.second == 0) return kSuccess;
  --failure->second.second;
  --state().pending_failures;
  return failure->second.first;
}

#define ENTRY_POINT()                                 \
  static std::atomic<int>& count = counter(__func__); \
  ++count;                                            \
  if (const int code = ordered_failure(__func__)) return code

// The layout of a cubin's ELF header: its ABI version tells the toolkit's major, its flags the architecture.
constexpr std::size_t kAbiByte = 8, kFlagsByte = 48, kHeaderBytes = 64;
constexpr unsigned char kAbiOfCuda12 = 7;

unsigned char byte_at(std::string_view image, std::size_t at) { return static_cast<unsigned char>(image[at]); }

int architecture_of(std::string_view cubin) {
  return byte_at(cubin, kFlagsByte + (byte_at(cubin, kAbiByte) > kAbiOfCuda12 ? 1 : 0));
}

int driver_major() { return state().driver_version / 1000; }

// 8.4 for CUDA 12.4, 8.8 for 12.9, 9.0 for 13.0: PTX ISA, "Release Notes". Drivers yet to come read
// everything.
int newest_ptx_version() {
  const int minor = state().driver_version % 1000 / 10;
  if (driver_major() == 12) return 80 + (minor > 8 ? 8 : minor);
  return driver_major() == 13 ? 90 + minor : 999;
}

int ptx_version(std::string_view ptx) {
  const std::size_t at = ptx.find(".version ");
  if (at == std::string_view::npos) return 0;
  return (ptx[at + 9] - '0') * 10 + (ptx[at + 11] - '0');
}

std::string entry_of(std::string_view ptx) {
  constexpr std::string_view kEntry = ".entry ";
  const std::size_t at = ptx.find(kEntry);
  if (at == std::string_view::npos) return "";
  const std::string_view rest = ptx.substr(at + kEntry.size());
  return std::string(rest.substr(0, rest.find_first_of("( \n")));
}

std::string linked_cubin(int device, const std::string& entry) {
  std::string cubin(kHeaderBytes, '\0');
  cubin.replace(0, kElfMagic.size(), kElfMagic);
  const unsigned char abi = driver_major() == 12 ? kAbiOfCuda12 : kAbiOfCuda12 + 1;
  cubin[kAbiByte] = static_cast<char>(abi);
  cubin[kFlagsByte + (abi > kAbiOfCuda12 ? 1 : 0)] =
      static_cast<char>(state().devices[static_cast<std::size_t>(device)].sm);
  return cubin + entry + '\0';
}

// An ELF file's length is not told to cuModuleLoadData; a copy of what surely is there is enough here.
std::string copy_image(const char* image) {
  std::uint64_t section_headers = 0;
  std::uint16_t entry_bytes = 0, entries = 0;
  std::memcpy(&section_headers, image + 40, sizeof section_headers);
  std::memcpy(&entry_bytes, image + 58, sizeof entry_bytes);
  std::memcpy(&entries, image + 60, sizeof entries);
  if (section_headers == 0) return std::string(image, kHeaderBytes) + std::string(image + kHeaderBytes);
  return std::string(image, section_headers + std::uint64_t{entry_bytes} * entries);
}

class Control final : public StubControl {
 public:
  void reset(int driver_version, const std::vector<StubDevice>& devices) override {
    const std::lock_guard lock(state().mutex);
    state().driver_version = driver_version;
    state().devices = devices;
    state().initialised = false;
    state().recording = true;
    state().launches.clear();
    state().failures.clear();
    state().pending_failures = 0;
    state().allowed_smem.clear();
    state().kernel = {};
    state().busy_until = 0;
    for (auto& [call, count] : state().calls) *count = 0;
    context_stack.clear();
  }

  void fail(const std::string& call, int code, int times) override {
    const std::lock_guard lock(state().mutex);
    state().failures[call] = {code, times};
    state().pending_failures += times;
  }

  int calls(const std::string& call) const override {
    const std::lock_guard lock(state().mutex);
    int sum = 0;
    for (const auto& [name, count] : state().calls)
      if (call.empty() || call == name) sum += *count;
    return sum;
  }

  void run_kernels_with(StubKernel kernel) override { state().kernel = std::move(kernel); }

  std::size_t allocated() const override {
    const std::lock_guard lock(state().mutex);
    std::size_t sum = 0;
    for (const auto& [pointer, bytes] : state().allocations) sum += bytes;
    return sum;
  }

  std::vector<StubLaunch> launches() const override {
    const std::lock_guard lock(state().mutex);
    return state().launches;
  }

  void record_launches(bool record) override { state().recording = record; }

  int allowed_smem(int device, const std::string& function) const override {
    const std::lock_guard lock(state().mutex);
    const auto allowed = state().allowed_smem.find({device, function});
    return allowed == state().allowed_smem.end() ? 0 : allowed->second;
  }

  void make_current(int device) override {
    context_stack.clear();
    if (device >= 0) context_stack.push_back(device);
  }

  int current() const override { return current_device(); }
};

}  // namespace

extern "C" {

StubControl* stub_control() {
  static Control control;
  return &control;
}

int cuInit(unsigned) {
  ENTRY_POINT();
  if (state().devices.empty()) return kNoDevice;
  state().initialised = true;
  return kSuccess;
}

int cuDriverGetVersion(int* version) {
  ENTRY_POINT();
  *version = state().driver_version;
  return kSuccess;
}

int cuGetErrorName(int error, const char** name) {
  *name = error == kInvalidImage ? "CUDA_ERROR_INVALID_IMAGE" : "CUDA_ERROR_OF_THE_STUB";
  return kSuccess;
}

int cuGetErrorString(int, const char** text) {
  *text = "the stub's own words";
  return kSuccess;
}

int cuDeviceGetCount(int* count_of_devices) {
  ENTRY_POINT();
  if (!state().initialised) return kNotInitialised;
  *count_of_devices = static_cast<int>(state().devices.size());
  return kSuccess;
}

int cuDeviceGet(int* device, int ordinal) {
  ENTRY_POINT();
  if (ordinal < 0 || static_cast<std::size_t>(ordinal) >= state().devices.size()) return kInvalidDevice;
  *device = ordinal;
  return kSuccess;
}

int cuDeviceGetName(char* name, int bytes, int device) {
  ENTRY_POINT();
  std::strncpy(name, state().devices.at(static_cast<std::size_t>(device)).name.c_str(),
               static_cast<std::size_t>(bytes) - 1);
  return kSuccess;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
  ENTRY_POINT();
  const StubDevice& asked = state().devices.at(static_cast<std::size_t>(device));
  // A Tesla T4's figures, where a test does not say others.
  const std::map<int, int> attributes = {{13, 1590000}, {16, asked.multiprocessors}, {36, 5001000},      {37, 256},
                                         {38, 1 << 22}, {75, asked.sm / 10},         {76, asked.sm % 10}};
  const auto found = attributes.find(attribute);
  if (found == attributes.end()) return kInvalidValue;
  *value = found->second;
  return kSuccess;
}

int cuDevicePrimaryCtxRetain(void** context, int device) {
  ENTRY_POINT();
  *context = reinterpret_cast<void*>(static_cast<std::intptr_t>(device) + 1);
  return kSuccess;
}

int cuCtxPushCurrent_v2(void* context) {
  ENTRY_POINT();
  context_stack.push_back(static_cast<int>(reinterpret_cast<std::intptr_t>(context)) - 1);
  return kSuccess;
}

int cuCtxPopCurrent_v2(void**) {
  ENTRY_POINT();
  if (context_stack.empty()) return kInvalidContext;
  context_stack.pop_back();
  return kSuccess;
}

int cuModuleLoadData(Module** module, const char* image) {
  ENTRY_POINT();
  if (current_device() < 0) return kInvalidContext;
  if (std::string_view(image, kElfMagic.size()) != kElfMagic) return kInvalidImage;
  const std::string copy = copy_image(image);
  if (byte_at(copy, kAbiByte) > kAbiOfCuda12 && driver_major() < 13) return kInvalidImage;
  const std::lock_guard lock(state().mutex);
  if (architecture_of(copy) != state().devices[static_cast<std::size_t>(current_device())].sm) return kNoBinaryForGpu;
  state().modules.push_back(std::make_unique<Module>(Module{current_device(), copy}));
  *module = state().modules.back().get();
  return kSuccess;
}

int cuModuleUnload(Module*) {
  ENTRY_POINT();
  return kSuccess;
}

int cuModuleGetFunction(Function** function, Module* module, const char* name) {
  ENTRY_POINT();
  if (module->image.find(name) == std::string::npos) return kNotFound;
  const std::lock_guard lock(state().mutex);
  state().functions.push_back(std::make_unique<Function>(Function{module->device, name}));
  *function = state().functions.back().get();
  return kSuccess;
}

int cuFuncSetAttribute(Function* function, int attribute, int value) {
  ENTRY_POINT();
  constexpr int kMaxDynamicSmem = 8;
  if (attribute != kMaxDynamicSmem) return kInvalidValue;
  const std::lock_guard lock(state().mutex);
  state().allowed_smem[{function->device, function->name}] = value;
  return kSuccess;
}

int cuFuncGetAttribute(int* value, int attribute, Function*) {
  ENTRY_POINT();
  constexpr int kStaticSmem = 1, kLocalBytes = 3, kRegisters = 4;
  if (attribute != kStaticSmem && attribute != kLocalBytes && attribute != kRegisters) return kInvalidValue;
  *value = attribute == kRegisters ? 42 : 0;
  return kSuccess;
}

int cuLaunchKernel(Function* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned smem, void* stream, void** arguments, void** extra) {
  ENTRY_POINT();
  if (current_device() < 0) return kInvalidContext;
  if (current_device() != function->device) return kInvalidHandle;
  if (grid_y != 1 || grid_z != 1 || block_y != 1 || block_z != 1 || extra != nullptr) return kInvalidValue;
  if (state().kernel) state().busy_until += state().kernel(function->name, arguments[0]);
  if (!state().recording) return kSuccess;
  const std::lock_guard lock(state().mutex);
  StubLaunch launch{function->device, function->name, grid_x, block_x, smem, stream, {}};
  std::memcpy(&launch.params, arguments[0], sizeof launch.params);
  state().launches.push_back(launch);
  return kSuccess;
}

int cuLinkCreate_v2(unsigned, int*, void**, Link** link) {
  ENTRY_POINT();
  if (current_device() < 0) return kInvalidContext;
  *link = new Link{current_device(), "", ""};
  return kSuccess;
}

int cuLinkAddData_v2(Link* link, int type, const char* data, std::size_t bytes, const char*, unsigned, int*, void**) {
  ENTRY_POINT();
  constexpr int kPtx = 1;
  if (type != kPtx || bytes == 0 || data[bytes - 1] != '\0') return kInvalidValue;
  if (ptx_version(data) > newest_ptx_version()) return kUnsupportedPtxVersion;
  link->entry = entry_of(data);
  return kSuccess;
}

int cuLinkComplete(Link* link, void** cubin, std::size_t* bytes) {
  ENTRY_POINT();
  link->cubin = linked_cubin(link->device, link->entry);
  *cubin = link->cubin.data();
  *bytes = link->cubin.size();
  return kSuccess;
}

int cuLinkDestroy(Link* link) {
  ENTRY_POINT();
  delete link;
  return kSuccess;
}

int cuDeviceGetPCIBusId(char* id, int bytes, int device) {
  ENTRY_POINT();
  std::snprintf(id, static_cast<std::size_t>(bytes), "0000:%02X:00.0", device + 1);
  return kSuccess;
}

int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Function*, int threads, std::size_t) {
  ENTRY_POINT();
  *blocks = threads > 0 ? 512 / threads : 0;
  return kSuccess;
}

int cuMemGetInfo_v2(std::size_t* free, std::size_t* total) {
  ENTRY_POINT();
  if (current_device() < 0) return kInvalidContext;
  *total = state().devices[static_cast<std::size_t>(current_device())].memory;
  *free = *total - std::min(*total, stub_control()->allocated());
  return kSuccess;
}

int cuMemAlloc_v2(std::uint64_t* pointer, std::size_t bytes) {
  ENTRY_POINT();
  if (current_device() < 0) return kInvalidContext;
  if (bytes == 0) return kInvalidValue;
  if (stub_control()->allocated() + bytes > state().devices[static_cast<std::size_t>(current_device())].memory)
    return kOutOfMemory;
  void* const memory = std::aligned_alloc(512, (bytes + 511) / 512 * 512);
  if (memory == nullptr) return kOutOfMemory;
  *pointer = reinterpret_cast<std::uint64_t>(memory);
  const std::lock_guard lock(state().mutex);
  state().allocations[*pointer] = bytes;
  return kSuccess;
}

int cuMemFree_v2(std::uint64_t pointer) {
  ENTRY_POINT();
  const std::lock_guard lock(state().mutex);
  if (state().allocations.erase(pointer) == 0) return kInvalidValue;
  std::free(reinterpret_cast<void*>(pointer));
  return kSuccess;
}

int cuMemcpyHtoD_v2(std::uint64_t to, const void* from, std::size_t bytes) {
  ENTRY_POINT();
  std::memcpy(reinterpret_cast<void*>(to), from, bytes);
  return kSuccess;
}

int cuMemcpyDtoH_v2(void* to, std::uint64_t from, std::size_t bytes) {
  ENTRY_POINT();
  std::memcpy(to, reinterpret_cast<const void*>(from), bytes);
  return kSuccess;
}

int cuMemsetD8_v2(std::uint64_t to, unsigned char byte, std::size_t bytes) {
  ENTRY_POINT();
  std::memset(reinterpret_cast<void*>(to), byte, bytes);
  return kSuccess;
}

int cuMemcpyDtoDAsync_v2(std::uint64_t to, std::uint64_t from, std::size_t bytes, void*) {
  ENTRY_POINT();
  constexpr double kBytesASecond = 100e9;
  std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
  state().busy_until += static_cast<double>(bytes) / kBytesASecond;
  return kSuccess;
}

int cuStreamCreate(void** stream, unsigned) {
  ENTRY_POINT();
  *stream = new int;
  return kSuccess;
}

int cuStreamDestroy_v2(void* stream) {
  ENTRY_POINT();
  delete static_cast<int*>(stream);
  return kSuccess;
}

int cuStreamSynchronize(void*) {
  ENTRY_POINT();
  return kSuccess;
}

int cuEventCreate(void** event, unsigned) {
  ENTRY_POINT();
  *event = new Event;
  return kSuccess;
}

int cuEventDestroy_v2(void* event) {
  ENTRY_POINT();
  delete static_cast<Event*>(event);
  return kSuccess;
}

int cuEventRecord(void* event, void*) {
  ENTRY_POINT();
  static_cast<Event*>(event)->seconds = state().busy_until;
  return kSuccess;
}

int cuEventSynchronize(void*) {
  ENTRY_POINT();
  return kSuccess;
}

int cuEventElapsedTime(float* milliseconds, void* from, void* to) {
  ENTRY_POINT();
  const Event &first = *static_cast<Event*>(from), &last = *static_cast<Event*>(to);
  if (first.seconds < 0 || last.seconds < 0) return kInvalidHandle;
  *milliseconds = static_cast<float>((last.seconds - first.seconds) * 1e3);
  return kSuccess;
}

int cuThreadExchangeStreamCaptureMode(int* mode) {
  ENTRY_POINT();
  static thread_local int mode_of_thread = 0;
  std::swap(*mode, mode_of_thread);
  return kSuccess;
}

}  // extern "C"
