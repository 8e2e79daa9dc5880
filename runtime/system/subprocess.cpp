#include "runtime/system/subprocess.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <mutex>

#include "runtime/system/fork.h"

#include "runtime/system/interrupt.h"

extern char** environ;

namespace flash_attn_jit {
namespace {

ProgramResult not_started(int error) { return {false, std::nullopt, "", std::strerror(error)}; }

std::string read_to_end(int file) {
  std::string text;
  std::array<char, 4096> buffer;
  for (;;) {
    pollfd readable{file, POLLIN, 0};
    constexpr int kMilliseconds = 100;
    if (poll(&readable, 1, kMilliseconds) <= 0) {
      throw_if_interrupted();
      continue;
    }
    const ssize_t n = read(file, buffer.data(), buffer.size());
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return text;
    text.append(buffer.data(), static_cast<std::size_t>(n));
  }
}

void wait_for(pid_t child, ProgramResult& result) {
  int status = 0;
  while (waitpid(child, &status, 0) < 0)
    if (errno != EINTR) {
      result.fault = std::strerror(errno);
      return;
    }
  result.status = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

// Signals that this process may ignore and the child must not: a compiler waits for programs of its own, and ends where
// nobody reads what it prints. And a process group of its own: a terminal's Ctrl-C is for us to answer.
class ChildAttributes {
 public:
  ChildAttributes() {
    posix_spawnattr_init(&attributes_);
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGCHLD);
    sigaddset(&signals, SIGPIPE);
    posix_spawnattr_setsigdefault(&attributes_, &signals);
    posix_spawnattr_setpgroup(&attributes_, 0);
    posix_spawnattr_setflags(&attributes_, POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETPGROUP);
  }
  ~ChildAttributes() { posix_spawnattr_destroy(&attributes_); }
  ChildAttributes(const ChildAttributes&) = delete;
  ChildAttributes& operator=(const ChildAttributes&) = delete;
  const posix_spawnattr_t* get() const { return &attributes_; }

 private:
  posix_spawnattr_t attributes_;
};

// The child's stdin is empty, its stdout and stderr go to `output`.
int spawn(const std::vector<std::string>& arguments, int output, pid_t& child) {
  std::vector<char*> argv;
  for (const std::string& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_adddup2(&actions, output, STDOUT_FILENO);
  posix_spawn_file_actions_adddup2(&actions, output, STDERR_FILENO);
  const ChildAttributes attributes;
  const int error = posix_spawnp(&child, argv[0], &actions, attributes.get(), argv.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  return error;
}

// A process forked off while the pipe's writing end is open would keep it, and this one from reading to the end.
ForkSafeMutex& no_fork = *new ForkSafeMutex;

}  // namespace

std::string ProgramResult::text() const {
  if (!started) return "cannot be started: " + fault;
  if (status) return "ended with status " + std::to_string(*status);
  return "ended, with a status that went to another waiter (" + fault + ")";
}

ProgramResult run_program(const std::vector<std::string>& arguments) {
  int ends[2];
  pid_t child = 0;
  int error = 0;
  {
    const std::lock_guard guard(no_fork);
    if (pipe2(ends, O_CLOEXEC) != 0) return not_started(errno);
    error = spawn(arguments, ends[1], child);
    close(ends[1]);
  }
  if (error != 0) {
    close(ends[0]);
    return not_started(error);
  }
  ProgramResult result{.started = true, .status = std::nullopt, .output = "", .fault = ""};
  try {
    result.output = read_to_end(ends[0]);
  } catch (...) {
    close(ends[0]);
    kill(-child, SIGTERM);  // and the programs that it started
    wait_for(child, result);
    throw;
  }
  close(ends[0]);
  wait_for(child, result);
  return result;
}

}  // namespace flash_attn_jit
