#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "src/core/vector_dtype.h"

namespace engram {

// Nearest IEEE 754 binary16, ties to even. What is too large becomes an infinity and NaN stays NaN,
// so that the server refuses it rather than that it is stored as something else.
uint16_t HalfOfFloat(float value);

// Nearest bfloat16, ties to even; NaN stays NaN.
uint16_t Bfloat16OfFloat(float value);

// Writes `row` as `dtype` into `to`, which is resized to VectorBytes(dtype, row.size()). Returns
// the scale: 1, or for int8 the largest magnitude / 127 (1 for a zero row). An int8 row with a
// number that is not finite gets a NaN scale and zeros, which the server refuses.
float EncodeVector(VectorDtype dtype, std::span<const float> row, std::vector<std::byte>& to);

}  // namespace engram
