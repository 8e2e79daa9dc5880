// What the library logs while this lives.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "runtime/system/log.h"

namespace flash_attn_jit::testing {

class CapturedLog {
 public:
  CapturedLog() : lines_(std::make_shared<Lines>()) {
    set_log_sink([lines = lines_](LogLevel level, const std::string& message) {
      const std::lock_guard lock(lines->mutex);
      (level == LogLevel::kWarning ? lines->warnings : lines->infos).push_back(message);
    });
  }
  ~CapturedLog() { set_log_sink({}); }
  CapturedLog(const CapturedLog&) = delete;
  CapturedLog& operator=(const CapturedLog&) = delete;

  std::vector<std::string> warnings() const { return copy(lines_->warnings); }
  std::vector<std::string> infos() const { return copy(lines_->infos); }

 private:
  struct Lines {
    std::mutex mutex;
    std::vector<std::string> warnings, infos;
  };

  std::vector<std::string> copy(const std::vector<std::string>& list) const {
    const std::lock_guard lock(lines_->mutex);
    return list;
  }

  std::shared_ptr<Lines> lines_;
};

}  // namespace flash_attn_jit::testing
