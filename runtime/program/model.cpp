// flash-attn-jit model: how fast a kernel runs on a Turing card, predicted from its machine code.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <iostream>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "generator/families/families.h"
#include "generator/tile_chooser.h"
#include "runtime/library/templates_folder.h"
#include "runtime/model/kernel_model.h"
#include "runtime/model/problem_model.h"
#include "runtime/program/command.h"
#include "runtime/program/flag_values.h"
#include "runtime/program/fresh_kernel.h"
#include "runtime/system/config.h"
#include "runtime/tuner/template_digest.h"

namespace flash_attn_jit::program {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::int64_t kMostSize = std::int64_t{1} << 24;

struct ModelFlags {
  KernelFlags kernel;
  std::string gpu = "t4";
  std::string batch, heads, seqlen_q, seqlen_k, window, bias_batch, bias_heads;
  std::string profile;
  std::string nvrtc;
  bool json = false;
};

struct Prediction {
  std::string templates;  // their digest, as a tuning record has it
  KernelSpec spec;
  const Card* card = nullptr;
  CompiledKernel kernel;
  int registers = 0, blocks = 0;
  std::optional<LoopPrediction> loop;
  std::vector<BlockCost> costs;
  std::optional<ProblemPrediction> problem;
};

const Card& parse_card(const std::string& text) {
  try {
    return find_card(text);
  } catch (const UnsupportedError& error) {
    throw UsageError("--gpu is '" + text + "'; accepted: " + error.refusal->accepted);
  }
}

// What the kernel is asked for, whether or not its kind reads it.
bool asks_for_bias(const KernelFlags& flags) {
  FeatureSet features;
  for (std::size_t i = 0; i < kFeatures.size(); ++i) features.set(kFeatures[i].feature, flags.features[i]);
  return features.read_pairs();
}

// How many of `size` an attn_bias tells apart: all, or it is broadcast.
std::int64_t parse_broadcast(const char* flag, const std::string& text, std::int64_t size) {
  if (text.empty()) return size;
  const std::int64_t number = parse_number(flag, text, 1, kMostSize);
  if (number != 1 && number != size)
    throw UsageError(std::string(flag) + " is " + text + "; accepted: 1, or as many as the problem has, " +
                     std::to_string(size));
  return number;
}

std::optional<ProblemSize> parse_size(const ModelFlags& flags, const KernelSpec& spec) {
  const std::pair<const char*, const std::string&> given[] = {{"--batch", flags.batch},
                                                              {"--heads", flags.heads},
                                                              {"--seqlen-q", flags.seqlen_q},
                                                              {"--seqlen-k", flags.seqlen_k}};
  if (std::ranges::all_of(given, [](const auto& flag) { return flag.second.empty(); })) {
    if (!flags.window.empty())
      throw UsageError("--window-size is given without a problem; accepted with it: --seqlen-q N");
    for (const auto& [flag, text] : {std::pair("--bias-batch", flags.bias_batch), {"--bias-heads", flags.bias_heads}})
      if (!text.empty())
        throw UsageError(std::string(flag) + " is given without a problem; accepted with it: --seqlen-q N");
    return std::nullopt;
  }
  const auto number = [](const char* flag, const std::string& text, std::int64_t otherwise) {
    return text.empty() ? otherwise : parse_number(flag, text, 1, kMostSize);
  };
  if (flags.seqlen_q.empty())
    throw UsageError("--seqlen-q is missing; accepted with a problem's other sizes: a length");
  if (family_of(spec.kind).results.cache && !flags.seqlen_k.empty())
    throw UsageError("--seqlen-k is given with --kind " + std::string(to_text(spec.kind)) +
                     ", whose time does not depend on how long a cache is; accepted: --seqlen-q, the new rows");
  ProblemSize size;
  size.batch = number("--batch", flags.batch, 1);
  size.num_heads = number("--heads", flags.heads, spec.group_size);
  size.seqlen_q = number("--seqlen-q", flags.seqlen_q, 1);
  size.seqlen_k = number("--seqlen-k", flags.seqlen_k, size.seqlen_q);
  const auto group = parse_number("--gqa", flags.kernel.gqa, 1, kMostSize);
  if (size.num_heads % group != 0)
    throw UsageError("--heads is " + std::to_string(size.num_heads) + "; accepted: a multiple of --gqa, " +
                     flags.kernel.gqa);
  size.num_heads_k = size.num_heads / group;
  if (flags.kernel.window) {
    if (flags.window.empty())
      throw UsageError("--window-size is missing: a problem with a window has one; accepted: keys on each side");
    size.window_left = size.window_right = parse_number("--window-size", flags.window, 0, kMostSize);
  } else if (!flags.window.empty()) {
    throw UsageError("--window-size is given without --window; accepted: both or neither");
  }
  if (asks_for_bias(flags.kernel)) {
    size.bias_heads = parse_broadcast("--bias-batch", flags.bias_batch, size.batch) *
                      parse_broadcast("--bias-heads", flags.bias_heads, size.num_heads);
  } else if (!flags.bias_batch.empty() || !flags.bias_heads.empty()) {
    throw UsageError(std::string(flags.bias_batch.empty() ? "--bias-heads" : "--bias-batch") +
                     " is given without an attn_bias; accepted with it: --bias16, --bias32 or --boolmask");
  }
  return size;
}

// That the library takes for the problem where nothing is measured.
TileConfig chosen_tile(const KernelSpec& spec, const ProblemSize& size, const Card& card) {
  return default_tile_chooser().choose(spec, {size.seqlen_q, size.seqlen_k, size.batch * size.num_heads,
                                              card.multiprocessors, size.window_left + size.window_right + 1});
}

// `spec` has the tile that is given, or the one with the most rows.
void require_rows(const KernelSpec& spec, const ProblemSize& size) {
  if (has_rows(spec, spec.tile, size.seqlen_k)) return;
  const std::string rows = std::to_string(spec.tile.block_m);
  throw UsageError("--seqlen-k is " + std::to_string(size.seqlen_k) + ", and --tile '" + spec.tile.text() +
                   "' of --kind " + std::string(to_text(spec.kind)) + " has " + rows +
                   " keys a block; accepted: 1 to " + rows);
}

Prediction predict_all(const ModelFlags& flags) {
  Prediction prediction;
  prediction.spec = parse_kernel(flags.kernel, arch_limits(kOldestSm));
  prediction.card = &parse_card(flags.gpu);
  const std::optional<ProblemSize> size = parse_size(flags, prediction.spec);
  if (size) require_rows(prediction.spec, *size);
  if (size && flags.kernel.tile == KernelFlags().tile)
    prediction.spec.tile = chosen_tile(prediction.spec, *size, *prediction.card);
  const Config settings = config_with_nvrtc("--nvrtc", flags.nvrtc);
  prediction.templates = template_digest(prediction.spec.kind, load_templates(settings));
  FreshKernel fresh = compile_afresh(prediction.spec, {.sm = kOldestSm, .code = CodeKind::kCubin}, settings);
  prediction.kernel = std::move(fresh.kernel);
  const KernelModel model(prediction.kernel, fresh.rendered.useful_mma, *prediction.card);
  prediction.registers = model.registers();
  prediction.blocks = model.blocks_per_multiprocessor();
  prediction.loop = model.loop(!flags.profile.empty());
  prediction.costs = model.costs();
  if (size) prediction.problem = predict(prediction.spec, *size, prediction.costs, *prediction.card);
  return prediction;
}

// What each pipe is busy for, of those that anything goes through, and the load/store unit and the issue slots.
std::vector<std::pair<std::string, double>> loads_of(const Usage& usage) {
  std::vector<std::pair<std::string, double>> loads;
  for (int i = 0; i < kPipes; ++i)
    if (usage.busy[static_cast<std::size_t>(i)] > 0 && static_cast<Pipe>(i) != Pipe::kMemory)
      loads.emplace_back(to_text(static_cast<Pipe>(i)), usage.busy[static_cast<std::size_t>(i)]);
  loads.emplace_back("lsu", usage.load_store);
  loads.emplace_back("issue", usage.issue);
  std::ranges::stable_sort(loads, [](const auto& a, const auto& b) { return a.second > b.second; });
  return loads;
}

struct Wait {
  std::uint32_t address;
  std::string reason;
  double share;
};

std::vector<Wait> longest_waits(const Waits& waits, std::size_t count) {
  double all = 0;
  for (const auto& [where, cycles] : waits) all += static_cast<double>(cycles);
  std::vector<Wait> longest;
  for (const auto& [where, cycles] : waits)
    longest.push_back({where.first, where.second, static_cast<double>(cycles) / all});
  std::ranges::stable_sort(longest, [](const Wait& a, const Wait& b) { return a.share > b.share; });
  longest.resize(std::min(count, longest.size()));
  return longest;
}

std::map<std::string, double> waits_by_reason(const Waits& waits) {
  double all = 0;
  std::map<std::string, double> shares;
  for (const auto& [where, cycles] : waits) all += static_cast<double>(cycles);
  for (const auto& [where, cycles] : waits) shares[where.second] += static_cast<double>(cycles) / all;
  return shares;
}

double rounded(double value, double unit) { return std::round(value / unit) * unit; }

Json loop_json(const LoopPrediction& loop, std::size_t waits) {
  Json json = {{"instructions", loop.instructions},
               {"tensor_instructions", loop.tensor_instructions},
               {"spill_instructions", loop.spill_instructions},
               {"code_bytes", loop.code_bytes},
               {"cycles", loop.usage.cycles},
               {"lowest", loop.lowest},
               {"highest", loop.highest}};
  if (waits == 0) return json;
  Json& profile = json["waits"] = Json::array();
  for (const auto& [address, reason, share] : longest_waits(loop.waits, waits))
    profile.push_back({{"address", address}, {"reason", reason}, {"share", share}});
  json["waits_by_reason"] = waits_by_reason(loop.waits);
  return json;
}

// What decides how long the problem takes: DRAM, or what is busiest in the kernel.
std::string limit_of(const Prediction& prediction) {
  if (prediction.problem->is_bound_by_dram()) return "dram";
  return prediction.loop ? prediction.loop->limit : "latency";
}

Json problem_json(const Prediction& prediction) {
  const ProblemPrediction& problem = *prediction.problem;
  return {{"blocks", problem.blocks},
          {"waves", problem.waves},
          {"iterations", problem.iterations},
          {"masked_iterations", problem.masked_iterations},
          {"cycles", problem.cycles},
          {"limit", limit_of(prediction)},
          {"dram_seconds", problem.dram_seconds},
          {"copy_seconds", problem.copy_seconds},
          {"share_of_copies", problem.share_of_copies()},
          {"useful_flops", problem.useful_flops},
          {"share_of_peak", problem.share_of_peak}};
}

Json prediction_json(const Prediction& prediction, std::size_t waits) {
  const Card& card = *prediction.card;
  const auto number = [](const std::optional<int>& value) { return value ? Json(*value) : Json(); };
  const Json copied = card.copied_bytes_per_second > 0 ? Json(card.copied_bytes_per_second) : Json();
  Json json = {{"predicted", true},
               {"kernel", prediction.spec.text()},
               {"tile", prediction.spec.tile.text()},
               {"built_by", prediction.kernel.built_by},
               {"templates", prediction.templates},
               {"card",
                {{"name", card.name},
                 {"multiprocessors", card.multiprocessors},
                 {"boost_mhz", card.boost_mhz},
                 {"sustained_mhz", card.sustained_mhz},
                 {"dram_bytes_per_second", card.dram_bytes_per_second},
                 {"copied_bytes_per_second", copied}}},
               {"threads", prediction.kernel.threads},
               {"registers", prediction.registers},
               {"spill_stores", number(prediction.kernel.resources.spill_stores)},
               {"spill_loads", number(prediction.kernel.resources.spill_loads)},
               {"static_smem", prediction.kernel.resources.static_smem},
               {"dynamic_smem", prediction.kernel.dynamic_smem},
               {"blocks_per_multiprocessor", prediction.blocks}};
  if (prediction.loop) {
    json["useful"] = prediction.loop->useful;
    json["useful_under_stress"] = prediction.loop->under_stress;
    json["limit"] = prediction.loop->limit;
    for (const auto& [pipe, share] : loads_of(prediction.loop->usage)) json["pipes"][pipe] = share;
    json["loop"] = loop_json(*prediction.loop, waits);
  }
  Json& costs = json["cycles_of_a_block"] = Json::array();
  for (const BlockCost& cost : prediction.costs)
    costs.push_back({{"block", rounded(cost.block, 1)},
                     {"iteration", rounded(cost.iteration, 1)},
                     {"masked_iteration", rounded(cost.masked_iteration, 1)}});
  if (!prediction.problem) return json;
  json["problem"] = problem_json(prediction);
  json["seconds"] = prediction.problem->seconds;
  json["seconds_at_boost"] = prediction.problem->seconds_at_boost;
  return json;
}

void print_loop(const LoopPrediction& loop, std::size_t waits) {
  std::printf("  main loop: %d instructions, %d of tensor cores, %d of spills; %.1f KiB of code, %.0f cycles\n",
              loop.instructions, loop.tensor_instructions, loop.spill_instructions, loop.code_bytes / 1024.0,
              loop.usage.cycles);
  std::printf("  useful share of the tensor cores' peak: %.3f; %.3f with longer latencies", loop.useful,
              loop.under_stress);
  if (loop.lowest < loop.highest) std::printf("; %.3f to %.3f busy, by how blocks start", loop.lowest, loop.highest);
  std::printf("\n  busy:");
  for (const auto& [pipe, share] : loads_of(loop.usage)) std::printf(" %s %.3f", pipe.c_str(), share);
  std::printf("; limited by %s\n", loop.limit.c_str());
  if (waits == 0) return;
  std::printf("  warps wait for:");
  for (const auto& [reason, share] : waits_by_reason(loop.waits))
    std::printf(" %s %.0f %%", reason.c_str(), 100 * share);
  std::printf("\n");
  for (const auto& [address, reason, share] : longest_waits(loop.waits, waits))
    std::printf("  %5.1f %% at 0x%04x: %s\n", 100 * share, address, reason.c_str());
}

void print_dram(const ProblemPrediction& problem, const Card& card) {
  std::printf("  DRAM alone takes %.4g ms at its nominal %.0f GB/s", problem.dram_seconds * 1e3,
              card.dram_bytes_per_second / 1e9);
  if (card.copied_bytes_per_second > 0)
    std::printf(", %.4g ms at the %.0f that copies get: %.3f of the time", problem.copy_seconds * 1e3,
                card.copied_bytes_per_second / 1e9, problem.share_of_copies());
  std::printf("\n");
}

void print_problem(const Prediction& prediction) {
  const ProblemPrediction& problem = *prediction.problem;
  const Card& card = *prediction.card;
  std::printf("  problem: %lld blocks in %.2f waves, %.1f iterations a block and %.1f that the mask cuts\n",
              static_cast<long long>(problem.blocks), problem.waves, problem.iterations, problem.masked_iterations);
  const auto line = [&](double seconds, double mhz) {
    std::printf("  %.4g ms at %.0f MHz", seconds * 1e3, mhz);
    if (problem.useful_flops > 0) std::printf(", %.1f TFLOP/s", problem.useful_flops / seconds / 1e12);
    std::printf("\n");
  };
  line(problem.seconds, card.sustained_mhz);
  if (card.boost_mhz != card.sustained_mhz) line(problem.seconds_at_boost, card.boost_mhz);
  std::printf("  %.3f of the tensor cores' peak; limited by %s, without DRAM %.4g ms\n", problem.share_of_peak,
              limit_of(prediction).c_str(), problem.cycles / card.sustained_mhz / 1e3);
  print_dram(problem, card);
}

void print(const Prediction& prediction, std::size_t waits) {
  std::printf("%s\non a %s, predicted: %d registers, %d block%s a multiprocessor\n", prediction.spec.text().c_str(),
              std::string(prediction.card->name).c_str(), prediction.registers, prediction.blocks,
              prediction.blocks == 1 ? "" : "s");
  if (prediction.loop) print_loop(*prediction.loop, waits);
  for (std::size_t i = 0; i < prediction.costs.size(); ++i)
    std::printf("  a block of %zu: %.0f cycles, %.0f an iteration, %.0f one that the mask cuts\n", i + 1,
                prediction.costs[i].block, prediction.costs[i].iteration, prediction.costs[i].masked_iteration);
  if (prediction.problem) print_problem(prediction);
}

int run_model(const ModelFlags& flags) {
  const std::size_t waits =
      flags.profile.empty() ? 0 : static_cast<std::size_t>(parse_number("--profile", flags.profile, 1, 10'000));
  const Prediction prediction = predict_all(flags);
  if (flags.json)
    std::cout << json_text(prediction_json(prediction, waits)) << "\n";
  else
    print(prediction, waits);
  return kSuccess;
}

std::string card_words() {
  std::string words;
  for (const Card& card : cards()) words += (words.empty() ? "" : ", ") + std::string(card.word);
  return words;
}

}  // namespace

void add_model(CLI::App& app, Action& chosen) {
  CLI::App* const command =
      app.add_subcommand("model", "Predict how fast a kernel, or a whole problem, runs on a Turing card; needs no GPU");
  const auto flags = std::make_shared<ModelFlags>();
  add_kernel_flags(*command, flags->kernel, "for the problem, where one is given, else for large ones");
  command->add_option("--gpu", flags->gpu, "The card: " + card_words())->capture_default_str();
  command->add_option("--batch", flags->batch, "Of a whole problem: its batch (default: 1)");
  command->add_option("--heads", flags->heads, "Query heads (default: those of one key head)");
  command->add_option("--seqlen-q", flags->seqlen_q, "Queries of a sequence; its new rows with --kind append");
  command->add_option("--seqlen-k", flags->seqlen_k, "Keys of a sequence (default: as many)");
  command->add_option("--window-size", flags->window, "With --window: keys that a query sees on each side");
  command->add_option("--bias-batch", flags->bias_batch,
                      "Of an attn_bias: 1 where it is the same for all sequences (default: the batch)");
  command->add_option("--bias-heads", flags->bias_heads,
                      "Of an attn_bias: 1 where it is the same for all query heads (default: the heads)");
  command->add_option("--profile", flags->profile, "Also the N instructions that warps wait at longest");
  command->add_option("--nvrtc", flags->nvrtc, "The libnvrtc to compile with, or the folder that has it");
  command->add_flag("--json", flags->json, "Print JSON");
  command->callback([&chosen, flags] { chosen = [flags] { return run_model(*flags); }; });
}

}  // namespace flash_attn_jit::program
