// The errors of the whole project. Every message names the argument, what came, what is accepted, what to do.
#pragma once

#include <stdexcept>
#include <string>

namespace flash_attn_jit {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A text that is no spec, tile or architecture.
struct SpecError : Error {
  using Error::Error;
};

// The device or the library cannot do what was asked: names the argument, the device and what is supported.
struct UnsupportedError : Error {
  using Error::Error;
};

// A bad value given by the caller.
struct ArgumentError : Error {
  using Error::Error;
};

// A bad environment variable or configuration value; names the variable.
struct ConfigError : Error {
  using Error::Error;
};

}  // namespace flash_attn_jit
