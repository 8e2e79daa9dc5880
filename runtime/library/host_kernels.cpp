#include "runtime/library/host_kernels.h"

#include "generator/legality.h"
#include "runtime/compile/compiler.h"
#include "runtime/compile/slow_compile.h"
#include "runtime/library/user_functions.h"
#include "runtime/system/errors.h"

namespace flash_attn_jit {
namespace {

#if defined(__x86_64__)
constexpr const char* kMachine = "x86_64";
#elif defined(__aarch64__)
constexpr const char* kMachine = "aarch64";
#else
constexpr const char* kMachine = "other";
#endif

KernelId id_for_host(const KernelRequest& request, const HostCompiler& compiler) {
  const std::string target = std::string("host_") + kMachine;
  KernelId id;
  id.key = make_key({{"source", request.rendered.source},
                     {"target", target},
                     {"compiler", compiler.version},
                     {"flags", joined(host_compiler_flags(compiler))}});
  id.name = request.spec.name() + "_" + target;
  id.spec = request.spec.text();
  id.target = target;
  id.is_host_code = true;
  return id;
}

}  // namespace

CompiledKernel HostKernels::compile(const KernelRequest& request, const KernelId& id) {
  try {
    return tell_if_slow(id.name, compile_for_host(request.rendered, compiler_));
  } catch (const HostCompileFailure& failure) {
    const std::string kept = cache_->keep_refused_source(id, request.rendered.source);
    throw CompileError(id.spec + ": " + failure.what() + "\nsource: " + kept + "\n" + failure.log, failure.log,
                       joined(host_compiler_flags(compiler_)), kept);
  }
}

FoundKernel HostKernels::find_or_compile(const KernelSpec& spec) {
  if (const auto reason = check(spec, arch_limits(75))) throw UnsupportedError(spec.text() + ": " + *reason);
  const KernelRequest request{spec, render(spec, templates_, user_functions(spec))};
  const KernelId id = id_for_host(request, compiler_);
  FoundKernel found = cache_->get_or_build(id, [&] { return compile(request, id); });
  set_launch_shape(found.kernel, request.rendered);
  return found;
}

}  // namespace flash_attn_jit
