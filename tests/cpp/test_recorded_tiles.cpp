// What launches make of tuning records: the choice of tiles, and on a libcuda that plays a GPU the kernel that runs.
#include <doctest/doctest.h>

#include <atomic>
#include <thread>

#include "generator/families/families.h"
#include "runtime/launch/forward_launch.h"
#include "runtime/launch/loaded_kernels.h"
#include "runtime/tuner/tuning.h"
#include "tests/cpp/captured_log.h"
#include "tests/cpp/containing.h"
#include "tests/cpp/counted_allocations.h"
#include "tests/cpp/stub_libcuda/stub_control.h"
#include "tests/cpp/stub_nvrtc.h"
#include "tests/cpp/temporary_folder.h"
#include "tests/cpp/tiny_templates.h"
#include "tests/cpp/tuning_fixture.h"

using namespace flash_attn_jit;
using namespace flash_attn_jit::testing;
namespace fs = std::filesystem;

namespace {

struct TuningSetting {
  TemporaryFolder folder;
  fs::path cache = folder / "cache", pack = folder / "pack";

  // What a new process has.
  std::unique_ptr<Tuning> process() const {
    return std::make_unique<Tuning>(Tuning::Settings{cache, pack, embedded_templates(), default_tile_chooser()});
  }
  void keep(const TuningRecord& record) const { RecordStore(cache, FolderUse::kCache).publish(record); }
  void pack_up(const TuningRecord& record) const { RecordStore(pack, FolderUse::kPack).publish(record); }
};

TileConfig chosen(Tuning& tuning, const TuningRecord& record) {
  return tuning.tiles_of(record.key.device).choose(record.key.problem.spec, record.measured_problem());
}

TileConfig default_choice(const TuningRecord& record) {
  return default_tile_chooser().choose(record.key.problem.spec, record.measured_problem());
}

// The same record with another winner.
TuningRecord with_winner(TuningRecord record, const TileConfig& winner) {
  Candidate candidate = measured_candidate(winner, 1e-3);
  std::erase_if(record.candidates, [&](const Candidate& each) { return each.tile == winner; });
  record.candidates.push_back(candidate);
  record.winner = winner;
  return record;
}

// Legal tiles that are no defaults.
std::vector<TileConfig> unusual_tiles(const KernelSpec& spec, std::size_t count) {
  std::vector<TileConfig> tiles;
  const std::vector<TileConfig> usual = default_tiles(spec);
  for (const TileConfig& tile : tile_space(spec, arch_limits(75)))
    if (tiles.size() < count && std::find(usual.begin(), usual.end(), tile) == usual.end()) tiles.push_back(tile);
  REQUIRE(tiles.size() == count);
  return tiles;
}

}  // namespace

TEST_CASE("a record decides its whole class, odd lengths included, and no other") {
  const TuningSetting setting;
  const TuningRecord record = made_up_record();
  setting.keep(record);
  const auto tuning = setting.process();
  const TileChooser& tiles = tuning->tiles_of(record.key.device);
  KernelSpec spec = record.key.problem.spec;
  spec.tile = {256, 32, 8, 16, {1, 1, 1}};  // is not read
  for (const std::int64_t seqlen : {513, 700, 997, 1000, 1023, 1024})
    for (const std::int64_t batch_heads : {33, 48, 63, 64})
      CHECK(tiles.choose(spec, {seqlen, seqlen, batch_heads, 40}) == record.winner);
  for (const Problem& other : {Problem{512, 1000, 64, 40},
                               {1000, 512, 64, 40},
                               {1025, 1000, 64, 40},
                               {1000, 1000, 65, 40},
                               {1000, 1000, 32, 40},
                               {0, 0, 0, 40}}) {
    CHECK(tiles.choose(spec, other) == default_tile_chooser().choose(spec, other));
    CHECK(tiles.choose(spec, other) != record.winner);
  }
  KernelSpec causal = spec;
  causal.mask = Mask::kCausal;
  CHECK(tiles.choose(causal, record.measured_problem()) ==
        default_tile_chooser().choose(causal, record.measured_problem()));
  spec.head_dim = 300;
  CHECK_THROWS_AS(tiles.choose(spec, record.measured_problem()), UnsupportedError);
}

