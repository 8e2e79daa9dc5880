// The process that measures, as the one that searches sees it: shell scripts that answer, hang and crash; and the other
// side of the conversation.
#include <doctest/doctest.h>

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <sstream>
#include <thread>

#include "runtime/system/errors.h"
#include "runtime/tuner/isolated_device.h"
#include "runtime/tuner/thread_compiler.h"
#include "tests/cpp/containing.h"

using namespace flash_attn_jit;
using namespace flash_attn_jit::testing;

namespace {

AttentionCase attention() {
  AttentionCase attention;
  attention.spec = parse_kernel_without_tile("fwd hdim64 fp16 causal softcap gqa4 vec16");
  attention.batch = 3;
  attention.num_heads = 8;
  attention.num_heads_k = 2;
  attention.seqlen_q = 100;
  attention.seqlen_k = 200;
  return attention;
}

CompiledCandidate candidate(int block_n, const std::string& image = "image") {
  CompiledKernel kernel;
  kernel.entry = "entry" + std::to_string(block_n);
  kernel.threads = 256;
  kernel.dynamic_smem = 50000;
  kernel.image = image;
  return {TileConfig{.block_m = 128, .block_n = block_n, .warps = 8, .register_dims = 64, .schedule = {}}, kernel, ""};
}

// Answers a setup; then to a check of the tile with n8 and n16 well, hangs at n24, crashes at n32, ends at n40.
constexpr const char* kScript = R"(
while read -r line; do
  case "$line" in
    *'"do":"setup"'*) echo '{"figures":{"power_limit_watts":70.0,"gigabytes":240.0,"tflops":50.5,"unknown_state":""}}' ;;
    *n24w*) exec sleep 100 ;;
    *n32w*) echo 'last words' >&2; kill -SEGV $$ ;;
    *n40w*) exit 3 ;;
    *'"do":"check"'*) echo '{"is_broken":false,"checked":{"fault":null,"error":0.001,"error_allowed":0.01,"blocks_per_multiprocessor":2}}' ;;
    *'"do":"time"'*) echo '{"is_broken":false,"burst":{"fault":null,"seconds":0.002,"clock_mhz":1500.0,"power_watts":null,"temperature_celsius":60.0,"throttled_by":["sw_power_cap"]}}' ;;
  esac
done)";

IsolatedDevice scripted(const std::string& script = kScript) {
  return IsolatedDevice({"/bin/sh", "-c", script}, {attention(), 0, {}, true, {}});
}

