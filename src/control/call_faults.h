#pragma once

#include <cstdint>
#include <expected>
#include <string>
#include <string_view>

#include <google/protobuf/repeated_field.h>
#include <google/protobuf/timestamp.pb.h>

#include "engram/v1/memory.pb.h"
#include "src/control/gateway_call.h"

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

// As short as a float32 can be read back.
std::string NumberText(double number);

// The checks that several requests share; `field` is the name of what is checked.

// Nanoseconds since 1970, `missing` where the time is not there.
std::expected<int64_t, CallError> CheckTime(bool has, const google::protobuf::Timestamp& time,
                                            int64_t missing, std::string_view field);
Asked CheckId(std::string_view id, std::string_view field);
Asked CheckFinite(float value, std::string_view field);
// The value of `confidence`, `missing` where it is not there.
std::expected<float, CallError> CheckConfidence(bool has, const v1::Confidence& confidence,
                                                float missing, std::string_view field);
// A vector that is there once, as numbers or packed, with 1 to kMaxDimension numbers; it points
// into these. The packed one's field is `packed_field`.
std::expected<VectorRef, CallError> CheckVector(
    const google::protobuf::RepeatedField<float>& numbers, bool has_packed,
    const v1::PackedVector& packed, std::string_view field, std::string_view packed_field);

}  // namespace engram
