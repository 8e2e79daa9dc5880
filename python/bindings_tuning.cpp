#include "python/bindings_tuning.h"

#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "runtime/cuda/nvrtc_choice.h"
#include "runtime/launch/autotune.h"
#include "runtime/launch/process.h"
#include "runtime/launch/tune_session.h"
#include "runtime/launch/tune_worker.h"
#include "runtime/system/errors.h"
#include "runtime/system/interrupt.h"
#include "runtime/system/log.h"
#include "runtime/tuner/presets.h"

namespace py = pybind11;

namespace flash_attn_jit::bindings {
namespace {

std::string own_name(std::string_view name) { return std::string(name); }

std::string json_array(const std::vector<TunedProblem>& problems) {
  std::string text = "[";
  for (const TunedProblem& problem : problems) {
    if (text.size() > 1) text += ",";
    text += outcome_json(problem, /*with_record=*/true);
  }
  return text + "]";
}

std::string driver_text() {
  if (process_driver() == nullptr) throw DriverError(process_driver_absence());
  return driver_version_text(process_driver()->version());
}

// Ctrl-C reaches Python once what was measured is kept.
std::string tune_problems(const ProblemChoice& choice, int ordinal, double budget_seconds, bool afresh,
                          const std::vector<std::string>& worker_command) {
  const std::vector<AttentionCase> asked = problems_of(choice, own_name);
  refuse_offline(config());
  flash_attn_jit::Device& device = process_devices().device(ordinal);
  TuneSettings settings;
  settings.worker_command = worker_command;
  settings.driver = driver_text();
  settings.budget_seconds = budget_seconds;
  settings.afresh = afresh;
  settings.tuned = [](const TunedProblem& tuned) { log(LogLevel::kInfo, "tune(): " + outcome_text(tuned)); };
  const std::vector<AttentionCase> cases = one_of_each_class(asked, device.info().multiprocessors);
  std::vector<TunedProblem> tuned = tune(device, process_tuning(), cases, settings);
  if (!tuned.empty() && tuned.back().result.interrupted) throw Interrupted();
  for (std::size_t i = tuned.size(); i < cases.size(); ++i) {
    tuned.push_back({cases[i], {}});
    tuned.back().result.reason = "budget_seconds was spent before it";
  }
  return json_array(tuned);
}

ProblemChoice choice_of(const std::string& preset, const std::vector<int>& head_dims,
                        const std::vector<int>& group_sizes, const std::vector<bool>& causal, int num_heads,
                        const std::vector<int>& seqlens, const std::vector<int>& batches,
                        const std::vector<std::string>& kinds) {
  ProblemChoice choice{preset, head_dims, group_sizes, false, false, num_heads, seqlens, batches, kinds};
  for (const bool is_causal : causal) (is_causal ? choice.causal : choice.full) = true;
  return choice;
}

void begin_autotune(double budget_seconds, double seconds_each, const std::vector<std::string>& worker_command) {
  refuse_offline(config());
  AutotuneSettings settings;
  settings.worker_command = worker_command;
  // Where there is no driver nothing is met that could be tuned.
  if (process_driver() != nullptr) settings.driver = driver_text();
  settings.budget_seconds = budget_seconds;
  settings.seconds_each = seconds_each;
  process_autotuner().begin(std::move(settings));
}

}  // namespace

void bind_tuning(py::module_& module) {
  using WithoutGil = py::call_guard<py::gil_scoped_release>;
  module.def(
      "tune",
      [](const std::string& preset, const std::vector<int>& head_dims, const std::vector<int>& gqa,
         const std::vector<bool>& causal, int heads, const std::vector<int>& seqlens, const std::vector<int>& batch,
         const std::vector<std::string>& kinds, double budget_seconds, int device, bool afresh,
         const std::vector<std::string>& worker_command) {
        return tune_problems(choice_of(preset, head_dims, gqa, causal, heads, seqlens, batch, kinds), device,
                             budget_seconds, afresh, worker_command);
      },
      py::arg("preset"), py::arg("head_dims"), py::arg("gqa"), py::arg("causal"), py::arg("heads"), py::arg("seqlens"),
      py::arg("batch"), py::arg("kinds"), py::arg("budget_seconds"), py::arg("device"), py::arg("afresh"),
      py::arg("worker_command"), WithoutGil());
  module.def("begin_autotune", &begin_autotune, py::arg("budget_seconds"), py::arg("seconds_each"),
             py::arg("worker_command"), WithoutGil());
  module.def("autotune_found", [] { return json_array(process_autotuner().found()); }, WithoutGil());
  module.def("end_autotune", [] { return json_array(process_autotuner().end()); }, WithoutGil());
  module.def("run_tune_worker", &run_tune_worker, WithoutGil());
}

}  // namespace flash_attn_jit::bindings
