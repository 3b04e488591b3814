#pragma once

#include <cstdint>

#include "src/core/commit_stamp.h"
#include "src/core/ids.h"

namespace engram {

// A session's id, from bit 0: 18 bits of the place where its home shard opened it, a 1 so that no
// id is 0, 8 bits of the home shard, 37 random bits. So a producer finds the home of one that is
// resumed, and ids cannot be guessed. A session that was resumed may be at another place, and after
// a change of the number of shards at another home.
inline constexpr unsigned kSessionPlaceBits = 18;
inline constexpr uint32_t kMaxSessionPlaces = 1u << kSessionPlaceBits;
inline constexpr unsigned kSessionHomeShift = kSessionPlaceBits + 1;
inline constexpr unsigned kSessionRandomShift = kSessionHomeShift + kStampShardBits;

// Uses the upper 37 bits of `random`. `home` is below kMaxShards, `place` below kMaxSessionPlaces.
constexpr SessionId MakeSessionId(uint64_t random, ShardId home, uint32_t place) {
  return SessionId(random >> kSessionRandomShift << kSessionRandomShift |
                   uint64_t{home.value()} << kSessionHomeShift | uint64_t{kMaxSessionPlaces} |
                   place);
}

// Of an id as a client sent it the shard need not exist, nor have such a session.
constexpr ShardId HomeOfSession(SessionId id) {
  return ShardId(static_cast<uint16_t>(id.value() >> kSessionHomeShift & (kMaxShards - 1)));
}

constexpr uint32_t PlaceOfSession(SessionId id) {
  return static_cast<uint32_t>(id.value()) & (kMaxSessionPlaces - 1);
}

}  // namespace engram
