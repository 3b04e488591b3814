#include "src/control/call_faults.h"

#include <array>
#include <cstdio>
#include <utility>

#include "src/control/memory_codec.h"

namespace engram {

namespace {

constexpr size_t kQuotedBytesMax = 64;  // of a value that an error repeats

}  // namespace

std::unexpected<CallError> Invalid(std::string message) {
  return std::unexpected(CallError{std::move(message)});
}

std::string Quoted(std::string_view text) {
  std::string quoted = "\"";
  std::string_view left = text.substr(0, kQuotedBytesMax);
  // Not within a character of UTF-8.
  if (left.size() < text.size()) {
    while (!left.empty() && (static_cast<uint8_t>(text[left.size()]) & 0xC0) == 0x80) {
      left.remove_suffix(1);
    }
  }
  for (;;) {
    const size_t good = Utf8Prefix(left);
    quoted.append(left.substr(0, good));
    if (good == left.size()) break;
    std::array<char, 8> hex{};
    std::snprintf(hex.data(), hex.size(), "\\x%02x", static_cast<uint8_t>(left[good]));
    quoted.append(hex.data());
    left.remove_prefix(good + 1);
  }
  return quoted.append(text.size() > kQuotedBytesMax ? "...\"" : "\"");
}

std::expected<int64_t, CallError> CheckTime(bool has, const google::protobuf::Timestamp& time,
                                            int64_t missing, const std::string& field) {
  if (!has) return missing;
  if (const auto unix_ns = ToUnixNs(time)) return *unix_ns;
  return Invalid(field + ": " + std::to_string(time.seconds()) + " s and " +
                 std::to_string(time.nanos()) +
                 " ns; expected a time of the years 1678 to 2261, with 0 to 999999999 ns");
}

}  // namespace engram
