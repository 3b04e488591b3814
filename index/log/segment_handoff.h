#pragma once

#include <atomic>
#include <cstdint>

namespace engram {

// Why no further segment is there.
enum class SegmentTrouble : uint8_t {
  kNone,      // being prepared
  kDiskFull,  // ENOSPC
  kFailing,   // any other error of the disk
};

// Between the core that writes a log and the SegmentKeeper that prepares its segments elsewhere.
//
// Thread safety: each member has one writer, named below, and may be read by anyone.
struct SegmentHandoff {
  // The keeper's: all segments from the current one to this one are ready to be written.
  std::atomic<uint32_t> prepared{0};
  std::atomic<SegmentTrouble> trouble{SegmentTrouble::kNone};
  // The writer's: it knows where the log ends.
  std::atomic<bool> started{false};
  // The writer's: the segment that it writes.
  std::atomic<uint32_t> current{0};
  // The writer's: bytes of blocks that were sealed since the start.
  std::atomic<uint64_t> bytes_taken{0};
};

}  // namespace engram
