#include "index/shard_sessions.h"

#include <gtest/gtest.h>

#include <bit>
#include <cstdint>
#include <map>
#include <set>
#include <unordered_set>
#include <vector>

#include "src/core/hash.h"

namespace engram {
namespace {

constexpr int64_t kIdleNs = 1'000;

TEST(ShardSessionsTest, ASessionIsFoundByItsIdOrByPlaceAndId) {
  ShardSessions sessions(4, kIdleNs, 1);
  Session* session = sessions.Open(7, ProducerId(2), 55, 10);
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

TEST(ShardSessionsTest, IdZeroIsNeverASessionAlsoWherePlacesAreFree) {
  ShardSessions sessions(2, kIdleNs, 1);
  EXPECT_EQ(sessions.Find(SessionId()), nullptr);
  Session* session = sessions.Open(0, ProducerId(0), 1, 0);
  sessions.Detach(session, 0);  // Took nothing: the place is free again.
  EXPECT_EQ(sessions.Find(SessionId()), nullptr);
  EXPECT_EQ(sessions.size(), 0u);
}

// Ids that count up, or of which a part never changes, could be guessed.
TEST(ShardSessionsTest, IdsAreDistinctAndLookRandom) {
  std::unordered_set<uint64_t> all;
  for (const uint64_t seed : {1, 2, 3}) {
    ShardSessions sessions(3'000, kIdleNs, seed);
    std::vector<uint64_t> random_parts;
    for (int i = 0; i < 3'000; ++i) {
      const Session* session = sessions.Open(0, ProducerId(0), 1, 0);
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

TEST(ShardSessionsTest, TheSameSeedDrawsTheSameIds) {
  ShardSessions a(10, kIdleNs, 42);
  ShardSessions b(10, kIdleNs, 42);
  for (int i = 0; i < 10; ++i) {
    EXPECT_EQ(a.Open(0, ProducerId(0), 1, 0)->id, b.Open(0, ProducerId(0), 1, 0)->id);
  }
}

// The 43 unknown bits of an id must not follow from other ids: a client that holds two sessions
// would compute those of the others. With the generator's state behind one multiply chain that is a
// search of 2^21.
TEST(ShardSessionsTest, AnIdDoesNotGiveAwayTheNext) {
  ShardSessions sessions(10, kIdleNs, 9'999);
  const auto unmix = [](uint64_t value) {
    value ^= value >> 31 ^ value >> 62;
    value *= 0x319642B2D24D8EC3;
    value ^= value >> 27 ^ value >> 54;
    value *= 0x96DE1B173F119089;
    value ^= value >> 30 ^ value >> 60;
    return value - 0x9E3779B97F4A7C15;
  };
  ASSERT_EQ(unmix(MixBits(12'345)), 12'345u);
  const uint64_t first = sessions.Open(0, ProducerId(0), 1, 0)->id.value() >> 21;
  const uint64_t second = sessions.Open(0, ProducerId(0), 1, 0)->id.value() >> 21;
  for (uint64_t low = 0; low < uint64_t{1} << 21; ++low) {
    const uint64_t state = unmix(first << 21 | low);
    ASSERT_NE(MixBits(state + 0x9E3779B97F4A7C15) >> 21, second) << "the state was found";
  }
}

TEST(ShardSessionsTest, ASessionThatTookNothingIsForgottenAtDetach) {
  ShardSessions sessions(2, kIdleNs, 1);
  Session* session = sessions.Open(0, ProducerId(0), 1, 0);
  const SessionId id = session->id;
  const uint32_t place = sessions.PlaceOf(*session);
  sessions.Detach(session, 5);
  EXPECT_EQ(sessions.Find(id), nullptr);
  EXPECT_EQ(sessions.At(place, id), nullptr);
  EXPECT_EQ(sessions.size(), 0u);
}

TEST(ShardSessionsTest, ASessionThatTookSomethingIsKeptForAResume) {
  ShardSessions sessions(2, kIdleNs, 1);
  Session* session = sessions.Open(0, ProducerId(0), 1, 0);
  const SessionId id = session->id;
  session->last_sequence = 3;
  sessions.Detach(session, 5);
  ASSERT_EQ(sessions.Find(id), session);
  EXPECT_EQ(session->origin, 0u);
  EXPECT_EQ(session->last_sequence, 3u);
  EXPECT_EQ(session->last_active_ns, 5);
  EXPECT_EQ(sessions.size(), 1u);
}

TEST(ShardSessionsTest, AReusedPlaceDoesNotReviveTheOldId) {
  ShardSessions sessions(1, kIdleNs, 1);
  std::set<uint64_t> old;
  for (int round = 0; round < 200; ++round) {
    Session* session = sessions.Open(static_cast<uint32_t>(round), ProducerId(0), 1, 0);
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

TEST(ShardSessionsTest, BeyondTheLimitOnlyIdleDetachedOnesGiveWayTheLongestIdleFirst) {
  ShardSessions sessions(3, kIdleNs, 1);
  Session* attached = sessions.Open(0, ProducerId(0), 1, 0);
  Session* older = sessions.Open(0, ProducerId(0), 2, 0);
  Session* newer = sessions.Open(0, ProducerId(0), 3, 0);
  const SessionId attached_id = attached->id;
  const SessionId older_id = older->id;
  const SessionId newer_id = newer->id;
  for (Session* session : {attached, older, newer}) session->last_sequence = 1;
  EXPECT_EQ(sessions.Open(0, ProducerId(0), 4, 1'000'000), nullptr) << "attached ones stay";
  sessions.Detach(newer, 200);
  sessions.Detach(older, 100);
  EXPECT_EQ(sessions.Open(0, ProducerId(0), 4, 100 + kIdleNs - 1), nullptr) << "not idle yet";
  EXPECT_EQ(sessions.size(), 3u);
  ASSERT_NE(sessions.Find(older_id), nullptr) << "a refusal evicts nothing";
  Session* fresh = sessions.Open(0, ProducerId(0), 5, 200 + kIdleNs);
  ASSERT_NE(fresh, nullptr);
  fresh->last_sequence = 1;
  EXPECT_EQ(sessions.Find(older_id), nullptr);
  EXPECT_NE(sessions.Find(newer_id), nullptr);
  EXPECT_EQ(sessions.Find(attached_id), attached);
  EXPECT_EQ(sessions.size(), 3u);
  ASSERT_NE(sessions.Open(0, ProducerId(0), 6, 200 + kIdleNs), nullptr);
  EXPECT_EQ(sessions.Find(newer_id), nullptr);
  EXPECT_EQ(sessions.Open(0, ProducerId(0), 7, INT64_MAX / 2), nullptr);
  EXPECT_EQ(sessions.Find(attached_id), attached);
}

TEST(ShardSessionsTest, ForEachAttachedVisitsThoseOfTheSpaceThatHaveAConnection) {
  ShardSessions sessions(10, kIdleNs, 1);
  std::set<uint64_t> wanted;
  for (int i = 0; i < 9; ++i) {
    Session* session =
        sessions.Open(static_cast<uint32_t>(i % 2), ProducerId(0), static_cast<Origin>(100 + i), 0);
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

// Against a map that keeps every session for ever.
TEST(ShardSessionsTest, AgreesWithAModelOverRandomPrograms) {
  struct Known {
    uint32_t place = 0;
    Origin origin = 0;
    Sequence last = 0;
    int64_t active_ns = 0;
  };
  constexpr uint32_t kLimit = 20;
  SplitMix64 random(5);
  ShardSessions sessions(kLimit, kIdleNs, 3);
  std::map<uint64_t, Known> alive;
  std::set<uint64_t> dead;
  int64_t now_ns = 0;
  int refused = 0;
  int evicted = 0;
  for (int step = 0; step < 20'000; ++step) {
    now_ns += static_cast<int64_t>(random.Below(20));
    if (random.Below(3) == 0) {
      Session* session = sessions.Open(1, ProducerId(0), 1 + random.Below(1'000), now_ns);
      if (alive.size() == kLimit) {
        auto oldest = alive.end();
        for (auto it = alive.begin(); it != alive.end(); ++it) {
          if (it->second.origin != 0 || now_ns - it->second.active_ns < kIdleNs) continue;
          if (oldest == alive.end() || it->second.active_ns < oldest->second.active_ns) oldest = it;
        }
        ASSERT_EQ(session == nullptr, oldest == alive.end()) << "step " << step;
        if (session == nullptr) {
          ++refused;
          continue;
        }
        // Of equally old ones any.
        const int64_t oldest_ns = oldest->second.active_ns;
        size_t gone = 0;
        for (auto it = alive.begin(); it != alive.end();) {
          if (sessions.Find(SessionId(it->first)) != nullptr) {
            ++it;
            continue;
          }
          ASSERT_EQ(it->second.active_ns, oldest_ns);
          dead.insert(it->first);
          it = alive.erase(it);
          ++gone;
        }
        ASSERT_EQ(gone, 1u);
        ++evicted;
      }
      ASSERT_NE(session, nullptr);
      ASSERT_FALSE(dead.contains(session->id.value()));
      ASSERT_TRUE(alive
                      .insert({session->id.value(),
                               {sessions.PlaceOf(*session), session->origin, 0, now_ns}})
                      .second);
    } else if (!alive.empty()) {
      auto it = std::next(alive.begin(), static_cast<ptrdiff_t>(random.Below(alive.size())));
      Session* session = sessions.Find(SessionId(it->first));
      ASSERT_NE(session, nullptr);
      if (random.Below(2) == 0) {
        session->last_sequence = ++it->second.last;
        session->last_active_ns = it->second.active_ns = now_ns;
      } else if (it->second.origin != 0) {
        sessions.Detach(session, now_ns);
        it->second.origin = 0;
        it->second.active_ns = now_ns;
        if (it->second.last == 0) {
          dead.insert(it->first);
          alive.erase(it);
        }
      }
    }
    ASSERT_EQ(sessions.size(), alive.size());
    for (const auto& [id, known] : alive) {
      const Session* session = sessions.Find(SessionId(id));
      ASSERT_NE(session, nullptr);
      ASSERT_EQ(sessions.At(known.place, SessionId(id)), session);
      ASSERT_EQ(session->origin, known.origin);
      ASSERT_EQ(session->last_sequence, known.last);
    }
    if (step % 500 == 0) {
      for (const uint64_t id : dead) ASSERT_EQ(sessions.Find(SessionId(id)), nullptr);
    }
  }
  EXPECT_GT(refused, 10);
  EXPECT_GT(evicted, 10);
}

}  // namespace
}  // namespace engram
