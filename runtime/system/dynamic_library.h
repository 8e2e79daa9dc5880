// A shared library opened at run time.
#pragma once

#include <filesystem>
#include <string>
#include <utility>

#include "generator/errors.h"

namespace flash_attn_jit {

// The file that holds this very code: the Python module, or a program, by the name that it was called by. Empty where
// that is not known.
std::filesystem::path file_of_this_code();

// Closes the library when destroyed.
class DynamicLibrary {
 public:
  DynamicLibrary() = default;

  // `path` may be a bare name, which the loader searches. Throws Error with the loader's words.
  static DynamicLibrary open(const std::filesystem::path& path);

  DynamicLibrary(DynamicLibrary&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  DynamicLibrary& operator=(DynamicLibrary&& other) noexcept;
  DynamicLibrary(const DynamicLibrary&) = delete;
  DynamicLibrary& operator=(const DynamicLibrary&) = delete;
  ~DynamicLibrary();

  // Null where the library has no such symbol.
  void* find(const char* symbol) const;

  // Throws Error where the library has no such symbol.
  template <typename Function>
  Function* function(const char* symbol) const {
    return reinterpret_cast<Function*>(require(symbol));
  }

  // The file that the loader opened.
  std::filesystem::path path() const;

 private:
  void* require(const char* symbol) const;

  void* handle_ = nullptr;
};

}  // namespace flash_attn_jit
