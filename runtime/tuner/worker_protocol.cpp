#include "runtime/tuner/worker_protocol.h"

#include <istream>
#include <map>
#include <ostream>

#include <nlohmann/json.hpp>

#include "generator/errors.h"

namespace flash_attn_jit {
namespace {

using Json = nlohmann::json;

// ---- values, to and fro; both sides are this program, so that a bad one is a bug ----

std::string to_hex(const std::string& bytes) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string hex;
  hex.reserve(2 * bytes.size());
  for (const char c : bytes) {
    hex += kDigits[static_cast<unsigned char>(c) >> 4];
    hex += kDigits[static_cast<unsigned char>(c) & 15];
  }
  return hex;
}

std::string from_hex(const std::string& hex) {
  std::string bytes;
  bytes.reserve(hex.size() / 2);
  for (std::size_t i = 0; i + 1 < hex.size(); i += 2)
    bytes += static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16));
  return bytes;
}

template <class Value>
Json optional_json(const std::optional<Value>& value) {
  return value ? Json(*value) : Json();
}

std::optional<double> optional_number(const Json& json) {
  return json.is_null() ? std::nullopt : std::optional(json.get<double>());
}

std::string line_of(const Json& json) { return json.dump(-1, ' ', false, Json::error_handler_t::replace); }

Json kernel_json(const std::optional<CompiledKernel>& kernel) {
  if (!kernel) return nullptr;
  return {{"entry", kernel->entry},
          {"threads", kernel->threads},
          {"dynamic_smem", kernel->dynamic_smem},
          {"image", to_hex(kernel->image)}};
}

std::optional<CompiledKernel> kernel_of(const Json& json) {
  if (json.is_null()) return std::nullopt;
  CompiledKernel kernel;
  kernel.entry = json.at("entry").get<std::string>();
  kernel.threads = json.at("threads").get<int>();
  kernel.dynamic_smem = json.at("dynamic_smem").get<int>();
  kernel.image = from_hex(json.at("image").get<std::string>());
  return kernel;
}

Json candidate_json(const CompiledCandidate& candidate, bool with_kernel) {
  return {{"tile", candidate.tile.text()},
          {"kernel", kernel_json(with_kernel ? candidate.kernel : std::optional<CompiledKernel>())}};
}

CompiledCandidate candidate_of(const Json& json) {
  return {TileConfig::parse(json.at("tile").get<std::string>()), kernel_of(json.at("kernel")), ""};
}

Json whole_candidate_json(const std::optional<CompiledCandidate>& candidate) {
  return candidate ? candidate_json(*candidate, true) : Json();
}

std::optional<CompiledCandidate> whole_candidate_of(const Json& json) {
  return json.is_null() ? std::nullopt : std::optional(candidate_of(json));
}

Json fault_json(const std::optional<CandidateFault>& fault) {
  if (!fault) return nullptr;
  return {{"outcome", to_text(fault->outcome)}, {"reason", fault->reason}};
}

std::optional<CandidateFault> fault_of(const Json& json) {
  if (json.is_null()) return std::nullopt;
  const auto text = json.at("outcome").get<std::string>();
  for (const Outcome outcome : kOutcomes)
    if (text == to_text(outcome)) return CandidateFault{outcome, json.at("reason").get<std::string>()};
  throw Error("outcome is '" + text + "'");
}

WorkerSetup setup_of(const Json& json) {
  const Json& sizes = json.at("sizes");
  const auto size = [&sizes](const char* name) { return sizes.at(name).get<std::int64_t>(); };
  return {{parse_kernel_without_tile(json.at("kernel").get<std::string>()), size("batch"), size("num_heads"),
           size("num_heads_k"), size("seqlen_q"), size("seqlen_k")},
          json.at("device").get<int>(),
          {whole_candidate_of(json.at("forward")), whole_candidate_of(json.at("preprocess"))},
          json.at("measures_memory").get<bool>(),
          kernel_of(json.at("tensor_kernel")),
          whole_candidate_of(json.at("combine"))};
}

Json figures_json(const WorkerFigures& figures) {
  return {{"power_limit_watts", optional_json(figures.power_limit_watts)},
          {"gigabytes", optional_json(figures.gigabytes)},
          {"tflops", optional_json(figures.tflops)},
          {"unknown_state", figures.unknown_state}};
}

Json checked_json(const CheckedCandidate& checked) {
  return {{"fault", fault_json(checked.fault)},
          {"error", optional_json(checked.error)},
          {"error_allowed", optional_json(checked.error_allowed)},
          {"blocks_per_multiprocessor", checked.blocks_per_multiprocessor}};
}

Json burst_json(const TimedBurst& burst) {
  const Sample& sample = burst.sample;
  return {{"fault", fault_json(burst.fault)},
          {"seconds", sample.seconds},
          {"clock_mhz", optional_json(sample.clock_mhz)},
          {"power_watts", optional_json(sample.power_watts)},
          {"temperature_celsius", optional_json(sample.temperature_celsius)},
          {"throttled_by", sample.throttled_by}};
}

