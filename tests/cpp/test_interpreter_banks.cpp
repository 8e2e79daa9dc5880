// Bank conflicts, counted on patterns whose cycles are known by hand.
#include <doctest/doctest.h>

#include <string>

#include "containing.h"
#include "runtime/interpreter/bank_conflicts.h"
#include "small_kernel.h"

using namespace flash_attn_jit;
using namespace flash_attn_jit::testing;

namespace {

template <class Address>
BankCycles cycles_of(int bytes, Address address, std::uint32_t lanes = 0xffffffffu) {
  std::array<std::uint32_t, 32> addresses;
  for (int lane = 0; lane < 32; ++lane) addresses[lane] = static_cast<std::uint32_t>(address(lane));
  return bank_cycles(addresses, lanes, bytes);
}

// What one run of a body by one warp counts for an access kind.
AccessCount count_of(const std::string& kind, const std::string& body) {
  const std::string prologue = "const int lane = thread_in_block(); (void)lane;\n";
  const CompiledKernel kernel = compile_small_kernel("struct Params {};", prologue + body);
  const char no_params = 0;
  const InterpreterReport report = run_small_kernel(kernel, 32, &no_params, {});
  REQUIRE(report.shared.count(kind) == 1);
  return report.shared.at(kind);
}

void check_count(const AccessCount& count, std::int64_t accesses, std::int64_t cycles, std::int64_t ideal) {
  CHECK(count.accesses == accesses);
  CHECK(count.cycles == cycles);
  CHECK(count.ideal_cycles == ideal);
}

void check_cycles(BankCycles banks, int cycles, int ideal) {
  CHECK(banks.cycles == cycles);
  CHECK(banks.ideal == ideal);
}

}  // namespace

TEST_CASE("4-byte accesses: all lanes in one phase") {
  check_cycles(cycles_of(4, [](int lane) { return lane * 4; }), 1, 1);
  check_cycles(cycles_of(4, [](int) { return 64; }), 1, 1);                // one word for all
  check_cycles(cycles_of(4, [](int lane) { return lane * 8; }), 2, 1);     // every second bank
  check_cycles(cycles_of(4, [](int lane) { return lane * 128; }), 32, 1);  // one bank
  check_cycles(cycles_of(4, [](int lane) { return lane / 4 * 132 + lane % 4 * 4; }), 4,
               1);  // rows of 33 words overlap
  check_cycles(cycles_of(4, [](int lane) { return lane / 4 * 144 + lane % 4 * 4; }), 1,
               1);  // rows of 36 words do not
}

TEST_CASE("2-byte accesses: two lanes may share a word") {
  check_cycles(cycles_of(2, [](int lane) { return lane * 2; }), 1, 1);
  check_cycles(cycles_of(2, [](int lane) { return lane * 64; }), 16, 1);
}

TEST_CASE("8 and 16 byte accesses: half a warp, a quarter of a warp at a time") {
  check_cycles(cycles_of(8, [](int lane) { return lane * 8; }), 2, 2);
  check_cycles(cycles_of(8, [](int lane) { return lane * 16; }), 4, 2);
  check_cycles(cycles_of(16, [](int lane) { return lane * 16; }), 4, 4);
  check_cycles(cycles_of(16, [](int lane) { return lane * 128; }), 32, 4);
  check_cycles(cycles_of(16, [](int lane) { return lane * 144; }), 4,
               4);  // rows of 64 fp16, padded by one chunk
  check_cycles(cycles_of(16, [](int lane) { return lane * 32; }), 8, 4);
  // XOR swizzle of 8 chunks
  check_cycles(cycles_of(16, [](int lane) { return lane * 128 + (lane % 8) * 16; }), 4, 4);
}

TEST_CASE("lanes that take no part cost nothing") {
  check_cycles(cycles_of(16, [](int lane) { return lane * 128; }, 0x000000ffu), 8, 1);
  check_cycles(cycles_of(16, [](int lane) { return lane * 128; }, 0x01010101u), 4, 4);
  check_cycles(cycles_of(4, [](int lane) { return lane * 128; }, 0x5u), 2, 1);
  check_cycles(cycles_of(4, [](int lane) { return lane; }, 0), 0, 0);
}

TEST_CASE("stores of one line are one access, and the next time it is the next one") {
  check_count(count_of("store_shared_16B", "store_shared_16B(lane * 16, Vec16{});"), 1, 4, 4);
  check_count(count_of("store_shared_16B",
                       "for (int i = 0; i < 3; ++i) store_shared_16B(lane * 32 + 1024 * i % 3072, Vec16{});"),
              3, 24, 12);
  check_count(count_of("store_shared_4B", "store_shared_4B(lane * 4, 0);\nstore_shared_4B(lane * 4, 0);"), 2, 2, 2);
  check_count(count_of("store_shared_2B", "store_shared_2B(lane * 128, 0);"), 1, 32, 1);
  // Half of the lanes once more
  check_count(count_of("store_shared_4B", "for (int i = 0; i < 1 + lane % 2; ++i) store_shared_4B(lane * 4, 0);"), 2, 2,
              2);
  check_count(count_of("store_shared_4B", "if (lane < 4) store_shared_4B(lane * 128, 0);"), 1, 4, 1);
}

TEST_CASE("a rendezvous ends an access") {
  check_count(count_of("store_shared_4B",
                       "if (lane < 16) store_shared_4B(lane * 4, 0); warp_barrier(); if (lane >= 16) "
                       "store_shared_4B(lane * 4, 0);"),
              2, 2, 2);
}

TEST_CASE("ldmatrix: a phase for each matrix, of the rows that its lanes point at") {
  const std::string fill =
      "for (int i = 0; i < 8; ++i) store_shared_16B(i * 512 + lane * 16, Vec16{});\nwarp_barrier();\n";
  check_count(count_of("ldmatrix_x4", fill + "unsigned r[4]; ldmatrix_x4(r, lane * 16);"), 1, 4, 4);
  check_count(count_of("ldmatrix_x4", fill + "unsigned r[4]; ldmatrix_x4(r, lane * 128);"), 1, 32, 4);
  check_count(count_of("ldmatrix_x4_trans", fill + "unsigned r[4]; ldmatrix_x4_trans(r, lane % 8 * 144);"), 1, 4, 4);
  check_count(count_of("ldmatrix_x2_trans", fill + "unsigned r[2]; ldmatrix_x2_trans(r, lane % 16 * 32);"), 1, 4, 2);
  check_count(count_of("ldmatrix_x1", fill + "unsigned r; ldmatrix_x1(r, lane % 8 * 80);"), 1, 1, 1);
  check_count(count_of("ldmatrix_x1_trans", fill + "unsigned r; ldmatrix_x1_trans(r, lane % 8 * 32);"), 1, 2, 1);
}

TEST_CASE("the report as text and as JSON") {
  const CompiledKernel kernel = compile_small_kernel("struct Params {};", "store_shared_4B(thread_in_block() * 8, 0);");
  const char no_params = 0;
  const InterpreterReport report = run_small_kernel(kernel, 64, &no_params, {});
  CHECK(report.text() == Containing{"small_kernel, 1 blocks: no races"});
  CHECK(report.text() == Containing{"bank conflict factor 2.000 (4 cycles, 2 without)"});
  CHECK(report.json() == Containing{"\"store_shared_4B\""});
  CHECK(report.json() == Containing{"\"factor\": 2.0"});
  CHECK(last_interpreter_report().json() == report.json());
}
