#include "src/core/session_id.h"

#include <gtest/gtest.h>

#include <set>

namespace engram {
namespace {

TEST(SessionIdTest, PlaceAndHomeComeBackWhateverTheRandomPart) {
  for (const uint64_t random : {uint64_t{0}, uint64_t{0x123456789ABCDEF0}, UINT64_MAX}) {
    for (const uint16_t home : {0, 1, 7, 128, 255}) {
      for (const uint32_t place : {0u, 1u, 131'071u, kMaxSessionPlaces - 1}) {
        const SessionId id = MakeSessionId(random, ShardId(home), place);
        EXPECT_EQ(HomeOfSession(id), ShardId(home));
        EXPECT_EQ(PlaceOfSession(id), place);
      }
    }
  }
}

// 0 says "no session" on the wire.
TEST(SessionIdTest, NoIdIsZero) { EXPECT_NE(MakeSessionId(0, ShardId(0), 0).value(), 0u); }

// Clients keep ids over a restart's answer, and two sides build and read them: the bits are fixed.
TEST(SessionIdTest, TheBitsAreFixed) {
  EXPECT_EQ(MakeSessionId(0, ShardId(0), 0).value(), uint64_t{1} << 18);
  EXPECT_EQ(MakeSessionId(0, ShardId(1), 5).value(), (uint64_t{3} << 18) | 5);
  EXPECT_EQ(MakeSessionId(UINT64_MAX, ShardId(255), kMaxSessionPlaces - 1).value(), UINT64_MAX);
  EXPECT_EQ(MakeSessionId(UINT64_MAX, ShardId(0), 0).value(), 0xFFFF'FFFF'F804'0000u);
}

TEST(SessionIdTest, DifferentPartsMakeDifferentIds) {
  std::set<uint64_t> ids;
  int made = 0;
  for (uint64_t random = 0; random < 8; ++random) {
    for (uint16_t home = 0; home < 8; ++home) {
      for (uint32_t place = 0; place < 8; ++place, ++made) {
        ids.insert(MakeSessionId(random << kSessionRandomShift, ShardId(home), place).value());
      }
    }
  }
  EXPECT_EQ(ids.size(), static_cast<size_t>(made));
}

}  // namespace
}  // namespace engram