// ---- the side that measures ----

class Server {
 public:
  explicit Server(const MakeWorkerDevice& make_device) : make_device_(make_device) {}

  Json answer(const Json& asked) {
    const auto what = asked.at("do").get<std::string>();
    if (what == "setup") {
      const WorkerSetup setup = setup_of(asked);
      device_ = make_device_(setup);
      return {{"figures", figures_json(device_->figures(setup))}};
    }
    if (device_ == nullptr) throw Error("'" + what + "' comes before 'setup'");
    const CompiledCandidate& candidate = kept(candidate_of(asked.at("candidate")));
    Json reply;
    if (what == "check")
      reply["checked"] = checked_json(device_->check(candidate, 0));
    else if (what == "time")
      reply["burst"] = burst_json(device_->time(candidate, asked.at("launches").get<int>(), 0));
    else
      throw Error("'" + what + "' is nothing that is done here");
    reply["is_broken"] = device_->is_broken();
    return reply;
  }

  bool is_broken() const { return device_ != nullptr && device_->is_broken(); }

 private:
  const CompiledCandidate& kept(CompiledCandidate candidate) {
    CompiledCandidate& known = candidates_[candidate.tile];
    if (candidate.kernel) known = std::move(candidate);
    if (!known.kernel) throw Error("tile " + candidate.tile.text() + " comes without its kernel");
    return known;
  }

  const MakeWorkerDevice& make_device_;
  std::unique_ptr<WorkerDevice> device_;
  std::map<TileConfig, CompiledCandidate> candidates_;
};

}  // namespace

std::string setup_line(const WorkerSetup& setup) {
  const AttentionCase& attention = setup.attention;
  return line_of({{"do", "setup"},
                  {"kernel", ProblemClass{.spec = attention.spec}.kernel()},
                  {"sizes",
                   {{"batch", attention.batch},
                    {"num_heads", attention.num_heads},
                    {"num_heads_k", attention.num_heads_k},
                    {"seqlen_q", attention.seqlen_q},
                    {"seqlen_k", attention.seqlen_k}}},
                  {"device", setup.device},
                  {"forward", whole_candidate_json(setup.earlier.forward)},
                  {"preprocess", whole_candidate_json(setup.earlier.preprocess)},
                  {"measures_memory", setup.measures_memory},
                  {"tensor_kernel", kernel_json(setup.tensor_kernel)},
                  {"combine", whole_candidate_json(setup.combine)}});
}

std::string check_line(const CompiledCandidate& candidate, bool with_kernel) {
  return line_of({{"do", "check"}, {"candidate", candidate_json(candidate, with_kernel)}});
}

std::string time_line(const CompiledCandidate& candidate, bool with_kernel, int launches) {
  return line_of({{"do", "time"}, {"candidate", candidate_json(candidate, with_kernel)}, {"launches", launches}});
}

WorkerReply parse_reply(const std::string& line) try {
  const Json json = Json::parse(line);
  WorkerReply reply;
  reply.error = json.value("error", "");
  reply.is_broken = json.value("is_broken", false);
  if (json.contains("figures")) {
    reply.figures.power_limit_watts = optional_number(json["figures"].at("power_limit_watts"));
    reply.figures.gigabytes = optional_number(json["figures"].at("gigabytes"));
    reply.figures.tflops = optional_number(json["figures"].at("tflops"));
    reply.figures.unknown_state = json["figures"].at("unknown_state").get<std::string>();
  }
  if (json.contains("checked")) {
    const Json& checked = json["checked"];
    reply.checked = {fault_of(checked.at("fault")), optional_number(checked.at("error")),
                     optional_number(checked.at("error_allowed")), checked.at("blocks_per_multiprocessor").get<int>()};
  }
  if (json.contains("burst")) {
    const Json& burst = json["burst"];
    reply.burst.fault = fault_of(burst.at("fault"));
    reply.burst.sample.seconds = burst.at("seconds").get<double>();
    reply.burst.sample.clock_mhz = optional_number(burst.at("clock_mhz"));
    reply.burst.sample.power_watts = optional_number(burst.at("power_watts"));
    reply.burst.sample.temperature_celsius = optional_number(burst.at("temperature_celsius"));
    reply.burst.sample.throttled_by = burst.at("throttled_by").get<std::vector<std::string>>();
  }
  return reply;
} catch (const Json::exception& error) {
  throw Error("the process that measures answered '" + line.substr(0, 200) + "': " + error.what());
}

void serve_tuning(std::istream& in, std::ostream& out, const MakeWorkerDevice& make_device) {
  Server server(make_device);
  for (std::string line; !server.is_broken() && std::getline(in, line);) {
    Json reply;
    try {
      reply = server.answer(Json::parse(line));
    } catch (const std::exception& error) {
      reply = {{"error", error.what()}, {"is_broken", true}};
    }
    out << line_of(reply) << std::endl;
  }
}

}  // namespace flash_attn_jit
