// CHECK(text == Containing("part")): prints both where it fails. (doctest before 2.4.10 has it for exceptions
// alone.)
#pragma once

#include <ostream>
#include <string>

namespace flash_attn_jit::testing {

struct Containing {
  std::string part;
  friend bool operator==(const std::string& text, const Containing& wanted) {
    return text.find(wanted.part) != std::string::npos;
  }
  friend std::ostream& operator<<(std::ostream& out, const Containing& wanted) {
    return out << "a text with \"" << wanted.part << "\"";
  }
};

}  // namespace flash_attn_jit::testing
