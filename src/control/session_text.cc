#include "src/control/session_text.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdint>

namespace engram {

std::string SessionText(SessionId session) {
  std::array<char, 16> digits;
  digits.fill('0');
  std::array<char, 16> text;
  const auto end = std::to_chars(text.data(), text.data() + text.size(), session.value(), 16).ptr;
  const auto size = static_cast<size_t>(end - text.data());
  std::copy(text.data(), end, digits.data() + digits.size() - size);
  return {digits.data(), digits.size()};
}

std::optional<SessionId> ReadSession(std::string_view text) {
  uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value, 16);
  const bool whole = error == std::errc() && end == text.data() + text.size() && value != 0;
  return whole ? std::optional(SessionId(value)) : std::nullopt;
}

}  // namespace engram
