#include "runtime/library/kernel_library.h"

#include <algorithm>

#include "generator/families/families.h"
#include "generator/legality.h"
#include "runtime/compile/compiler.h"
#include "runtime/compile/slow_compile.h"
#include "runtime/cuda/nvrtc_choice.h"
#include "runtime/library/templates_folder.h"
#include "runtime/system/errors.h"

namespace flash_attn_jit {
namespace {

KernelSpec checked(const KernelSpec& spec, int sm) {
  if (const auto reason = check(spec, arch_limits(sm))) throw UnsupportedError(*reason);
  return spec;
}

std::string architecture_in_name(CodeKind code, int sm) {
  return (code == CodeKind::kPtx ? "compute" : "sm") + std::to_string(sm);
}

KernelId id_of(const KernelSpec& spec, const RenderedKernel& rendered, const CompileTarget& target) {
  KernelId id;
  id.key = make_key(
      {{"source", rendered.source}, {"options", joined(compile_options(target))}, {"target", target.text()}});
  id.name = spec.name() + "_" + architecture_in_name(target.code, target.sm);
  id.spec = spec.text();
  id.target = target.text();
  return id;
}

KernelId id_of_linked(const KernelSpec& spec, const RenderedKernel& rendered, const LinkTarget& target,
                      int driver_version) {
  const CompileTarget ptx{target.ptx_sm, CodeKind::kPtx};
  const std::string machine = "sm_" + std::to_string(target.device_sm);
  KernelId id;
  id.key = make_key({{"source", rendered.source},
                     {"options", joined(compile_options(ptx))},
                     {"target", ptx.text()},
                     {"linked for", machine},
                     {"driver", std::to_string(driver_version)},
                     {"purpose", target.purpose}});
  id.name = spec.name() + "_" + architecture_in_name(CodeKind::kPtx, target.ptx_sm) + "_on_" +
            architecture_in_name(CodeKind::kCubin, target.device_sm);
  id.spec = spec.text();
  id.target = ptx.text() + " linked for " + machine;
  return id;
}

// How a kernel is launched is the generator's knowledge, not the file's.
FoundKernel with_launch_shape(FoundKernel found, const RenderedKernel& rendered) {
  found.kernel.entry = rendered.entry;
  found.kernel.threads = rendered.threads;
  found.kernel.dynamic_smem = rendered.dynamic_smem;
  return found;
}

std::string prebuild_command(const KernelSpec& spec, int sm) {
  std::string features;
  for (const FeatureInfo& info : kFeatures)
    if (spec.has(info.feature)) features += " --" + std::string(info.word) + " yes";
  return "flash-attn-jit prebuild --arch sm_" + std::to_string(sm) + " --kinds " +
         std::string(family_of(spec.kind).pack_group) + " --head-dims " + std::to_string(spec.head_dim) +
         " --causal " + (spec.mask == Mask::kCausal ? "yes" : "no") + (spec.mask == Mask::kWindow ? " --window" : "") +
         features + " --gqa " + std::to_string(spec.group_size) + " --out DIR";
}

MissingKernelError missing(const KernelSpec& spec, const CompileTarget& target, const KernelCache& cache,
                           const std::string& no_compiler) {
  std::string message = "kernel '" + spec.text() + "' for " + target.text() + " is neither in the cache (" +
                        (cache.settings().dir.empty() ? "memory" : cache.settings().dir.string()) + ") nor in " +
                        (cache.settings().prebuilt ? "the pack " + cache.settings().prebuilt->string()
                                                   : "a pack (FLASH_ATTN_JIT_PREBUILT is not set)") +
                        ", and it cannot be compiled here: " + no_compiler;
  // PTX depends on the driver that links it, so that no pack can stand in for the compiler.
  if (target.code == CodeKind::kPtx) return {message, spec, ""};
  const std::string command = prebuild_command(spec, target.sm);
  return {
      message +
          "\nOr build a pack where there is an NVRTC, and set FLASH_ATTN_JIT_PREBUILT to it here: " + command,
      spec, command};
}

}  // namespace

KernelLibrary::KernelLibrary(const Settings& settings)
    : KernelLibrary(settings.config, std::make_shared<KernelCache>(settings.cache), settings.driver_version) {
}

KernelLibrary::KernelLibrary(const Config& config, std::shared_ptr<KernelCache> cache,
                             std::optional<int> driver_version)
    : config_(config),
      cache_(std::move(cache)),
      driver_version_(driver_version),
      templates_(load_templates(config)),
      compilers_(std::make_unique<NvrtcChoice>(config, driver_version)) {}

KernelLibrary::~KernelLibrary() = default;

FoundKernel KernelLibrary::find_or_compile(const KernelSpec& spec, const CompileTarget& target) {
  const RenderedKernel rendered = render(checked(spec, target.sm), templates_);
  const KernelId id = id_of(spec, rendered, target);
  const auto objection = [this](const CompiledKernel& kernel) { return objection_to(kernel); };
  const auto build = [&] { return tell_if_slow(id.name, compile(spec, rendered, target, id)); };
  if (target.code == CodeKind::kCubin)
    return with_launch_shape(cache_->get_or_build(id, build, objection), rendered);
  if (auto found = cache_->find(id, objection)) return with_launch_shape(*std::move(found), rendered);
  return {build(), KernelOrigin::kCompiled};
}

std::optional<FoundKernel> KernelLibrary::find(const KernelSpec& spec, const CompileTarget& target) {
  const RenderedKernel rendered = render(checked(spec, target.sm), templates_);
  auto found = cache_->find(id_of(spec, rendered, target),
                            [this](const CompiledKernel& kernel) { return objection_to(kernel); });
  if (found) found = with_launch_shape(*std::move(found), rendered);
  return found;
}

FoundKernel KernelLibrary::find_or_link(const KernelSpec& spec, const LinkTarget& target,
                                        const LinkPtx& link) {
  const RenderedKernel rendered = render(checked(spec, target.ptx_sm), templates_);
  const KernelId id = id_of_linked(spec, rendered, target, driver_version_.value_or(0));
  const auto build = [&] {
    const CompileTarget ptx{target.ptx_sm, CodeKind::kPtx};
    auto packed = find(spec, ptx);
    CompiledKernel kernel = link(packed ? packed->kernel : compile(spec, rendered, ptx, id));
    if (const auto nvrtc = compilers_->foresee(CodeKind::kCubin); nvrtc && target.until_newer_nvrtc)
      kernel.stands_in_for_nvrtc = nvrtc->as_driver_version();
    return tell_if_slow(id.name, std::move(kernel));
  };
  return with_launch_shape(cache_->get_or_build(id, build, objection_to_linked(target)), rendered);
}

std::optional<FoundKernel> KernelLibrary::find_linked(const KernelSpec& spec, const LinkTarget& target) {
  const RenderedKernel rendered = render(checked(spec, target.ptx_sm), templates_);
  auto found = cache_->find(id_of_linked(spec, rendered, target, driver_version_.value_or(0)),
                            objection_to_linked(target));
  if (found) found = with_launch_shape(*std::move(found), rendered);
  return found;
}

bool KernelLibrary::compiler_lacks(int sm) {
  std::string reason;
  const Nvrtc* nvrtc = compilers_->best(CodeKind::kCubin, reason);
  if (nvrtc == nullptr) return false;
  const std::vector<int>& known = nvrtc->supported_architectures();
  return std::find(known.begin(), known.end(), sm) == known.end();
}

int KernelLibrary::nvrtc_opened() const { return compilers_->opened(); }

CompiledKernel KernelLibrary::compile(const KernelSpec& spec, const RenderedKernel& rendered,
                                      const CompileTarget& target, const KernelId& id) {
  std::string reason;
  const Nvrtc* nvrtc = compilers_->best(target.code, reason);
  if (nvrtc == nullptr) throw missing(spec, target, *cache_, reason);
  try {
    return compile_with(*nvrtc, rendered, target);
  } catch (const NvrtcFailure& failure) {
    const std::string kept = cache_->keep_refused_source(id, rendered.source);
    const std::string options = joined(nvrtc_options(target, nvrtc->version()));
    throw CompileError("NVRTC " + nvrtc->version().text() + " refused kernel '" + spec.text() +
                           "': " + failure.what() + "\noptions: " + options + "\nsource: " + kept +
                           "\nlog:\n" + failure.log,
                       failure.log, options, kept);
  }
}

std::optional<std::string> KernelLibrary::objection_to(const CompiledKernel& kernel) const {
  if (!driver_version_ || kernel.min_driver <= *driver_version_) return std::nullopt;
  return "it was built by " + kernel.built_by + " and needs a CUDA " +
         driver_version_text(kernel.min_driver) + " driver or newer; this one is " +
         driver_version_text(*driver_version_);
}

KernelCache::Objection KernelLibrary::objection_to_linked(const LinkTarget& target) {
  if (!target.until_newer_nvrtc) return {};
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
