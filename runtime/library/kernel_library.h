// Spec + target -> compiled kernel: prebuilt packs first, then the disk cache, then the compiler.
// Thread-safe.
#pragma once

#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "generator/kernel_spec.h"
#include "generator/render.h"
#include "runtime/cache/kernel_cache.h"
#include "runtime/compile/compiled_kernel.h"
#include "runtime/cuda/compile_target.h"
#include "runtime/system/config.h"

namespace flash_attn_jit {

class NvrtcChoice;

// Machine code that the driver makes of PTX.
struct LinkTarget {
  int ptx_sm = 75;
  int device_sm = 0;
  // Why PTX was taken: what one purpose stored, another does not find.
  std::string purpose;
  // A stand-in, because no NVRTC knew the device: no longer taken once there is a newer one than were there then.
  bool until_newer_nvrtc = false;
};

// A cache with a compiler behind it.
class KernelLibrary {
 public:
  struct Settings {
    Config config;
    KernelCacheSettings cache;
    // The driver that shall load the kernels, as cuDriverGetVersion counts. Nothing: any driver.
    std::optional<int> driver_version;
  };
  explicit KernelLibrary(const Settings& settings);
  KernelLibrary(const Config& config, std::shared_ptr<KernelCache> cache, std::optional<int> driver_version);
  ~KernelLibrary();

  // A kernel for a GPU. Several threads or processes that ask for one kernel compile it once. PTX is not
  // stored: it is looked for in the pack, else compiled. Throws CompileError, MissingKernelError,
  // UnsupportedError (check()'s reason).
  FoundKernel find_or_compile(const KernelSpec& spec, const CompileTarget& target);

  // find_or_compile() without the compiler.
  std::optional<FoundKernel> find(const KernelSpec& spec, const CompileTarget& target);

  // Turns a PTX kernel into one of machine code, resources included.
  using LinkPtx = std::function<CompiledKernel(CompiledKernel ptx)>;

  // The kernel as machine code made of PTX by `link`; that code is stored, for this driver version alone.
  // Throws as find_or_compile(), and what `link` throws.
  FoundKernel find_or_link(const KernelSpec& spec, const LinkTarget& target, const LinkPtx& link);
  std::optional<FoundKernel> find_linked(const KernelSpec& spec, const LinkTarget& target);

  // Whether there is an NVRTC and it does not know sm_`sm`. Opens it.
  bool compiler_lacks(int sm);

  KernelCache& cache() { return *cache_; }

  // How many NVRTC libraries this object opened: a hit opens none.
  int nvrtc_opened() const;

 private:
  CompiledKernel compile(const KernelSpec& spec, const RenderedKernel& rendered, const CompileTarget& target,
                         const KernelId& id);
  std::optional<std::string> objection_to(const CompiledKernel& kernel) const;
  KernelCache::Objection objection_to_linked(const LinkTarget& target);

  Config config_;
  std::shared_ptr<KernelCache> cache_;
  std::optional<int> driver_version_;
  TemplateSet templates_;
  std::unique_ptr<NvrtcChoice> compilers_;
};

// Where the process's kernels are kept and looked for, as `config` says.
KernelCacheSettings cache_settings(const Config& config);

}  // namespace flash_attn_jit
