// The errors of the whole project. Every message names the argument, what came, what is accepted, what to do.
#pragma once

#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

namespace flash_attn_jit {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A text that is no spec, tile or architecture.
struct SpecError : Error {
  using Error::Error;
};

// Why an argument is refused, in the parts of the message.
struct Refusal {
  std::string argument;  // its name
  std::string came;      // of it: "has shape (2, 8)"
  std::string accepted;
  std::string advice = "";  // what to do about it, where that helps

  // "q has shape (2, 8); accepted: 4 dimensions. Use q.unsqueeze(0)"
  std::string text() const {
    return argument + " " + came + "; accepted: " + accepted + (advice.empty() ? "" : ". " + advice);
  }
};

// An error about an argument, with the parts of its message where it has them.
struct RefusalError : Error {
  explicit RefusalError(const std::string& text) : Error(text) {}
  explicit RefusalError(Refusal parts) : Error(parts.text()), refusal(std::move(parts)) {}

  std::optional<Refusal> refusal;
};

// The device or the library cannot do what was asked: names the argument, the device and what is supported.
struct UnsupportedError : RefusalError {
  using RefusalError::RefusalError;
};

// A bad value given by the caller.
struct ArgumentError : RefusalError {
  using RefusalError::RefusalError;
};

// A bad environment variable or configuration value; names the variable.
struct ConfigError : Error {
  using Error::Error;
};

}  // namespace flash_attn_jit
