// A kernel's shared object, loaded into this process from memory.
#pragma once

#include <memory>
#include <string>

#include "runtime/interpreter/block_engine.h"

namespace flash_attn_jit {

class HostObject {
 public:
  // Loads `image`, or returns the one that is loaded already. Throws InterpreterError where the system
  // refuses.
  static std::shared_ptr<const HostObject> load(const std::string& image, const std::string& kernel);

  HostObject(const std::string& image, const std::string& kernel);
  ~HostObject();
  HostObject(const HostObject&) = delete;
  HostObject& operator=(const HostObject&) = delete;

  BlockEngine::ThreadFunction thread() const { return thread_; }

 private:
  int file_ = -1;
  void* handle_ = nullptr;
  BlockEngine::ThreadFunction thread_ = nullptr;
};

}  // namespace flash_attn_jit
