#include "runtime/tuner/guarded_json.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace flash_attn_jit {
namespace {

using Json = nlohmann::json;

// What a parser reports, checked as it comes.
class Guard {
 public:
  Guard(const JsonBounds& bounds, const TakeObject& take) : bounds_(bounds), take_(take) {}

  // False: the value is not kept.
  bool operator()(int depth, Json::parse_event_t event, Json& value) {
    using Event = Json::parse_event_t;
    if (++values_ > bounds_.values) throw RecordError("it holds more values than a record can have");
    if (event == Event::object_start || event == Event::array_start) {
      if (depth >= bounds_.depth) throw RecordError("it is nested deeper than a record can be");
      open_.push_back(event == Event::array_start ? kArray : keys_.size());
    } else if (event == Event::key) {
      keys_.push_back(std::hash<std::string>()(value.get_ref<const std::string&>()));
    } else if (event == Event::array_end) {
      open_.pop_back();
    } else if (event == Event::object_end) {
      return end_object(depth, value);
    }
    return true;
  }

 private:
  static constexpr std::size_t kArray = std::numeric_limits<std::size_t>::max();

  bool end_object(int depth, Json& object) {
    const auto own = keys_.begin() + static_cast<std::ptrdiff_t>(open_.back());
    if (static_cast<std::size_t>(keys_.end() - own) != object.size()) {
      std::sort(own, keys_.end());
      for (const auto& [key, value] : object.items())
        if (const auto [first, last] = std::equal_range(own, keys_.end(), std::hash<std::string>()(key));
            last - first > 1)
          throw RecordError("the key " + shown(key) + " comes twice");
    }
    keys_.erase(own, keys_.end());
    open_.pop_back();
    const bool is_element = !open_.empty() && open_.back() == kArray;
    if (!take_ || !is_element || !take_(depth, object)) return true;
    values_ = 0;
    return false;
  }

  const JsonBounds& bounds_;
  const TakeObject& take_;
  std::size_t values_ = 0;
  std::vector<std::size_t> keys_;  // hashes: of each open object's, one behind the other
  std::vector<std::size_t> open_;  // where an open object's begin, or kArray
};

std::string number_text(double number) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", number);
  return text;
}

constexpr std::size_t kMostShown = 80;

// How many bytes the control character at `at` has; 0 where there is none.
std::size_t control_bytes_at(std::string_view text, std::size_t at) {
  const auto byte = static_cast<unsigned char>(text[at]);
  if ((byte < 0x20 && byte != '\n' && byte != '\t') || byte == 0x7f) return 1;
  // U+0080 to U+009F
  return byte == 0xc2 && at + 1 < text.size() && static_cast<unsigned char>(text[at + 1]) < 0xa0 ? 2 : 0;
}

}  // namespace

Json parse_guarded(std::string_view text, const JsonBounds& bounds, const TakeObject& take) {
  Guard guard(bounds, take);
  try {
    return Json::parse(
        text, [&guard](int depth, Json::parse_event_t event, Json& value) { return guard(depth, event, value); });
  } catch (const Json::exception& error) {
    throw RecordError(made_plain(error.what(), 300));
  }
}

JsonObject::JsonObject(const Json& json, std::string where) : json_(json), where_(std::move(where)) {
  if (!json.is_object())
    throw RecordError((where_.empty() ? "it" : where_) + " is " + shown(json) + "; accepted: an object");
}

std::string JsonObject::where(std::string_view key) const {
  return where_ + (where_.empty() ? "" : ".") + std::string(key);
}

const Json& JsonObject::at(std::string_view key) {
  const auto found = json_.find(std::string(key));
  if (found == json_.end()) throw RecordError(where(key) + " is missing");
  asked_for_.push_back(key);
  return *found;
}

JsonObject JsonObject::object(std::string_view key) { return {at(key), where(key)}; }

