#include "runtime/system/fork.h"

#include <pthread.h>

#include <new>
#include <set>

namespace flash_attn_jit {
namespace {

struct Registry {
  std::mutex mutex;
  std::set<std::mutex*> all;
};

Registry& registry();

// All are held while the process forks, so that no other thread holds one, and are released on both sides.
void lock_all() {
  registry().mutex.lock();
  for (std::mutex* each : registry().all) each->lock();
}

void unlock_all() {
  for (std::mutex* each : registry().all) each->unlock();
  registry().mutex.unlock();
}

// Never destroyed: objects with such a mutex may be.
Registry& registry() {
  static Registry& process_registry = *[] {
    auto* made = new Registry;
    if (::pthread_atfork(lock_all, unlock_all, unlock_all) != 0) throw std::bad_alloc();
    return made;
  }();
  return process_registry;
}

// Made while the library is loaded, before there can be threads that ask for it.
[[maybe_unused]] const Registry& registry_made_early = registry();

}  // namespace

ForkSafeMutex::ForkSafeMutex() {
  const std::lock_guard guard(registry().mutex);
  registry().all.insert(&mutex_);
}

ForkSafeMutex::~ForkSafeMutex() {
  const std::lock_guard guard(registry().mutex);
  registry().all.erase(&mutex_);
}

}  // namespace flash_attn_jit
