#include "src/core/crc32c.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <random>
#include <span>
#include <string_view>
#include <vector>

namespace engram {
namespace {

std::vector<std::byte> Bytes(size_t count, auto value_of) {
  std::vector<std::byte> bytes(count);
  for (size_t i = 0; i < count; ++i) bytes[i] = static_cast<std::byte>(value_of(i));
  return bytes;
}

// RFC 3720, appendix B.4 (the RFC prints the bytes of the value in order of transmission).
TEST(Crc32cTest, Rfc3720Vectors) {
  EXPECT_EQ(Crc32c(Bytes(32, [](size_t) { return 0; })), 0x8A9136AAu);
  EXPECT_EQ(Crc32c(Bytes(32, [](size_t) { return 0xFF; })), 0x62A8AB43u);
  EXPECT_EQ(Crc32c(Bytes(32, [](size_t i) { return i; })), 0x46DD794Eu);
  EXPECT_EQ(Crc32c(Bytes(32, [](size_t i) { return 31 - i; })), 0x113FDB5Cu);
  constexpr unsigned char kScsiRead[48] = {
      0x01, 0xC0, 0, 0,    0, 0, 0, 0,    0,    0, 0, 0, 0, 0, 0, 0, 0x14, 0, 0, 0, 0, 0, 4, 0,
      0,    0,    0, 0x14, 0, 0, 0, 0x18, 0x28, 0, 0, 0, 0, 0, 0, 0, 2,    0, 0, 0, 0, 0, 0, 0};
  EXPECT_EQ(Crc32c(std::as_bytes(std::span(kScsiRead))), 0xD9963A56u);
  constexpr std::string_view kDigits = "123456789";
  EXPECT_EQ(Crc32c(std::as_bytes(std::span(kDigits))), 0xE3069283u);
}

TEST(Crc32cTest, NothingChangesNothing) {
  EXPECT_EQ(Crc32c({}), 0u);
  EXPECT_EQ(Crc32c({}, 0x12345678), 0x12345678u);
}

uint32_t BitwiseCrc32c(std::span<const std::byte> bytes) {
  uint32_t state = 0xFFFFFFFF;
  for (const std::byte byte : bytes) {
    state ^= static_cast<uint32_t>(byte);
    for (int bit = 0; bit < 8; ++bit) state = (state >> 1) ^ ((state & 1) != 0 ? 0x82F63B78 : 0);
  }
  return ~state;
}

// Every length through the vector code's seams, at every alignment of a cache line.
TEST(Crc32cTest, AgreesWithTheBitwiseDefinition) {
  std::mt19937_64 random(1);
  const std::vector<std::byte> bytes = Bytes(5'000, [&](size_t) { return random(); });
  const std::span<const std::byte> all(bytes);
  for (size_t length = 0; length <= 600; ++length) {
    const auto part = all.subspan(length % 64, length);
    ASSERT_EQ(Crc32c(part), BitwiseCrc32c(part)) << length;
  }
  for (size_t offset = 0; offset < 64; ++offset) {
    const auto part = all.subspan(offset, 4'100 + offset);
    ASSERT_EQ(Crc32c(part), BitwiseCrc32c(part)) << offset;
  }
}

TEST(Crc32cTest, ChainsAtEverySplit) {
  std::mt19937_64 random(2);
  const std::vector<std::byte> bytes = Bytes(700, [&](size_t) { return random(); });
  const std::span<const std::byte> all(bytes);
  const uint32_t whole = Crc32c(all);
  for (size_t split = 0; split <= all.size(); ++split) {
    ASSERT_EQ(Crc32c(all.subspan(split), Crc32c(all.first(split))), whole) << split;
  }
}

// ISA-L's length is an int: lengths beyond it must be cut, not truncated.
TEST(Crc32cTest, MoreThanTwoGigabytes) {
  constexpr size_t kBytes = (size_t{1} << 31) + 5'000;
  // Read-only anonymous memory: the kernel's one page of zeros, so this takes no memory.
  void* zeros =
      mmap(nullptr, kBytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (zeros == MAP_FAILED) GTEST_SKIP() << "needs 2 GiB of address space";
  const std::span<const std::byte> all(static_cast<const std::byte*>(zeros), kBytes);
  uint32_t in_parts = 0;
  constexpr size_t kPart = size_t{1} << 20;
  for (size_t at = 0; at < kBytes; at += kPart) {
    in_parts = Crc32c(all.subspan(0, std::min(kPart, kBytes - at)), in_parts);
  }
  EXPECT_EQ(Crc32c(all), in_parts);
  munmap(zeros, kBytes);
}

}  // namespace
}  // namespace engram