TEST_CASE("a decode record decides for problems whose queries make as many rows, and for no others") {
  const TuningSetting setting;
  const TuningRecord few = made_up_decode_record();
  const TuningRecord many = with_winner(made_up_decode_record(16), unusual_tiles(few.key.problem.spec, 2).back());
  REQUIRE(many.winner != few.winner);
  setting.keep(few);
  setting.keep(many);
  const auto tuning = setting.process();
  const TileChooser& tiles = tuning->tiles_of(few.key.device);
  const KernelSpec spec = few.key.problem.spec;
  for (const std::int64_t seqlen_q : {1, 3, 4}) CHECK(tiles.choose(spec, {seqlen_q, 4000, 64, 40}) == few.winner);
  for (const std::int64_t seqlen_q : {9, 16}) CHECK(tiles.choose(spec, {seqlen_q, 4000, 64, 40}) == many.winner);
  for (const Problem& other : {Problem{5, 4000, 64, 40}, {17, 4000, 64, 40}, {1, 2048, 64, 40}, {1, 4000, 32, 40}})
    CHECK(tiles.choose(spec, other) == default_tile_chooser().choose(spec, other));
  CHECK(tiles.takes_decode(spec, few.measured_problem()));
}

TEST_CASE("a record is for one device and for the code it runs") {
  const TuningSetting setting;
  const TuningRecord record = made_up_record();
  setting.keep(record);
  const auto tuning = setting.process();
  CHECK(chosen(*tuning, record) == record.winner);
  for (const TunedDevice& other : {TunedDevice{"Tesla T4G", 75, 40, "native"},
                                   {"Tesla T4", 80, 40, "native"},
                                   {"Tesla T4", 75, 36, "native"},
                                   {"Tesla T4", 75, 40, "compute_75"}})
    CHECK(tuning->tiles_of(other).choose(record.key.problem.spec, record.measured_problem()) == default_choice(record));
  CHECK(&tuning->tiles_of(record.key.device) == &tuning->tiles_of(record.key.device));
}

TEST_CASE("a record of other templates is kept and not used; of another driver, NVRTC or power limit it is used") {
  const TuningSetting setting;
  TuningRecord elsewhere = made_up_record(128);
  elsewhere.environment = {"0.0.1", "13.0", "nvrtc 13.1", 60.0, {}, {}};
  setting.keep(elsewhere);
  TuningRecord other = made_up_record();
  other.key.templates = std::string(64, 'a');
  setting.keep(other);
  const auto tuning = setting.process();
  CHECK(chosen(*tuning, other) == default_choice(other));
  CHECK(chosen(*tuning, elsewhere) == elsewhere.winner);
  CHECK(tuning->store().read(other.key.device).size() == 2);
  CHECK_FALSE(tuning->has_templates_in_use(other.key));
}

TEST_CASE("a winner that check() refuses is passed over with one warning") {
  const TuningSetting setting;
  const TuningRecord record = with_winner(made_up_record(), {100, 16, 4, 64, {2, 4, 7}});
  setting.keep(record);
  const CapturedLog log;
  const auto tuning = setting.process();
  for (int i = 0; i < 2; ++i) CHECK(chosen(*tuning, record) == default_choice(record));
  REQUIRE(log.warnings().size() == 1);
  CHECK(log.warnings()[0] == Containing{record.key.problem.text()});
  CHECK(log.warnings()[0] == Containing{"100 rows for 4 warps"});
}

TEST_CASE(
    "of several records: what was measured before what was predicted, the cache's before a pack's, then the newest") {
  const std::vector<TileConfig> tiles = unusual_tiles(made_up_record().key.problem.spec, 4);
  const auto record = [&](std::size_t tile, const std::string& day, const std::string& l2) {
    TuningRecord made = with_winner(made_up_record(64, 1000, day), tiles[tile]);
    made.key.policy.l2 = l2;
    return made;
  };
  TuningRecord predicted = record(0, "30", "none");
  predicted.key.policy.timer = "model";
  const TuningSetting setting;
  setting.keep(predicted);
  CHECK(chosen(*setting.process(), predicted) == tiles[0]);
  setting.pack_up(record(1, "29", "rotated inputs"));
  CHECK(chosen(*setting.process(), predicted) == tiles[1]);
  setting.keep(record(2, "01", "rotated inputs"));
  CHECK(chosen(*setting.process(), predicted) == tiles[2]);
  setting.keep(record(3, "02", "warm"));
  CHECK(chosen(*setting.process(), predicted) == tiles[3]);
  setting.keep(record(2, "03", "rotated inputs"));
  CHECK(chosen(*setting.process(), predicted) == tiles[2]);
}

TEST_CASE("what is published while a process runs decides from then on, in other processes too") {
  const TuningSetting setting;
  const TuningRecord record = made_up_record();
  const auto tuning = setting.process(), beside = setting.process();
  CHECK(chosen(*tuning, record) == default_choice(record));
  tuning->publish(record);
  CHECK(chosen(*tuning, record) == record.winner);
  CHECK(chosen(*beside, record) == record.winner);  // its device was not used before

  const TuningRecord again = with_winner(made_up_record(64, 1000, "28"), unusual_tiles(record.key.problem.spec, 2)[1]);
  tuning->publish(again);
  CHECK(chosen(*tuning, record) == again.winner);
  tuning->publish(with_winner(made_up_record(64, 1000, "28"), record.winner));
  CHECK(chosen(*tuning, record) == record.winner);
}

