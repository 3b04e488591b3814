#pragma once

#include <cstdint>
#include <expected>
#include <string>
#include <string_view>

#include <google/protobuf/timestamp.pb.h>

// What is wrong with a request, said so that its author can mend it.

namespace engram {

// Why a request is not taken: INVALID_ARGUMENT.
struct CallError {
  std::string message;  // names field, value and what was expected
};
using Asked = std::expected<void, CallError>;

std::unexpected<CallError> Invalid(std::string message);

// In quotes, cut where it is long. What came as a header may be any bytes; a message is text.
std::string Quoted(std::string_view text);

// Nanoseconds since 1970, `missing` where the time is not there.
std::expected<int64_t, CallError> CheckTime(bool has, const google::protobuf::Timestamp& time,
                                            int64_t missing, const std::string& field);

}  // namespace engram
