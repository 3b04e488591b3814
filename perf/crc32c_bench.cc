// GB/s of Crc32c beside memcpy of the same bytes, by size.
//
//   crc32c_bench [--json] [--rounds N]
//
// The two are measured in turn and the medians printed. 3,200 bytes is about one 768-d f32
// observation on the wire.

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <span>
#include <vector>

#include "perf/bench_support.h"
#include "src/core/crc32c.h"

namespace {

constexpr std::array<size_t, 5> kSizes{64, 512, 3'200, 65'536, size_t{1} << 20};
constexpr size_t kBytesPerRound = size_t{64} << 20;

// Keeps the compiler from leaving out what nobody reads.
void Use(const void* value) { asm volatile("" : : "g"(value) : "memory"); }

template <typename Work>
double GigabytesPerSecond(size_t bytes, Work work) {
  const size_t repeats = kBytesPerRound / bytes;
  const auto start = std::chrono::steady_clock::now();
  for (size_t i = 0; i < repeats; ++i) work();
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  return static_cast<double>(repeats * bytes) / elapsed.count() / 1e9;
}

void Run(bool json, int rounds) {
  std::vector<std::byte> from(kSizes.back(), std::byte{0x5A});
  std::vector<std::byte> to(kSizes.back());
  if (json) {
    std::printf("{\"benchmark\":\"crc32c\",\"rounds\":%d,\"sizes\":[", rounds);
  } else {
    std::printf("%10s %12s %12s %8s\n", "bytes", "crc32c GB/s", "memcpy GB/s", "ratio");
  }
  const char* separator = "";
  for (const size_t bytes : kSizes) {
    std::vector<double> crc_speeds;
    std::vector<double> copy_speeds;
    for (int round = 0; round < rounds; ++round) {
      crc_speeds.push_back(GigabytesPerSecond(bytes, [&] {
        const uint32_t crc = engram::Crc32c(std::span(from).first(bytes));
        Use(&crc);
      }));
      copy_speeds.push_back(GigabytesPerSecond(bytes, [&] {
        std::memcpy(to.data(), from.data(), bytes);
        Use(to.data());
      }));
    }
    const double crc = engram::Median(crc_speeds);
    const double copy = engram::Median(copy_speeds);
    if (json) {
      std::printf(
          "%s{\"bytes\":%zu,\"crc32c_gb_per_s\":%.2f,\"memcpy_gb_per_s\":%.2f,"
          "\"ratio\":%.3f}",
          separator, bytes, crc, copy, crc / copy);
      separator = ",";
    } else {
      std::printf("%10zu %12.2f %12.2f %8.2f\n", bytes, crc, copy, crc / copy);
    }
  }
  if (json) std::printf("]}\n");
}

}  // namespace

int main(int argc, char** argv) {
  bool json = false;
  uint64_t rounds = 7;
  engram::ReadArguments(argc, argv, &json, {{"--rounds", &rounds}});
  Run(json, static_cast<int>(rounds));
  return 0;
}