std::string words_of(const std::function<void()>& work) {
  try {
    work();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

// Right, but for one tile; keeps what it was given.
class PlayedWorker final : public WorkerDevice {
 public:
  explicit PlayedWorker(std::vector<CompiledCandidate>& given) : given_(given) {}
  CheckedCandidate check(const CompiledCandidate& candidate, double) override {
    given_.push_back(candidate);
    if (candidate.tile.block_n == 24) {
      broken_ = true;
      return {CandidateFault{Outcome::kLaunchFailed, "an illegal address \xff"}, {}, {}, 0};
    }
    return {std::nullopt, 0.25, 0.5, 3};
  }
  TimedBurst time(const CompiledCandidate& candidate, int launches, double) override {
    given_.push_back(candidate);
    TimedBurst burst;
    burst.sample.seconds = launches * 0.5;
    burst.sample.clock_mhz = 1590;
    burst.sample.throttled_by = {"hw_slowdown"};
    return burst;
  }
  bool is_broken() const override { return broken_; }
  WorkerFigures figures(const WorkerSetup& setup) override {
    const auto gigabytes = setup.measures_memory ? std::optional(300.0) : std::nullopt;
    return {70, gigabytes, setup.tensor_kernel ? std::optional(60.0) : std::nullopt, "no NVML here"};
  }

 private:
  std::vector<CompiledCandidate>& given_;
  bool broken_ = false;
};

}  // namespace

TEST_CASE("worker: a check and a burst come back whole") {
  IsolatedDevice device = scripted();
  const CheckedCandidate checked = device.check(candidate(16), 20);
  CHECK_FALSE(checked.fault);
  CHECK(checked.error == 0.001);
  CHECK(checked.error_allowed == 0.01);
  CHECK(checked.blocks_per_multiprocessor == 2);
  const TimedBurst burst = device.time(candidate(16), 5, 20);
  CHECK_FALSE(burst.fault);
  CHECK(burst.sample.seconds == 0.002);
  CHECK(burst.sample.clock_mhz == 1500);
  CHECK_FALSE(burst.sample.power_watts);
  CHECK(burst.sample.throttled_by == std::vector<std::string>{"sw_power_cap"});
  CHECK(device.figures().power_limit_watts == 70);
  CHECK(device.figures().gigabytes == 240);
  CHECK(device.figures().tflops == 50.5);
  CHECK(device.times_started() == 1);
}

TEST_CASE("worker: one that hangs is ended in time, one that crashes is told, and both times another process goes on") {
  IsolatedDevice device = scripted();
  const auto begin = std::chrono::steady_clock::now();
  const CheckedCandidate hanging = device.check(candidate(24), 1.0);
  REQUIRE(hanging.fault);
  CHECK(hanging.fault->outcome == Outcome::kTimedOut);
  CHECK(std::chrono::steady_clock::now() - begin < std::chrono::seconds(20));
  CHECK_FALSE(device.check(candidate(16), 20).fault);
  CHECK(device.times_started() == 2);

  const TimedBurst crashed = device.time(candidate(32), 5, 20);
  REQUIRE(crashed.fault);
  CHECK(crashed.fault->outcome == Outcome::kCrashed);
  CHECK(crashed.fault->reason == Containing{"signal 11"});
  CHECK(crashed.fault->reason == Containing{"last words"});
  const CheckedCandidate ended = device.check(candidate(40), 20);
  REQUIRE(ended.fault);
  CHECK(ended.fault->reason == Containing{"ended with status 3"});
  CHECK_FALSE(device.time(candidate(16), 5, 20).fault);
  CHECK(device.times_started() == 4);
  CHECK(device.figures().gigabytes == 240);
}

TEST_CASE("worker: a process that cannot measure at all is an error, in its own words") {
  IsolatedDevice full = scripted("read -r line; echo '{\"error\":\"the card is full\"}'; read -r line");
  CHECK(words_of([&] { full.check(candidate(16), 20); }) == "the card is full");
  IsolatedDevice ends = scripted("echo 'no such device' >&2; exit 7");
  CHECK(words_of([&] { ends.check(candidate(16), 20); }) == Containing{"ended with status 7: no such device"});
  IsolatedDevice babbles = scripted("read -r line; echo 'hello'; read -r line");
  CHECK(words_of([&] { babbles.check(candidate(16), 20); }) == Containing{"answered 'hello'"});
  IsolatedDevice missing({"/no/such/program"}, {attention(), 0, {}, false, {}});
  CHECK(words_of([&] { missing.check(candidate(16), 20); }) == Containing{"cannot be started"});
  IsolatedDevice slow = scripted("exec sleep 100");
  const CheckedCandidate checked = slow.check(candidate(16), 0.3);
  REQUIRE(checked.fault);
  CHECK(checked.fault->outcome == Outcome::kTimedOut);
}

TEST_CASE("worker: the other side gets the setup, each kernel once and whole, and answers until it is broken") {
  std::string bytes;
  for (int i = 0; i < 256; ++i) bytes += static_cast<char>(i);
  WorkerSetup setup{
      attention(),           2, {candidate(8, "forward"), std::nullopt}, true, candidate(8, "peak").kernel,
      candidate(0, "behind")};
  std::istringstream in(setup_line(setup) + "\n" + check_line(candidate(16, bytes), true) + "\n" +
                        time_line(candidate(16), false, 4) + "\n" + check_line(candidate(24), true) + "\n" +
                        check_line(candidate(16), false) + "\n");
  std::ostringstream out;
  std::vector<CompiledCandidate> given;
  std::optional<WorkerSetup> seen;
  serve_tuning(in, out, [&](const WorkerSetup& asked) {
    seen = asked;
    return std::make_unique<PlayedWorker>(given);
  });
  REQUIRE(seen);
  CHECK(seen->attention == setup.attention);
  CHECK(seen->device == 2);
  CHECK(seen->measures_memory);
  CHECK(seen->tensor_kernel.value().image == "peak");
  CHECK(seen->earlier.forward.value().kernel.value().image == "forward");
  CHECK_FALSE(seen->earlier.preprocess);
  CHECK(seen->combine.value().tile == candidate(0).tile);
  CHECK(seen->combine->kernel.value().image == "behind");
  REQUIRE(given.size() == 3);
  CHECK(given[0].kernel.value().image == bytes);
  CHECK(given[0].kernel->entry == "entry16");
  CHECK(given[0].kernel->dynamic_smem == 50000);
  CHECK(given[1].kernel.value().image == bytes);

  std::istringstream replies(out.str());
  std::vector<WorkerReply> parsed;
  for (std::string line; std::getline(replies, line);) parsed.push_back(parse_reply(line));
  REQUIRE(parsed.size() == 4);  // nothing after it broke
  CHECK(parsed[0].figures.power_limit_watts == 70);
  CHECK(parsed[0].figures.gigabytes == 300);
  CHECK(parsed[0].figures.tflops == 60);
  CHECK(parsed[0].figures.unknown_state == "no NVML here");
  CHECK(parsed[1].checked.error == 0.25);
  CHECK(parsed[1].checked.blocks_per_multiprocessor == 3);
  CHECK(parsed[2].burst.sample.seconds == 2);
  CHECK(parsed[2].burst.sample.throttled_by == std::vector<std::string>{"hw_slowdown"});
  CHECK(parsed[3].is_broken);
  CHECK(parsed[3].checked.fault.value().outcome == Outcome::kLaunchFailed);
}

TEST_CASE("worker: what is no question is answered with an error") {
  for (const char* line : {"{", "{\"do\":\"dance\"}", "{\"do\":\"check\"}", "[]", "{\"do\":\"setup\"}"}) {
    CAPTURE(line);
    std::istringstream in(std::string(line) + "\n");
    std::ostringstream out;
    std::vector<CompiledCandidate> given;
    serve_tuning(in, out, [&](const WorkerSetup&) { return std::make_unique<PlayedWorker>(given); });
    CHECK_FALSE(parse_reply(out.str()).error.empty());
  }
}

TEST_CASE("candidates compile side by side while others are measured, and what nobody wants is forgotten") {
  std::atomic<int> under_way = 0, most = 0;
  std::atomic<bool> go = false;
  ThreadCompiler compiler(3, [&](const KernelSpec& spec) {
    const int now = ++under_way;
    for (int seen = most; now > seen && !most.compare_exchange_weak(seen, now);) {
    }
    while (!go) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    --under_way;
    if (spec.tile.block_n == 24) throw Error("refused");
    CompiledKernel kernel;
    kernel.threads = spec.tile.block_n;
    return kernel;
  });
  CHECK(compiler.most_at_once() == 3);
  KernelSpec spec = attention().spec;
  for (const int n : {8, 16, 24}) {
    spec.tile = candidate(n).tile;
    compiler.start(spec);
  }
  CHECK_FALSE(compiler.next(0));
  for (int i = 0; i < 5000 && most < 3; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  CHECK(most == 3);
  go = true;
  int right = 0;
  for (int i = 0; i < 3; ++i) {
    const auto compiled = compiler.next(20);
    REQUIRE(compiled);
    if (compiled->tile.block_n == 24) {
      CHECK(compiled->failure == "refused");
    } else {
      ++right;
      CHECK(compiled->kernel.value().threads == compiled->tile.block_n);
    }
  }
  CHECK(right == 2);
  go = false;
  compiler.start(spec);
  while (under_way == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  compiler.forget();
  go = true;
  CHECK_FALSE(compiler.next(0.2));
}
