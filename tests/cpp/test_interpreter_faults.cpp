// Planted faults, each of which the interpreter must find and name; beside each, the same code without the
// fault.
#include <doctest/doctest.h>

#include <cstdint>
#include <vector>

#include "containing.h"
#include "runtime/system/errors.h"
#include "small_kernel.h"

using namespace flash_attn_jit;
using namespace flash_attn_jit::testing;

namespace {

using doctest::Contains;

// A kernel that has one tensor, and the error of running a body on it.
struct TensorKernel {
  std::vector<std::uint16_t> memory = std::vector<std::uint16_t>(4096, 0);
  std::vector<std::int64_t> shape, strides;
  TensorUse use = TensorUse::kRead;

  std::string error_of(const std::string& body) {
    struct Params {
      void* tensor;
    } params{aligned()};
    const CompiledKernel kernel = compile_small_kernel("struct Params { unsigned short* tensor; };", body);
    const TensorExtent extent{"tensor", aligned(), 2, shape, strides, use};
    try {
      run_small_kernel(kernel, 32, &params, {&extent, 1});
    } catch (const InterpreterError& error) {
      return error.what();
    }
    return "";
  }

  // 16-byte aligned, with other memory of ours on both sides.
  std::uint16_t* aligned() {
    const auto address = reinterpret_cast<std::uintptr_t>(memory.data() + 1024);
    return reinterpret_cast<std::uint16_t*>((address + 15) / 16 * 16);
  }
};

}  // namespace

TEST_CASE("race between two warps: a write, then a read without a barrier") {
  const std::string write = "if (thread_in_block() == 0) store_shared_4B(0, 1);\n";
  const std::string read = "if (thread_in_block() == 37) load_shared_2B(0);";
  const std::string error = error_of_small_kernel(write + read);
  CHECK(error == Containing{"race in shared memory: read of bytes 0 and 1"});
  CHECK(error == Containing{"which warp 0 lane 0 wrote at body.cu:1"});
  CHECK(error == Containing{"small_kernel: body.cu:2: block 0, warp 1, lane 5: race"});
  CHECK(error_of_small_kernel(write + "warp_barrier();" + read) == Containing{"race"});
  CHECK(error_of_small_kernel(write + "block_barrier();" + read) == "");
}

TEST_CASE("race between two warps: a read, then a write without a barrier") {
  // After a block barrier the warp that came last runs first.
  const std::string begin =
      "if (thread_in_block() == 0) store_shared_4B(0, 1);\nblock_barrier();\n"
      "if (thread_in_block() == 36) load_shared_2B(2);\n";
  const std::string write = "if (thread_in_block() == 5) store_shared_4B(0, 2);";
  const std::string error = error_of_small_kernel(begin + write);
  CHECK(error == Containing{"body.cu:4: block 0, warp 0, lane 5: race in shared memory: write of bytes 2 and 3"});
  CHECK(error == Containing{"which warp 1 lane 4 read at body.cu:3"});
  CHECK(error_of_small_kernel(begin + "block_barrier();" + write) == "");
}

TEST_CASE("race of two writes to the same bytes") {
  CHECK(error_of_small_kernel("store_shared_2B(0, 1);", 32) ==
        Containing{"race in shared memory: write of bytes 0 and 1"});
  CHECK(error_of_small_kernel("store_shared_4B(thread_in_block() / 2 * 4, 1);", 32) == Containing{"race"});
  CHECK(error_of_small_kernel("store_shared_2B(thread_in_block() * 2, 1);", 32) == "");
}

TEST_CASE("race inside a warp: collectives are no barriers, warp_barrier is") {
  const std::string write = "store_shared_16B(thread_in_block() * 16, Vec16{});\n";
  const std::string read = "unsigned r[4]; ldmatrix_x4(r, (thread_in_block() ^ 1) * 16);";
  CHECK(error_of_small_kernel(write + read, 32) == Containing{"race in shared memory: read of bytes 16 and 17"});
  CHECK(error_of_small_kernel(write + "any_in_warp(true); shuffle_xor(1.0f, 1);" + read, 32) == Containing{"race"});
  CHECK(error_of_small_kernel(write + "warp_barrier();" + read, 32) == "");
  // A lane's own bytes need no barrier.
  CHECK(error_of_small_kernel(write + "unsigned r[4]; ldmatrix_x4(r, thread_in_block() * 16);", 32) == "");
}

