// The module flash_attn_jit._core: what the Python package needs of the runtime, and no policy.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include "generator/families/families.h"
#include "generator/kernel_selection.h"
#include "generator/kernel_traffic.h"
#include "generator/legality.h"
#include "python/bindings_append.h"
#include "python/bindings_backward.h"
#include "python/bindings_errors.h"
#include "python/bindings_forward.h"
#include "python/bindings_options.h"
#include "python/bindings_tensors.h"
#include "python/bindings_tuning.h"
#include "runtime/cuda/nvrtc_search.h"
#include "runtime/interpreter/interpreter.h"
#include "runtime/launch/machine_report.h"
#include "runtime/launch/process.h"
#include "runtime/library/pack.h"
#include "runtime/library/user_functions.h"
#include "runtime/request/attention_options.h"
#include "runtime/system/interrupt.h"
#include "runtime/system/log.h"
#include "runtime/tuner/report_data.h"

namespace py = pybind11;
using namespace flash_attn_jit;

namespace {

// Python's logging levels.
int python_level(LogLevel level) { return level == LogLevel::kWarning ? 30 : 20; }

// `logger.log(level, message)` for everything that the library tells. The logger is leaked: a thread may log
// while the interpreter goes down.
void set_logger(const py::object& logger) {
  const auto* log_method = new py::object(logger.attr("log"));
  set_log_sink([log_method](LogLevel level, const std::string& message) {
    if (!Py_IsInitialized()) return;
    const py::gil_scoped_acquire gil;
    // Ctrl-C that was heard and has yet to be raised is no business of the logger's.
    std::optional<py::error_scope> heard;
    if (PyErr_Occurred() != nullptr) heard.emplace();
    try {
      // As an argument of "%s": a message is no format string.
      (*log_method)(python_level(level), "%s", bindings::readable(message));
    } catch (py::error_already_set& error) {
      // Most likely not the logger's own: Python's signal handlers run wherever Python code does, and Ctrl-C must not
      // get lost in here. A thread of ours has no Python code below that could be told.
      if (PyEval_GetFrame() == nullptr || heard) return error.discard_as_unraisable("flash_attn_jit's logger");
      error.restore();
      throw Interrupted();
    }
  });
}

// Python's own signal handlers run here, in the main thread alone. What they raise stays set for the error translator,
// which Interrupted reaches.
bool python_wants_to_stop() {
  if (!Py_IsInitialized()) return false;
  const py::gil_scoped_acquire gil;
  return PyErr_CheckSignals() != 0;
}

py::list devices() {
  std::vector<DeviceInfo> infos;
  Driver* driver = nullptr;
  {
    const py::gil_scoped_release without_gil;
    driver = process_driver();
    for (int i = 0; driver && i < driver->device_count(); ++i) infos.push_back(driver->device_info(i));
  }
  py::list found;
  for (const DeviceInfo& info : infos) {
    py::dict device;
    device["ordinal"] = info.ordinal;
    device["name"] = info.name;
    device["sm"] = info.sm;
    device["multiprocessors"] = info.multiprocessors;
    device["driver_version"] = driver->version();
    found.append(device);
  }
  return found;
}

std::vector<std::string> select_kernel_texts(const std::vector<std::string>& kinds, const std::vector<int>& head_dims,
                                             const std::vector<bool>& causal, const std::vector<int>& group_sizes,
                                             const std::string& arch) {
  KernelSelection selection;
  selection.kinds.clear();
  for (const std::string& kind : kinds) selection.kinds.push_back(parse_kind(kind));
  selection.head_dims = head_dims;
  for (const bool c : causal) selection.masks.push_back(c ? Mask::kCausal : Mask::kNone);
  selection.group_sizes = group_sizes;
  std::vector<std::string> texts;
  for (const KernelSpec& spec : select_kernels(selection, arch_limits(parse_arch(arch)))) texts.push_back(spec.text());
  return texts;
}

// What the report and the demo are told of a kind of kernel.
struct FamilyFacts {
  std::string word;
  int products;
  bool has_tile_costs;
  RowTraffic traffic;
};

std::vector<FamilyFacts> kernel_families() {
  std::vector<FamilyFacts> families;
  for (const KernelKind kind : kKernelKinds)
    families.push_back(
        {std::string(to_text(kind)), family_of(kind).products, family_of(kind).has_tile_costs(), row_traffic(kind)});
  return families;
}

const char* origin_text(KernelOrigin origin) {
  switch (origin) {
    case KernelOrigin::kPrebuilt:
      return "prebuilt";
    case KernelOrigin::kDiskCache:
      return "cache";
    case KernelOrigin::kCompiled:
      return "compiled";
  }
  return "";
}

py::dict describe(const KernelSpec& spec, const FoundKernel& found) {
  const CompiledKernel& kernel = found.kernel;
  py::dict result;
  result["name"] = spec.name();
  result["tile"] = spec.tile.text();
  result["origin"] = origin_text(found.origin);
  result["built_by"] = bindings::readable(kernel.built_by);
  result["threads"] = kernel.threads;
  result["dynamic_smem"] = kernel.dynamic_smem;
  result["registers"] = kernel.resources.registers;
  result["spill_stores"] = kernel.resources.spill_stores;
  result["spill_loads"] = kernel.resources.spill_loads;
  result["seconds"] = kernel.seconds;
  return result;
}

py::dict find_kernel(KernelLibrary& library, const std::string& spec_text, const std::string& arch) {
  const KernelSpec spec = KernelSpec::parse(spec_text);
  const CompileTarget target{parse_arch(arch), CodeKind::kCubin};
  std::optional<FoundKernel> found;
  {
    const py::gil_scoped_release without_gil;
    found = library.find_or_compile(spec, target);
  }
  return describe(spec, *found);
}

void bind_kernel_library(py::module_& module) {
  py::class_<KernelLibrary>(module, "KernelLibrary", "A cache with a compiler behind it.")
      .def("find_or_compile", &find_kernel, py::arg("spec"), py::arg("arch"));
  // What reads or writes files may log, or wait for a thread that does.
  using WithoutGil = py::call_guard<py::gil_scoped_release>;
  using std::filesystem::path;
  module.def("process_library", &process_library, py::return_value_policy::reference, WithoutGil());
  module.def(
      "open_pack_for_writing", [](const path& dir) { return open_pack_for_writing(config(), dir); }, WithoutGil());
  module.def("write_manifest", [](const path& dir) { write_manifest(dir); }, WithoutGil());
}

void bind_kernel_families(py::module_& module) {
  py::class_<FamilyFacts>(module, "KernelFamily", "A kind of kernel: what it multiplies and moves.")
      .def_readonly("word", &FamilyFacts::word)
      .def_readonly("products", &FamilyFacts::products)
      .def_readonly("has_tile_costs", &FamilyFacts::has_tile_costs)
      .def_property_readonly("query_rows", [](const FamilyFacts& facts) { return facts.traffic.query_rows; })
      .def_property_readonly("query_value_rows",
                             [](const FamilyFacts& facts) { return facts.traffic.query_value_rows; })
      .def_property_readonly("key_rows", [](const FamilyFacts& facts) { return facts.traffic.key_rows; })
      .def_property_readonly("value_rows", [](const FamilyFacts& facts) { return facts.traffic.value_rows; })
      .def_property_readonly("query_numbers", [](const FamilyFacts& facts) { return facts.traffic.query_numbers; });
  module.def("kernel_families", &kernel_families);
}

void bind_interpreter_report(py::module_& module) {
  py::class_<AccessCount>(module, "AccessCount",
                          "Shared-memory traffic of one access kind; one count a warp-wide access.")
      .def_readonly("accesses", &AccessCount::accesses, "Warp-wide accesses.")
      .def_readonly("cycles", &AccessCount::cycles, "Cycles that the 32 banks need for them.")
      .def_readonly("ideal_cycles", &AccessCount::ideal_cycles, "Cycles that they would need without conflicts.")
      .def_property_readonly("factor", &AccessCount::factor, "cycles / ideal_cycles.");
  py::class_<InterpreterReport>(module, "InterpreterReport", "What the interpreter saw in one kernel's run.")
      .def_readonly("kernel", &InterpreterReport::kernel, "The kernel's name; empty before the first run.")
      .def_readonly("blocks", &InterpreterReport::blocks, "Thread blocks that ran.")
      .def_readonly("shared", &InterpreterReport::shared, "Access kind -> AccessCount.")
      .def("json", &InterpreterReport::json, "The report as a JSON text.")
      .def("__str__", &InterpreterReport::text)
      .def("__repr__", &InterpreterReport::text);
}

// Limits, and what is accepted in the words of the checks: Python must know of some calls whether they will be refused
// before it makes them.
void bind_limits(py::module_& module) {
  module.attr("most_head_dim") = kMostHeadDim;
  module.attr("most_head_dim_of_gradients") = kMostNarrowHeadDim;
  module.attr("oldest_sm") = kOldestSm;
  module.attr("report_same_within") = kSameWithin;
  py::dict accepted = bindings::accepted_tensors();
  accepted["softmax_scale"] = accepted_scales();
  accepted["head_dim"] = accepted_head_dims();
  accepted["gpu"] = kAcceptedGpu;
  accepted["last_dim"] = kAcceptedLastDim;
  accepted["dtype"] = bindings::kAcceptedDtype;
  accepted["device"] = bindings::kAcceptedDevice;
  accepted["devices"] = bindings::kAcceptedDevices;
  module.attr("accepted") = accepted;
}

std::vector<std::string> loaded_kernels(int ordinal) {
  const py::gil_scoped_release without_gil;
  return process_devices().device(ordinal).loaded();
}

void bind_attention(py::module_& module) {
  module.def("forward", &bindings::forward, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"),
             py::arg("softmax_lse"), py::arg("options"), py::arg("tile") = py::none(), py::arg("user") = py::none());
  module.def("backward", &bindings::backward, py::arg("dout"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"),
             py::arg("softmax_lse"), py::arg("dlse"), py::arg("dq"), py::arg("dk"), py::arg("dv"), py::arg("dbias"),
             py::arg("delta"), py::arg("peaks"), py::arg("options"), py::arg("dkdv_tile") = py::none(),
             py::arg("dq_tile") = py::none(), py::arg("all_keys_tile") = py::none(), py::arg("user") = py::none());
  module.def("keep_user_functions", &keep_user_functions, py::arg("code"));
  module.def("append", &bindings::append, py::arg("k"), py::arg("v"), py::arg("k_cache"), py::arg("v_cache"),
             py::arg("cache_seqlens"), py::arg("block_table"), py::arg("q"), py::arg("q_turned"), py::arg("rotary_cos"),
             py::arg("rotary_sin"), py::arg("interleaved"), py::arg("queries_advance"));
  module.def(
      "refuse_rank",
      [](const char* name, py::handle tensor, bool varlen) {
        bindings::refuse_rank(name, tensor, varlen ? bindings::Layout::kTotal : bindings::Layout::kBatch);
      },
      py::arg("name"), py::arg("tensor"), py::arg("varlen"));
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "The compiled part of flash_attn_jit. Private: use the package's own functions.";
  bindings::register_error_translator();
  set_interrupt_check(&python_wants_to_stop);
  bind_interpreter_report(module);
  bind_kernel_families(module);
  bind_kernel_library(module);

  module.def("connect_torch", &bindings::connect_torch, py::arg("torch"));
  module.def("connect_options", &bindings::connect_options, py::arg("type"));
  module.def("uses_exchange_api", &bindings::uses_exchange_api);
  module.def("set_logger", &set_logger, py::arg("logger"));
  module.def("set_python_search_path", &set_python_search_path);

  bind_attention(module);
  bind_limits(module);
  bindings::bind_tuning(module);
  module.def("interprets", [] { return config().interpret; }, "Whether CPU tensors are run by the interpreter.");
  module.def("refuses_bfloat16", [] { return config().refuses_bfloat16; }, "Whether bfloat16 tensors are an error.");
  module.def("interpreter_report", &last_interpreter_report);
  module.def("devices", &devices);
  module.def("loaded_kernels", &loaded_kernels, py::arg("device"));
  module.def("machine_report_json", &machine_report_json);
  module.def("select_kernels", &select_kernel_texts, py::arg("kinds"), py::arg("head_dims"), py::arg("causal"),
             py::arg("group_sizes"), py::arg("arch"));
}
