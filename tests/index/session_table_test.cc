#include "index/session_table.h"

#include <gtest/gtest.h>

#include <array>
#include <bit>
#include <cstdint>
#include <set>
#include <unordered_set>
#include <vector>

#include "src/core/hash.h"
#include "src/core/session_id.h"
#include "tests/index/session_table_rig.h"
#include "tests/support/allocation_counter.h"

namespace engram {
namespace {

TEST(SessionTableTest, ASessionIsFoundByItsIdOrByPlaceAndId) {
  SessionTable sessions(Options(4));
  Session* session = sessions.Open(7, ProducerId(2), 55, 10, kUnixNs + 10);
  ASSERT_NE(session, nullptr);
  EXPECT_NE(session->id.value(), 0u);
  EXPECT_EQ(session->space, 7u);
  EXPECT_EQ(session->producer, ProducerId(2));
  EXPECT_EQ(session->origin, 55u);
  EXPECT_EQ(session->last_sequence, 0u);
  EXPECT_EQ(session->granted_sequence, 0u);
  EXPECT_EQ(session->last_active_ns, 10);
  EXPECT_EQ(sessions.Find(session->id), session);
  const uint32_t place = sessions.PlaceOf(*session);
  EXPECT_EQ(sessions.At(place, session->id), session);
  EXPECT_EQ(sessions.At(place + 1, session->id), nullptr);
  EXPECT_EQ(sessions.At(4'000'000'000, session->id), nullptr) << "a place beyond the table";
  EXPECT_EQ(sessions.At(place, SessionId(session->id.value() ^ (uint64_t{1} << 50))), nullptr);
  EXPECT_EQ(sessions.Find(SessionId()), nullptr);
  EXPECT_EQ(sessions.Find(SessionId(session->id.value() ^ 1)), nullptr) << "another place";
  EXPECT_EQ(sessions.Find(SessionId(session->id.value() ^ (uint64_t{1} << 50))), nullptr);
  EXPECT_EQ(sessions.Find(SessionId(UINT64_MAX)), nullptr) << "a place beyond the table";
  EXPECT_EQ(sessions.size(), 1u);
}

TEST(SessionTableTest, IdZeroIsNeverASessionAlsoWherePlacesAreFree) {
  SessionTable sessions(Options(2));
  EXPECT_EQ(sessions.Find(SessionId()), nullptr);
  Session* session = OpenAt(&sessions, 0);
  sessions.Detach(session, 0);  // Took nothing: the place is free again.
  EXPECT_EQ(sessions.Find(SessionId()), nullptr);
  EXPECT_EQ(sessions.size(), 0u);
}

// Ids that count up, or of which a part never changes, could be guessed.
TEST(SessionTableTest, IdsAreDistinctAndLookRandom) {
  std::unordered_set<uint64_t> all;
  for (const uint64_t seed : {1, 2, 3}) {
    SessionTable sessions(Options(3'000, seed));
    std::vector<uint64_t> random_parts;
    for (int i = 0; i < 3'000; ++i) {
      const Session* session = OpenAt(&sessions, 0);
      ASSERT_NE(session, nullptr);
      EXPECT_TRUE(all.insert(session->id.value()).second);
      random_parts.push_back(session->id.value() >> 20);
    }
    uint64_t changing = 0;
    int flips = 0;
    for (size_t i = 1; i < random_parts.size(); ++i) {
      changing |= random_parts[i] ^ random_parts[0];
      flips += std::popcount(random_parts[i] ^ random_parts[i - 1]);
    }
    EXPECT_GE(std::popcount(changing), 37);
    EXPECT_NEAR(flips / 2'999.0, 18.5, 1.0) << "half of the bits change from one id to the next";
  }
}

TEST(SessionTableTest, TheSameSeedDrawsTheSameIds) {
  SessionTable a(Options(10, 42));
  SessionTable b(Options(10, 42));
  for (int i = 0; i < 10; ++i) {
    EXPECT_EQ(OpenAt(&a, 0)->id, OpenAt(&b, 0)->id);
  }
}

// The 43 unknown bits of an id must not follow from other ids: a client that holds two sessions
// would compute those of the others. With the generator's state behind one multiply chain that is a
// search of 2^21.
TEST(SessionTableTest, AnIdDoesNotGiveAwayTheNext) {
  SessionTable sessions(Options(10, 9'999));
  const auto unmix = [](uint64_t value) {
    value ^= value >> 31 ^ value >> 62;
    value *= 0x319642B2D24D8EC3;
    value ^= value >> 27 ^ value >> 54;
    value *= 0x96DE1B173F119089;
    value ^= value >> 30 ^ value >> 60;
    return value - 0x9E3779B97F4A7C15;
  };
  ASSERT_EQ(unmix(MixBits(12'345)), 12'345u);
  const uint64_t first = OpenAt(&sessions, 0)->id.value() >> 21;
  const uint64_t second = OpenAt(&sessions, 0)->id.value() >> 21;
  for (uint64_t low = 0; low < uint64_t{1} << 21; ++low) {
    const uint64_t state = unmix(first << 21 | low);
    ASSERT_NE(MixBits(state + 0x9E3779B97F4A7C15) >> 21, second) << "the state was found";
  }
}

TEST(SessionTableTest, ASessionThatTookNothingIsForgottenAtDetach) {
  SessionTable sessions(Options(2));
  Session* session = OpenAt(&sessions, 0);
  const SessionId id = session->id;
  const uint32_t place = sessions.PlaceOf(*session);
  sessions.Detach(session, 5);
  EXPECT_EQ(sessions.Find(id), nullptr);
  EXPECT_EQ(sessions.At(place, id), nullptr);
  EXPECT_EQ(sessions.size(), 0u);
}

TEST(SessionTableTest, ASessionThatTookSomethingIsKeptForAResume) {
  SessionTable sessions(Options(2));
  Session* session = OpenAt(&sessions, 0);
  const SessionId id = session->id;
  session->last_sequence = 3;
  sessions.Detach(session, 5);
  ASSERT_EQ(sessions.Find(id), session);
  EXPECT_EQ(session->origin, 0u);
  EXPECT_EQ(session->last_sequence, 3u);
  EXPECT_EQ(session->last_active_ns, 5);
  EXPECT_EQ(sessions.size(), 1u);
}

TEST(SessionTableTest, AReusedPlaceDoesNotReviveTheOldId) {
  SessionTable sessions(Options(1));
  std::set<uint64_t> old;
  for (int round = 0; round < 200; ++round) {
    Session* session = sessions.Open(static_cast<uint32_t>(round), ProducerId(0), 1, 0, kUnixNs);
    ASSERT_NE(session, nullptr);
    EXPECT_EQ(sessions.PlaceOf(*session), 0u);
    EXPECT_EQ(session->last_sequence, 0u) << "nothing is left of the one before";
    EXPECT_EQ(session->granted_sequence, 0u);
    for (const uint64_t id : old) EXPECT_EQ(sessions.Find(SessionId(id)), nullptr);
    ASSERT_TRUE(old.insert(session->id.value()).second);
    session->granted_sequence = 9;
    sessions.Detach(session, 0);
  }
}

TEST(SessionTableTest, ForEachAttachedVisitsThoseOfTheSpaceThatHaveAConnection) {
  SessionTable sessions(Options(10));
  std::set<uint64_t> wanted;
  for (int i = 0; i < 9; ++i) {
    Session* session = sessions.Open(static_cast<uint32_t>(i % 2), ProducerId(0),
                                     static_cast<Origin>(100 + i), 0, kUnixNs);
    session->last_sequence = i == 4 ? 0 : 1;
    if (i == 4 || i == 6) {  // One is forgotten, one waits for a resume.
      sessions.Detach(session, 0);
    } else if (i % 2 == 0) {
      wanted.insert(session->origin);
    }
  }
  std::set<uint64_t> visited;
  sessions.ForEachAttached(0, [&](Session& session) {
    EXPECT_EQ(session.space, 0u);
    EXPECT_TRUE(visited.insert(session.origin).second);
  });
  EXPECT_EQ(visited, wanted);
}

TEST(SessionTableTest, SessionsOfADroppedSpaceAreForgottenButForThoseInUse) {
  SessionTable sessions(Options(40));
  std::set<uint64_t> left;
  for (int i = 0; i < 40; ++i) {
    Session* session = OpenAt(&sessions, 0, static_cast<uint32_t>(i % 2));
    session->last_sequence = 1;
    session->first_forward = i % 10 == 0 ? 1 : 0;
    if (i % 4 != 1) sessions.Detach(session, i < 20 ? 0 : 2 * kIdleNs);
    if (i % 2 == 0 || i % 4 == 1) left.insert(session->id.value());
    if (i % 10 == 5) session->first_forward = 1;
    if (i % 10 == 5) left.insert(session->id.value());
  }
  ASSERT_TRUE(sessions.Sweep(2 * kIdleNs, kUnixNs + 2 * kIdleNs, 100));
  ASSERT_GT(sessions.dormant(), 0u);
  size_t forgotten = 0;
  uint64_t cursor = 0;
  int parts = 0;
  do {
    forgotten += sessions.ForgetSpace(1, &cursor, 7);
    ++parts;
  } while (cursor != 0);
  EXPECT_EQ(parts, 6);
  EXPECT_EQ(forgotten, 40 - left.size());
  EXPECT_EQ(sessions.size() + sessions.dormant(), left.size());
  for (const uint64_t id : left) EXPECT_TRUE(sessions.SpaceOf(SessionId(id), kUnixNs)) << id;
  ExpectSound(sessions);
}

TEST(SessionTableTest, NothingIsAllocatedAfterConstruction) {
  if (!AllocationsAreCounted()) GTEST_SKIP() << "the sanitizer's allocator is not counted";
  SessionTableOptions options = Options(50);
  options.max_dormant = 500;
  SessionTable sessions(options);
  SplitMix64 random(4);
  std::array<SessionId, 4'096> ids;
  size_t known = 0;
  int64_t now_ns = 0;
  uint64_t visited = 0;
  const uint64_t before = AllocationCount();
  for (int step = 0; step < 50'000; ++step) {
    now_ns += kIdleNs / 20;
    SessionId& id = ids[known++ % ids.size()];
    if (random.Below(3) == 0) {
      id = MakeSessionId(random.Next(), ShardId(1), 1);
      sessions.Restore(id, 2, 1, kUnixNs + now_ns);
    } else if (Session* session =
                   sessions.Open(random.Below(3), ProducerId(0), 1, now_ns, kUnixNs + now_ns)) {
      id = session->id;
      session->last_sequence = random.Below(4);
      sessions.Detach(session, now_ns);
    }
    if (const auto resumed =
            sessions.Resume(ids[random.Below(ids.size())], now_ns, kUnixNs + now_ns)) {
      sessions.Touch(*resumed, now_ns);
    }
    sessions.Sweep(now_ns, kUnixNs + now_ns, 5);
    if (step % 1'000 == 0) {
      uint64_t cursor = 0;
      do {
        visited += sessions.Visit(&cursor, 64, [](SessionId, uint32_t, Sequence, int64_t) {});
      } while (cursor != 0);
      sessions.ForgetSpace(1, &cursor, 5'000);
    }
  }
  EXPECT_EQ(AllocationCount(), before);
  EXPECT_GT(visited, 1'000u);
  EXPECT_EQ(sessions.dormant(), 500u);
  ExpectSound(sessions);
}

}  // namespace
}  // namespace engram
