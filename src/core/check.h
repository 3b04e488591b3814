#pragma once

// CHECK guards what only a bug of ours can break. It is always on, also in release builds: a daemon
// that holds other people's memories stops rather than goes on with a broken invariant.

namespace engram {

// Prints "file:line: CHECK failed: condition: message" to standard error and aborts.
[[noreturn]] void CheckFailed(const char* file, int line, const char* condition,
                              const char* message);

}  // namespace engram

// `message` is a string literal that says which invariant broke.
#define CHECK(condition, message)                                       \
  do {                                                                  \
    if (!(condition)) [[unlikely]] {                                    \
      ::engram::CheckFailed(__FILE__, __LINE__, #condition, (message)); \
    }                                                                   \
  } while (false)
