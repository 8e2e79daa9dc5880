#include "runtime/system/subprocess.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <mutex>

#include "generator/errors.h"
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

// `input` -1: the child's stdin is empty.
struct ChildFiles {
  int input = -1, output = -1, errors = -1;
};

int spawn(const std::vector<std::string>& arguments, const ChildFiles& files, pid_t& child) {
  std::vector<char*> argv;
  for (const std::string& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  if (files.input < 0)
    posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  else
    posix_spawn_file_actions_adddup2(&actions, files.input, STDIN_FILENO);
  posix_spawn_file_actions_adddup2(&actions, files.output, STDOUT_FILENO);
  posix_spawn_file_actions_adddup2(&actions, files.errors, STDERR_FILENO);
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
    error = spawn(arguments, {.input = -1, .output = ends[1], .errors = ends[1]}, child);
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

Conversation::Conversation(const std::vector<std::string>& arguments) {
  int ends[2] = {-1, -1};
  int error = 0;
  {
    const std::lock_guard guard(no_fork);
    errors_ = memfd_create("stderr", MFD_CLOEXEC);
    if (errors_ < 0 || socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0)
      error = errno;
    else
      error = spawn(arguments, {.input = ends[1], .output = ends[1], .errors = errors_}, child_);
    if (ends[1] >= 0) close(ends[1]);
  }
  socket_ = ends[0];
  if (error == 0) return;
  if (socket_ >= 0) close(socket_);
  if (errors_ >= 0) close(errors_);
  throw Error(arguments[0] + " " + not_started(error).text());
}

Conversation::~Conversation() {
  kill_and_wait();
  close(socket_);
  close(errors_);
}

Conversation::Answer Conversation::ask(std::string_view line, double limit_seconds) {
  using Clock = std::chrono::steady_clock;
  const auto end = Clock::now() + std::chrono::duration<double>(limit_seconds);
  std::string unsent = std::string(line) + "\n";
  std::array<char, 65536> buffer;
  while (!has_ended_) {
    if (const std::size_t at = unread_.find('\n'); unsent.empty() && at != std::string::npos) {
      Answer answer{End::kNone, unread_.substr(0, at)};
      unread_.erase(0, at + 1);
      return answer;
    }
    if (Clock::now() >= end) {
      kill_and_wait();
      return {End::kTimedOut, "it did not end within " + std::to_string(limit_seconds) + " s"};
    }
    throw_if_interrupted();
    pollfd ready{socket_, static_cast<short>(unsent.empty() ? POLLIN : POLLIN | POLLOUT), 0};
    constexpr int kMilliseconds = 50;
    if (poll(&ready, 1, kMilliseconds) <= 0) continue;
    if ((ready.revents & POLLOUT) != 0) {
      const ssize_t sent = send(socket_, unsent.data(), unsent.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
      if (sent > 0) unsent.erase(0, static_cast<std::size_t>(sent));
    }
    if ((ready.revents & (POLLIN | POLLHUP | POLLERR)) == 0) continue;
    const ssize_t got = recv(socket_, buffer.data(), buffer.size(), MSG_DONTWAIT);
    if (got < 0 && (errno == EINTR || errno == EAGAIN)) continue;
    if (got <= 0) break;
    unread_.append(buffer.data(), static_cast<std::size_t>(got));
  }
  kill_and_wait();
  return {End::kEnded, end_in_words()};
}

// The program has some time to end by itself: how it does is what is told. One that a device holds may not end at all.
void Conversation::kill_and_wait() {
  if (has_ended_) return;
  has_ended_ = true;
  shutdown(socket_, SHUT_RDWR);
  constexpr int kTries = 300, kTriesBeforeKill = 20;
  for (int i = 0; i < kTries; ++i) {
    const pid_t ended = waitpid(child_, &status_, WNOHANG);
    if (ended == child_ || (ended < 0 && errno != EINTR)) return;
    if (i == kTriesBeforeKill) kill(-child_, SIGKILL);
    usleep(10000);
  }
}

std::string Conversation::end_in_words() {
  std::string words = WIFSIGNALED(status_) ? "ended by signal " + std::to_string(WTERMSIG(status_)) + " (" +
                                                 strsignal(WTERMSIG(status_)) + ")"
                                           : "ended with status " + std::to_string(WEXITSTATUS(status_));
  constexpr off_t kMostShown = 2000;
  const off_t size = lseek(errors_, 0, SEEK_END), from = std::max<off_t>(0, size - kMostShown);
  std::string text(static_cast<std::size_t>(std::max<off_t>(0, size - from)), '\0');
  if (pread(errors_, text.data(), text.size(), from) > 0) words += ": " + text;
  while (!words.empty() && words.back() == '\n') words.pop_back();
  return words;
}

}  // namespace flash_attn_jit
