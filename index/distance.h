#pragma once

#include <cstddef>
#include <cstdint>

#include "src/core/observation.h"

namespace engram {

// Distances between float32 vectors: smaller is nearer.
//   cosine         1 - dot, of vectors that are stored with norm 1; 0 to 2
//   inner product  -dot; any sign
//   L2             squared Euclidean distance
// All kernels take rows as VectorStore lays them out: PaddedDimension(dimension) floats from a
// cache line on, zero beyond the dimension, so there is no remainder to handle.

inline constexpr size_t kRowFloats = 16;  // one cache line
constexpr size_t PaddedDimension(size_t dimension) {
  return (dimension + kRowFloats - 1) & ~(kRowFloats - 1);
}

// `a` and `b`: `padded_dimension` floats each, aligned to 64 bytes.
using DistanceFn = float (*)(const float* a, const float* b, size_t padded_dimension);

// The kernel for this machine. Resolve it once and keep it. kUnspecified is a bug.
DistanceFn DistanceFunction(Metric metric);

// Sum of the squares of `count` floats, no alignment needed. Infinite where it leaves float's
// range.
float SquaredNorm(const float* v, size_t count);

// Scales `v` to norm 1, exact to float's rounding for every finite vector, also of tiny or huge
// values. False, and `v` unchanged, for a zero vector. No alignment needed; every value is finite.
bool NormaliseInPlace(float* v, size_t dimension);

}  // namespace engram
