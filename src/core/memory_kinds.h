#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <span>
#include <string_view>

#include "src/core/observation.h"

namespace engram {

// What a space's memory is taken for. The values are sent: unchangeable; new ones go to the end.
enum class MemoryKind : uint8_t {
  kRows = 0,     // vectors as they are kept, and as int8 beside that
  kCodes = 1,    // of one bit a number, to walk the graph with
  kLinks = 2,    // the graph, without vectors
  kLists = 3,    // inverted lists of what is linked, to link with
  kWaiting = 4,  // what is not linked yet: the list of it, and inverted lists
  kRecords = 5,  // time, place in the log and the like
  kIds = 6,      // ids, payloads that lie in no log, and the map from ids
  kStamps = 7,   // when versions begin and end, and the order of what expires
  kFilters = 8,  // attributes and the index by time
};
inline constexpr size_t kMemoryKinds = 9;
inline constexpr std::array<std::string_view, kMemoryKinds> kMemoryKindNames = {
    "rows", "codes", "links", "lists", "waiting", "records", "ids", "stamps", "filters"};

// Bytes, rounding included.
using MemoryByKind = std::array<uint64_t, kMemoryKinds>;

inline uint64_t SumOf(const MemoryByKind& memory) {
  return std::accumulate(memory.begin(), memory.end(), uint64_t{0});
}

// Bytes of a SpaceRecord with a name of `name_bytes`, and its memory by kind behind that.
constexpr size_t SpaceRecordBytes(size_t name_bytes) {
  return PadTo8(sizeof(SpaceRecord) + name_bytes) + sizeof(MemoryByKind);
}

// What the record at `bytes` says of its memory; zeros for what an older or a newer side does not
// know. `bytes` has record_bytes, at least those of the header and the name.
inline MemoryByKind MemoryInRecord(const SpaceRecord& record, std::span<const std::byte> bytes) {
  MemoryByKind memory{};
  const size_t at = PadTo8(sizeof(SpaceRecord) + record.name_bytes);
  if (bytes.size() > at) {
    std::memcpy(memory.data(), bytes.data() + at, std::min(bytes.size() - at, sizeof(memory)));
  }
  return memory;
}

}  // namespace engram