TEST_CASE("race of a write with one of many readers, the last of which is the writer itself") {
  const std::string body =
      "if (thread_in_block() == 0) store_shared_2B(0, 1);\nblock_barrier();\nload_shared_2B(0);\n"
      "if (thread_in_block() == 30) store_shared_2B(0, 1);";
  CHECK(error_of_small_kernel(body) == Containing{"race in shared memory: write of bytes 0 and 1"});
}

TEST_CASE("a barrier of the past does not excuse a race of the present") {
  const std::string body =
      "store_shared_4B(thread_in_block() * 4, 1);\nblock_barrier();\nload_shared_2B(0);\nblock_barrier();\n"
      "store_shared_4B(thread_in_block() * 4, 1);\nload_shared_2B(0);";
  CHECK(error_of_small_kernel(body) == Containing{"body.cu:6"});
}

TEST_CASE("read of shared memory that was never written") {
  const std::string error = error_of_small_kernel(
      "store_shared_2B(thread_in_block() * 4, 1);\nblock_barrier();\n"
      "if (thread_in_block() == 2) load_shared_2B(2);");
  CHECK(error ==
        Containing{"body.cu:3: block 0, warp 0, lane 2: read of shared memory that was never written: bytes 2 and 3"});
  // One byte pair of sixteen is missing.
  CHECK(error_of_small_kernel("if (thread_in_block() != 13) store_shared_2B(thread_in_block() * 2, 1);\n"
                              "block_barrier();\nVec16 v; load_shared_16B(v, thread_in_block() % 8 * 16);") ==
        Containing{"never written: bytes 26 and 27"});
}

TEST_CASE("what an earlier block wrote is not there") {
  const CompiledKernel kernel =
      compile_small_kernel("struct Params {};",
                           "if (block_in_grid() == 0) store_shared_2B(thread_in_block() * 2, 1);\n"
                           "load_shared_2B(thread_in_block() * 2);");
  const char no_params = 0;
  CHECK_NOTHROW(interpret(kernel, {1, 32, 4096}, &no_params, {}));
  CHECK_THROWS_WITH_AS(interpret(kernel, {2, 32, 4096}, &no_params, {}),
                       Contains("block 1, warp 0, lane 0: read of shared memory that was never written"),
                       InterpreterError);
}

TEST_CASE("shared memory: outside the block's, and not aligned") {
  CHECK(error_of_small_kernel("store_shared_4B(4096, 1);") == Containing{"outside the block's 4096 bytes"});
  CHECK(error_of_small_kernel("store_shared_4B(-4, 1);") == Containing{"outside the block's 4096 bytes"});
  CHECK(error_of_small_kernel("store_shared_16B(8, Vec16{});") == Containing{"address 8 is no multiple of 16"});
  CHECK(error_of_small_kernel("if (thread_in_block() == 0) store_shared_4B(4092, 1);") == "");
}

TEST_CASE("lanes at different primitives") {
  const std::string error =
      error_of_small_kernel("if (thread_in_block() < 5)\n  warp_barrier();\nelse\n  any_in_warp(true);");
  CHECK(error ==
        Containing{"body.cu:4: block 0, warp 0, lane 5: divergence: this lane is at any_in_warp while lane 4 waits at "
                   "warp_barrier (body.cu:2)"});
  CHECK(error_of_small_kernel("if (thread_in_block() % 2)\n  warp_barrier();\nelse\n  warp_barrier();") ==
        Containing{"divergence"});
  CHECK(error_of_small_kernel("float c[4] = {};\nif (thread_in_block() < 5)\n  Fp16::multiply_add(c, 0, 0, 0);\nelse\n"
                              "  Fp16::multiply(c, 0, 0, 0);") ==
        Containing{"is at multiply while lane 4 waits at multiply_add "});
}

TEST_CASE("a lane that leaves while others wait") {
  CHECK(error_of_small_kernel("if (thread_in_block() == 7) return;\nany_in_warp(true);") ==
        Containing{"warp 0, lane 7: divergence: this lane has left the kernel while 7 lanes of its warp wait "
                   "at any_in_warp"});
  CHECK(error_of_small_kernel("if (thread_in_block() == 0) return;\nwarp_barrier();") ==
        Containing{"while 1 lanes of its warp have left the kernel"});
}

