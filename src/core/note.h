#pragma once

#include <cstdint>
#include <functional>
#include <string>

namespace engram {

// How much a line of the log asks of a person.
enum class Severity : uint8_t {
  kInfo,     // nothing
  kWarning,  // to look at it when there is time
  kError,    // to act: something is lost, refused, or about to be
};

// A line for the log. It need not say of itself that it is an error.
struct Note {
  Severity severity = Severity::kInfo;
  std::string text;
};
using NoteFn = std::function<void(const Note&)>;

}  // namespace engram
