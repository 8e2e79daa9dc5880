#include "runtime/subprocess.h"

#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <mutex>

#include "runtime/fork.h"

extern char** environ;

namespace flash_attn_jit {
namespace {

ProgramResult not_started(int error) { return {127, std::strerror(error)}; }

std::string read_to_end(int file) {
  std::string text;
  std::array<char, 4096> buffer;
  for (;;) {
    const ssize_t n = read(file, buffer.data(), buffer.size());
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return text;
    text.append(buffer.data(), static_cast<std::size_t>(n));
  }
}

int wait_for(pid_t child) {
  int status = 0;
  while (waitpid(child, &status, 0) < 0)
    if (errno != EINTR) return 127;
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

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
  const int error = posix_spawnp(&child, argv[0], &actions, nullptr, argv.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  return error;
}

}  // namespace

ProgramResult run_program(const std::vector<std::string>& arguments) {
  int ends[2];
  pid_t child = 0;
  int error = 0;
  {
    // A process forked off meanwhile would keep the pipe's writing end, and with it this one from reading to the end.
    static ForkSafeMutex& no_fork = *new ForkSafeMutex;
    const std::lock_guard guard(no_fork);
    if (pipe2(ends, O_CLOEXEC) != 0) return not_started(errno);
    error = spawn(arguments, ends[1], child);
    close(ends[1]);
  }
  if (error != 0) {
    close(ends[0]);
    return not_started(error);
  }
  ProgramResult result;
  result.output = read_to_end(ends[0]);
  close(ends[0]);
  result.status = wait_for(child);
  return result;
}

}  // namespace flash_attn_jit
