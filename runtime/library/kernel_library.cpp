#include "runtime/library/kernel_library.h"

#include <algorithm>

#include "generator/families/families.h"
#include "generator/legality.h"
#include "generator/tile_chooser.h"
#include "runtime/compile/compiler.h"
#include "runtime/compile/slow_compile.h"
#include "runtime/cuda/nvrtc_choice.h"
#include "runtime/library/templates_folder.h"
#include "runtime/library/user_functions.h"
#include "runtime/system/errors.h"

namespace flash_attn_jit {
namespace {

std::string architecture_in_name(CodeKind code, int sm) {
  return (code == CodeKind::kPtx ? "compute" : "sm") + std::to_string(sm);
}

KernelId id_of(const KernelRequest& request, const CompileTarget& target) {
  KernelId id;
  id.key = make_key(
      {{"source", request.rendered.source}, {"options", joined(compile_options(target))}, {"target", target.text()}});
  id.name = request.rendered.entry + "_" + architecture_in_name(target.code, target.sm);
  id.spec = request.text();
  id.target = target.text();
  return id;
}

KernelId id_of_linked(const KernelRequest& request, const LinkTarget& target, int driver_version) {
  const CompileTarget ptx{target.ptx_sm, CodeKind::kPtx};
  const std::string machine = "sm_" + std::to_string(target.device_sm);
  KernelId id;
  id.key = make_key({{"source", request.rendered.source},
                     {"options", joined(compile_options(ptx))},
                     {"target", ptx.text()},
                     {"linked for", machine},
                     {"driver", std::to_string(driver_version)},
                     {"purpose", target.purpose}});
  id.name = request.rendered.entry + "_" + architecture_in_name(CodeKind::kPtx, target.ptx_sm) + "_on_" +
            architecture_in_name(CodeKind::kCubin, target.device_sm);
  id.spec = request.text();
  id.target = ptx.text() + " linked for " + machine;
  return id;
}

FoundKernel with_launch_shape(FoundKernel found, const KernelRequest& request) {
  set_launch_shape(found.kernel, request.rendered);
  return found;
}

std::optional<FoundKernel> with_launch_shape(std::optional<FoundKernel> found, const KernelRequest& request) {
  if (found) set_launch_shape(found->kernel, request.rendered);
  return found;
}

std::string prebuild_command(const KernelSpec& spec, int sm) {
  const std::string program = "flash-attn-jit prebuild --arch sm_" + std::to_string(sm);
  const std::vector<TileConfig> tiles = default_tiles(spec);
  if (std::find(tiles.begin(), tiles.end(), spec.tile) == tiles.end())  // a tuning record chose it
    return "flash-attn-jit tune --export FILE && " + program + " --tuned FILE --out DIR";
  std::string features;
  for (const FeatureInfo& info : kFeatures)
    if (spec.has(info.feature)) features += " --" + std::string(info.word) + " yes";
  const std::string of_v = spec.head_dim_v != 0 ? " --head-dim-v " + std::to_string(spec.head_dim_v) : "";
  return program + " --kinds " + std::string(family_of(spec.kind).pack_group) + " --head-dims " +
         std::to_string(spec.head_dim) + of_v + " --causal " + (spec.mask == Mask::kCausal ? "yes" : "no") +
         (spec.mask == Mask::kWindow ? " --window" : "") + features + " --gqa " + std::to_string(spec.group_size) +
         " --out DIR";
}

// Where a kernel was looked for in vain.
std::string places_of(const KernelCacheSettings& settings) {
  return "neither in the cache (" + (settings.dir.empty() ? "memory" : settings.dir.string()) + ") nor in " +
         (settings.prebuilt ? "the pack " + settings.prebuilt->string()
                            : "a pack (FLASH_ATTN_JIT_PREBUILT is not set)") +
         (settings.bundled ? " nor in the one installed with this library, " + settings.bundled->pack.string() : "");
}

constexpr const char* kOfflineReason = "FLASH_ATTN_JIT_OFFLINE is 1, which forbids it.";

MissingKernelError missing(const KernelSpec& spec, const CompileTarget& target, const KernelCacheSettings& searched,
                           bool offline, const std::string& no_compiler) {
  const std::string message = "kernel '" + spec.text() + "' for " + target.text() + " is " + places_of(searched) +
                              ", and it cannot be compiled here: " + no_compiler;
  // What a driver makes of PTX is for that driver alone, so that no pack can stand in for the compiler.
  if (target.code == CodeKind::kPtx)
    return {message + (offline ? "\nNo pack holds kernels that a driver links of PTX: without that variable, they are "
                                 "compiled once and kept in the cache"
                               : ""),
            spec, "", no_compiler};
  const std::string command = prebuild_command(spec, target.sm);
  return {message + (offline ? "\nBuild a pack without that variable" : "\nOr build a pack where there is an NVRTC") +
              ", and set FLASH_ATTN_JIT_PREBUILT to it here: " + command,
          spec, command, no_compiler};
}

}  // namespace

KernelLibrary::KernelLibrary(const Settings& settings)
    : KernelLibrary(settings.config, std::make_shared<KernelCache>(settings.cache), settings.driver_version) {}

KernelLibrary::KernelLibrary(const Config& config, std::shared_ptr<KernelCache> cache,
                             std::optional<int> driver_version, std::shared_ptr<KernelCache> refused)
    : config_(config),
      cache_(std::move(cache)),
      refused_(refused != nullptr ? std::move(refused) : cache_),
      driver_version_(driver_version),
      templates_(load_templates(config)),
      compilers_(std::make_unique<NvrtcChoice>(config, driver_version)) {}

KernelLibrary::~KernelLibrary() = default;

FoundKernel KernelLibrary::find_or_compile(const KernelSpec& spec, const CompileTarget& target) {
  if (const auto reason = check(spec, arch_limits(target.sm))) throw UnsupportedError(*reason);
  const KernelRequest kernel = request(spec);
  const CompileRequest compiled = request(kernel, target);
  if (auto found = find(compiled)) return *std::move(found);
  return make(compiled);
}

KernelRequest KernelLibrary::request(const KernelSpec& spec) {
  ++rendered_;
  return {spec, render(spec, templates_, user_functions(spec))};
}

KernelRequest KernelLibrary::tensor_peak_request() {
  ++rendered_;
  return {{}, render_tensor_peak(templates_), "tensor peak"};
}

CompileRequest KernelLibrary::request(const KernelRequest& kernel, const CompileTarget& target) {
  ++hashed_;
  return {kernel, target, id_of(kernel, target)};
}

LinkRequest KernelLibrary::request(const KernelRequest& kernel, const LinkTarget& target) {
  ++hashed_;
  return {kernel, target, id_of_linked(kernel, target, driver_version_.value_or(0))};
}

std::optional<FoundKernel> KernelLibrary::find(const CompileRequest& request) {
  return with_launch_shape(cache_->find(request.id, objection_to_compiled()), request.kernel);
}

std::optional<FoundKernel> KernelLibrary::find(const LinkRequest& request) {
  return with_launch_shape(cache_->find(request.id, objection_to_linked(request.target)), request.kernel);
}

FoundKernel KernelLibrary::make(const CompileRequest& request) {
  const auto build = [&] { return tell_if_slow(request.id.name, compile(request.kernel, request.target, request.id)); };
  if (request.target.code == CodeKind::kPtx) return {build(), KernelOrigin::kCompiled};
  return with_launch_shape(cache_->build(request.id, build, objection_to_compiled()), request.kernel);
}

FoundKernel KernelLibrary::make(const LinkRequest& request, const LinkPtx& link) {
  const LinkTarget& target = request.target;
  const auto build = [&] {
    const CompileRequest ptx = this->request(request.kernel, CompileTarget{target.ptx_sm, CodeKind::kPtx});
    auto found = find(ptx);
    CompiledKernel kernel = link(found ? found->kernel : compile(ptx.kernel, ptx.target, request.id));
    if (const auto nvrtc = compilers_->foresee(CodeKind::kCubin); nvrtc && target.until_newer_nvrtc)
      kernel.stands_in_for_nvrtc = nvrtc->as_driver_version();
    return tell_if_slow(request.id.name, std::move(kernel));
  };
  return with_launch_shape(cache_->build(request.id, build, objection_to_linked(target)), request.kernel);
}

CompiledKernel KernelLibrary::compile_afresh(const CompileRequest& request) {
  if (config_.offline)
    throw ConfigError("FLASH_ATTN_JIT_OFFLINE is '1', and what is asked for compiles kernels afresh; accepted: 0");
  try {
    return compile(request.kernel, request.target, request.id);
  } catch (const MissingKernelError& error) {  // no pack can help
    throw Error("kernel '" + request.kernel.spec.text() + "' is to be compiled afresh for " + request.target.text() +
                ", and cannot be: " + error.no_compiler);
  }
}

bool KernelLibrary::compiler_lacks(int sm) {
  if (config_.offline) return false;
  std::string reason;
  const Nvrtc* nvrtc = compilers_->best(CodeKind::kCubin, reason);
  if (nvrtc == nullptr) return false;
  const std::vector<int>& known = nvrtc->supported_architectures();
  return std::find(known.begin(), known.end(), sm) == known.end();
}

int KernelLibrary::nvrtc_opened() const { return compilers_->opened(); }

CompiledKernel KernelLibrary::compile(const KernelRequest& request, const CompileTarget& target, const KernelId& id) {
  std::string reason = kOfflineReason;
  const Nvrtc* nvrtc = config_.offline ? nullptr : compilers_->best(target.code, reason);
  if (nvrtc == nullptr) throw missing(request.spec, target, cache_->settings(), config_.offline, reason);
  try {
    return compile_with(*nvrtc, request.rendered, target);
  } catch (const NvrtcFailure& failure) {
    const std::string kept = refused_->keep_refused_source(id, request.rendered.source);
    const std::string options = joined(nvrtc_options(target, nvrtc->version()));
    throw CompileError("NVRTC " + nvrtc->version().text() + " refused kernel '" + request.spec.text() + "': " +
                           failure.what() + "\noptions: " + options + "\nsource: " + kept + "\nlog:\n" + failure.log,
                       failure.log, options, kept);
  }
}

KernelCache::Objection KernelLibrary::objection_to_compiled() const {
  if (!driver_version_) return {};
  return [version = *driver_version_](const CompiledKernel& kernel) -> std::optional<std::string> {
    if (kernel.min_driver <= version) return std::nullopt;
    return "it was built by " + kernel.built_by + " and needs a CUDA " + driver_version_text(kernel.min_driver) +
           " driver or newer; this one is " + driver_version_text(version);
  };
}

KernelCache::Objection KernelLibrary::objection_to_linked(const LinkTarget& target) const {
  // Where nothing may be compiled, nothing newer comes of a newer NVRTC.
  if (!target.until_newer_nvrtc || config_.offline) return {};
  return [this](const CompiledKernel& kernel) -> std::optional<std::string> {
    const auto nvrtc = compilers_->foresee(CodeKind::kCubin);
    if (!nvrtc || nvrtc->as_driver_version() <= kernel.stands_in_for_nvrtc) return std::nullopt;
    return "it is the Turing code (" + kernel.built_by + "), and NVRTC " + nvrtc->text() +
           ", which was not there then, may know this GPU";
  };
}

KernelCacheSettings cache_settings(const Config& config) {
  return {.dir = config.cache_dir, .max_bytes = config.cache_max_bytes, .prebuilt = config.prebuilt};
}

}  // namespace flash_attn_jit
