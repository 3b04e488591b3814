#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace engram {

// A fuzzer's input as a program: its operations read their numbers off it, front to back, and zeros
// behind its end.
class FuzzProgram {
 public:
  explicit FuzzProgram(std::span<const uint8_t> input) : left_(input) {}

  bool empty() const { return left_.empty(); }
  uint8_t Byte() {
    if (left_.empty()) return 0;
    const uint8_t byte = left_[0];
    left_ = left_.subspan(1);
    return byte;
  }
  // Of two bytes.
  uint32_t Below(uint32_t bound) { return (uint32_t{Byte()} << 8 | Byte()) % bound; }
  // Of four bytes.
  uint32_t Number() {
    uint32_t number = 0;
    for (int i = 0; i < 4; ++i) number = number << 8 | Byte();
    return number;
  }
  // As many as there are.
  std::vector<std::byte> Bytes(size_t most) {
    const auto bytes = std::as_bytes(left_.first(std::min(most, left_.size())));
    left_ = left_.subspan(bytes.size());
    return {bytes.begin(), bytes.end()};
  }
  std::span<const std::byte> rest() const { return std::as_bytes(left_); }

 private:
  std::span<const uint8_t> left_;
};

}  // namespace engram
