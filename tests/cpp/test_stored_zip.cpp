// Zip files of packs: what is written is read, and archives made to mislead are refused.
#include <doctest/doctest.h>

#include <fcntl.h>

#include <functional>
#include <random>
#include <set>

#include "runtime/cache/stored_zip.h"
#include "tests/cpp/containing.h"
#include "tests/cpp/temporary_folder.h"

using namespace flash_attn_jit;
using namespace flash_attn_jit::testing;

namespace {

constexpr std::uint64_t kAll = 1 << 20;

using Files = std::map<std::string, std::string>;

const Files kFiles = {{"a.kernel", std::string("\x7f"
                                               "ELF\0 and so on",
                                               14)},
                      {"empty", ""},
                      {"manifest.json", "{}\n"},
                      {"tuning/tesla_t4/x.json", "{\"format\": 1}"}};

StoredZip open_zip(const std::filesystem::path& path) {
  return StoredZip(Descriptor(::open(path.c_str(), O_RDONLY | O_CLOEXEC)), path);
}

struct ZipSetting {
  TemporaryFolder folder;
  std::filesystem::path path = folder / "pack.zip";

  StoredZip open(const std::string& bytes) const {
    write_all(path, bytes);
    return open_zip(path);
  }

  // Everything is read; empty where nothing is wrong.
  std::string fault_of(const std::string& bytes) const {
    try {
      const StoredZip zip = open(bytes);
      for (const ZippedFile& file : zip.files()) zip.read(file.name, kAll);
    } catch (const FileError& error) {
      CHECK(std::string(error.what()) == Containing{"pack.zip"});
      return error.what();
    }
    return "";
  }
};

void put(std::string& bytes, std::size_t at, std::uint32_t value, std::size_t size) {
  for (std::size_t i = 0; i < size; ++i) bytes.at(at + i) = static_cast<char>(value >> 8 * i & 0xff);
}

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  REQUIRE(from.size() == to.size());
  for (std::size_t at = text.find(from); at != std::string::npos; at = text.find(from, at + 1))
    text.replace(at, from.size(), to);
  return text;
}

// Where the record at the end and the first entry of the directory begin, in an archive of ours.
std::size_t end_of(const std::string& bytes) { return bytes.size() - 22; }
std::size_t directory_of(const std::string& bytes) { return bytes.find("PK\x01\x02"); }

}  // namespace

TEST_CASE("a zip gives back what was written, and is always the same") {
  const ZipSetting setting;
  const std::string bytes = stored_zip(kFiles);
  CHECK(bytes == stored_zip(kFiles));
  const StoredZip zip = setting.open(bytes);
  Files read;
  for (const ZippedFile& file : zip.files()) read[file.name] = zip.read(file.name, kAll).value();
  CHECK(read == kFiles);
  CHECK_FALSE(zip.read("b.kernel", kAll));
  CHECK_FALSE(zip.read("tuning", kAll));
  CHECK_THROWS_WITH_AS(zip.read("a.kernel", 13), doctest::Contains("at most 13"), FileError);
  CHECK(setting.open(stored_zip({})).files().empty());
}

TEST_CASE("names that lead elsewhere are none") {
  for (const char* name : {"a", "a.b", "..a", "a../b", "tuning/x.json"}) CHECK(is_plain_path(name));
  for (const std::string name : {"", "/", "/a", "a/", "a//b", ".", "..", "../a", "a/../b", "a/..", "a\\b", "c:a", "a b",
                                 "a\nb", "\xc3\xa4", "a\x7f"})
    CHECK_FALSE(is_plain_path(name));
  CHECK_FALSE(is_plain_path(std::string("a\0b", 3)));
  CHECK_FALSE(is_plain_path(std::string(256, 'a')));
  CHECK_THROWS_AS(stored_zip({{"../a", ""}}), Error);
}

