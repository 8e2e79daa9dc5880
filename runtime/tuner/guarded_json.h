// JSON that somebody else may have written.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json.hpp>

#include "generator/errors.h"

namespace flash_attn_jit {

// Why a text is no record, or no database: what, and where in it.
struct RecordError : Error {
  using Error::Error;
};

// Bounds beyond which a text is refused; a text's own size is the caller's to bound.
struct JsonBounds {
  int depth;           // of arrays and objects within each other
  std::size_t values;  // numbers, texts, keys and so on, between two objects that `take` took
};

// What becomes of an array's element that is an object and complete, with so many around it: true where it was taken
// and need not be kept.
using TakeObject = std::function<bool(int depth, nlohmann::json& object)>;

// Refuses, beside what is no JSON, keys that come twice. Throws RecordError, and what `take` throws.
nlohmann::json parse_guarded(std::string_view text, const JsonBounds& bounds, const TakeObject& take = {});

// An object of exactly the keys that are asked for: `end()` refuses others. Everything throws RecordError, which says
// where. What is given as a key has to live as long.
class JsonObject {
 public:
  JsonObject(const nlohmann::json& json, std::string where);

  std::string where(std::string_view key) const;  // "key.device.sm"
  const nlohmann::json& at(std::string_view key);
  JsonObject object(std::string_view key);
  const nlohmann::json& array(std::string_view key, std::size_t most);
  std::string text(std::string_view key, std::size_t most_bytes);
  std::int64_t integer(std::string_view key, std::int64_t least, std::int64_t most);
  double number(std::string_view key, double least, double most);
  std::optional<int> integer_or_null(std::string_view key, int least, int most);
  std::optional<double> number_or_null(std::string_view key, double least, double most);
  void end() const;

  // "key.device.sm is 7; accepted: ..."
  [[noreturn]] void refuse(std::string_view key, const std::string& accepted) const;

 private:
  const nlohmann::json& json_;
  std::string where_;  // empty: the text itself
  std::vector<std::string_view> asked_for_;
};

// What came, short enough for a message.
std::string shown(const nlohmann::json& json);

// A text of one of these arrays.
std::string text_in(const nlohmann::json& json, const std::string& where, std::size_t most_bytes);

// Whether a terminal shows it as it is: no control characters but line ends and tabs.
bool is_plain(std::string_view text);

// A text as a file may hold it: valid UTF-8, plain, at most so many bytes.
std::string made_plain(std::string_view text, std::size_t most_bytes);

}  // namespace flash_attn_jit
