#pragma once

#include <cstdint>
#include <vector>

#include "src/core/hash.h"

namespace engram {

// A vector of a cloud: its centre, anywhere between -1 and 1 in each dimension, and up to `spread`
// of noise. The same centre's generator makes vectors of the same cloud.
inline std::vector<float> CloudVector(SplitMix64 centre, SplitMix64 noise, uint32_t dimension,
                                      float spread) {
  const auto unit = [](SplitMix64* random) {
    return static_cast<float>(random->Below(1 << 20)) / (1 << 19) - 1;
  };
  std::vector<float> vector(dimension);
  for (float& value : vector) value = unit(&centre) + spread * unit(&noise);
  return vector;
}

}  // namespace engram
