#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace engram {

inline constexpr uint32_t kMaxDimension = 4096;

// How a vector's numbers are written, on the wire and in slots. The values are stored:
// unchangeable.
enum class VectorDtype : uint8_t {
  kNone = 0,  // no vector (a delete)
  kF32 = 1,   // IEEE 754 binary32
  kF16 = 2,   // IEEE 754 binary16
  kBf16 = 3,  // the upper half of binary32
  kInt8 = 4,  // -128..127, times the record's scale
};

constexpr size_t ElementBytes(VectorDtype dtype) {
  switch (dtype) {
    case VectorDtype::kF32:
      return 4;
    case VectorDtype::kF16:
    case VectorDtype::kBf16:
      return 2;
    case VectorDtype::kInt8:
      return 1;
    case VectorDtype::kNone:
      break;
  }
  return 0;
}
constexpr size_t VectorBytes(VectorDtype dtype, uint32_t dimension) {
  return ElementBytes(dtype) * dimension;
}
std::string_view DtypeName(VectorDtype dtype);

// What a vector's numbers are, found while they are copied.
enum class VectorFinding : uint8_t { kOrdinary, kZero, kNotFinite };

// Copies the numbers of a vector and looks at each on the way: one pass over the bytes. `from` and
// `to` hold VectorBytes(dtype, dimension) bytes each, need no alignment and do not overlap.
VectorFinding CopyVector(VectorDtype dtype, uint32_t dimension, const std::byte* from,
                         std::byte* to);

// Writes `dimension` float32 numbers to `to` (int8: times `scale`). The numbers are finite: not
// every instruction set's conversion from f16 keeps infinities. No alignment needed.
void DecodeVector(VectorDtype dtype, uint32_t dimension, float scale, const std::byte* from,
                  float* to);

}  // namespace engram
