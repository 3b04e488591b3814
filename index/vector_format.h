#pragma once

#include <cstddef>
#include <cstdint>

#include "index/distance.h"
#include "src/core/observation.h"

namespace engram {

// How a vector of one space lies in memory, and how far two of them are apart.
//
// A row is PaddedDimension(precision, dimension) elements, zero beyond the dimension, from a cache
// line on, with int8 from a quarter of a line on:
//   f32   the numbers as they are
//   bf16  each rounded to the nearest bf16, ties to even; one beyond the largest finite bf16
//   becomes
//         that one
//   int8  round(number / step), with step = the largest magnitude / 127, then an Int8Trailer. Under
//         cosine the row's scale is not the step but 1 / norm of the int8 numbers, so that the
//         stored vector has norm 1 too; else the scale is the step. A zero vector has scale 0.
// The same vector gives the same bytes on every machine.
//
// Thread safety: constant after construction.
class VectorFormat {
 public:
  // `dimension` is 1 to kMaxDimension; neither precision nor metric is kUnspecified.
  VectorFormat(Precision precision, Metric metric, uint32_t dimension);

  Precision precision() const { return precision_; }
  Metric metric() const { return metric_; }
  uint32_t dimension() const { return dimension_; }
  size_t padded_dimension() const { return padded_dimension_; }
  // A multiple of 64, with int8 of 16.
  size_t row_bytes() const { return row_bytes_; }

  DistanceFn distance() const { return distance_; }
  // nullptr where several at once are no faster.
  DistancesFn distances() const { return distances_; }
  // Of two rows that Encode wrote, aligned as it says; see index/distance.h.
  float Distance(const std::byte* a, const std::byte* b) const {
    return distance_(a, b, padded_dimension_);
  }

  // Writes the whole row, padding included. `v`: `dimension` floats, all finite, of norm 1 under
  // cosine (NormaliseInPlace), no alignment needed. `row`: row_bytes(), aligned to 64 bytes, with
  // int8 to 16.
  void Encode(const float* v, std::byte* row) const;
  // What is stored, as `dimension` floats; every one is finite. No alignment of `v` needed.
  void Decode(const std::byte* row, float* v) const;
  // Adds the dimension() numbers that Decode would give, before it rounds them, to `sums`. Of int8
  // rows only.
  void AddDecoded(const std::byte* row, double* sums) const;

 private:
  void EncodeInt8(const float* v, std::byte* row) const;

  Precision precision_;
  Metric metric_;
  uint32_t dimension_;
  size_t padded_dimension_;
  size_t row_bytes_;
  DistanceFn distance_;
  DistancesFn distances_;
};

}  // namespace engram
