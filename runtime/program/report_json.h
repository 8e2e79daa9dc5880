// The report as JSON and as CSV.
#pragma once

#include <nlohmann/json.hpp>

#include "runtime/tuner/report_data.h"

namespace flash_attn_jit::program {

nlohmann::ordered_json row_json(const ReportRow& row);
nlohmann::ordered_json compared_json(const ComparedClass& compared);

// Of arrays of these: a line for each.
void print_report_csv(const nlohmann::ordered_json& rows);
void print_comparison_csv(const nlohmann::ordered_json& classes);

}  // namespace flash_attn_jit::program
