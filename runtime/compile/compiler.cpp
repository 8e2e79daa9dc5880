#include "runtime/compile/compiler.h"

#include <charconv>
#include <chrono>
#include <optional>

namespace flash_attn_jit {
namespace {

// The number in front of `words`, as in "1704 bytes stack frame".
std::optional<int> number_before(std::string_view log, std::string_view words) {
  const std::size_t at = log.find(words);
  if (at == std::string_view::npos) return std::nullopt;
  const std::size_t before = log.find_last_not_of("0123456789", at - 1);
  const std::size_t start = before == std::string_view::npos ? 0 : before + 1;
  int number = 0;
  if (std::from_chars(log.data() + start, log.data() + at, number).ec != std::errc()) return std::nullopt;
  return number;
}

}  // namespace

std::vector<std::string> compile_options(const CompileTarget& target) {
  // The templates' constexpr functions are plain C++, which the interpreter's compiler takes as they are.
  std::vector<std::string> options = {"--gpu-architecture=" + target.text(), "--std=c++17",
                                      "--device-as-default-execution-space"};
  if (target.code == CodeKind::kCubin) options.push_back("--ptxas-options=-v");
  return options;
}

std::vector<std::string> nvrtc_options(const CompileTarget& target, const NvrtcVersion& version) {
  std::vector<std::string> options = compile_options(target);
  // NVRTC keeps a cache of its own, in a folder that is not ours, from 12.9 on (older ones refuse the option); what
  // comes from it has an empty log, which does not tell registers and spills. Not part of the kernel's key.
  if (version >= NvrtcVersion{12, 9}) options.push_back("--no-cache");
  return options;
}

std::string joined(const std::vector<std::string>& options) {
  std::string text;
  for (const std::string& option : options) text += (text.empty() ? "" : " ") + option;
  return text;
}

KernelResources parse_ptxas_log(std::string_view log) {
  // Static shared memory is named only where there is some.
  return {number_before(log, " registers"), number_before(log, " bytes smem").value_or(0),
          number_before(log, " bytes spill stores"), number_before(log, " bytes spill loads")};
}

CompiledKernel compile_with(const Nvrtc& nvrtc, const RenderedKernel& rendered, const CompileTarget& target) {
  const auto start = std::chrono::steady_clock::now();
  const std::vector<std::string> options = nvrtc_options(target, nvrtc.version());
  NvrtcResult result = nvrtc.compile(rendered.source, rendered.entry + ".cu", options, target.code);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  if (!result.succeeded) throw NvrtcFailure(result.status, std::move(result.log));

  CompiledKernel kernel;
  kernel.image = std::move(result.image);
  set_launch_shape(kernel, rendered);
  if (target.code == CodeKind::kCubin) kernel.resources = parse_ptxas_log(result.log);
  kernel.built_by = "nvrtc " + nvrtc.version().text();
  kernel.min_driver =
      target.code == CodeKind::kPtx ? nvrtc.version().as_driver_version() : nvrtc.version().major * 1000;
  kernel.log = std::move(result.log);
  kernel.seconds = seconds.count();
  return kernel;
}

}  // namespace flash_attn_jit
