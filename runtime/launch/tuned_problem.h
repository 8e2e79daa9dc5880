// What tuning found for a problem, for people and for programs to read.
#pragma once

#include <string>

#include "runtime/tuner/attention_case.h"
#include "runtime/tuner/search.h"

namespace flash_attn_jit {

struct TunedProblem {
  AttentionCase attention;
  SearchResult result;
};

// "fwd hdim64 fp16 causal gqa1 vec16, batch 4, 16 heads, 1000 x 1000"
std::string problem_text(const AttentionCase& attention);

// A line: the winner, its time and why it won, or why there is none.
std::string outcome_text(const TunedProblem& tuned);

// The same as a JSON object; with the whole record where that is wanted, null where there is none.
std::string outcome_json(const TunedProblem& tuned, bool with_record);

}  // namespace flash_attn_jit
