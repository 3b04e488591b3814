#include "src/control/call_faults.h"

#include <array>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <limits>
#include <span>
#include <utility>

#include "src/control/memory_codec.h"

namespace engram {

namespace {

constexpr size_t kQuotedBytesMax = 64;  // of a value that an error repeats

Asked CheckVectorSize(size_t size, std::string_view field) {
  if (size >= 1 && size <= kMaxDimension) return {};
  return Invalid(std::string(field) + ": " + std::to_string(size) + " values; expected 1 to 4096");
}

// kNone where it is none.
VectorDtype DtypeOf(v1::VectorType type) {
  switch (type) {
    case v1::VECTOR_TYPE_F32:
      return VectorDtype::kF32;
    case v1::VECTOR_TYPE_F16:
      return VectorDtype::kF16;
    case v1::VECTOR_TYPE_BF16:
      return VectorDtype::kBf16;
    case v1::VECTOR_TYPE_INT8:
      return VectorDtype::kInt8;
    default:
      return VectorDtype::kNone;
  }
}

std::expected<VectorRef, CallError> CheckPacked(const v1::PackedVector& packed,
                                                const std::string& field) {
  VectorRef vector;
  vector.dtype = DtypeOf(packed.type());
  if (vector.dtype == VectorDtype::kNone) {
    return Invalid(field + ".type: " + std::to_string(packed.type()) +
                   "; expected a VectorType, 1 to 4");
  }
  const size_t each = ElementBytes(vector.dtype);
  if (packed.values().size() % each != 0) {
    return Invalid(field + ".values: " + std::to_string(packed.values().size()) +
                   " bytes; expected " + std::to_string(each) + " for each number");
  }
  const size_t size = packed.values().size() / each;
  if (auto checked = CheckVectorSize(size, field + ".values"); !checked) {
    return std::unexpected(checked.error());
  }
  if (vector.dtype == VectorDtype::kInt8) {
    // The largest that keeps 128 * scale finite. Written so that NaN fails.
    if (!(packed.scale() > 0 && packed.scale() <= std::numeric_limits<float>::max() / 128)) {
      return Invalid(field + ".scale: " + NumberText(packed.scale()) +
                     "; expected a finite number above 0");
    }
    vector.scale = packed.scale();
  }
  vector.dimension = static_cast<uint32_t>(size);
  vector.bytes = reinterpret_cast<const std::byte*>(packed.values().data());
  return vector;
}

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
                                            int64_t missing, std::string_view field) {
  if (!has) return missing;
  if (const auto unix_ns = ToUnixNs(time)) return *unix_ns;
  return Invalid(std::string(field) + ": " + std::to_string(time.seconds()) + " s and " +
                 std::to_string(time.nanos()) +
                 " ns; expected a time of the years 1678 to 2261, with 0 to 999999999 ns");
}

std::string NumberText(double number) {
  if (std::isnan(number)) return "nan";
  std::array<char, 32> text{};
  const auto end =
      std::to_chars(text.data(), text.data() + text.size(), static_cast<float>(number)).ptr;
  return {text.data(), end};
}

Asked CheckId(std::string_view id, std::string_view field) {
  if (!id.empty() && id.size() <= kMaxIdBytes) return {};
  if (id.empty()) return Invalid(std::string(field) + ": empty; expected 1 to 256 bytes");
  return Invalid(std::string(field) + ": " + std::to_string(id.size()) +
                 " bytes; expected 1 to 256");
}

Asked CheckFinite(float value, std::string_view field) {
  if (std::isfinite(value)) return {};
  return Invalid(std::string(field) + ": " + NumberText(value) + "; expected a finite number");
}

std::expected<float, CallError> CheckConfidence(bool has, const v1::Confidence& confidence,
                                                float missing, std::string_view field) {
  if (has && !v1::ConfidenceCategory_IsValid(confidence.category())) {
    return Invalid(std::string(field) + ".category: " + std::to_string(confidence.category()) +
                   "; expected a ConfidenceCategory, 0 to 5");
  }
  const float value = has ? ValueOf(confidence) : missing;
  // Written so that NaN fails.
  if (value >= 0 && value <= 1) return value;
  return Invalid(std::string(field) + ".value: " + NumberText(value) + "; expected 0 to 1");
}

std::expected<VectorRef, CallError> CheckVector(
    const google::protobuf::RepeatedField<float>& numbers, bool has_packed,
    const v1::PackedVector& packed, std::string_view field, std::string_view packed_field) {
  if (has_packed && !numbers.empty()) {
    return Invalid(std::string(packed_field) + ": set beside " + std::string(field) +
                   "; expected one of them");
  }
  if (has_packed) return CheckPacked(packed, std::string(packed_field));
  const auto size = static_cast<size_t>(numbers.size());
  if (auto checked = CheckVectorSize(size, field); !checked) {
    return std::unexpected(checked.error());
  }
  return VectorRef(std::span(numbers.data(), size));
}

}  // namespace engram
