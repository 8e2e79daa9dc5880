// The card's model: machine code -> cycles -> seconds.
#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include <doctest/doctest.h>
#include <nlohmann/json.hpp>

#include "generator/families/families.h"
#include "generator/tile_chooser.h"
#include "generator/tile_layout.h"
#include "runtime/model/card.h"
#include "runtime/model/control_flow.h"
#include "runtime/model/kernel_model.h"
#include "runtime/model/problem_model.h"

namespace flash_attn_jit {
namespace {

namespace fs = std::filesystem;

const fs::path kKernels = fs::path(FLASH_ATTN_JIT_SOURCE_DIR) / "tests/data/card_model";

std::string bytes_of(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  REQUIRE(file);
  return {std::istreambuf_iterator<char>(file), {}};
}

// A kernel as it was compiled once, and what an independent model says of it.
struct MeasuredKernel {
  nlohmann::json facts;
  CompiledKernel kernel;
};

std::vector<MeasuredKernel> kernels_with_figures() {
  std::vector<MeasuredKernel> kernels;
  const auto figures = nlohmann::json::parse(bytes_of(kKernels / "figures.json"));
  for (const nlohmann::json& facts : figures["kernels"]) {
    CompiledKernel kernel;
    kernel.image = bytes_of(kKernels / facts["file"].get<std::string>());
    kernel.entry = facts["entry"];
    kernel.threads = facts["threads"];
    kernel.dynamic_smem = facts["dynamic_smem"];
    kernels.push_back({facts, std::move(kernel)});
  }
  return kernels;
}

void check_near(double value, double expected) { CHECK(value == doctest::Approx(expected).epsilon(0.01).scale(0.1)); }

Instruction instruction(std::string_view name, Pipe pipe, std::uint32_t address, int stall = 1) {
  Instruction made;
  made.name = name;
  made.pipe = pipe;
  made.address = address;
  made.stall = stall;
  return made;
}

std::vector<Instruction> repeated(std::string_view name, Pipe pipe, int count, int width = 0) {
  std::vector<Instruction> code;
  for (int i = 0; i < count; ++i) {
    code.push_back(instruction(name, pipe, static_cast<std::uint32_t>(i) * kInstructionBytes));
    code.back().width = width;
  }
  return code;
}

Stream stream(const std::vector<Instruction>& code) {
  Stream pointers;
  for (const Instruction& each : code) pointers.push_back(&each);
  return pointers;
}

double share(const Usage& usage, Pipe pipe) { return usage.busy[static_cast<std::size_t>(pipe)]; }

// Where blocks share a multiprocessor, the independent model waits for the last warp to have its turns: there a turn is
// what the share of the tensor pipe, of four sub-partitions, makes of its instructions.
double cycles_of_a_turn(const nlohmann::json& facts, const CompiledKernel& kernel) {
  const int blocks = facts["blocks"], warps = kernel.threads / 32;
  if (blocks == 1) return facts["cycles"];
  const double instructions = facts["loop_tensor"].get<double>() * warps * blocks / 4;
  return instructions * multiprocessor_of(find_card("t4")).mma_interval / facts["pipes"]["tensor"].get<double>();
}

TEST_CASE("agrees with the figures of an independent model") {
  const std::vector<MeasuredKernel> kernels = kernels_with_figures();
  REQUIRE(kernels.size() >= 8);
  for (const auto& [facts, kernel] : kernels) {
    CAPTURE(facts["file"]);
    const KernelModel model(kernel, facts["useful_mma"], find_card("t4"));
    CHECK(model.registers() == facts["registers"].get<int>());
    CHECK(model.blocks_per_multiprocessor() == facts["blocks"].get<int>());
    const auto loop = model.loop();
    REQUIRE(loop);
    CHECK(loop->instructions == facts["loop_instructions"].get<int>());
    CHECK(loop->tensor_instructions == facts["loop_tensor"].get<int>());
    CHECK(loop->spill_instructions == facts["loop_spills"].get<int>());
    CHECK(loop->code_bytes == facts["code_bytes"].get<int>());
    CHECK(loop->limit == facts["limit"].get<std::string>());
    check_near(loop->useful, facts["useful"]);
    check_near(loop->under_stress, facts["useful_under_stress"]);
    check_near(loop->usage.load_store, facts["lsu"]);
    check_near(loop->usage.issue, facts["issue"]);
    for (const Pipe pipe : {Pipe::kTensor, Pipe::kFma, Pipe::kAlu, Pipe::kXu, Pipe::kFp16})
      check_near(share(loop->usage, pipe), facts["pipes"].value(std::string(to_text(pipe)), 0.0));
    CHECK(loop->usage.cycles == doctest::Approx(cycles_of_a_turn(facts, kernel)).epsilon(0.01));
    if (facts.contains("lowest")) {
      check_near(loop->lowest, facts["lowest"]);
      check_near(loop->highest, facts["highest"]);
    }
  }
}

TEST_CASE("agrees with the figures of whole blocks") {
  int compared = 0;
  for (const auto& [facts, kernel] : kernels_with_figures()) {
    if (!facts.contains("block_cycles")) continue;
    CAPTURE(facts["file"]);
    const BlockCost cost = KernelModel(kernel, facts["useful_mma"], find_card("t4")).costs().back();
    CHECK(cost.block == doctest::Approx(facts["block_cycles"].get<double>()).epsilon(0.01));
    CHECK(cost.iteration == doctest::Approx(facts["iteration_cycles"].get<double>()).epsilon(0.01));
    ++compared;
  }
  CHECK(compared >= 2);
}

TEST_CASE("blocks that share a multiprocessor take what their costs say, however many iterations they have") {
  int compared = 0;
  for (const auto& [facts, kernel] : kernels_with_figures()) {
    const KernelModel model(kernel, facts["useful_mma"], find_card("t4"));
    const int blocks = model.blocks_per_multiprocessor();
    if (blocks == 1) continue;
    CAPTURE(facts["file"]);
    const MachineCode code = read_machine_code(kernel.image, kernel.entry);
    const CodeLoop loop = tensor_loops(code).front();
    const Stream turn = stream_of(code, loop), after = path_from(code, loop);
    const BlockCost cost = model.costs().back();
    for (const int iterations : {6, 24, 60}) {
      CAPTURE(iterations);
      Stream whole = path_to(code, loop);
      for (int i = 0; i < iterations; ++i) whole.insert(whole.end(), turn.begin(), turn.end());
      whole.insert(whole.end(), after.begin(), after.end());
      const ResidentBlocks resident{blocks, (kernel.threads + 31) / 32};
      const double cycles = play_blocks(multiprocessor_of(find_card("t4")), whole, resident, 4 * blocks).cycles;
      const double tolerance = iterations < 10 ? 0.04 : 0.01;
      CHECK(cost.block + iterations * cost.iteration == doctest::Approx(cycles).epsilon(tolerance));
    }
    ++compared;
  }
  CHECK(compared >= 2);
}

TEST_CASE("a GeForce RTX 20 takes twice as long for a tensor instruction") {
  const std::vector<Instruction> code = repeated("HMMA", Pipe::kTensor, 64);
  for (const auto& [word, cycles] : {std::pair("t4", 8.0), {"rtx2080ti", 16.0}}) {
    const Usage usage = play_loop(multiprocessor_of(find_card(word)), stream(code), {.blocks = 1, .warps = 4});
    CHECK(share(usage, Pipe::kTensor) == doctest::Approx(1.0).epsilon(0.02));
    CHECK(usage.cycles == doctest::Approx(64 * cycles).epsilon(0.02));
  }
}

TEST_CASE("pipes: what streams of one instruction cost") {
  const MultiprocessorModel model;
  constexpr int kCount = 512;
  const auto cycles = [&](std::string_view name, Pipe pipe, int width = 0) {
    std::vector<Instruction> code = repeated(name, pipe, kCount, width);
    code.push_back(instruction("BAR", Pipe::kControl, kCount * kInstructionBytes));  // no warp starves the others
    return play_loop(model, stream(code), {.blocks = 1, .warps = 16}).cycles / kCount;
  };
  // 16 warps, four on each sub-partition.
  CHECK(cycles("FFMA", Pipe::kFma) == doctest::Approx(4 * 2).epsilon(0.02));
  CHECK(cycles("MUFU", Pipe::kXu) == doctest::Approx(4 * 8).epsilon(0.02));
  // 32 lanes of 16 bytes at 64 a cycle, of the multiprocessor's one unit.
  CHECK(cycles("LDSM", Pipe::kMemory, 16) == doctest::Approx(16 * 8).epsilon(0.02));
  CHECK(cycles("SHFL", Pipe::kMemory) == doctest::Approx(16 * 2).epsilon(0.02));
}

TEST_CASE("where blocks starve one another a turn takes what all of them together need for one") {
  const MultiprocessorModel model;
  constexpr int kCount = 64, kBlocks = 12;
  std::vector<Instruction> code = repeated("MUFU", Pipe::kXu, kCount);
  for (const bool with_barrier : {false, true}) {
    if (with_barrier) code.push_back(instruction("BAR", Pipe::kControl, kCount * kInstructionBytes));
    const Usage usage = play_loop(model, stream(code), {.blocks = kBlocks, .warps = 4});
    CHECK(usage.cycles == doctest::Approx(kBlocks * kCount * model.xu_interval).epsilon(0.02));
    CHECK(share(usage, Pipe::kXu) == doctest::Approx(1.0).epsilon(0.02));
  }
}

TEST_CASE("a loop that does not fit the instruction cache is slower for each instruction") {
  const MultiprocessorModel model;
  const auto cycles = [&](int count) {
    // On two pipes in turn, an instruction a cycle.
    std::vector<Instruction> code = repeated("FFMA", Pipe::kFma, count);
    for (std::size_t i = 0; i < code.size(); i += 2) code[i].pipe = Pipe::kAlu;
    return play_loop(model, stream(code), {.blocks = 1, .warps = 4}).cycles / count;
  };
  CHECK(cycles(1000) == doctest::Approx(1).epsilon(0.02));
  CHECK(cycles(2000) > 1.2);
}

TEST_CASE("a scoreboard is waited for, and a barrier holds every warp of its block") {
  const MultiprocessorModel model;
  std::vector<Instruction> code = repeated("FFMA", Pipe::kFma, 3);
  code[0] = instruction("LDG", Pipe::kMemory, 0);
  code[0].width = 4;
  code[0].result_board = 0;
  code[1].waits_for = 1;
  CHECK(play_loop(model, stream(code), {.blocks = 1, .warps = 1}).cycles > model.global_latency);
  code[1].waits_for = 2;
  CHECK(play_loop(model, stream(code), {.blocks = 1, .warps = 1}).cycles < 20);
  code[0] = instruction("BAR", Pipe::kControl, 0);
  CHECK(play_loop(model, stream(code), {.blocks = 1, .warps = 8}).cycles > model.barrier_latency);
  Waits waits;
  play_loop(model, stream(code), {.blocks = 1, .warps = 8}, {}, &waits);
  CHECK(waits.contains({0, "barrier"}));
}

TEST_CASE("resident blocks are bound by registers, shared memory, threads and slots") {
  CHECK(resident_blocks(255, 0, 256) == 1);
  CHECK(resident_blocks(255, 0, 128) == 2);
  CHECK(resident_blocks(128, 0, 256) == 2);
  CHECK(resident_blocks(32, 32768, 128) == 2);
  CHECK(resident_blocks(32, 32769, 128) == 1);
  CHECK(resident_blocks(32, 65537, 128) == 0);
  CHECK(resident_blocks(32, 0, 512) == 2);
  CHECK(resident_blocks(16, 0, 32) == 16);
}

TEST_CASE("bytes that are no cubin are refused, and never read beyond") {
  const std::string cubin = bytes_of(kKernels / kernels_with_figures().front().facts["file"].get<std::string>());
  const std::string entry = kernels_with_figures().front().facts["entry"];
  CHECK_NOTHROW(read_machine_code(cubin, entry));
  CHECK_THROWS_AS(read_machine_code(cubin, "other"), MachineCodeError);
  CHECK_THROWS_AS(read_machine_code("", entry), MachineCodeError);
  std::mt19937 random(1);
  int refused = 0;
  for (int i = 0; i < 400; ++i) {
    // In memory of its own, so that a sanitizer sees the end.
    std::string bad(cubin.data(), random() % 2 == 0 ? cubin.size() : random() % cubin.size());
    for (int flips = static_cast<int>(random() % 4); flips > 0; --flips) {
      // The header and the section table, which stands at the end, are what is believed.
      const std::size_t at =
          random() % 2 == 0 ? random() % 64 : bad.size() - 1 - random() % std::min<std::size_t>(bad.size(), 2048);
      if (at < bad.size()) bad[at] = static_cast<char>(random());
    }
    try {
      const MachineCode code = read_machine_code(bad, entry);
      CHECK(code.instructions.size() * kInstructionBytes <= bad.size());
    } catch (const MachineCodeError&) {
      ++refused;
    }
  }
  CHECK(refused > 100);
}

// ---- whole problems ----

KernelSpec spec_of(KernelKind kind, int head_dim, Mask mask, const TileConfig& tile) {
  KernelSpec spec;
  spec.kind = kind;
  spec.head_dim = head_dim;
  spec.mask = mask;
  spec.tile = tile;
  return spec;
}

bool sees(const KernelSpec& spec, const ProblemSize& size, std::int64_t query, std::int64_t key) {
  const std::int64_t distance = key - (query + size.seqlen_k - size.seqlen_q);
  if (spec.mask == Mask::kCausal) return distance <= 0;
  if (spec.mask == Mask::kNone) return true;
  return (size.window_left < 0 || distance >= -size.window_left) &&
         (size.window_right < 0 || distance <= size.window_right);
}

struct Counted {
  double whole = 0, cut = 0, scores = 0;
};

// Tiles of the first block whose scores are all, or some but not all, seen.
Counted count(const KernelSpec& spec, const ProblemSize& size) {
  const bool owns_keys = family_of(spec.kind).rows == RowSide::kKeys;
  const std::int64_t rows = owns_keys ? size.seqlen_k : size.seqlen_q,
                     columns = owns_keys ? size.seqlen_q : size.seqlen_k;
  Counted counted;
  for (std::int64_t tile = 0; tile < columns; tile += spec.tile.block_n) {
    std::int64_t seen = 0;
    for (std::int64_t row = 0; row < rows; ++row)
      for (std::int64_t column = tile; column < std::min<std::int64_t>(columns, tile + spec.tile.block_n); ++column)
        seen += owns_keys ? sees(spec, size, column, row) : sees(spec, size, row, column);
    counted.scores += static_cast<double>(seen);
    if (seen == rows * spec.tile.block_n)
      ++counted.whole;
    else if (seen > 0)
      ++counted.cut;
  }
  return counted;
}

TEST_CASE("iterations are those of the tiles that are seen") {
  std::mt19937 random(2);
  const auto below = [&](int end) { return static_cast<std::int64_t>(random() % static_cast<unsigned>(end)); };
  int with_whole = 0, with_cut = 0;
  for (int i = 0; i < 3000; ++i) {
    const KernelKind kind =
        std::array{KernelKind::kForward, KernelKind::kBackwardDkDv, KernelKind::kBackwardDq}[below(3)];
    const Mask mask = kAllMasks[static_cast<std::size_t>(below(3))];
    const KernelSpec spec = spec_of(kind, 64, mask, {64, 8, 1, 64, {}});
    ProblemSize size{.seqlen_q = 1 + below(100), .seqlen_k = 1 + below(100)};
    if (mask == Mask::kWindow) {
      size.window_left = below(60) - 1;
      size.window_right = below(60) - 1;
    }
    const bool owns_keys = family_of(kind).rows == RowSide::kKeys;
    if ((owns_keys ? size.seqlen_k : size.seqlen_q) > 64) continue;  // one block
    CAPTURE(spec.text());
    CAPTURE(size.seqlen_q);
    CAPTURE(size.seqlen_k);
    CAPTURE(size.window_left);
    CAPTURE(size.window_right);
    const Counted counted = count(spec, size);
    const ProblemPrediction predicted = predict(spec, size, {BlockCost{1, 1, 1}}, find_card("t4"));
    CHECK(predicted.iterations == counted.whole);
    CHECK(predicted.masked_iterations == counted.cut);  // one warp: it leaves out none that the block does not
    CHECK(predicted.useful_flops == counted.scores * 2 * 64 * family_of(kind).products);
    with_whole += counted.whole > 0;
    with_cut += counted.cut > 0;
  }
  CHECK(with_whole > 300);
  CHECK(with_cut > 300);
}

TEST_CASE("a problem takes as long as its waves") {
  const KernelSpec spec = spec_of(KernelKind::kForward, 64, Mask::kNone, {128, 32, 4, 64, {}});
  const Card& card = find_card("t4");
  const std::vector<BlockCost> costs = {{1000, 500, 800}, {900, 450, 700}};
  const auto cycles = [&](std::int64_t batch) {
    return predict(spec, {.batch = batch, .seqlen_q = 128, .seqlen_k = 320}, costs, card).cycles;
  };
  // 10 iterations a block; what a block reads and writes once comes on top, and is the same for all.
  const double extra = cycles(40) - 6000;
  CHECK(extra >= 0);
  CHECK(cycles(1) == doctest::Approx(6000 + extra));
  CHECK(cycles(41) == doctest::Approx(2 * (5400 + extra)));
  CHECK(cycles(80) == doctest::Approx(2 * (5400 + extra)));
  CHECK(cycles(81) == doctest::Approx(2 * (5400 + extra) + 6000 + extra));
}

TEST_CASE("no problem is faster than DRAM or the tensor cores") {
  std::mt19937 random(3);
  const Card& card = find_card("t4");
  for (int i = 0; i < 200; ++i) {
    const Mask mask = kAllMasks[random() % 3];
    const KernelKind kind = kKernelKinds[random() % kKernelKinds.size()];
    KernelSpec spec = spec_of(kind, std::max(64, family_of(kind).least_head_dim), mask, {});
    spec.tile = default_tiles(spec).front();
    const ProblemSize size{.batch = 1 + static_cast<std::int64_t>(random() % 9),
                           .num_heads = 4,
                           .num_heads_k = 2,
                           .seqlen_q = 1 + static_cast<std::int64_t>(random() % 3000),
                           .seqlen_k = 1 + static_cast<std::int64_t>(random() % 3000)};
    // Iterations at the tensor cores' peak, and nothing beside them.
    const double iteration = useful_mma_per_iteration(spec) * spec.tile.warps * 8 / 4.0;
    const ProblemPrediction predicted = predict(spec, size, {BlockCost{0, iteration, iteration}}, card);
    CHECK(predicted.seconds >= predicted.copy_seconds);
    CHECK(predicted.copy_seconds == doctest::Approx(predicted.dram_seconds * 320 / 240));
    CHECK(predicted.seconds >= predicted.seconds_at_boost);
    CHECK(predicted.dram_seconds > 0);
    if (mask == Mask::kNone) CHECK(predicted.share_of_peak <= 1.0 + 1e-9);
  }
}

TEST_CASE("a token over a cache: one sequence fills the card, and DRAM bounds it") {
  KernelSpec spec = spec_of(KernelKind::kDecode, 128, Mask::kCausal, {16, 16, 4, 128, {0, 0, 0}});
  spec.group_size = 4;
  const std::vector<BlockCost> costs = {{4075, 1756, 1756}, {2483, 1320, 1320}};
  ProblemSize size{.batch = 1, .num_heads = 32, .num_heads_k = 8, .seqlen_q = 1, .seqlen_k = 8192};
  const ProblemPrediction one = predict(spec, size, costs, find_card("t4"));
  CHECK(one.blocks >= 72);  // of 80 at once
  CHECK(one.blocks % 8 == 0);
  CHECK(one.iterations == doctest::Approx(std::ceil(8192.0 / static_cast<double>(one.blocks / 8) / 64)));
  const double bytes = 2.0 * 8 * 8192 * 128 * 2;  // of keys and values
  CHECK(one.is_bound_by_dram());
  CHECK(one.share_of_copies() == 1);
  CHECK(one.seconds * 240e9 == doctest::Approx(bytes).epsilon(0.02));
  CHECK(one.dram_seconds * 320e9 == doctest::Approx(bytes).epsilon(0.02));
  CHECK(one.cycles / 1400e6 < 0.5 * one.seconds);  // its instructions leave room
  size.batch = 64;
  const ProblemPrediction many = predict(spec, size, costs, find_card("t4"));
  CHECK(many.blocks == 64 * 8);  // without splits
  CHECK(many.seconds == doctest::Approx(64 * one.seconds).epsilon(0.02));
}

TEST_CASE("DRAM's floor counts the elements of an attn_bias that are read") {
  const std::vector<BlockCost> costs = {{1, 1, 1}};
  ProblemSize size{.batch = 2, .num_heads = 4, .num_heads_k = 2, .seqlen_q = 300, .seqlen_k = 400};
  const auto bytes = [&](KernelKind kind, Mask mask, FeatureSet features) {
    KernelSpec spec = spec_of(kind, 64, mask, {128, 32, 4, 64, {}});
    spec.group_size = 2;
    spec.features = features;
    return predict(spec, size, costs, find_card("t4")).dram_seconds * find_card("t4").dram_bytes_per_second;
  };
  const auto of_bias = [&](KernelKind kind, Mask mask, FeatureSet features) {
    size.bias_heads = 0;
    const double without = bytes(kind, mask, features);
    CHECK(without == doctest::Approx(bytes(kind, mask, {})));
    size.bias_heads = 3;
    return bytes(kind, mask, features) - without;
  };
  for (const KernelKind kind : {KernelKind::kForward, KernelKind::kBackwardDkDv, KernelKind::kBackwardDq}) {
    CHECK(of_bias(kind, Mask::kNone, {Feature::kBias16}) == doctest::Approx(3 * 300 * 400 * 2));
    CHECK(of_bias(kind, Mask::kNone, {Feature::kBias32, Feature::kUnpaired}) == doctest::Approx(3 * 300 * 400 * 4));
    CHECK(of_bias(kind, Mask::kNone, {Feature::kBoolMask, Feature::kOneRow}) == doctest::Approx(3 * 400));
    // Query i sees i + 101 keys: what the mask hides is not read.
    CHECK(of_bias(kind, Mask::kCausal, {Feature::kBoolMask}) == doctest::Approx(3 * (300 * 101 + 299 * 300 / 2)));
    CHECK(of_bias(kind, Mask::kNone, {Feature::kSoftcap}) == 0);
  }
}

TEST_CASE("DRAM's floor is what copies get, where that is known") {
  const KernelSpec spec = spec_of(KernelKind::kDecode, 128, Mask::kCausal, {16, 16, 4, 128, {0, 0, 0}});
  const ProblemSize size{.batch = 8, .seqlen_q = 1, .seqlen_k = 8192};
  const std::vector<BlockCost> quick = {{1, 1, 1}}, slow = {{1000, 50'000, 50'000}};
  for (const Card& card : cards()) {
    CAPTURE(card.name);
    CHECK(card.attainable_bytes_per_second() <= card.dram_bytes_per_second);
    const ProblemPrediction bound = predict(spec, size, quick, card);
    CHECK(bound.seconds == bound.copy_seconds);
    CHECK(bound.copy_seconds * card.attainable_bytes_per_second() ==
          doctest::Approx(bound.dram_seconds * card.dram_bytes_per_second));
    // What its instructions bound takes as long as they do, whatever DRAM gives.
    const ProblemPrediction busy = predict(spec, size, slow, card);
    CHECK_FALSE(busy.is_bound_by_dram());
    CHECK(busy.seconds == doctest::Approx(busy.cycles / card.sustained_mhz / 1e6));
    CHECK(busy.share_of_copies() < 1);
  }
  CHECK(find_card("t4").copied_bytes_per_second == 240e9);
  CHECK(find_card("rtx2080").copied_bytes_per_second == 0);
}

TEST_CASE("bad sizes and cards are refused by name") {
  const KernelSpec spec = spec_of(KernelKind::kForward, 64, Mask::kNone, {128, 32, 4, 64, {}});
  const std::vector<BlockCost> costs = {{1, 1, 1}};
  CHECK_THROWS_AS(predict(spec, {.seqlen_q = 0}, costs, find_card("t4")), UnsupportedError);
  CHECK_THROWS_AS(predict(spec, {.num_heads = 3, .num_heads_k = 2}, costs, find_card("t4")), UnsupportedError);
  CHECK_THROWS_AS(find_card("a100"), UnsupportedError);
}

}  // namespace
}  // namespace flash_attn_jit
