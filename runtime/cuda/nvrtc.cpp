#include "runtime/cuda/nvrtc.h"

#include <map>
#include <mutex>

#include "runtime/system/dynamic_library.h"
#include "runtime/system/fork.h"

namespace flash_attn_jit {

// Not in an anonymous namespace, where GCC 13 fails on Nvrtc::Api if another file includes this one.
using NvrtcProgram = struct NvrtcProgramTag*;

namespace {

using Status = int;  // 0 is success

}  // namespace

// The entry points, as NVIDIA's NVRTC documentation declares them.
struct Nvrtc::Api {
  DynamicLibrary builtins, library;
  const char* (*error_string)(Status);
  Status (*version)(int* major, int* minor);
  Status (*count_architectures)(int* count);
  Status (*architectures)(int* list);
  Status (*create)(NvrtcProgram*, const char* source, const char* name, int headers, const char* const* header_sources,
                   const char* const* header_names);
  Status (*destroy)(NvrtcProgram*);
  Status (*compile)(NvrtcProgram, int count, const char* const* options);
  Status (*log_size)(NvrtcProgram, std::size_t*);
  Status (*log)(NvrtcProgram, char*);
  Status (*cubin_size)(NvrtcProgram, std::size_t*);
  Status (*cubin)(NvrtcProgram, char*);
  Status (*ptx_size)(NvrtcProgram, std::size_t*);
  Status (*ptx)(NvrtcProgram, char*);

  explicit Api(const NvrtcCandidate& candidate) {
    // NVRTC opens its builtins by bare name, which finds them only where they are open already or on the
    // loader's path.
    if (!candidate.builtins.empty()) builtins = DynamicLibrary::open(candidate.builtins);
    library = DynamicLibrary::open(candidate.library);
    resolve("nvrtcGetErrorString", error_string);
    resolve("nvrtcVersion", version);
    resolve("nvrtcGetNumSupportedArchs", count_architectures);
    resolve("nvrtcGetSupportedArchs", architectures);
    resolve("nvrtcCreateProgram", create);
    resolve("nvrtcDestroyProgram", destroy);
    resolve("nvrtcCompileProgram", compile);
    resolve("nvrtcGetProgramLogSize", log_size);
    resolve("nvrtcGetProgramLog", log);
    resolve("nvrtcGetCUBINSize", cubin_size);
    resolve("nvrtcGetCUBIN", cubin);
    resolve("nvrtcGetPTXSize", ptx_size);
    resolve("nvrtcGetPTX", ptx);
  }

  void require(Status status, const char* call) const {
    if (status != 0) throw Error("NVRTC (" + library.path().string() + "): " + call + ": " + error_string(status));
  }

 private:
  template <typename Function>
  void resolve(const char* symbol, Function*& pointer) {
    pointer = library.function<Function>(symbol);
  }
};

// Opened once in a process and never closed: NVRTC does not give its memory back.
std::shared_ptr<const Nvrtc::Api> Nvrtc::open(const NvrtcCandidate& candidate) {
  struct OpenLibraries {
    ForkSafeMutex mutex;  // not held while a library is opened
    std::map<std::filesystem::path, std::shared_ptr<const Api>> all;
  };
  static constinit ProcessOwn<OpenLibraries> process;
  OpenLibraries& open = process.get([] { return OpenLibraries(); });
  {
    const std::lock_guard lock(open.mutex);
    if (const auto known = open.all.find(candidate.library); known != open.all.end()) return known->second;
  }
  auto api = std::make_shared<const Api>(candidate);
  const std::lock_guard lock(open.mutex);
  return open.all.try_emplace(candidate.library, std::move(api)).first->second;
}

Nvrtc::Nvrtc(const NvrtcCandidate& candidate) : api_(open(candidate)) {
  path_ = api_->library.path();
  api_->require(api_->version(&version_.major, &version_.minor), "nvrtcVersion");
  int count = 0;
  api_->require(api_->count_architectures(&count), "nvrtcGetNumSupportedArchs");
  architectures_.resize(static_cast<std::size_t>(count));
  api_->require(api_->architectures(architectures_.data()), "nvrtcGetSupportedArchs");
}

NvrtcResult Nvrtc::compile(const std::string& source, const std::string& name, const std::vector<std::string>& options,
                           CodeKind code) const {
  NvrtcProgram created = nullptr;
  api_->require(api_->create(&created, source.c_str(), name.c_str(), 0, nullptr, nullptr), "nvrtcCreateProgram");
  const auto destroy = [this](NvrtcProgram* program) { api_->destroy(program); };
  const std::unique_ptr<NvrtcProgram, decltype(destroy)> program(&created, destroy);
  const auto fetch = [&](auto size_of, auto read, const char* call) {
    std::size_t size = 0;
    api_->require(size_of(created, &size), call);
    std::string text(size, '\0');
    if (size > 0) api_->require(read(created, text.data()), call);
    return text;
  };
  const auto without_terminator = [](std::string text) {
    if (text.ends_with('\0')) text.pop_back();
    return text;
  };

  std::vector<const char*> arguments;
  for (const std::string& option : options) arguments.push_back(option.c_str());
  const Status status = api_->compile(created, static_cast<int>(arguments.size()), arguments.data());
  NvrtcResult result;
  result.status = api_->error_string(status);
  result.log = without_terminator(fetch(api_->log_size, api_->log, "nvrtcGetProgramLog"));
  // After a failure NVRTC may still answer the sizes with success: its status alone tells.
  if (status != 0) return result;
  result.image = code == CodeKind::kPtx ? without_terminator(fetch(api_->ptx_size, api_->ptx, "nvrtcGetPTX"))
                                        : fetch(api_->cubin_size, api_->cubin, "nvrtcGetCUBIN");
  result.succeeded = !result.image.empty();
  if (!result.succeeded) result.status = "success, but no code";
  return result;
}

}  // namespace flash_attn_jit
