#pragma once

#include <cstdint>

namespace engram {

// A place in one shard's log: the segment's number in the upper 32 bits, the offset in its file in
// the lower ones. Rises as the log is written, whatever the size of the segments.
using LogPosition = uint64_t;

constexpr LogPosition MakeLogPosition(uint32_t segment, uint32_t offset) {
  return uint64_t{segment} << 32 | offset;
}
constexpr uint32_t SegmentOf(LogPosition position) { return static_cast<uint32_t>(position >> 32); }
constexpr uint32_t OffsetOf(LogPosition position) { return static_cast<uint32_t>(position); }

// Where an observation's record lies: the log (the number of the shard that wrote it) in the top 8
// bits, its position, a multiple of 8, divided by 8 in the lower 56. Stored: unchangeable.
using LogAddress = uint64_t;
inline constexpr LogAddress kNoLogAddress = 0;
inline constexpr uint32_t kMaxSegment = (uint32_t{1} << 27) - 1;

constexpr LogAddress MakeLogAddress(uint16_t log, LogPosition position) {
  return uint64_t{log} << 56 | position >> 3;
}
constexpr uint16_t LogOf(LogAddress address) { return static_cast<uint16_t>(address >> 56); }
constexpr LogPosition PositionOf(LogAddress address) { return address << 8 >> 5; }

}  // namespace engram
