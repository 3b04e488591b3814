#pragma once

#include <cstddef>
#include <cstdint>

#include "index/distance.h"
#include "index/random_rotation.h"
#include "src/core/arena_heap.h"
#include "src/core/observation.h"

namespace engram {

// Codes of one bit a dimension and unbiased estimates of the metric's distance from them.
//
// Source: RaBitQ (Gao and Long, "RaBitQ: Quantizing high-dimensional vectors with a theoretical
// error bound for approximate nearest neighbor search", SIGMOD 2024).
//
// With c the centroid and P the rotation, a vector x has the residual r = P(x - c) and a query q
// has s = P(q - c). The code is the signs of r. The estimate of <x - c, q - c> = <r, s> is
//   |r|^2 / sum_i |r_i| * sum_i sign(r_i) * s_i,
// whose error is about 0.75 / sqrt(bits) * |x - c| * |q - c| at random directions, with no bias
// over random rotations. A distance is estimated as
//   A + offset + F * sum_i sign(r_i) * s_i,  A and F of the row, offset of the query:
//   L2             A = |r|^2,        offset = |s|^2,      F = -2 * |r|^2 / sum_i |r_i|
//   cosine         half of L2, as all vectors have norm 1
//   inner product  A = -<x - c, c>,  offset = -<q, c>,    F = -|r|^2 / sum_i |r_i|
// An estimate may be below 0 where no distance is. It is always finite: factors and results are
// clamped to what float holds. The row of x = c has A alone, F = 0.
//
// A row, row_bytes() from a cache line on:
//   bits() / 8 bytes of code: bit i % 8 of byte i / 8 is 1 where r_i is above 0
//   float A, float F, float number of ones
//   zeros up to the next cache line
// The same vector gives the same code on every machine (little-endian); A and F agree to rounding.
//
// A query has s in 4 bits a dimension, s_i = low + step * u_i, as four bit planes, so that the sum
// takes one AND and one population count for each plane and register. Rounding s so adds 4 % to the
// error's variance. Its layout is the kernels' affair: planes are zero beyond bits(), so that a
// kernel may take whole lines of a row, factors included.
//
// Thread safety: constant after creation.
class RabitqFormat {
 public:
  // `centroid`: `dimension` finite floats, no alignment needed. The metric is not kUnspecified and
  // `dimension` is 1 to kMaxDimension. The format lies in one block of the heap; nullptr where the
  // heap is spent.
  static RabitqFormat* Create(Metric metric, uint32_t dimension, const float* centroid,
                              uint64_t seed, ArenaHeap* heap);
  // `format`: of Create with the same heap, or nullptr.
  static void Destroy(RabitqFormat* format, ArenaHeap* heap);

  RabitqFormat(const RabitqFormat&) = delete;
  RabitqFormat& operator=(const RabitqFormat&) = delete;

  Metric metric() const { return metric_; }
  uint32_t dimension() const { return rotation_.dimension(); }
  // dimension() floats.
  const float* centroid() const { return centroid_; }
  float squared_norm_of_centroid() const { return static_cast<float>(squared_norm_of_centroid_); }
  // Of a code: the rotated dimension, a multiple of 64.
  size_t bits() const { return bits_; }
  // A multiple of 64.
  size_t row_bytes() const { return row_bytes_; }
  // A multiple of 64.
  size_t query_bytes() const { return query_bytes_; }
  // What the format takes of its heap.
  size_t heap_bytes() const;

  // All of these take `v` as dimension() finite floats, no alignment needed, of norm 1 under
  // cosine. None allocates; each takes up to 32 KiB of stack.

  // Writes the whole row, padding included. `row`: row_bytes(), aligned to 64 bytes.
  void Encode(const float* v, std::byte* row) const;
  // `query`: query_bytes(), aligned to 64 bytes.
  void EncodeQuery(const float* v, std::byte* query) const;
  // |v - c|^2, what an estimate's error grows with the root of.
  float SquaredResidual(const float* v) const;

  // Of a query and a row, in this order, each aligned to 64 bytes; its last argument is bits().
  // Resolved once; the same for all formats of this machine.
  DistanceFn distance() const { return distance_; }
  // Several rows at once cost less each; the results are the same bit for bit. The caller
  // prefetches.
  DistancesFn distances() const { return distances_; }

 private:
  struct Residual;

  RabitqFormat(Metric metric, uint32_t dimension, uint64_t seed, float* centroid);
  void TakeResidual(const float* v, Residual* residual) const;
  void WriteRow(const Residual& residual, std::byte* row) const;
  float OffsetOf(const Residual& residual) const;

  RandomRotation rotation_;
  Metric metric_;
  size_t bits_;
  size_t row_bytes_;
  size_t query_bytes_;
  float* centroid_;            // padded with zeros to bits_
  float largest_of_centroid_;  // magnitude
  double squared_norm_of_centroid_;
  DistanceFn distance_;
  DistancesFn distances_;
};

}  // namespace engram
