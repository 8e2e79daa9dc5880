#include "runtime/tuner/thread_compiler.h"

#include <algorithm>
#include <chrono>

#include "runtime/system/interrupt.h"

namespace flash_attn_jit {

ThreadCompiler::ThreadCompiler(int threads, std::function<CompiledKernel(const KernelSpec&)> compile)
    : compile_(std::move(compile)) {
  for (int i = 0; i < std::max(threads, 1); ++i) threads_.emplace_back([this] { work(); });
}

ThreadCompiler::~ThreadCompiler() {
  {
    const std::lock_guard lock(mutex_);
    ends_ = true;
    work_.clear();
  }
  stop_ = true;
  has_work_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadCompiler::start(const KernelSpec& spec) {
  const std::lock_guard lock(mutex_);
  work_.push_back({spec, generation_});
  has_work_.notify_one();
}

std::optional<CompiledCandidate> ThreadCompiler::next(double wait_seconds) {
  using Clock = std::chrono::steady_clock;
  const auto end = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                      std::chrono::duration<double>(std::min(wait_seconds, 1e6)));
  std::unique_lock lock(mutex_);
  while (done_.empty()) {
    const auto now = Clock::now();
    if (now >= end) return std::nullopt;
    has_result_.wait_until(lock, std::min(end, now + std::chrono::milliseconds(50)));
    lock.unlock();
    throw_if_interrupted();
    lock.lock();
  }
  CompiledCandidate first = std::move(done_.front());
  done_.pop_front();
  return first;
}

void ThreadCompiler::forget() {
  const std::lock_guard lock(mutex_);
  ++generation_;
  work_.clear();
  done_.clear();
}

CompiledCandidate ThreadCompiler::compiled(const KernelSpec& spec) const {
  CompiledCandidate candidate{spec.tile, std::nullopt, ""};
  try {
    candidate.kernel = compile_(spec);
  } catch (const std::exception& error) {  // Interrupted too: then nobody asks for it
    candidate.failure = error.what();
  }
  return candidate;
}

void ThreadCompiler::work() {
  const InterruptedBy caller(stop_);
  std::unique_lock lock(mutex_);
  for (;;) {
    has_work_.wait(lock, [this] { return ends_ || !work_.empty(); });
    if (ends_) return;
    const Work next = work_.front();
    work_.pop_front();
    lock.unlock();
    CompiledCandidate candidate = compiled(next.spec);
    lock.lock();
    if (next.generation != generation_) continue;
    done_.push_back(std::move(candidate));
    has_result_.notify_all();
  }
}

}  // namespace flash_attn_jit
