#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "src/core/check.h"
#include "src/core/clock.h"
#include "src/core/ids.h"
#include "src/core/spsc_ring.h"

namespace engram {

// When an observation was taken: nanoseconds since 1970 with the home shard's number in the lowest
// 8 bits. Strictly rising within a shard, different between any two shards, and so a total order:
// of two observations with one id the one of the later stamp stands (DESIGN, principles 5 and 6).
using CommitStamp = uint64_t;

inline constexpr unsigned kStampShardBits = 8;
inline constexpr uint16_t kMaxShards = 1u << kStampShardBits;
inline constexpr CommitStamp kNoStamp = 0;             // before every observation
inline constexpr CommitStamp kOpenStamp = UINT64_MAX;  // the end of what still lives

// Before any that a shard draws from then on.
constexpr CommitStamp StampBefore(int64_t unix_ns) {
  return (static_cast<CommitStamp>(unix_ns) >> kStampShardBits << kStampShardBits) - 1;
}

// Not before any that a shard has drawn at that moment or earlier.
constexpr CommitStamp StampAt(int64_t unix_ns) {
  return static_cast<CommitStamp>(unix_ns) | ((CommitStamp{1} << kStampShardBits) - 1);
}

constexpr int64_t UnixNsOf(CommitStamp stamp) {
  return static_cast<int64_t>(stamp >> kStampShardBits << kStampShardBits);
}

// Draws the stamps of one shard. Runs ahead of the clock where more than 3.9 million a second are
// drawn or the clock was set back.
//
// Thread safety: the shard's alone.
class StampClock {
 public:
  explicit StampClock(ShardId shard) : shard_(shard.value()) {
    CHECK(shard_ < kMaxShards, "a stamp has 8 bits for the shard");
  }
  CommitStamp Next(int64_t unix_ns) {
    const CommitStamp now = static_cast<CommitStamp>(unix_ns) / kStep * kStep + shard_;
    last_ = std::max(now, last_ + kStep);
    return last_;
  }
  // Those drawn from now on are later than `stamp`.
  void Pass(CommitStamp stamp) { last_ = std::max(last_, stamp / kStep * kStep + shard_); }
  // The last one drawn.
  CommitStamp last() const { return last_; }

 private:
  static constexpr CommitStamp kStep = CommitStamp{1} << kStampShardBits;

  CommitStamp shard_;
  CommitStamp last_ = kNoStamp;
};

// Up to which stamp each shard is complete: every observation that it took up to there, as home, is
// visible in whichever shard owns it. A snapshot over several partitions is the least of theirs.
//
// A shard that sleeps publishes kOpenStamp: nothing of it is under way, and what it takes later
// gets a later stamp than the clock shows now, since it publishes a finite one again before it
// reads the clock.
//
// Thread safety: Publish is each shard's own; CompleteUpTo is anyone's.
class StampBoard {
 public:
  explicit StampBoard(uint16_t shards) : lines_(shards) {}

  void Publish(ShardId shard, CommitStamp complete) {
    lines_[shard.value()].complete.store(complete, std::memory_order_seq_cst);
  }
  // `unix_ns` is the clock as the caller read it before the call.
  CommitStamp CompleteUpTo(ShardId shard, int64_t unix_ns) const {
    const CommitStamp complete = lines_[shard.value()].complete.load(std::memory_order_seq_cst);
    if (complete != kOpenStamp) return complete;
    return StampBefore(unix_ns);
  }
  uint16_t shards() const { return static_cast<uint16_t>(lines_.size()); }

 private:
  // alignas: each line is written by another core.
  struct alignas(kFalseSharingBytes) Line {
    std::atomic<CommitStamp> complete{kOpenStamp};
  };
  std::vector<Line> lines_;
};

}  // namespace engram
