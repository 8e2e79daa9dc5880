#include "runtime/cache/kernel_file.h"

#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>

#include "generator/errors.h"

namespace flash_attn_jit {
namespace {

using nlohmann::json;

constexpr std::string_view kMagic = "FAJKERNL";
constexpr std::size_t kHeaderBytes = 120;
constexpr std::size_t kMostLogBytes = 128 << 10;  // of a log that is kept; six bytes may stand for one of it
constexpr std::size_t kDigestsBefore = 88;        // what the header's own digest covers, beside the description

template <typename Integer>
void append_integer(std::string& out, Integer value) {
  for (std::size_t i = 0; i < sizeof value; ++i) out.push_back(static_cast<char>(value >> 8 * i & 0xff));
}

template <typename Integer>
Integer read_integer(std::string_view bytes, std::size_t at) {
  Integer value = 0;
  for (std::size_t i = 0; i < sizeof value; ++i)
    value |= static_cast<Integer>(static_cast<std::uint8_t>(bytes[at + i])) << 8 * i;
  return value;
}

std::string_view as_text(const Sha256Digest& digest) {
  return {reinterpret_cast<const char*>(digest.data()), digest.size()};
}

Sha256Digest digest_of(std::string_view header, std::string_view description) {
  Sha256 hash;
  hash.update(header.substr(0, kDigestsBefore));
  hash.update(description);
  return hash.finish();
}

// A number of a description that is none of ours.
struct NumberFault : Error {
  using Error::Error;
};

// The JSON library makes some int of any number.
int to_int(const json& value) {
  const bool fits = value.is_number_unsigned()  ? value.get<std::uint64_t>() <= std::numeric_limits<int>::max()
                    : value.is_number_integer() ? value.get<std::int64_t>() >= std::numeric_limits<int>::min()
                                                : false;
  if (!fits) throw NumberFault("one of its numbers is no whole number, or too large");
  return value.get<int>();
}

json optional_number(const std::optional<int>& value) { return value ? json(*value) : json(); }

std::optional<int> to_optional(const json& value) {
  return value.is_null() ? std::nullopt : std::optional<int>(to_int(value));
}

std::string describe(const KernelFile& file) {
  const CompiledKernel& kernel = file.kernel;
  const json description = {
      {"name", file.id.name},
      {"spec", file.id.spec},
      {"target", file.id.target},
      {"entry", kernel.entry},
      {"threads", kernel.threads},
      {"dynamic_smem", kernel.dynamic_smem},
      {"registers", optional_number(kernel.resources.registers)},
      {"static_smem", kernel.resources.static_smem},
      {"spill_stores", optional_number(kernel.resources.spill_stores)},
      {"spill_loads", optional_number(kernel.resources.spill_loads)},
      {"built_by", kernel.built_by},
      {"min_driver", kernel.min_driver},
      {"stands_in_for_nvrtc", kernel.stands_in_for_nvrtc},
      {"log", kernel.log.substr(0, kMostLogBytes)},
      {"seconds", kernel.seconds},
  };
  // A compiler's log is bytes of any encoding.
  return description.dump(2, ' ', false, json::error_handler_t::replace);
}

void read_description(std::string_view text, KernelFile& file) {
  const json description = json::parse(text);
  CompiledKernel& kernel = file.kernel;
  description.at("name").get_to(file.id.name);
  description.at("spec").get_to(file.id.spec);
  description.at("target").get_to(file.id.target);
  description.at("entry").get_to(kernel.entry);
  kernel.threads = to_int(description.at("threads"));
  kernel.dynamic_smem = to_int(description.at("dynamic_smem"));
  kernel.resources.registers = to_optional(description.at("registers"));
  kernel.resources.static_smem = to_int(description.at("static_smem"));
  kernel.resources.spill_stores = to_optional(description.at("spill_stores"));
  kernel.resources.spill_loads = to_optional(description.at("spill_loads"));
  description.at("built_by").get_to(kernel.built_by);
  kernel.min_driver = to_int(description.at("min_driver"));
  if (const auto number = description.find("stands_in_for_nvrtc"); number != description.end())
    kernel.stands_in_for_nvrtc = to_int(*number);  // files of before have none
  description.at("log").get_to(kernel.log);
  description.at("seconds").get_to(kernel.seconds);
}

}  // namespace

KernelKey make_key(std::initializer_list<KeyField> fields) {
  Sha256 hash;
  const auto add = [&](std::string_view text) {
    std::string length;
    append_integer<std::uint64_t>(length, text.size());
    hash.update(length);
    hash.update(text);
  };
  add("format");
  add(std::to_string(kKernelFileVersion));
  for (const KeyField& field : fields) add(field.name), add(field.value);
  return hash.finish();
}

std::string KernelId::file_name() const { return name + "." + to_hex(key) + ".kernel"; }

std::string serialize(const KernelFile& file) {
  const std::string description = describe(file);
  std::string bytes(kMagic);
  append_integer<std::uint32_t>(bytes, kKernelFileVersion);
  append_integer<std::uint32_t>(bytes, static_cast<std::uint32_t>(description.size()));
  append_integer<std::uint64_t>(bytes, file.kernel.image.size());
  bytes += as_text(file.id.key);
  bytes += as_text(sha256(file.kernel.image));
  bytes += as_text(digest_of(bytes, description));
  return bytes + description + file.kernel.image;
}

std::variant<KernelFile, KernelFileFault> parse_kernel_file(std::string_view bytes) {
  if (bytes.empty()) return KernelFileFault{"the file is empty"};
  if (!bytes.starts_with(kMagic.substr(0, bytes.size()))) return KernelFileFault{"it is not a kernel file"};
  if (bytes.size() < kHeaderBytes) return KernelFileFault{"the file is truncated within its header"};
  if (const auto version = read_integer<std::uint32_t>(bytes, 8); version != kKernelFileVersion)
    return KernelFileFault{"its format version is " + std::to_string(version) + ", this library reads " +
                           std::to_string(kKernelFileVersion)};
  const std::uint64_t description_bytes = read_integer<std::uint32_t>(bytes, 12);
  const auto payload_bytes = read_integer<std::uint64_t>(bytes, 16);
  const std::uint64_t rest = bytes.size() - kHeaderBytes;
  if (description_bytes > rest || payload_bytes != rest - description_bytes)
    return KernelFileFault{"the file is " + std::to_string(bytes.size()) + " bytes long, not what its header says"};
  if (description_bytes > kMostDescriptionBytes) return KernelFileFault{"its description is too long"};
  const std::string_view description = bytes.substr(kHeaderBytes, description_bytes);
  const std::string_view payload = bytes.substr(kHeaderBytes + description_bytes);
  if (as_text(digest_of(bytes, description)) != bytes.substr(88, 32))
    return KernelFileFault{"its header's checksum is wrong"};
  if (as_text(sha256(payload)) != bytes.substr(56, 32)) return KernelFileFault{"its payload's checksum is wrong"};

  KernelFile file;
  std::memcpy(file.id.key.data(), bytes.data() + 24, file.id.key.size());
  try {
    read_description(description, file);
  } catch (const NumberFault& error) {
    return KernelFileFault{std::string("its description does not parse: ") + error.what()};
  } catch (const json::exception& error) {
    return KernelFileFault{std::string("its description does not parse: ") + error.what()};
  }
  file.kernel.image = payload;
  return file;
}

}  // namespace flash_attn_jit
