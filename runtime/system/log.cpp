#include "runtime/system/log.h"

#include <iostream>
#include <memory>
#include <mutex>
#include <set>

#include "runtime/system/fork.h"

namespace flash_attn_jit {
namespace {

void write_to_stderr(LogLevel level, const std::string& message) {
  const char* prefix = level == LogLevel::kWarning ? "flash_attn_jit: warning: " : "flash_attn_jit: ";
  std::cerr << prefix + message + "\n";
}

struct LogState {
  ForkSafeMutex mutex;
  std::shared_ptr<const LogSink> sink = std::make_shared<const LogSink>(write_to_stderr);
  std::set<std::string> warned;
};

LogState& log_state() {
  static constinit ProcessOwn<LogState> process_state;
  return process_state.get([] { return LogState(); });
}

}  // namespace

void set_log_sink(LogSink sink) {
  auto shared = std::make_shared<const LogSink>(sink ? std::move(sink) : LogSink(write_to_stderr));
  const std::lock_guard lock(log_state().mutex);
  log_state().sink.swap(shared);
}

void log(LogLevel level, const std::string& message) {
  std::shared_ptr<const LogSink> sink;
  {
    const std::lock_guard lock(log_state().mutex);
    sink = log_state().sink;
  }
  (*sink)(level, message);
}

void warn_once(const std::string& message) {
  {
    const std::lock_guard lock(log_state().mutex);
    if (!log_state().warned.insert(message).second) return;
  }
  log(LogLevel::kWarning, message);
}

}  // namespace flash_attn_jit
