#include <doctest/doctest.h>

#include "runtime/cache/kernel_file.h"
#include "tests/cpp/containing.h"

using namespace flash_attn_jit;
using flash_attn_jit::testing::Containing;

namespace {

KernelFile example() {
  KernelFile file;
  file.id = {make_key({{"source", "text"}}), "flash_fwd_example_sm75", "fwd hdim64", "sm_75"};
  file.kernel.image = std::string(
      "\x7f"
      "ELF\0\1\2",
      7);
  file.kernel.entry = "flash_fwd_example";
  file.kernel.threads = 128;
  file.kernel.dynamic_smem = 65536;
  file.kernel.resources = {200, 0, 4, std::nullopt};
  file.kernel.built_by = "nvrtc 12.9";
  file.kernel.min_driver = 12000;
  file.kernel.log = "ptxas info: \xff\xfe not UTF-8";
  file.kernel.seconds = 0.25;
  return file;
}

std::string fault_of(const std::string& bytes) {
  const auto parsed = parse_kernel_file(bytes);
  const auto* fault = std::get_if<KernelFileFault>(&parsed);
  return fault != nullptr ? fault->reason : "";
}

}  // namespace

TEST_CASE("a kernel file gives back what was written") {
  const KernelFile file = example();
  const auto parsed = parse_kernel_file(serialize(file));
  REQUIRE(std::holds_alternative<KernelFile>(parsed));
  const KernelFile& read = std::get<KernelFile>(parsed);
  CHECK(read.id.key == file.id.key);
  CHECK(read.id.name == file.id.name);
  CHECK(read.id.spec == file.id.spec);
  CHECK(read.id.target == file.id.target);
  CHECK(read.kernel.image == file.kernel.image);
  CHECK(read.kernel.entry == file.kernel.entry);
  CHECK(read.kernel.threads == 128);
  CHECK(read.kernel.dynamic_smem == 65536);
  CHECK(read.kernel.resources.registers == 200);
  CHECK(read.kernel.resources.spill_stores == 4);
  CHECK_FALSE(read.kernel.resources.spill_loads.has_value());
  CHECK(read.kernel.built_by == "nvrtc 12.9");
  CHECK(read.kernel.min_driver == 12000);
  CHECK(read.kernel.log == Containing{"not UTF-8"});
  CHECK(read.kernel.seconds == 0.25);
}

TEST_CASE("a kernel file with any bit flipped does not verify") {
  const std::string good = serialize(example());
  for (std::size_t at = 0; at < good.size(); ++at)
    for (int bit = 0; bit < 8; ++bit) {
      std::string bad = good;
      bad[at] = static_cast<char>(bad[at] ^ 1 << bit);
      CAPTURE(at);
      CHECK(fault_of(bad) != "");
    }
}

TEST_CASE("a kernel file of any other length does not verify") {
  const std::string good = serialize(example());
  for (std::size_t length = 0; length < good.size(); ++length) {
    CAPTURE(length);
    CHECK(fault_of(good.substr(0, length)) != "");
  }
  CHECK(fault_of(good + '\0') != "");
}

TEST_CASE("a kernel file's fault is named") {
  std::string other_version = serialize(example());
  other_version[8] = 99;
  CHECK(fault_of("") == Containing{"empty"});
  CHECK(fault_of("\x7f"
                 "ELF and so on, but no kernel file at all") == Containing{"not a kernel file"});
  CHECK(fault_of(serialize(example()).substr(0, 50)) == Containing{"truncated"});
  CHECK(fault_of(other_version) == Containing{"format version is 99"});
}

TEST_CASE("every field changes the key") {
  const KernelKey key = make_key({{"source", "s"}, {"options", "o"}, {"target", "t"}});
  CHECK(key == make_key({{"source", "s"}, {"options", "o"}, {"target", "t"}}));
  CHECK(key != make_key({{"source", "x"}, {"options", "o"}, {"target", "t"}}));
  CHECK(key != make_key({{"source", "s"}, {"options", "x"}, {"target", "t"}}));
  CHECK(key != make_key({{"source", "s"}, {"options", "o"}, {"target", "x"}}));
  CHECK(key != make_key({{"source", "s"}, {"options", "o"}}));
  CHECK(key != make_key({{"sourced", "s"}, {"options", "o"}, {"target", "t"}}));
  // Without length prefixes these two would be one text.
  CHECK(make_key({{"a", "bc"}, {"d", "e"}}) != make_key({{"a", "b"}, {"cd", "e"}}));
}
