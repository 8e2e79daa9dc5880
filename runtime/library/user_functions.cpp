#include "runtime/library/user_functions.h"

#include <map>
#include <mutex>
#include <utility>

#include "generator/errors.h"
#include "runtime/system/fork.h"
#include "runtime/system/sha256.h"

namespace flash_attn_jit {
namespace {

struct Codes {
  ForkSafeMutex mutex;
  std::map<std::uint64_t, std::string> by_number;
};

Codes& codes() {
  static Codes& the_codes = *new Codes;  // used until the process ends
  return the_codes;
}

std::uint64_t number_of(std::string_view code) {
  const Sha256Digest digest = sha256(code);
  std::uint64_t number = 0;
  for (int i = 0; i < 8; ++i) number = number << 8 | digest[i];
  return number != 0 ? number : 1;
}

}  // namespace

std::uint64_t keep_user_functions(std::string_view code) {
  const std::uint64_t number = number_of(code);
  const std::lock_guard guard(codes().mutex);
  const auto [kept, is_new] = codes().by_number.emplace(number, code);
  if (kept->second != code) throw Error("two users' functions have the same number");
  return number;
}

std::string user_functions(const KernelSpec& spec) {
  if (spec.functions == 0) return {};
  const std::lock_guard guard(codes().mutex);
  const auto kept = codes().by_number.find(spec.functions);
  if (kept == codes().by_number.end())
    throw Error("kernel '" + spec.text() + "' names functions that this process was not given");
  return kept->second;
}

}  // namespace flash_attn_jit
