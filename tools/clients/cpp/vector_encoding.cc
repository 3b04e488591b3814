#include "tools/clients/cpp/vector_encoding.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "src/core/check.h"

namespace engram {

namespace {

constexpr uint32_t kFloatMagnitude = 0x7FFFFFFF;
constexpr uint32_t kFloatInfinity = 0x7F800000;

template <typename T, typename Convert>
void WriteEach(std::span<const float> row, std::vector<std::byte>& to, const Convert& convert) {
  for (size_t i = 0; i < row.size(); ++i) {
    const T value = convert(row[i]);
    std::memcpy(to.data() + i * sizeof(T), &value, sizeof(T));
  }
}

float EncodeInt8(std::span<const float> row, std::vector<std::byte>& to) {
  float largest = 0;
  bool finite = true;
  for (const float value : row) {
    finite = finite && std::isfinite(value);
    largest = std::max(largest, std::fabs(value));
  }
  if (!finite) {
    std::ranges::fill(to, std::byte{0});
    return std::numeric_limits<float>::quiet_NaN();
  }
  // A row of numbers so small that the scale would be zero is a zero row.
  const float scale = largest / 127;
  if (!std::isnormal(scale)) {
    std::ranges::fill(to, std::byte{0});
    return 1;
  }
  WriteEach<int8_t>(row, to, [scale](float value) {
    return static_cast<int8_t>(std::clamp(std::lrint(value / scale), -127L, 127L));
  });
  return scale;
}

}  // namespace

uint16_t HalfOfFloat(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & kFloatMagnitude;
  if (magnitude > kFloatInfinity) return sign | 0x7E00;
  // 65,520 lies halfway between the largest half and the next power of two: from there on it is
  // infinite.
  if (magnitude >= std::bit_cast<uint32_t>(65'520.0f)) return sign | 0x7C00;
  if (magnitude < std::bit_cast<uint32_t>(0x1p-14f)) {
    // Subnormal: adding 0.5 puts the unit of 2^-24 into the last place, rounded by the hardware.
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(
        sign | (std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(0.5f)));
  }
  // Exponent bias 127 becomes 15; 13 bits of the fraction are rounded off.
  const uint32_t odd = (magnitude >> 13) & 1;
  return static_cast<uint16_t>(sign | ((magnitude - (112u << 23) + 0xFFF + odd) >> 13));
}

uint16_t Bfloat16OfFloat(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  if ((bits & kFloatMagnitude) > kFloatInfinity) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

float EncodeVector(VectorDtype dtype, std::span<const float> row, std::vector<std::byte>& to) {
  to.resize(VectorBytes(dtype, static_cast<uint32_t>(row.size())));
  switch (dtype) {
    case VectorDtype::kF32:
      std::memcpy(to.data(), row.data(), to.size());
      return 1;
    case VectorDtype::kF16:
      WriteEach<uint16_t>(row, to, HalfOfFloat);
      return 1;
    case VectorDtype::kBf16:
      WriteEach<uint16_t>(row, to, Bfloat16OfFloat);
      return 1;
    case VectorDtype::kInt8:
      return EncodeInt8(row, to);
    case VectorDtype::kNone:
      break;
  }
  CHECK(false, "a vector is written as f32, f16, bf16 or int8");
  return 0;
}

}  // namespace engram