TEST_CASE("hostile zips are refused with the reason") {
  const ZipSetting setting;
  const std::string good = stored_zip(kFiles);
  REQUIRE(setting.fault_of(good) == "");
  const auto edited = [&](const std::function<void(std::string&)>& edit) {
    std::string bytes = good;
    edit(bytes);
    return setting.fault_of(bytes);
  };
  const std::size_t end = end_of(good), directory = directory_of(good);

  CHECK(setting.fault_of("") == Containing{"0 bytes"});
  CHECK(setting.fault_of(std::string(100, 'x')) == Containing{"does not end"});
  CHECK(setting.fault_of(good + "tail") == Containing{"does not end"});
  CHECK(setting.fault_of("head" + good) == Containing{"directory does not lie"});
  CHECK(edited([&](std::string& b) { put(b, end + 20, 1, 2), b += "c"; }) == Containing{"does not end"});
  CHECK(edited([&](std::string& b) { put(b, end + 20, 1, 2); }) == Containing{"comment"});
  CHECK(edited([&](std::string& b) { put(b, end + 4, 1, 2); }) == Containing{"disks"});
  CHECK(edited([&](std::string& b) { put(b, end + 8, 0xffff, 2), put(b, end + 10, 0xffff, 2); }) ==
        Containing{"zip64"});
  CHECK(edited([&](std::string& b) { put(b, end + 8, 5, 2), put(b, end + 10, 5, 2); }) == Containing{"cut short"});
  CHECK(edited([&](std::string& b) { put(b, end + 8, 3, 2), put(b, end + 10, 3, 2); }) == Containing{"more bytes"});
  CHECK(edited([&](std::string& b) { put(b, end + 12, 0xffffffff, 4); }) == Containing{"directory does not lie"});

  CHECK(edited([&](std::string& b) { put(b, directory + 10, 8, 2); }) == Containing{"compressed"});
  CHECK(edited([&](std::string& b) { put(b, directory + 20, 9, 4); }) == Containing{"compressed"});
  CHECK(edited([&](std::string& b) { put(b, directory + 8, 1, 2); }) == Containing{"encrypted"});
  CHECK(edited([&](std::string& b) { put(b, directory + 8, 8, 2); }) == Containing{"encrypted"});
  CHECK(edited([&](std::string& b) { put(b, directory + 38, 0120777u << 16, 4); }) == Containing{"link"});
  CHECK(edited([&](std::string& b) { put(b, directory + 42, 1, 4); }) == Containing{"before its first file"});
  // Sizes that lie, in the directory and in the header.
  for (const std::uint32_t size : {13u, 15u, 0xfffffffeu, 0xffffffffu})
    CHECK(edited([&](std::string& b) { put(b, directory + 20, size, 4), put(b, directory + 24, size, 4); }) != "");
  CHECK(edited([&](std::string& b) { put(b, 22, 13, 4), put(b, 18, 13, 4); }) == Containing{"header"});
  CHECK(edited([&](std::string& b) { put(b, 28, 1, 2); }) == Containing{"header"});
  CHECK(edited([&](std::string& b) { b[30 + 8] ^= 1; }) == Containing{"checksum"});

  CHECK(setting.fault_of(replaced(good, "manifest.json", "../ifest.json")) == Containing{"name"});
  CHECK(setting.fault_of(replaced(good, "tuning/tesla_t4/x.json", "tuning/../../../x.json")) == Containing{"name"});
  CHECK(setting.fault_of(replaced(good, "a.kernel", "/.kernel")) == Containing{"name"});
  CHECK(setting.fault_of(replaced(stored_zip({{"a", "1"}, {"b", "2"}}), "b", "a")) == Containing{"twice"});
}

TEST_CASE("files that lie in each other are refused") {
  const ZipSetting setting;
  std::string bytes = stored_zip({{"a", "1"}, {"b", "2"}});
  const std::size_t second = bytes.find("PK\x01\x02", directory_of(bytes) + 4);
  put(bytes, second + 42, 0, 4);  // both begin at the first header
  CHECK(setting.fault_of(bytes) == Containing{"reaches beyond"});
}

TEST_CASE("a folder's entry is passed over, and one with bytes refused") {
  const ZipSetting setting;
  std::string bytes = replaced(stored_zip({{"tuning_", ""}}), "tuning_", "tuning/");
  put(bytes, directory_of(bytes) + 38, 0040755u << 16, 4);
  CHECK(setting.open(bytes).files().empty());
  bytes = replaced(stored_zip({{"tuning_", "x"}}), "tuning_", "tuning/");
  put(bytes, directory_of(bytes) + 38, 0040755u << 16, 4);
  CHECK(setting.fault_of(bytes) == Containing{"folder with bytes"});
}

TEST_CASE("damaged zips are refused or read as something whole, with fixed seeds") {
  const ZipSetting setting;
  const std::string good = stored_zip(kFiles);
  int refused = 0;
  for (unsigned seed = 0; seed < 3000; ++seed) {
    CAPTURE(seed);
    std::mt19937 random(seed);
    std::string bytes = good;
    for (unsigned edits = 1 + random() % 3; edits > 0; --edits) {
      const std::size_t at = random() % bytes.size();
      switch (random() % 4) {
        case 0:
          bytes[at] = static_cast<char>(random());
          break;
        case 1:
          put(bytes, std::min(at, bytes.size() - 4), random() % 2 ? 0xffffffff : random() % 300, 4);
          break;
        case 2:
          bytes.erase(at, random() % 30);
          break;
        case 3:
          bytes.insert(at, bytes.substr(random() % bytes.size(), random() % 60));
          break;
      }
      if (bytes.size() < 4) break;
    }
    try {
      const StoredZip zip = setting.open(bytes);
      std::set<std::string> names;
      std::size_t total = 0;
      for (const ZippedFile& file : zip.files()) {
        CHECK(is_plain_path(file.name));
        CHECK(names.insert(file.name).second);
        total += zip.read(file.name, kAll).value().size();
      }
      CHECK(total <= bytes.size());
    } catch (const FileError&) {
      ++refused;
    }
  }
  CHECK(refused > 2000);
  CHECK(refused < 3000);  // an edit of a date harms nothing
}
