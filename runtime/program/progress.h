// Progress on stderr: one bar that is redrawn on a terminal, one line a step elsewhere.
#pragma once

#include <chrono>
#include <cstddef>
#include <mutex>
#include <string>

namespace flash_attn_jit::program {

// Thread-safe.
class Progress {
 public:
  explicit Progress(std::size_t total);

  // One more step is done. `what` is shown: "built flash_fwd_... in 0.61 s".
  void step(const std::string& what);

  // What goes on within a step, on a terminal alone; some times a second at most.
  void show(const std::string& what);

  // Ends the bar's line.
  void finish();

 private:
  void draw(const std::string& what);

  std::mutex mutex_;
  std::size_t total_;
  std::size_t done_ = 0;
  bool on_terminal_;
  std::chrono::steady_clock::time_point next_show_{};
};

}  // namespace flash_attn_jit::program
