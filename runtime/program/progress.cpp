#include "runtime/program/progress.h"

#include <iostream>

#include <sys/ioctl.h>
#include <unistd.h>

namespace flash_attn_jit::program {
namespace {

constexpr std::size_t kBarWidth = 10;  // 80 columns have room for what is tried and what leads

std::size_t terminal_columns() {
  winsize size{};
  return ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
}

std::string bar(std::size_t done, std::size_t total) {
  const std::size_t filled = total == 0 ? kBarWidth : done * kBarWidth / total;
  return "[" + std::string(filled, '#') + std::string(kBarWidth - filled, '.') + "]";
}

}  // namespace

Progress::Progress(std::size_t total) : total_(total), on_terminal_(isatty(STDERR_FILENO) == 1) {}

void Progress::step(const std::string& what) {
  const std::lock_guard lock(mutex_);
  ++done_;
  if (on_terminal_) return draw(what);
  std::cerr << "[" << done_ << "/" << total_ << "] " << what << std::endl;
}

void Progress::show(const std::string& what) {
  const std::lock_guard lock(mutex_);
  const auto now = std::chrono::steady_clock::now();
  if (!on_terminal_ || now < next_show_) return;
  next_show_ = now + std::chrono::milliseconds(150);
  draw(what);
}

void Progress::draw(const std::string& what) {
  const std::string count = std::to_string(done_) + "/" + std::to_string(total_);
  const std::string line = (bar(done_, total_) + " " + count + " " + what).substr(0, terminal_columns() - 1);
  std::cerr << "\r\x1b[K" << line << std::flush;
}

void Progress::finish() {
  const std::lock_guard lock(mutex_);
  if (on_terminal_) std::cerr << "\r\x1b[K" << std::flush;
}

}  // namespace flash_attn_jit::program
