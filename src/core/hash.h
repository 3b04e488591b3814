#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>

namespace engram {

// Spreads every bit of `value` over the result (SplitMix64's finaliser; Steele, Lea and Flood
// 2014).
constexpr uint64_t MixBits(uint64_t value) {
  value += 0x9E3779B97F4A7C15;
  value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9;
  value = (value ^ (value >> 27)) * 0x94D049BB133111EB;
  return value ^ (value >> 31);
}

// A 64-bit hash of a string for tables. With a secret random `seed` strings that collide cannot be
// worked out beforehand; it is no cryptographic hash all the same. With a fixed seed it is the same
// on every machine.
inline uint64_t HashString(std::string_view text, uint64_t seed) {
  uint64_t hash = MixBits(seed ^ text.size());
  const char* bytes = text.data();
  size_t left = text.size();
  for (; left >= 8; left -= 8, bytes += 8) {
    uint64_t word;
    std::memcpy(&word, bytes, 8);
    hash = MixBits(hash ^ word);
  }
  if (left > 0) {
    uint64_t word = 0;
    std::memcpy(&word, bytes, left);
    hash = MixBits(hash ^ word);
  }
  return hash;
}

// A small, fast source of numbers that look random; the same seed gives the same ones.
class SplitMix64 {
 public:
  explicit SplitMix64(uint64_t seed) : state_(seed) {}
  uint64_t Next() {
    const uint64_t value = MixBits(state_);
    state_ += 0x9E3779B97F4A7C15;
    return value;
  }
  // 0 to bound - 1.
  uint64_t Below(uint64_t bound) { return Next() % bound; }

 private:
  uint64_t state_;
};

}  // namespace engram
