#include "runtime/cache/stored_zip.h"

#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <utility>

namespace flash_attn_jit {
namespace {

// The records of the format (PKWARE's APPNOTE), with what their first four bytes are. Integers are little-endian.
constexpr std::uint32_t kHeaderMark = 0x04034b50, kDirectoryMark = 0x02014b50, kEndMark = 0x06054b50;
constexpr std::size_t kLocalHeaderBytes = 30, kDirectoryEntryBytes = 46, kEndBytes = 22;

constexpr std::uint64_t kMostZipBytes = 0xfffffffe;      // beyond: zip64
constexpr std::size_t kMostZippedFiles = 0xfffe;         // beyond: zip64
constexpr std::uint64_t kMostDirectoryBytes = 32 << 20;  // of the most files, with long names
constexpr std::size_t kMostNameBytes = 255;

constexpr unsigned kUtf8Names = 0x0800;  // the one flag that says nothing about the bytes of a file
constexpr unsigned kFirstDay = 0x0021;   // 1980-01-01
constexpr std::uint32_t kZippedFileMode = 0100644u << 16, kKindOfFile = 0170000u << 16,
                        kAnyRegularFile = 0100000u << 16, kAnyFolder = 0040000u << 16;

constexpr std::array<std::uint32_t, 256> kCrcTable = [] {
  std::array<std::uint32_t, 256> table{};
  for (std::uint32_t i = 0; i < 256; ++i) {
    std::uint32_t value = i;
    for (int bit = 0; bit < 8; ++bit) value = value >> 1 ^ (value & 1 ? 0xedb88320u : 0);
    table[i] = value;
  }
  return table;
}();

std::uint32_t crc32(std::string_view bytes) {
  std::uint32_t crc = 0xffffffff;
  for (const char byte : bytes) crc = crc >> 8 ^ kCrcTable[(crc ^ static_cast<std::uint8_t>(byte)) & 0xff];
  return ~crc;
}

std::uint32_t zip_number(std::string_view bytes, std::size_t at, std::size_t size) {
  std::uint32_t value = 0;
  for (std::size_t i = 0; i < size; ++i)
    value |= static_cast<std::uint32_t>(static_cast<std::uint8_t>(bytes[at + i])) << 8 * i;
  return value;
}

// What a file's header and its entry in the directory both tell.
struct ZipFields {
  unsigned flags, method;
  std::uint32_t crc, stored_bytes, bytes;
  std::size_t name_bytes, extra_bytes;
  bool operator==(const ZipFields&) const = default;
};

ZipFields zip_fields_at(std::string_view bytes, std::size_t at) {
  return {zip_number(bytes, at, 2),      zip_number(bytes, at + 2, 2),  zip_number(bytes, at + 8, 4),
          zip_number(bytes, at + 12, 4), zip_number(bytes, at + 16, 4), zip_number(bytes, at + 20, 2),
          zip_number(bytes, at + 22, 2)};
}

// Of a folder's entry the name ends in a slash.
bool is_folder_entry(std::string_view name) { return name.ends_with('/'); }

// Nothing, or why an entry of the directory is none that is read.
std::optional<std::string> entry_objection(const ZipFields& entry, std::string_view name, std::size_t comment_bytes,
                                           unsigned disk, std::uint32_t attributes) {
  const std::string_view path = name.substr(0, name.size() - (is_folder_entry(name) ? 1 : 0));
  if (!is_plain_path(path)) return "a file's name leads out of the archive or has letters that none of a pack has";
  const std::string file = "the file " + std::string(name) + " ";
  if (entry.method != 0 || entry.bytes != entry.stored_bytes) return file + "is compressed; a pack's are stored";
  if ((entry.flags & ~kUtf8Names) != 0) return file + "is encrypted, or its size stands behind it";
  if (entry.bytes > kMostZipBytes) return file + "is of a zip64 archive";
  if (comment_bytes != 0 || disk != 0) return file + "has a comment or lies on another disk";
  const std::uint32_t kind = attributes & kKindOfFile;
  if (kind != 0 && kind != (is_folder_entry(name) ? kAnyFolder : kAnyRegularFile))
    return file + "is a link or no plain file";
  if (is_folder_entry(name) && entry.bytes != 0) return file + "is a folder with bytes of its own";
  return std::nullopt;
}

class ZipRecords {
 public:
  ZipRecords& add(std::uint32_t value, std::size_t size) {
    for (std::size_t i = 0; i < size; ++i) bytes.push_back(static_cast<char>(value >> 8 * i & 0xff));
    return *this;
  }
  // What ZipFields reads, with the time between.
  ZipRecords& add_fields(std::string_view name, std::string_view content) {
    const auto size = static_cast<std::uint32_t>(content.size());
    add(0, 2).add(0, 2).add(0, 2).add(kFirstDay, 2).add(crc32(content), 4).add(size, 4).add(size, 4);
    return add(static_cast<std::uint32_t>(name.size()), 2).add(0, 2);
  }
  std::string bytes;
};

constexpr unsigned kZipVersion = 20, kZippedOnUnix = 3 << 8 | kZipVersion;

}  // namespace

bool is_plain_path(std::string_view name) {
  if (name.size() > kMostNameBytes) return false;
  while (true) {
    const std::size_t end = std::min(name.find('/'), name.size());
    const std::string_view part = name.substr(0, end);
    if (part.empty() || part == "." || part == "..") return false;
    for (const char letter : part)
      if (letter <= ' ' || letter > '~' || letter == '\\' || letter == ':') return false;
    if (end == name.size()) return true;
    name.remove_prefix(end + 1);
  }
}

StoredZip::StoredZip(Descriptor file, std::filesystem::path path) : file_(std::move(file)), path_(std::move(path)) {
  const Directory directory = find_directory();
  read_entries(directory);
  find_ends(directory.begin);
  sort_by_name();
}

void StoredZip::refuse(const std::string& reason) const {
  throw FileError(path_.string() + " is no zip file of a pack: " + reason);
}

std::string StoredZip::bytes_at(std::uint64_t begin, std::uint64_t count) const {
  std::string bytes(count, '\0');
  std::size_t filled = 0;
  while (filled < bytes.size()) {
    const ssize_t got =
        ::pread(file_.get(), bytes.data() + filled, bytes.size() - filled, static_cast<off_t>(begin + filled));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail_on_file("read", path_, errno);
    if (got == 0) refuse("it became shorter while it was read");
    filled += static_cast<std::size_t>(got);
  }
  return bytes;
}

// The directory's bytes and how many entries they are, as the record at the archive's end tells.
StoredZip::Directory StoredZip::find_directory() const {
  struct stat status{};
  if (::fstat(file_.get(), &status) != 0) fail_on_file("read", path_, errno);
  if (!S_ISREG(status.st_mode)) refuse("it is no file");
  const auto size = static_cast<std::uint64_t>(status.st_size);
  if (size < kEndBytes || size > kMostZipBytes)
    refuse("it has " + std::to_string(size) + " bytes; accepted: " + std::to_string(kEndBytes) + " to " +
           std::to_string(kMostZipBytes));
  const std::string end = bytes_at(size - kEndBytes, kEndBytes);
  if (zip_number(end, 0, 4) != kEndMark) refuse("it does not end as one without a comment does");
  const std::size_t count = zip_number(end, 10, 2);
  const std::uint64_t bytes = zip_number(end, 12, 4), begin = zip_number(end, 16, 4);
  if (zip_number(end, 4, 4) != 0 || zip_number(end, 8, 2) != count || zip_number(end, 20, 2) != 0)
    refuse("it is one of several disks, or has a comment");
  if (count > kMostZippedFiles) refuse("it is a zip64 archive");
  if (begin + bytes != size - kEndBytes || bytes > kMostDirectoryBytes)
    refuse("its directory does not lie where its end says");
  return {count, begin, bytes_at(begin, bytes)};
}

void StoredZip::read_entries(const Directory& directory) {
  const std::string_view bytes = directory.bytes;
  std::size_t at = 0;
  for (std::size_t i = 0; i < directory.count; ++i) {
    if (bytes.size() - at < kDirectoryEntryBytes || zip_number(bytes, at, 4) != kDirectoryMark)
      refuse("its directory is cut short");
    const ZipFields entry = zip_fields_at(bytes, at + 8);
    const std::size_t comment_bytes = zip_number(bytes, at + 32, 2);
    const std::size_t entry_bytes = kDirectoryEntryBytes + entry.name_bytes + entry.extra_bytes + comment_bytes;
    if (bytes.size() - at < entry_bytes) refuse("its directory is cut short");
    const std::string_view name = bytes.substr(at + kDirectoryEntryBytes, entry.name_bytes);
    if (const auto reason =
            entry_objection(entry, name, comment_bytes, zip_number(bytes, at + 34, 2), zip_number(bytes, at + 38, 4)))
      refuse(*reason);
    files_.push_back({std::string(name), entry.bytes, entry.crc, zip_number(bytes, at + 42, 4), 0});
    at += entry_bytes;
  }
  if (at != bytes.size()) refuse("its directory has more bytes than its files need");
}

// Each file begins where the one before ends, so that none lies in another.
void StoredZip::find_ends(std::uint64_t directory_begin) {
  std::sort(files_.begin(), files_.end(), [](const ZippedFile& a, const ZippedFile& b) { return a.begin < b.begin; });
  if ((files_.empty() ? directory_begin : files_.front().begin) != 0) refuse("bytes stand before its first file");
  for (std::size_t i = 0; i < files_.size(); ++i) {
    ZippedFile& file = files_[i];
    file.end = i + 1 < files_.size() ? files_[i + 1].begin : directory_begin;
    if (file.begin + kLocalHeaderBytes + file.name.size() + file.bytes > file.end)
      refuse("the file " + file.name + " reaches beyond the begin of what follows it");
  }
}

void StoredZip::sort_by_name() {
  std::erase_if(files_, [](const ZippedFile& file) { return is_folder_entry(file.name); });
  std::sort(files_.begin(), files_.end(), [](const ZippedFile& a, const ZippedFile& b) { return a.name < b.name; });
  for (std::size_t i = 1; i < files_.size(); ++i)
    if (files_[i - 1].name == files_[i].name) refuse("the file " + files_[i].name + " is there twice");
}

std::optional<std::string> StoredZip::read(std::string_view name, std::uint64_t most_bytes) const {
  const auto file = std::lower_bound(files_.begin(), files_.end(), name,
                                     [](const ZippedFile& a, std::string_view b) { return a.name < b; });
  if (file == files_.end() || file->name != name) return std::nullopt;
  if (file->bytes > most_bytes)
    refuse("the file " + file->name + " has " + std::to_string(file->bytes) + " bytes; accepted: at most " +
           std::to_string(most_bytes));
  const std::string header = bytes_at(file->begin, kLocalHeaderBytes + file->name.size());
  const ZipFields told = zip_fields_at(header, 6);
  const bool agrees = zip_number(header, 0, 4) == kHeaderMark && told.method == 0 && (told.flags & ~kUtf8Names) == 0 &&
                      told.crc == file->crc && told.bytes == file->bytes && told.stored_bytes == file->bytes &&
                      told.name_bytes == file->name.size() && header.substr(kLocalHeaderBytes) == file->name;
  const std::uint64_t begin = file->begin + header.size() + told.extra_bytes;
  if (!agrees || begin + file->bytes != file->end)
    refuse("the header of the file " + file->name + " says something else than the directory");
  std::string bytes = bytes_at(begin, file->bytes);
  if (crc32(bytes) != file->crc) refuse("the checksum of the file " + file->name + " is wrong");
  return bytes;
}

std::string stored_zip(const std::map<std::string, std::string>& files) {
  ZipRecords archive, directory;
  for (const auto& [name, content] : files) {
    if (!is_plain_path(name)) throw Error("'" + name + "' is no name of a file in a zip");
    const std::size_t begin = archive.bytes.size();
    if (content.size() > kMostZipBytes || begin + content.size() > kMostZipBytes || files.size() > kMostZippedFiles)
      throw Error("the pack is too large for a zip file: " + std::to_string(files.size()) +
                  " files; accepted: at most " + std::to_string(kMostZippedFiles) +
                  ", and 4 GB together. Build it as a folder");
    archive.add(kHeaderMark, 4).add(kZipVersion, 2).add_fields(name, content);
    archive.bytes += name;
    archive.bytes += content;
    directory.add(kDirectoryMark, 4).add(kZippedOnUnix, 2).add(kZipVersion, 2).add_fields(name, content);
    directory.add(0, 2).add(0, 2).add(0, 2).add(kZippedFileMode, 4).add(static_cast<std::uint32_t>(begin), 4);
    directory.bytes += name;
  }
  const std::size_t begin = archive.bytes.size();
  if (begin + directory.bytes.size() + kEndBytes > kMostZipBytes)
    throw Error("the pack is too large for a zip file: accepted are 4 GB. Build it as a folder");
  const auto count = static_cast<std::uint32_t>(files.size());
  archive.bytes += directory.bytes;
  archive.add(kEndMark, 4).add(0, 4).add(count, 2).add(count, 2);
  archive.add(static_cast<std::uint32_t>(directory.bytes.size()), 4).add(static_cast<std::uint32_t>(begin), 4);
  return std::move(archive.add(0, 2).bytes);
}

}  // namespace flash_attn_jit