const Json& JsonObject::array(std::string_view key, std::size_t most) {
  const Json& value = at(key);
  if (!value.is_array()) refuse(key, "an array");
  if (value.size() > most)
    throw RecordError(where(key) + " has " + std::to_string(value.size()) + " elements; accepted: at most " +
                      std::to_string(most));
  return value;
}

std::string JsonObject::text(std::string_view key, std::size_t most_bytes) {
  return text_in(at(key), where(key), most_bytes);
}

std::int64_t JsonObject::integer(std::string_view key, std::int64_t least, std::int64_t most) {
  const Json& value = at(key);
  const bool fits =
      value.is_number_integer() && !(value.is_number_unsigned() && value.get<std::uint64_t>() > INT64_MAX);
  if (!fits || value.get<std::int64_t>() < least || value.get<std::int64_t>() > most)
    refuse(key, "a whole number from " + std::to_string(least) + " to " + std::to_string(most));
  return value.get<std::int64_t>();
}

double JsonObject::number(std::string_view key, double least, double most) {
  const Json& value = at(key);
  if (!value.is_number() || !(value.get<double>() >= least && value.get<double>() <= most))
    refuse(key, "a number from " + number_text(least) + " to " + number_text(most));
  return value.get<double>();
}

std::optional<int> JsonObject::integer_or_null(std::string_view key, int least, int most) {
  if (!at(key).is_null()) return static_cast<int>(integer(key, least, most));
  return std::nullopt;
}

std::optional<double> JsonObject::number_or_null(std::string_view key, double least, double most) {
  if (!at(key).is_null()) return number(key, least, most);
  return std::nullopt;
}

void JsonObject::end() const {
  for (const auto& [key, value] : json_.items())
    if (std::find(asked_for_.begin(), asked_for_.end(), key) == asked_for_.end())
      throw RecordError(where(shown(key)) + " is not known");
}

void JsonObject::refuse(std::string_view key, const std::string& accepted) const {
  throw RecordError(where(key) + " is " + shown(json_.at(std::string(key))) + "; accepted: " + accepted);
}

std::string shown(const Json& json) {
  if (json.is_structured()) return json.is_array() ? "an array" : "an object";
  const std::string text = json.dump(-1, ' ', true, Json::error_handler_t::replace);  // escapes what is not ASCII
  return text.size() <= kMostShown ? text : text.substr(0, kMostShown) + "...";
}

std::string text_in(const Json& json, const std::string& where, std::size_t most_bytes) {
  if (!json.is_string()) throw RecordError(where + " is " + shown(json) + "; accepted: a text");
  const std::string& text = json.get_ref<const std::string&>();
  if (text.size() > most_bytes)
    throw RecordError(where + " has " + std::to_string(text.size()) + " bytes; accepted: at most " +
                      std::to_string(most_bytes));
  if (!is_plain(text))
    throw RecordError(where + " is " + shown(json) + "; accepted: a text without control characters");
  return text;
}

bool is_plain(std::string_view text) {
  for (std::size_t i = 0; i < text.size(); ++i)
    if (control_bytes_at(text, i) > 0) return false;
  return true;
}

std::string made_plain(std::string_view text, std::size_t most_bytes) {
  const bool is_ascii = std::all_of(text.begin(), text.end(), [](char c) { return static_cast<signed char>(c) >= 0; });
  std::string valid(text);
  if (!is_ascii)
    valid = Json::parse(Json(valid).dump(-1, ' ', false, Json::error_handler_t::replace)).get<std::string>();
  std::string plain;
  for (std::size_t i = 0; i < valid.size(); ++i) {
    const std::size_t control = control_bytes_at(valid, i);
    plain += control > 0 ? ' ' : valid[i];
    if (control > 1) ++i;
  }
  if (plain.size() <= most_bytes) return plain;
  std::size_t end = most_bytes;
  while (end > 0 && (static_cast<unsigned char>(plain[end]) & 0xc0) == 0x80) --end;  // within a character
  return plain.substr(0, end);
}

}  // namespace flash_attn_jit