TEST_CASE("launches choose while records are added: the tile before or the tile after") {
  const TuningSetting setting;
  const auto tuning = setting.process();
  const TuningRecord first = made_up_record();
  const std::vector<TileConfig> tiles = unusual_tiles(first.key.problem.spec, 8);
  RecordedTiles chooser(default_tile_chooser());
  std::atomic<bool> done = false;
  std::atomic<int> strange = 0;
  std::vector<std::thread> launches;
  for (int i = 0; i < 2; ++i)
    launches.emplace_back([&] {
      std::size_t least = 0;  // a tile never comes back
      while (!done)
        if (const TileConfig tile = chooser.choose(first.key.problem.spec, first.measured_problem());
            tile != default_choice(first)) {
          const auto at = static_cast<std::size_t>(std::find(tiles.begin(), tiles.end(), tile) - tiles.begin());
          if (at < least || at == tiles.size()) ++strange;
          least = at;
        }
    });
  for (std::size_t i = 0; i < tiles.size(); ++i)
    for (int other = 1; other <= 10; ++other) {  // head dims
      KernelSpec another = first.key.problem.spec;
      another.head_dim = other;
      chooser.add(class_of(another, first.measured_problem()), tiles[i], {true, true, "x"});
      chooser.add(first.key.problem, tiles[i], {true, true, std::to_string(i)});
    }
  done = true;
  for (std::thread& launch : launches) launch.join();
  CHECK(strange == 0);
  CHECK(chooser.choose(first.key.problem.spec, first.measured_problem()) == tiles.back());
}

TEST_CASE("one backward kernel or three: by their times, where all four were measured on one problem") {
  KernelSpec spec;
  spec.head_dim = 64;
  spec.mask = Mask::kCausal;
  spec.group_size = 4;
  const Problem size{120, 100, 400, 40};
  const bool otherwise = default_tile_chooser().takes_all_keys(spec, size);
  const auto chooser_of = [&](double all_keys, double dq, const Problem& size_of_dq = {120, 100, 400, 40}) {
    auto chooser = std::make_unique<RecordedTiles>(default_tile_chooser());
    const auto add = [&](KernelKind kind, double seconds, const Problem& measured) {
      KernelSpec one = spec;
      one.kind = kind;
      one = normalized(one);
      chooser->add(class_of(one, size), default_tiles(one).front(), {true, true, "x"}, {seconds, measured});
    };
    add(KernelKind::kBackwardPreprocess, 1e-5, size);
    add(KernelKind::kBackwardDkDv, 2e-5, size);
    add(KernelKind::kBackwardDq, dq, size_of_dq);
    add(KernelKind::kBackwardAllKeys, all_keys, size);
    return chooser;
  };
  for (const Problem& asked : {size, Problem{128, 128, 512, 40}, Problem{65, 65, 257, 40}}) {  // of one class
    CHECK(chooser_of(5.9e-5, 3e-5)->takes_all_keys(spec, asked));
    CHECK_FALSE(chooser_of(6.1e-5, 3e-5)->takes_all_keys(spec, asked));
  }
  // Not measured, or on another problem: as without records.
  for (const double all_keys : {5.9e-5, 6.1e-5}) {
    CHECK(chooser_of(all_keys, 0)->takes_all_keys(spec, size) == otherwise);
    CHECK(chooser_of(all_keys, 3e-5, {128, 128, 400, 40})->takes_all_keys(spec, size) == otherwise);
  }
  CHECK_FALSE(chooser_of(1e-6, 3e-5)->takes_all_keys(spec, {128, 129, 400, 40}));  // of another class
}

TEST_CASE("every class of a grid is told apart") {
  RecordedTiles chooser(default_tile_chooser());
  std::vector<ProblemClass> classes;
  for (const int head_dim : {1, 64, 128, 256})
    for (const Mask mask : kAllMasks)
      for (std::int64_t seqlen = kSeqlenBuckets.least; seqlen <= kSeqlenBuckets.greatest; seqlen *= 2)
        for (std::int64_t heads = kBatchHeadsBuckets.least; heads <= kBatchHeadsBuckets.greatest; heads *= 2) {
          KernelSpec spec;
          spec.head_dim = head_dim;
          spec.mask = mask;
          classes.push_back({spec, seqlen, seqlen, heads});
        }
  const auto tile_of = [](std::size_t i) { return TileConfig{static_cast<int>(i) + 1, 8, 1, 16, {}}; };
  for (std::size_t i = 0; i < classes.size(); ++i) chooser.add(classes[i], tile_of(i), {});
  std::size_t wrong = 0;
  for (std::size_t i = 0; i < classes.size(); ++i)
    wrong += chooser.choose(classes[i].spec, {classes[i].seqlen_q, classes[i].seqlen_k, classes[i].batch_heads, 40}) !=
             tile_of(i);
  CHECK(wrong == 0);
}

