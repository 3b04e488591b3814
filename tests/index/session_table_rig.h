#pragma once

#include <gtest/gtest.h>

#include <cstdint>

#include "index/session_table.h"
#include "src/core/clock.h"

// What the tests of the table of sessions share.

namespace engram {

inline constexpr int64_t kIdleNs = 300 * kNanosPerSecond;
inline constexpr int64_t kKeepNs = int64_t{7} * 24 * 3'600 * kNanosPerSecond;
// The wall clock where the monotonic one is 0.
inline constexpr int64_t kUnixNs = 1'700'000'000 * kNanosPerSecond;

inline SessionTableOptions Options(uint32_t max_sessions, uint64_t seed = 1) {
  return {.max_sessions = max_sessions,
          .max_dormant = 1'000,
          .idle_timeout_ns = kIdleNs,
          .keep_ns = kKeepNs,
          .unix_ns = kUnixNs,
          .seed = seed,
          .home = ShardId(0)};
}

inline Session* OpenAt(SessionTable* sessions, int64_t now_ns, uint32_t space = 0) {
  return sessions->Open(space, ProducerId(0), 1, now_ns, kUnixNs + now_ns);
}

inline void ExpectSound(const SessionTable& sessions) {
  const auto sound = sessions.CheckInvariants();
  EXPECT_TRUE(sound.has_value()) << sound.error().message;
}

}  // namespace engram
