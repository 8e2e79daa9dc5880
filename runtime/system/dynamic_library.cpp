#include "runtime/system/dynamic_library.h"

#include <dlfcn.h>
#include <link.h>

namespace flash_attn_jit {
namespace {

std::string loader_words() {
  const char* words = dlerror();
  return words != nullptr ? words : "the loader gave no reason";
}

}  // namespace

std::filesystem::path file_of_this_code() {
  Dl_info info{};
  if (::dladdr(reinterpret_cast<const void*>(&file_of_this_code), &info) == 0 || info.dli_fname == nullptr) return {};
  return info.dli_fname;
}

DynamicLibrary DynamicLibrary::open(const std::filesystem::path& path) {
  DynamicLibrary library;
  library.handle_ = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library.handle_ == nullptr) throw Error("cannot open " + path.string() + ": " + loader_words());
  return library;
}

DynamicLibrary& DynamicLibrary::operator=(DynamicLibrary&& other) noexcept {
  std::swap(handle_, other.handle_);
  return *this;
}

DynamicLibrary::~DynamicLibrary() {
  if (handle_ != nullptr) dlclose(handle_);
}

void* DynamicLibrary::find(const char* symbol) const { return dlsym(handle_, symbol); }

void* DynamicLibrary::require(const char* symbol) const {
  void* found = find(symbol);
  if (found == nullptr) throw Error(path().string() + " has no entry point " + symbol);
  return found;
}

std::filesystem::path DynamicLibrary::path() const {
  link_map* map = nullptr;
  if (dlinfo(handle_, RTLD_DI_LINKMAP, &map) != 0 || map == nullptr) return {};
  return map->l_name;
}

}  // namespace flash_attn_jit