TEST_CASE("a block barrier that one warp misses") {
  const std::string first = error_of_small_kernel("if (thread_in_block() / 32 != 0)\n  block_barrier();", 96);
  CHECK(first == Containing{"block barrier that not every warp reaches"});
  CHECK(first == Containing{"gone from the kernel are warps 0"});
  const std::string last = error_of_small_kernel("if (thread_in_block() / 32 != 2)\n  block_barrier();", 96);
  CHECK(last == Containing{"waiting are warps 0 1, gone from the kernel are warps 2"});
  // Warps may meet at different lines.
  CHECK(error_of_small_kernel("if (thread_in_block() / 32 == 0)\n  block_barrier();\nelse\n  block_barrier();") == "");
}

TEST_CASE("global reads outside a tensor") {
  TensorKernel kernel{.shape = {4, 8}, .strides = {8, 1}};
  CHECK(kernel.error_of("load_global_2B(params.tensor + 32);") ==
        Containing{"read of 2 bytes of global memory outside every tensor: 0 bytes behind the end of tensor "
                   "of shape (4, 8)"});
  CHECK(kernel.error_of("load_global_2B(params.tensor - 1);") == Containing{"2 bytes before the start of tensor"});
  CHECK(kernel.error_of("Vec16 v; load_global_16B(v, params.tensor + 4);") == Containing{"no multiple of 16"});
  CHECK(kernel.error_of("load_global_2B(params.tensor + 31); Vec16 v; load_global_16B(v, params.tensor + 24);") == "");
}

TEST_CASE("global reads in a stride gap") {
  TensorKernel kernel{.shape = {4, 6}, .strides = {16, 1}};
  CHECK(kernel.error_of("\nload_global_2B(params.tensor + 16 + 6);") ==
        Containing{"body.cu:2: block 0, warp 0, lane 0: read of 2 bytes of global memory in a gap, 1 "
                   "elements behind (1, 5)"});
  CHECK(kernel.error_of("Vec16 v; load_global_16B(v, params.tensor + 32);") ==
        Containing{"begins at (2, 0) of tensor of shape (4, 6) and strides (16, 1) and leaves its row"});
  CHECK(kernel.error_of("load_global_2B(params.tensor + 16 + 5);") == "");
}

TEST_CASE("global reads of transposed and of overlapping layouts") {
  // (2, 3, 4) with the first two dims stored the other way round, and rows of 4 in 8.
  TensorKernel transposed{.shape = {2, 3, 4}, .strides = {8, 16, 1}};
  CHECK(transposed.error_of("for (int i = 0; i < 6; ++i) load_global_2B(params.tensor + i * 8 + 3);") == "");
  CHECK(transposed.error_of("load_global_2B(params.tensor + 2 * 8 + 4);") ==
        Containing{"gap, 1 elements behind (0, 1, 3)"});
  // A window of 4 that slides by 3: element 11 is the last of the last window; nothing lies between.
  TensorKernel sliding{.shape = {3, 4}, .strides = {3, 1}};
  CHECK(sliding.error_of("for (int i = 0; i < 10; ++i) load_global_2B(params.tensor + i);") == "");
  CHECK(sliding.error_of("load_global_2B(params.tensor + 10);") == Containing{"outside every tensor"});
  // Offsets 0 2 3 5: 3 is reached by its second index alone.
  TensorKernel odd{.shape = {2, 2}, .strides = {3, 2}};
  CHECK(odd.error_of("load_global_2B(params.tensor); load_global_2B(params.tensor + 2); "
                     "load_global_2B(params.tensor + 5);") == "");
  CHECK(odd.error_of("load_global_2B(params.tensor + 4);") == Containing{"in a gap"});
  TensorKernel expanded{.shape = {5, 8}, .strides = {0, 1}};
  CHECK(expanded.error_of("Vec16 v; load_global_16B(v, params.tensor);") == "");
  CHECK(expanded.error_of("load_global_2B(params.tensor + 8);") == Containing{"outside every tensor"});
}

