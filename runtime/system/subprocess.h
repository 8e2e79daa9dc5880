// Runs another program and waits for it, or talks with it.
#pragma once

#include <sys/types.h>

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace flash_attn_jit {

struct ProgramResult {
  bool started = false;
  std::optional<int> status;  // what it exited with; 128 + n where signal n ended it; nothing where that is not known
  std::string output;         // stdout and stderr, as they came
  std::string fault;          // the system's words for why it was not started or its status is not known

  bool succeeded() const { return started && status == 0; }

  // It ran to its end, and what that was went to another waiter: the process ignores SIGCHLD, or another of its threads
  // waits for any child. What it wrote tells whether it did its work.
  bool status_is_unknown() const { return started && !status; }

  std::string text() const;  // "ended with status 1", "cannot be started: No such file or directory"
};

// `arguments[0]` is the program, searched on PATH where it has no slash. Nothing is read from stdin. Throws
// Interrupted, the program ended, where the user has asked to stop.
ProgramResult run_program(const std::vector<std::string>& arguments);

// A program that answers a line with a line. It is killed where it does not, and when this is destroyed.
class Conversation {
 public:
  // `arguments` as of run_program(); the program's stdin and stdout are the conversation. Throws Error where it cannot
  // be started.
  explicit Conversation(const std::vector<std::string>& arguments);
  ~Conversation();
  Conversation(const Conversation&) = delete;
  Conversation& operator=(const Conversation&) = delete;

  enum class End { kNone, kEnded, kTimedOut };
  struct Answer {
    End end = End::kNone;
    std::string line;  // where it answered; else how it ended, in words, with the last of what it wrote to stderr
  };
  // Neither text has a line end. After an end there are no more answers. Throws Interrupted.
  Answer ask(std::string_view line, double limit_seconds);

 private:
  std::string end_in_words();
  void kill_and_wait();

  pid_t child_ = 0;
  int socket_ = -1, errors_ = -1;
  int status_ = 0;
  bool has_ended_ = false;
  std::string unread_;
};

}  // namespace flash_attn_jit
