#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "src/core/vector_dtype.h"

namespace engram {

// A random rotation of vectors: orthonormal, so that norms and inner products stay as they are, and
// such that the coordinates of any vector come out alike in size, a hot one included. It costs
// O(n log n) additions and O(n) multiplications.
//
// Source: the FHT-Kac rotation of the RaBitQ library (Gao et al., "Practical and asymptotically
// optimal quantization of high-dimensional vectors in Euclidean space", SIGMOD 2025), which is
// Ailon and Chazelle's fast Johnson-Lindenstrauss transform (2006) with steps of Kac's random walk
// (1956).
//
// 1. The vector is padded with zeros to n, a multiple of 64.
// 2. Twice:
//    a. flip the sign of each coordinate at random (by the seed), then a Walsh-Hadamard transform
//       of the first 2^k coordinates, the largest power of two within n;
//    b. flip again, then a transform of the last 2^k;
//    c. where 2^k < n: flip half of them again; then coordinate pairs (i, i + n/2) become their sum
//       and their difference over sqrt(2), which evens out what the transforms have in them.
//
// The library pairs after each transform, without flips. Then half of a hot coordinate may move
// each time to where the next transform does not reach: at n = 768 a quarter of it was left in one
// place. And where n = 3 * 2^(k-1), pairs that no flip has made independent all have the same sign,
// so that one half gets all.
//
// Each output is the same tree of operations on every instruction set: equal bits on all machines.
//
// Thread safety: constant after construction.
class RandomRotation {
 public:
  // n for a dimension.
  static constexpr size_t RotatedDimension(size_t dimension) {
    return (dimension + 63) & ~size_t{63};
  }

  // `dimension` is 1 to kMaxDimension. The same dimension and seed give the same rotation.
  RandomRotation(uint32_t dimension, uint64_t seed);

  uint32_t dimension() const { return dimension_; }
  // A multiple of 64.
  size_t rotated_dimension() const { return rotated_dimension_; }

  // `v`: dimension() finite floats, no alignment needed, with a norm of at most 1e35. `rotated`:
  // rotated_dimension() floats, aligned to 64 bytes; apart from `v`. Right to about 1e-6 of the
  // norm.
  void Rotate(const float* v, float* rotated) const;
  // The same for a vector that lies padded with zeros in `v`, which becomes what it is rotated to.
  void RotateInPlace(float* v) const;

 private:
  static constexpr size_t kFlips = 6;
  // Signs lie so that 16 neighbouring floats find theirs in one bit of 16 neighbouring words: that
  // of float 512 * c + 16 * g + l is bit 31 - g of word 16 * c + l.
  static constexpr size_t kSignWords = kMaxDimension / 32;

  uint32_t dimension_;
  size_t rotated_dimension_;
  size_t transformed_;  // 2^k
  float scale_;         // 2^(-k/2)
  // Aligned for whole registers of signs, not against false sharing: nothing here is written.
  alignas(64) std::array<uint32_t, kFlips * kSignWords> signs_;
};

}  // namespace engram
