// Candidates compiled on threads, while the device measures others.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "runtime/tuner/search_parts.h"

namespace flash_attn_jit {

class ThreadCompiler final : public CandidateCompiler {
 public:
  // `compile` is called on several threads; what it throws is why a candidate did not compile.
  ThreadCompiler(int threads, std::function<CompiledKernel(const KernelSpec&)> compile);
  ~ThreadCompiler() override;  // waits for what is being compiled, and leaves out what is not

  int most_at_once() const override { return static_cast<int>(threads_.size()); }
  void start(const KernelSpec& spec) override;
  std::optional<CompiledCandidate> next(double wait_seconds) override;

  // What was started for a search that ended is nobody's any more.
  void forget();

 private:
  struct Work {
    KernelSpec spec;
    int generation;
  };
  void work();
  CompiledCandidate compiled(const KernelSpec& spec) const;

  std::function<CompiledKernel(const KernelSpec&)> compile_;
  std::mutex mutex_;  // guards what is below
  std::condition_variable has_work_, has_result_;
  std::deque<Work> work_;
  std::deque<CompiledCandidate> done_;
  int generation_ = 0;
  bool ends_ = false;
  std::atomic<bool> stop_ = false;  // ends waits within a compile
  std::vector<std::thread> threads_;
};

}  // namespace flash_attn_jit
