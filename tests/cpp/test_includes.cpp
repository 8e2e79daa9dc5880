// The road has one direction: no include runs back up it.
#include <doctest/doctest.h>

#include <filesystem>
#include <map>
#include <regex>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "runtime/system/files.h"

using namespace flash_attn_jit;

namespace {

// From the ground up. A file may include its own folder's and those of lower floors; folders of one floor do not know
// each other.
const std::map<std::string, int> kFloors = {
    {"templates", 0},        {"generator", 1},       {"runtime/system", 2}, {"runtime/request", 3},
    {"runtime/cuda", 4},     {"runtime/compile", 5}, {"runtime/cache", 6},  {"runtime/interpreter", 6},
    {"runtime/model", 6},    {"runtime/library", 7}, {"runtime/tuner", 8},  {"runtime/launch", 9},
    {"runtime/program", 10}, {"python", 10}};

// The families' files are the generator's.
std::string room_of(const std::string& path) {
  const std::string folder = path.substr(0, path.rfind('/'));
  return folder == "generator/families" ? "generator" : folder;
}

using Sources = std::map<std::string, std::string>;  // path -> text

struct Include {
  std::string from, to;  // paths
  std::string where;     // "runtime/cuda/driver.h:14: #include ..."
};

std::string folder_of(const std::string& path) { return path.substr(0, path.rfind('/')); }

std::vector<Include> includes_of(const Sources& sources) {
  static const std::regex kInclude("\\s*#\\s*include\\s*\"([^\"]+)\".*");
  std::vector<Include> includes;
  for (const auto& [path, text] : sources) {
    std::istringstream lines(text);
    std::string line;
    for (int number = 1; std::getline(lines, line); ++number) {
      std::smatch match;
      if (!std::regex_match(line, match, kInclude)) continue;
      const std::string name = match[1];
      const bool is_sibling = name.find('/') == std::string::npos;
      includes.push_back(
          {path, is_sibling ? folder_of(path) + "/" + name : name, path + ":" + std::to_string(number) + ": " + line});
    }
  }
  return includes;
}

std::vector<std::string> arrows_back_up(const Sources& sources) {
  std::vector<std::string> found;
  for (const Include& include : includes_of(sources)) {
    const std::string from = room_of(include.from), to = room_of(include.to);
    for (const std::string& folder : {from, to})
      if (!kFloors.contains(folder)) found.push_back(include.where + ": " + folder + " has no floor");
    if (from == to || !kFloors.contains(from) || !kFloors.contains(to)) continue;
    if (kFloors.at(to) >= kFloors.at(from)) found.push_back(include.where + ": " + from + " does not know " + to);
  }
  return found;
}

// A header and its source file are one.
std::string unit_of(const std::string& path) { return path.substr(0, path.rfind('.')); }

std::vector<std::string> circles(const Sources& sources) {
  std::map<std::string, std::vector<Include>> leaving;
  for (const Include& include : includes_of(sources))
    if (unit_of(include.from) != unit_of(include.to)) leaving[unit_of(include.from)].push_back(include);
  std::vector<std::string> found;
  for (const auto& entry : leaving)
    for (const Include& first : entry.second) {
      std::set<std::string> reached;
      std::vector<std::string> next{unit_of(first.to)};
      while (!next.empty()) {
        const std::string unit = next.back();
        next.pop_back();
        if (!reached.insert(unit).second) continue;
        for (const Include& include : leaving[unit]) next.push_back(unit_of(include.to));
      }
      if (reached.contains(entry.first)) found.push_back(first.where + ": leads back to " + entry.first);
    }
  return found;
}

Sources project_sources() {
  const std::filesystem::path root = FLASH_ATTN_JIT_SOURCE_DIR;
  Sources sources;
  for (const char* folder : {"templates", "generator", "runtime", "python"})
    for (const auto& entry : std::filesystem::recursive_directory_iterator(root / folder)) {
      const std::string kind = entry.path().extension();
      if (kind == ".h" || kind == ".cpp" || kind == ".cuh")
        sources[entry.path().lexically_relative(root)] = read_file(entry.path()).value();
    }
  return sources;
}

}  // namespace

TEST_CASE("no include runs back up the road, and no files include each other") {
  const Sources sources = project_sources();
  CHECK(includes_of(sources).size() > 200);
  for (const std::string& arrow : arrows_back_up(sources)) FAIL_CHECK(arrow);
  for (const std::string& circle : circles(sources)) FAIL_CHECK(circle);
}

TEST_CASE("an include that runs back up and files that include each other are found") {
  using Found = std::vector<std::string>;
  CHECK(arrows_back_up({{"runtime/cuda/driver.h", "\n#include \"runtime/launch/process.h\"\n"}}) ==
        Found{"runtime/cuda/driver.h:2: #include \"runtime/launch/process.h\": runtime/cuda does not know "
              "runtime/launch"});
  CHECK(arrows_back_up({{"runtime/cache/kernel_cache.cpp", "#include \"runtime/interpreter/report.h\""}}).size() == 1);
  CHECK(arrows_back_up({{"runtime/system/log.cpp", "#include \"tests/cpp/containing.h\""}}).size() == 1);
  CHECK(arrows_back_up({{"runtime/launch/process.h", "#include \"runtime/cuda/driver.h\"\n#include \"device.h\""}})
            .empty());
  CHECK(circles({{"generator/a.h", "#include \"generator/b.h\""}, {"generator/b.cpp", "#include \"generator/a.h\""}}) ==
        Found{"generator/a.h:1: #include \"generator/b.h\": leads back to generator/a",
              "generator/b.cpp:1: #include \"generator/a.h\": leads back to generator/b"});
  CHECK(circles({{"generator/a.cpp", "#include \"generator/a.h\""}, {"generator/a.h", ""}}).empty());
}
