// The card's model as the tuner asks it.
#include <doctest/doctest.h>

#include <nlohmann/json.hpp>

#include "generator/tile_layout.h"
#include "runtime/model/kernel_model.h"
#include "runtime/model/problem_model.h"
#include "runtime/tuner/card_predictions.h"
#include "temporary_folder.h"

using namespace flash_attn_jit;

namespace {

const std::filesystem::path kKernels = std::filesystem::path(FLASH_ATTN_JIT_SOURCE_DIR) / "tests/data/card_model";

struct KnownKernel {
  KernelSpec spec;
  CompiledKernel kernel;
};

std::vector<KnownKernel> known_kernels() {
  const auto figures = nlohmann::json::parse(testing::read_all(kKernels / "figures.json"));
  std::vector<KnownKernel> kernels;
  for (const auto& facts : figures["kernels"]) {
    KnownKernel known;
    known.spec = KernelSpec::parse(facts["spec"].get<std::string>());
    known.kernel.image = testing::read_all(kKernels / facts["file"].get<std::string>());
    known.kernel.entry = facts["entry"];
    known.kernel.threads = facts["threads"];
    known.kernel.dynamic_smem = facts["dynamic_smem"];
    kernels.push_back(std::move(known));
  }
  return kernels;
}

}  // namespace

TEST_CASE("a device's card: by its name, else like a T4 with its multiprocessors, and none but Turing") {
  CHECK(card_of({"Tesla T4", 75, 40, "native"})->word == "t4");
  CHECK(card_of({"NVIDIA GeForce RTX 2080 Ti", 75, 68, "native"})->mma_interval == 16);
  const auto other = card_of({"Quadro T1000", 75, 14, "native"});
  REQUIRE(other);
  CHECK(other->multiprocessors == 14);
  CHECK(!card_of({"NVIDIA H100 80GB HBM3", 90, 132, "compute_75"}));
}

TEST_CASE("the tuner is told what the model says") {
  const Card card = find_card("t4");
  const CardPredictions predictions(card);
  for (const auto& [spec, kernel] : known_kernels()) {
    CAPTURE(spec.text());
    const auto found = predictions.predict(spec, {1024, 2048, 64, 40, 0}, &kernel);
    REQUIRE(found);
    const KernelModel model(kernel, useful_mma_per_iteration(spec), card);
    const ProblemSize size{.batch = 64, .seqlen_q = 1024, .seqlen_k = 2048};
    CHECK(found->seconds == predict(spec, size, model.costs(), card).seconds);
    CHECK(found->limited_by == model.loop()->limit);
    CHECK(!predictions.predict(spec, {1024, 2048, 64, 40, 0}, nullptr));
  }
}

TEST_CASE("machine code that cannot be read is not predicted") {
  auto [spec, kernel] = known_kernels().front();
  kernel.image = "no cubin";
  CHECK(!CardPredictions(find_card("t4")).predict(spec, {1024, 1024, 64, 40, 0}, &kernel));
}
