#include "src/core/crc32c.h"

#include <isa-l/crc.h>

#include <algorithm>
#include <climits>

namespace engram {

uint32_t Crc32c(std::span<const std::byte> bytes, uint32_t crc) {
  // ISA-L takes a non-const pointer, a length of type int, and the running value without the final
  // inversion.
  auto* data = reinterpret_cast<unsigned char*>(const_cast<std::byte*>(bytes.data()));
  size_t left = bytes.size();
  uint32_t state = ~crc;
  while (left > 0) {
    const int step = static_cast<int>(std::min<size_t>(left, INT_MAX));
    state = crc32_iscsi(data, step, state);
    data += step;
    left -= static_cast<size_t>(step);
  }
  return ~state;
}

}  // namespace engram
