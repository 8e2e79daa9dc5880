// The `.kernel` file: one compiled kernel with what is needed to trust it.
//
//   offset  bytes
//        0      8  magic "FAJKERNL"
//        8      4  format version            (integers are little-endian)
//       12      4  length of the description
//       16      8  length of the payload
//       24     32  key
//       56     32  SHA-256 of the payload
//       88     32  SHA-256 of bytes 0 to 87 and the description
//      120         description: JSON
//                  payload: the image
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>
#include <variant>

#include "runtime/compile/compiled_kernel.h"
#include "runtime/system/sha256.h"

namespace flash_attn_jit {

inline constexpr std::uint32_t kKernelFileVersion = 1;

// A file with a longer description is refused: its reading takes many times its length.
inline constexpr std::size_t kMostDescriptionBytes = 1 << 20;

// The digest of everything that decides what a kernel is.
using KernelKey = Sha256Digest;

struct KeyField {
  std::string_view name, value;
};

// Hashes the format version and every field, each length-prefixed, in the order given.
KernelKey make_key(std::initializer_list<KeyField> fields);

// What the cache calls a kernel.
struct KernelId {
  KernelKey key{};
  std::string name;           // "flash_fwd_hdim128_fp16_causal_gqa8_vec16_m256n16w8q96l2b4k7_sm75", for people
  std::string spec;           // KernelSpec::text()
  std::string target;         // CompileTarget::text(), or what else it was made for
  bool is_host_code = false;  // runs in this process and not on a GPU: never taken from a pack

  std::string file_name() const;  // "<name>.<key in hex>.kernel"
};

struct KernelFile {
  KernelId id;
  CompiledKernel kernel;
};

// Why bytes are no kernel file.
struct KernelFileFault {
  std::string reason;
};

std::string serialize(const KernelFile& file);

// Checks everything: lengths, both digests, the description. Never throws on bad bytes, whoever wrote them.
std::variant<KernelFile, KernelFileFault> parse_kernel_file(std::string_view bytes);

}  // namespace flash_attn_jit
