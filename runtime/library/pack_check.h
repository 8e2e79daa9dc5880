// What a pack holds and whether it is as it should be, read so that a pack of anybody's can be looked at: nothing of it
// is run or loaded, and nothing that it says is believed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "runtime/cache/kernel_file.h"
#include "runtime/cache/pack_files.h"
#include "runtime/library/kernel_library.h"
#include "runtime/system/config.h"

namespace flash_attn_jit {

struct PackedKernel {
  std::string name;  // of its file
  std::uint64_t bytes = 0;
  KernelFile file;  // without its image
};

struct PackFault {
  std::string name;  // of the file; empty: the whole pack
  std::string fault;
};

struct PackListing {
  std::string library;                // the version that made it, as its manifest tells; empty where it does not
  std::vector<PackedKernel> kernels;  // those that verify, by name
  std::size_t records = 0;
  std::uint64_t bytes = 0;  // of all files
  std::vector<PackFault> faults;
};

// Every file, its checksums, and whether the manifest says the same.
PackListing list_pack(const PackFiles& pack);

struct PackVerdict {
  PackListing listing;      // with the faults of all checks
  std::size_t rebuilt = 0;  // kernels that were compiled anew, to the same bytes
};

// As list_pack(); then whether each kernel is what its spec says and one that `library` would look for. With `rebuild`,
// a configuration that says where NVRTCs are, each of those is compiled with the version that made it, and its bytes
// are compared: one whose NVRTC is not here is a fault.
PackVerdict verify_pack(const PackFiles& pack, KernelLibrary& library, const std::optional<Config>& rebuild);

}  // namespace flash_attn_jit
