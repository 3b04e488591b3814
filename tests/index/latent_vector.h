#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "src/core/hash.h"
#include "src/core/vector_dtype.h"

namespace engram {

// A vector of many dimensions that has few degrees of freedom, as the vectors of real data have:
// near ones are much nearer than others are, so RaBitQ codes tell them apart. `number`: which one.
// `shift`: added to each latent coordinate.
inline std::vector<float> LatentVector(uint64_t number, uint32_t dimension, float shift = 0) {
  constexpr size_t kLatent = 10;
  const auto normal = [](SplitMix64* random) {  // nearly
    float sum = 0;
    for (int i = 0; i < 4; ++i) sum += static_cast<float>(random->Below(1 << 20)) / (1 << 19) - 1;
    return sum;
  };
  // The same for all vectors; drawn once, as tests make each of them many times over.
  static const std::vector<float> basis = [&] {
    SplitMix64 random(99);
    std::vector<float> drawn(kMaxDimension * kLatent);
    for (float& value : drawn) value = normal(&random);
    return drawn;
  }();
  SplitMix64 random(MixBits(number + 0x1234567));
  std::array<float, kLatent> latent;
  for (float& value : latent) value = normal(&random) + shift;
  std::vector<float> vector(dimension);
  for (size_t i = 0; i < dimension; ++i) {
    for (size_t k = 0; k < kLatent; ++k) vector[i] += latent[k] * basis[i * kLatent + k];
    vector[i] += 0.1F * normal(&random);
  }
  return vector;
}

}  // namespace engram
