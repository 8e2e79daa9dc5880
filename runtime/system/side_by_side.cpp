#include "runtime/system/side_by_side.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "runtime/system/interrupt.h"

namespace flash_attn_jit {
namespace {

class SharedWork {
 public:
  SharedWork(std::size_t count, const std::function<void(std::size_t)>& work) : work_(work), errors_(count) {}

  // On the calling thread: what no other one has begun.
  void take_part() {
    for (std::size_t i = next_++; i < errors_.size() && !stop_; i = next_++) try {
        work_(i);
      } catch (const Interrupted&) {
        stop_ = true;
      } catch (...) {
        errors_[i] = std::current_exception();
      }
  }

  void help() {
    {
      const InterruptedBy caller(stop_);
      take_part();
    }
    const std::lock_guard lock(mutex_);
    ++helpers_ended_;
    ended_.notify_one();
  }

  void wait_for(std::size_t helpers) {
    using namespace std::chrono_literals;
    try {
      std::unique_lock lock(mutex_);
      while (!ended_.wait_for(lock, 50ms, [&] { return helpers_ended_ == helpers; })) {
        lock.unlock();
        throw_if_interrupted();
        lock.lock();
      }
    } catch (const Interrupted&) {
      stop_ = true;
    }
  }

  void rethrow() const {
    if (stop_) throw Interrupted();
    for (const std::exception_ptr& error : errors_)
      if (error) std::rethrow_exception(error);
  }

 private:
  const std::function<void(std::size_t)>& work_;
  std::atomic<std::size_t> next_ = 0;
  std::atomic<bool> stop_ = false;
  std::vector<std::exception_ptr> errors_;
  std::mutex mutex_;  // guards helpers_ended_
  std::condition_variable ended_;
  std::size_t helpers_ended_ = 0;
};

}  // namespace

void run_side_by_side(std::size_t count, const std::function<void(std::size_t)>& work) {
  SharedWork shared(count, work);
  {
    std::vector<std::jthread> helpers;
    helpers.reserve(count);
    try {
      for (std::size_t i = 1; i < count; ++i) helpers.emplace_back([&shared] { shared.help(); });
    } catch (const std::system_error&) {
      // No more threads can be had: those that run take over the rest.
    }
    shared.take_part();
    shared.wait_for(helpers.size());
  }
  shared.rethrow();
}

}  // namespace flash_attn_jit
