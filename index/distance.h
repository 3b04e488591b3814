#pragma once

#include <cstddef>
#include <cstdint>

#include "src/core/check.h"
#include "src/core/observation.h"

namespace engram {

// Distances between vectors of one space: smaller is nearer.
//   cosine         1 - dot, of vectors that are stored with norm 1; 0 to 2
//   inner product  -dot; any sign
//   L2             squared Euclidean distance
// All kernels take rows as VectorFormat writes them: PaddedDimension(precision, dimension)
// elements, zero beyond the dimension, so there is no remainder to handle. Each takes its two rows
// in either order with the same result, bit for bit.
//
// f32 and bf16 rows are summed in float: beyond its range a sum is infinite, or not a number where
// terms of both signs leave it. bf16 rows are not scaled again after their rounding, so the cosine
// distance of a row to itself is 0 only to 2^-7 at worst, 1e-4 for usual vectors.
// int8 rows are summed exactly in int32 and scaled in double; the result is clamped to what float
// holds, so it is always finite, and L2 is never negative.

// Elements of a row in memory: whole cache lines.
constexpr size_t PaddedDimension(Precision precision, size_t dimension) {
  const auto padded = [dimension](size_t per_line) {
    return (dimension + per_line - 1) & ~(per_line - 1);
  };
  switch (precision) {
    case Precision::kF32:
      return padded(16);
    case Precision::kBf16:
      return padded(32);
    case Precision::kInt8:
      return padded(64);
    case Precision::kUnspecified:
      break;
  }
  CHECK(false, "a space has a precision");
}

// What follows the padded numbers of an int8 row. A stored number is the int8 times `scale`.
// Double, because no finite float vector leaves its range: neither the step of the smallest
// denormals nor the squared norm of the largest values.
struct Int8Trailer {
  double scale;     // 0 for a zero vector
  int32_t sum;      // of the int8 numbers
  int32_t squares;  // the sum of theirs

  // Of the stored numbers.
  double squared_norm() const { return scale * scale * squares; }
};
// A quarter of a line. So three of four int8 rows begin inside a line; they touch as many lines as
// one that begins with a line.
static_assert(sizeof(Int8Trailer) == 16);
// Rows begin at a multiple of this: of f32 and bf16, which are whole lines, at one of 64.
inline constexpr size_t kRowAlignment = 16;

// `a` and `b`: rows of one format, aligned to 64 bytes, int8 ones to 16.
using DistanceFn = float (*)(const std::byte* a, const std::byte* b, size_t padded_dimension);
// The distances from `query` to `count` rows, which are what a DistanceFn gives for each.
using DistancesFn = void (*)(const std::byte* query, const std::byte* const* rows, size_t count,
                             size_t padded_dimension, float* out);

// The kernel for this machine. Resolve it once and keep it. kUnspecified is a bug.
DistanceFn DistanceFunction(Precision precision, Metric metric);
// The same for several int8 rows at once: a third of the time of one after the other, where they
// are in cache.
DistancesFn Int8DistancesFunction(Metric metric);

// Sum of the squares of `count` floats, no alignment needed. Infinite where it leaves float's
// range.
float SquaredNorm(const float* v, size_t count);

// Scales `v` to norm 1, exact to float's rounding for every finite vector, also of tiny or huge
// values. False, and `v` unchanged, for a zero vector. No alignment needed; every value is finite.
bool NormaliseInPlace(float* v, size_t dimension);

}  // namespace engram
