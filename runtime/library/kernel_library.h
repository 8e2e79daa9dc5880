// Spec + target -> compiled kernel: packs first, then the disk cache, then the compiler.
// Thread-safe.
#pragma once

#include <atomic>
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
#include "runtime/library/kernel_request.h"
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

// A request for one target, under the key that it is looked for and kept by. `kernel` has to outlive it.
struct CompileRequest {
  const KernelRequest& kernel;
  CompileTarget target;
  KernelId id;
};
struct LinkRequest {
  const KernelRequest& kernel;
  LinkTarget target;
  KernelId id;
};

// A cache with a compiler behind it. A caller with a second choice of target makes one request for each out of one
// KernelRequest, so that the kernel is rendered once, and hashed and looked for once by each key.
class KernelLibrary {
 public:
  struct Settings {
    Config config;
    KernelCacheSettings cache;
    // The driver that shall load the kernels, as cuDriverGetVersion counts. Nothing: any driver.
    std::optional<int> driver_version;
  };
  explicit KernelLibrary(const Settings& settings);
  // `refused` keeps the sources that a compiler refused; `cache` does where it is null.
  KernelLibrary(const Config& config, std::shared_ptr<KernelCache> cache, std::optional<int> driver_version,
                std::shared_ptr<KernelCache> refused = nullptr);
  ~KernelLibrary();

  // A kernel for a GPU: checked, found, else made. Throws as make(), and UnsupportedError (check()'s reason).
  FoundKernel find_or_compile(const KernelSpec& spec, const CompileTarget& target);

  // `spec` is one that check() allows.
  KernelRequest request(const KernelSpec& spec);
  KernelRequest tensor_peak_request();
  CompileRequest request(const KernelRequest& kernel, const CompileTarget& target);
  LinkRequest request(const KernelRequest& kernel, const LinkTarget& target);

  // What is there; never opens a compiler.
  std::optional<FoundKernel> find(const CompileRequest& request);
  std::optional<FoundKernel> find(const LinkRequest& request);

  // After a find() in vain. Several threads or processes that ask for one kernel compile it once. PTX is not stored.
  // Throws CompileError, MissingKernelError.
  FoundKernel make(const CompileRequest& request);

  // Compiled whatever the cache holds, and not stored. Throws as make(), and ConfigError where compiling is forbidden.
  CompiledKernel compile_afresh(const CompileRequest& request);

  // Turns a PTX kernel into one of machine code, resources included.
  using LinkPtx = std::function<CompiledKernel(CompiledKernel ptx)>;

  // Machine code that `link` makes of PTX, which is found, else compiled. The code is stored, for this driver version
  // alone. Throws also what `link` throws.
  FoundKernel make(const LinkRequest& request, const LinkPtx& link);

  // Whether there is an NVRTC and it does not know sm_`sm`. Opens it, unless compiling is forbidden.
  bool compiler_lacks(int sm);

  KernelCache& cache() { return *cache_; }

  // How many NVRTC libraries this object opened: a hit opens none.
  int nvrtc_opened() const;

  // How many kernels this object rendered, and how many keys it hashed.
  int rendered() const { return rendered_; }
  int hashed() const { return hashed_; }

 private:
  CompiledKernel compile(const KernelRequest& request, const CompileTarget& target, const KernelId& id);
  KernelCache::Objection objection_to_compiled() const;
  KernelCache::Objection objection_to_linked(const LinkTarget& target) const;

  Config config_;
  std::shared_ptr<KernelCache> cache_, refused_;
  std::optional<int> driver_version_;
  TemplateSet templates_;
  std::unique_ptr<NvrtcChoice> compilers_;
  std::atomic<int> rendered_ = 0, hashed_ = 0;
};

// Where the process's kernels are kept and looked for, as `config` says.
KernelCacheSettings cache_settings(const Config& config);

}  // namespace flash_attn_jit
