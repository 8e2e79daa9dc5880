#include "runtime/launch/tuned_problem.h"

#include <cstdio>
#include <utility>

#include "runtime/tuner/record_json.h"

namespace flash_attn_jit {

std::string problem_text(const AttentionCase& attention) {
  return ProblemClass{.spec = attention.spec}.kernel() + ", batch " + std::to_string(attention.batch) + ", " +
         std::to_string(attention.num_heads) + " heads, " + std::to_string(attention.seqlen_q) + " x " +
         std::to_string(attention.seqlen_k);
}

std::string outcome_text(const TunedProblem& tuned) {
  const std::string name = problem_text(tuned.attention);
  if (!tuned.result.record) return name + ": " + tuned.result.reason;
  const TuningRecord& record = *tuned.result.record;
  std::string text = name + ": " + record.winner.text();
  if (const Candidate* winner = record.candidate(record.winner); winner != nullptr && winner->median_seconds) {
    char time[48];
    std::snprintf(time, sizeof time, ", %.4g ms", *winner->median_seconds * 1e3);
    text += time;
  }
  text += " (" + record.rule + ")";
  return tuned.result.newly_measured == 0 ? text + ", known" : text;
}

std::string outcome_json(const TunedProblem& tuned, bool with_record) {
  using Json = nlohmann::ordered_json;
  const AttentionCase& attention = tuned.attention;
  Json json = {{"kernel", ProblemClass{.spec = attention.spec}.kernel()},
               {"batch", attention.batch},
               {"num_heads", attention.num_heads},
               {"num_heads_k", attention.num_heads_k},
               {"seqlen_q", attention.seqlen_q},
               {"seqlen_k", attention.seqlen_k},
               {"class", nullptr},
               {"default", nullptr},
               {"winner", nullptr},
               {"winner_seconds", nullptr},
               {"default_seconds", nullptr},
               {"rule", tuned.result.reason},
               {"settled", tuned.result.settled},
               {"newly_measured", tuned.result.newly_measured},
               {"candidates", 0}};
  if (with_record) json["record"] = tuned.result.record ? record_json(*tuned.result.record) : Json();
  if (tuned.result.record) {
    const TuningRecord& record = *tuned.result.record;
    json["class"] = record.key.problem.text();
    json["default"] = record.default_tile.text();
    json["winner"] = record.winner.text();
    json["rule"] = record.rule;
    json["candidates"] = record.candidates.size();
    for (const auto& [key, tile] :
         {std::pair("winner_seconds", record.winner), {"default_seconds", record.default_tile}})
      if (const Candidate* candidate = record.candidate(tile); candidate != nullptr && candidate->median_seconds)
        json[key] = *candidate->median_seconds;
  }
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

}  // namespace flash_attn_jit
