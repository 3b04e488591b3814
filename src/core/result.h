#pragma once

#include <expected>
#include <string>
#include <utility>

namespace engram {

// What went wrong, for a person. Used at cold boundaries (start-up, configuration, files); the data
// plane uses an enum and a counter per packet instead (dataplane/drop_reason.h).
enum class ErrorCode {
  kInvalidArgument,    // what the caller gave can never work
  kNotFound,           // a file, space or device is not there
  kAlreadyExists,      // someone else holds it
  kResourceExhausted,  // memory, descriptors, room
  kPermissionDenied,   // the operating system forbids it
  kUnavailable,        // it may work later, or on another machine
  kCorrupt,            // bytes that fail their own checks
  kInternal,           // a system call failed in a way that we did not foresee
};

struct Error {
  ErrorCode code = ErrorCode::kInternal;
  // Names the field, the value and the remedy.
  std::string message;
};

template <typename T>
using Result = std::expected<T, Error>;

inline std::unexpected<Error> Fail(ErrorCode code, std::string message) {
  return std::unexpected<Error>(Error{code, std::move(message)});
}

// "what: strerror(errno_value)", as an Error whose code follows from errno_value.
std::unexpected<Error> FailErrno(const std::string& what, int errno_value);

}  // namespace engram
