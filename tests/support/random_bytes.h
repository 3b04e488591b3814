#pragma once

#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

namespace engram {

using Bytes = std::vector<std::byte>;

inline Bytes RandomBytes(uint64_t seed, size_t count) {
  std::mt19937_64 random(seed);
  Bytes bytes(count);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
  return bytes;
}

}  // namespace engram