TEST_CASE("global writes: into an input, into a gap, twice, into nothing") {
  TensorKernel input{.shape = {4, 8}, .strides = {8, 1}};
  CHECK(input.error_of("store_global_2B(params.tensor, 0);") ==
        Containing{"write of 2 bytes of global memory at (0, 0) of tensor"});
  CHECK(input.error_of("store_global_2B(params.tensor, 0);") == Containing{"which may only be read"});
  TensorKernel output{.shape = {32, 6}, .strides = {16, 1}, .use = TensorUse::kWrite};
  CHECK(output.error_of("store_global_2B(params.tensor + 16 * thread_in_block() + 5, 0);") == "");
  CHECK(output.error_of("store_global_2B(params.tensor + 16 * thread_in_block() + 6, 0);") == Containing{"in a gap"});
  CHECK(output.error_of("store_global_2B(params.tensor + 16 * (thread_in_block() % 31), 0);") ==
        Containing{"warp 0, lane 31: element (0, 0) of tensor is written a second time"});
  CHECK(output.error_of("load_global_2B(params.tensor);") == Containing{"which may only be written"});
  TensorKernel empty{.shape = {0, 8}, .strides = {8, 1}, .use = TensorUse::kWrite};
  CHECK(empty.error_of("store_global_2B(params.tensor, 0);") == Containing{"outside every tensor"});
}

TEST_CASE("what a block passes on: written before, and behind a barrier") {
  TensorKernel passed{.shape = {64}, .strides = {1}, .use = TensorUse::kPassOn};
  const std::string write = "store_global_2B(params.tensor + thread_in_block(), 7);\n";
  const std::string read = "load_global_2B(params.tensor + 31 - thread_in_block());";
  CHECK(passed.error_of(write + "block_barrier();" + read) == "");
  CHECK(passed.error_of(write + read) == Containing{"which this block has not written before its last barrier"});
  CHECK(passed.error_of("block_barrier();" + read) == Containing{"has not written before its last barrier"});
  CHECK(passed.error_of(write + "block_barrier();" + write) == Containing{"is written a second time"});
  CHECK(passed.error_of("load_global_2B(params.tensor + 64);") == Containing{"outside every tensor"});
}

TEST_CASE("a failed check changes no memory") {
  TensorKernel output{.shape = {2, 4}, .strides = {8, 1}, .use = TensorUse::kWrite};
  output.error_of("store_global_16B(params.tensor, Vec16{{~0u, ~0u, ~0u, ~0u}});");
  for (std::uint16_t element : output.memory) CHECK(element == 0);
}

TEST_CASE("undefined behaviour in a kernel") {
  CHECK(error_of_small_kernel("volatile int big = 0x7fffffff;\nbig = big + 1 + thread_in_block();") ==
        Containing{"body.cu:2: block 0, warp 0, lane 0: undefined behaviour: a signed addition overflows"});
  CHECK(error_of_small_kernel(
            "int a[4] = {};\nvolatile int i = thread_in_block();\na[i] = 1;\nvolatile int use = a[0];") ==
        Containing{"body.cu:3: block 0, warp 0, lane 4: undefined behaviour: an array index out of bounds"});
  CHECK(error_of_small_kernel("volatile int n = 33;\nvolatile int x = 1 << n;") == Containing{"a shift by too much"});
}

TEST_CASE("a fault does not disturb the next run") {
  for (int i = 0; i < 3; ++i) {
    CHECK(error_of_small_kernel("block_barrier();\nif (thread_in_block() == 40) return;\nblock_barrier();") != "");
    CHECK(error_of_small_kernel("block_barrier(); block_barrier();") == "");
  }
}

TEST_CASE("grids that cannot be") {
  const CompiledKernel kernel = compile_small_kernel("struct Params {};", "");
  const char no_params = 0;
  CHECK_THROWS_WITH_AS(interpret(kernel, {1, 33, 0}, &no_params, {}), Contains("33 threads"), ArgumentError);
  CHECK_THROWS_AS(interpret(kernel, {1, 2048, 0}, &no_params, {}), ArgumentError);
  CHECK_THROWS_AS(interpret(kernel, {-1, 32, 0}, &no_params, {}), ArgumentError);
  CompiledKernel broken = kernel;
  broken.image = "no object";
  CHECK_THROWS_WITH_AS(interpret(broken, {1, 32, 0}, &no_params, {}), Contains("cannot be loaded"), InterpreterError);
}
