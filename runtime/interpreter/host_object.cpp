#include "runtime/interpreter/host_object.h"

#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <list>
#include <mutex>
#include <utility>

#include "runtime/system/errors.h"
#include "runtime/system/fork.h"

namespace flash_attn_jit {
namespace {

// Objects kept loaded; the one unused for longest goes first.
constexpr std::size_t kKeptObjects = 64;

[[noreturn]] void fail(const std::string& kernel, const std::string& what, const char* why) {
  throw InterpreterError(kernel + ": the kernel's shared object cannot be " + what + ": " +
                         (why ? why : "unknown error"));
}

void write_all(int file, const std::string& bytes, const std::string& kernel) {
  for (std::size_t done = 0; done < bytes.size();) {
    const ssize_t n = write(file, bytes.data() + done, bytes.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail(kernel, "written to memory", std::strerror(errno));
    done += static_cast<std::size_t>(n);
  }
}

}  // namespace

HostObject::HostObject(const std::string& image, const std::string& kernel) {
  file_ = memfd_create("flash-attn-jit-kernel", MFD_CLOEXEC);
  if (file_ < 0) fail(kernel, "given a file in memory", std::strerror(errno));
  try {
    write_all(file_, image, kernel);
    // The file stays open as long as the object is loaded: the loader knows objects by their path, so another
    // one must not get this number.
    handle_ = dlopen(("/proc/self/fd/" + std::to_string(file_)).c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle_ == nullptr) fail(kernel, "loaded", dlerror());
    auto* engine = static_cast<HostEngine*>(dlsym(handle_, "flash_attn_jit_engine"));
    thread_ = reinterpret_cast<BlockEngine::ThreadFunction>(dlsym(handle_, "flash_attn_jit_thread"));
    if (engine == nullptr || thread_ == nullptr)
      fail(kernel, "used", "it does not define flash_attn_jit_engine and flash_attn_jit_thread");
    *engine = BlockEngine::primitives();
  } catch (...) {
    if (handle_ != nullptr) dlclose(handle_);
    close(file_);
    throw;
  }
}

HostObject::~HostObject() {
  dlclose(handle_);
  close(file_);
}

std::shared_ptr<const HostObject> HostObject::load(const std::string& image, const std::string& kernel) {
  // Never destroyed: threads may still run kernels while the process ends.
  static auto& mutex = *new ForkSafeMutex;
  static auto& loaded = *new std::list<std::pair<std::string, std::shared_ptr<const HostObject>>>;  // last used first
  const std::lock_guard lock(mutex);
  const auto found = std::find_if(loaded.begin(), loaded.end(), [&](const auto& each) { return each.first == image; });
  if (found != loaded.end()) {
    loaded.splice(loaded.begin(), loaded, found);
  } else {
    loaded.emplace_front(image, std::make_shared<const HostObject>(image, kernel));
    if (loaded.size() > kKeptObjects) loaded.pop_back();
  }
  return loaded.front().second;
}

}  // namespace flash_attn_jit
