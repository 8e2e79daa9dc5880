// What the library tells without being asked: warnings, and the one line about a slow compile.
#pragma once

#include <functional>
#include <string>

namespace flash_attn_jit {

enum class LogLevel { kInfo, kWarning };

using LogSink = std::function<void(LogLevel, const std::string&)>;

// Replaces the sink; an empty one restores the default, stderr. The sink is called on whatever thread has
// something to say, while other threads may wait for a kernel that this thread builds: a caller that holds a
// lock which the sink takes (Python's) must release it around every call that may compile. It may throw Interrupted.
void set_log_sink(LogSink sink);

// What the sink throws goes to the caller.
void log(LogLevel level, const std::string& message);

// Logs a warning the first time that this process gives this text.
void warn_once(const std::string& message);

}  // namespace flash_attn_jit