TEST_CASE("a choice takes no memory, with a record and without" * doctest::skip(!testing::kCountsAllocations)) {
  const TuningSetting setting;
  const TuningRecord record = made_up_record();
  setting.keep(record);
  const auto tuning = setting.process();
  const TileChooser& tiles = tuning->tiles_of(record.key.device);
  const std::size_t before = testing::allocations_of_this_thread();
  int rows = 0;
  for (std::int64_t seqlen = 0; seqlen < 4096; seqlen += 13)
    rows += tiles.choose(record.key.problem.spec, {seqlen, seqlen, 64, 40}).block_m;
  CHECK(testing::allocations_of_this_thread() == before);
  CHECK(rows > 0);
}

#ifdef FLASH_ATTN_JIT_STUB_LIBCUDA

namespace {

StubControl& stub() {
  static const DynamicLibrary library = DynamicLibrary::open(FLASH_ATTN_JIT_STUB_LIBCUDA);
  return *library.function<StubControl*()>("stub_control")();
}

// The problem of a record, with tensors that are never read.
ForwardRequest request_of(const TuningRecord& record) {
  const std::int64_t dims = record.key.problem.spec.head_dim;
  const auto view = [&](std::uintptr_t at, std::int64_t seqlen, std::int64_t heads) {
    return TensorView{reinterpret_cast<void*>(at),
                      {record.batch, seqlen, heads, dims},
                      {seqlen * heads * dims, heads * dims, dims, 1}};
  };
  ForwardRequest request;
  request.q = view(0x1000, record.seqlen_q, record.num_heads);
  request.k = view(0x2000, record.seqlen_k, record.num_heads_k);
  request.v = view(0x3000, record.seqlen_k, record.num_heads_k);
  request.out = view(0x4000, record.seqlen_q, record.num_heads);
  request.softmax_lse = reinterpret_cast<float*>(0x5000);
  request.options.softmax_scale = 0.125;
  return request;
}

}  // namespace

TEST_CASE("the kernel that is launched is the record's winner, and a hot launch takes no memory") {
  const TuningSetting setting;
  TinySetting library_setting;
  library_setting.config.templates.reset();
  library_setting.config.nvrtc = make_stub_nvrtc(setting.folder / "nvrtc", {.major = "12"});
  const TuningRecord record = made_up_record();
  setting.keep(record);
  const auto tuning = setting.process();

  stub().reset(12040, {{"Tesla T4", 75, 40}, {"Tesla T4", 75, 40}, {"Quadro T1000", 75, 14}});
  Driver driver(FLASH_ATTN_JIT_STUB_LIBCUDA);
  KernelLibrary library(library_setting.settings(12040));
  DeviceRuntime devices(driver, library, TargetChoice::kNative,
                        [&](const TunedDevice& device) -> const TileChooser& { return tuning->tiles_of(device); });
  CHECK(devices.device(0).tuned_as() == record.key.device);
  const auto launched = [&](int device, const TuningRecord& problem) {
    stub().make_current(device);
    launch_forward(devices.device(device), request_of(problem), nullptr);
    return stub().launches().back().function;
  };
  const auto name_of = [](const TuningRecord& of, const TileConfig& tile) {
    KernelSpec spec = of.key.problem.spec;
    spec.tile = tile;
    return spec.name();
  };
  CHECK(launched(0, record) == name_of(record, record.winner));
  CHECK(launched(1, record) == name_of(record, record.winner));
  CHECK(launched(2, record) ==
        name_of(record, default_tile_chooser().choose(record.key.problem.spec, {1000, 1000, 64, 14})));

  // Tuned in this process while it goes on.
  const TuningRecord later = made_up_record(128);
  CHECK(launched(0, later) == name_of(later, default_choice(later)));
  tuning->publish(later);
  CHECK(launched(0, later) == name_of(later, later.winner));

  if (!testing::kCountsAllocations) return;
  stub().record_launches(false);
  const ForwardRequest request = request_of(record);
  launch_forward(devices.device(0), request, nullptr);
  const std::size_t before = testing::allocations_of_this_thread();
  for (int i = 0; i < 10; ++i) launch_forward(devices.device(0), request, nullptr);
  CHECK(testing::allocations_of_this_thread() == before);
}

#endif
