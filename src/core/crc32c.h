#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace engram {

// CRC-32C (Castagnoli, RFC 3720 appendix B.4), by ISA-L. `crc` is the value so far, 0 to begin
// with: Crc32c(b, Crc32c(a)) is the checksum of a followed by b.
uint32_t Crc32c(std::span<const std::byte> bytes, uint32_t crc = 0);

}  // namespace engram
