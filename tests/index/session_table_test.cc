#include "index/session_table.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <iterator>
#include <map>
#include <set>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "src/core/clock.h"
#include "src/core/hash.h"
#include "src/core/session_id.h"
#include "tests/support/allocation_counter.h"

namespace engram {
namespace {

constexpr int64_t kIdleNs = 300 * kNanosPerSecond;
constexpr int64_t kKeepNs = int64_t{7} * 24 * 3'600 * kNanosPerSecond;
// The wall clock where the monotonic one is 0.
constexpr int64_t kUnixNs = 1'700'000'000 * kNanosPerSecond;

SessionTableOptions Options(uint32_t max_sessions, uint64_t seed = 1) {
  return {.max_sessions = max_sessions,
          .max_dormant = 1'000,
          .idle_timeout_ns = kIdleNs,
          .keep_ns = kKeepNs,
          .unix_ns = kUnixNs,
          .seed = seed,
          .home = ShardId(0)};
}

Session* OpenAt(SessionTable* sessions, int64_t now_ns, uint32_t space = 0) {
  return sessions->Open(space, ProducerId(0), 1, now_ns, kUnixNs + now_ns);
}

void ExpectSound(const SessionTable& sessions) {
  const auto sound = sessions.CheckInvariants();
  EXPECT_TRUE(sound.has_value()) << sound.error().message;
}

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

TEST(SessionTableTest, WhereNoPlaceIsFreeTheLongestIdleOneMakesOne) {
  SessionTable sessions(Options(3));
  Session* attached = OpenAt(&sessions, 0);
  Session* older = OpenAt(&sessions, 0);
  Session* newer = OpenAt(&sessions, 0);
  const SessionId attached_id = attached->id;
  const SessionId older_id = older->id;
  const SessionId newer_id = newer->id;
  for (Session* session : {attached, older, newer}) session->last_sequence = 1;
  EXPECT_EQ(OpenAt(&sessions, 2 * kIdleNs), nullptr) << "attached ones stay";
  sessions.Detach(older, 100);
  sessions.Detach(newer, 200);
  EXPECT_EQ(OpenAt(&sessions, 100 + kIdleNs - 1), nullptr) << "not idle yet";
  EXPECT_EQ(sessions.size(), 3u);
  EXPECT_EQ(sessions.Find(older_id), older) << "a refusal moves nothing";
  Session* fresh = OpenAt(&sessions, 200 + kIdleNs);
  ASSERT_NE(fresh, nullptr);
  EXPECT_EQ(sessions.Find(older_id), nullptr);
  EXPECT_EQ(sessions.SpaceOf(older_id, kUnixNs), 0u) << "and may still be resumed";
  EXPECT_EQ(sessions.Find(newer_id), newer);
  EXPECT_EQ(sessions.Find(attached_id), attached);
  EXPECT_EQ(sessions.size(), 3u);
  EXPECT_EQ(sessions.dormant(), 1u);
  ASSERT_NE(OpenAt(&sessions, 200 + kIdleNs), nullptr);
  EXPECT_EQ(sessions.Find(newer_id), nullptr);
  EXPECT_EQ(OpenAt(&sessions, 1'000 * kIdleNs), nullptr);
  EXPECT_EQ(sessions.Find(attached_id), attached);
  ExpectSound(sessions);
}

TEST(SessionTableTest, ADormantSessionComesBackAsItWas) {
  SessionTable sessions(Options(4));
  const SessionId other = OpenAt(&sessions, 0)->id;
  Session* session = OpenAt(&sessions, 0, 7);
  const SessionId id = session->id;
  session->last_sequence = 41;
  session->told_sequence = 41;
  session->granted_sequence = 4'000;
  sessions.Detach(session, 5);
  EXPECT_TRUE(sessions.Sweep(5 + kIdleNs, kUnixNs + 5 + kIdleNs, 10));
  EXPECT_EQ(sessions.size(), 1u);
  EXPECT_EQ(sessions.dormant(), 1u);
  EXPECT_EQ(sessions.Find(id), nullptr);
  EXPECT_EQ(sessions.At(PlaceOfSession(id), id), nullptr) << "its connection is long gone";
  // Its place is another's now.
  Session* next = OpenAt(&sessions, 2 * kIdleNs);
  EXPECT_EQ(sessions.PlaceOf(*next), PlaceOfSession(id));
  EXPECT_EQ(sessions.SpaceOf(id, kUnixNs + 2 * kIdleNs), 7u);
  const auto resumed = sessions.Resume(id, 2 * kIdleNs, kUnixNs + 2 * kIdleNs);
  ASSERT_TRUE(resumed.has_value());
  Session* back = *resumed;
  EXPECT_EQ(back->id, id);
  EXPECT_EQ(back->space, 7u);
  EXPECT_EQ(back->origin, 0u);
  EXPECT_EQ(back->last_sequence, 41u);
  EXPECT_EQ(back->told_sequence, 41u);
  EXPECT_EQ(back->granted_sequence, 41u) << "nothing beyond what it took is granted";
  EXPECT_EQ(back->first_forward, 0u);
  EXPECT_EQ(back->last_active_ns, 2 * kIdleNs);
  EXPECT_EQ(sessions.Find(id), back);
  EXPECT_EQ(sessions.At(sessions.PlaceOf(*back), id), back);
  EXPECT_EQ(sessions.dormant(), 0u);
  EXPECT_NE(sessions.Find(other), nullptr);
  sessions.Attach(back, ProducerId(3), 77, 2 * kIdleNs);
  EXPECT_EQ(back->producer, ProducerId(3));
  EXPECT_EQ(back->origin, 77u);
  EXPECT_TRUE(sessions.Sweep(9 * kIdleNs, kUnixNs + 9 * kIdleNs, 10));
  EXPECT_EQ(sessions.Find(id), back) << "it has a connection again";
  ExpectSound(sessions);
}

TEST(SessionTableTest, AResumeOfAnActiveSessionLeavesItsConnectionToBeFenced) {
  SessionTable sessions(Options(4));
  Session* session = OpenAt(&sessions, 0);
  session->last_sequence = 9;
  session->told_sequence = 8;
  const auto resumed = sessions.Resume(session->id, 10, kUnixNs + 10);
  ASSERT_TRUE(resumed.has_value());
  EXPECT_EQ(*resumed, session);
  EXPECT_EQ(session->origin, 1u);
  EXPECT_EQ(session->last_sequence, 9u);
  EXPECT_EQ(session->told_sequence, 8u);
  sessions.Attach(session, ProducerId(1), 2, 10);
  EXPECT_EQ(session->origin, 2u);
  ExpectSound(sessions);
}

TEST(SessionTableTest, NoPlaceForAResumeIsNotTakenForAnUnknownSession) {
  SessionTable sessions(Options(1));
  Session* session = OpenAt(&sessions, 0);
  const SessionId id = session->id;
  session->last_sequence = 5;
  sessions.Detach(session, 0);
  Session* other = OpenAt(&sessions, kIdleNs);
  ASSERT_NE(other, nullptr);
  other->last_sequence = 1;
  const auto refused = sessions.Resume(id, kIdleNs, kUnixNs + kIdleNs);
  ASSERT_FALSE(refused.has_value());
  EXPECT_EQ(refused.error(), RefusalReason::kSessionLimit);
  const auto unknown = sessions.Resume(SessionId(id.value() ^ 1), kIdleNs, kUnixNs + kIdleNs);
  ASSERT_FALSE(unknown.has_value());
  EXPECT_EQ(unknown.error(), RefusalReason::kSessionExpired);
  ExpectSound(sessions);
  sessions.Detach(other, kIdleNs);
  const auto resumed = sessions.Resume(id, 2 * kIdleNs, kUnixNs + 2 * kIdleNs);
  ASSERT_TRUE(resumed.has_value());
  EXPECT_EQ((*resumed)->last_sequence, 5u);
  ExpectSound(sessions);
}

// With both tiers full the two that change places must not push each other out.
TEST(SessionTableTest, TwoSessionsTakeTurnsWhereEachTierHoldsOne) {
  SessionTableOptions options = Options(1);
  options.max_dormant = 1;
  SessionTable sessions(options);
  std::vector<SessionId> ids;
  int64_t now_ns = 0;
  for (int i = 0; i < 2; ++i, now_ns += kIdleNs) {
    Session* session = OpenAt(&sessions, now_ns);
    ASSERT_NE(session, nullptr);
    session->last_sequence = static_cast<Sequence>(100 + i);
    ids.push_back(session->id);
    sessions.Detach(session, now_ns);
  }
  for (size_t turn = 0; turn < 20; ++turn, now_ns += kIdleNs) {
    const auto resumed = sessions.Resume(ids[turn % 2], now_ns, kUnixNs + now_ns);
    ASSERT_TRUE(resumed.has_value()) << turn;
    EXPECT_EQ((*resumed)->last_sequence, 100 + turn % 2);
    EXPECT_EQ(sessions.size(), 1u);
    EXPECT_EQ(sessions.dormant(), 1u);
    ExpectSound(sessions);
  }
}

TEST(SessionTableTest, SevenDaysAfterItWasLastActiveASessionIsForgotten) {
  for (const int64_t fraction_ns : {int64_t{0}, int64_t{1}, kNanosPerSecond - 1}) {
    SessionTable sessions(Options(4));
    Session* session = OpenAt(&sessions, fraction_ns);
    const SessionId id = session->id;
    session->last_sequence = 1;
    sessions.Detach(session, fraction_ns);
    ASSERT_TRUE(sessions.Sweep(kIdleNs + kNanosPerSecond, kUnixNs + kIdleNs + kNanosPerSecond, 9));
    ASSERT_EQ(sessions.dormant(), 1u);
    // Up to the whole second that follows.
    const int64_t end_ns = kKeepNs + (fraction_ns == 0 ? 0 : kNanosPerSecond);
    EXPECT_TRUE(sessions.SpaceOf(id, kUnixNs + end_ns - 1).has_value());
    EXPECT_FALSE(sessions.SpaceOf(id, kUnixNs + end_ns).has_value());
    // Sweeps do not forget it earlier.
    for (int64_t now_ns = kIdleNs; now_ns < end_ns; now_ns += 3'600 * kNanosPerSecond) {
      ASSERT_TRUE(sessions.Sweep(now_ns, kUnixNs + now_ns, 10'000));
    }
    ASSERT_TRUE(sessions.Sweep(end_ns - 1, kUnixNs + end_ns - 1, 10'000));
    ASSERT_TRUE(sessions.SpaceOf(id, kUnixNs + end_ns - 1).has_value());
    const auto expired = sessions.Resume(id, end_ns, kUnixNs + end_ns);
    ASSERT_FALSE(expired.has_value());
    EXPECT_EQ(expired.error(), RefusalReason::kSessionExpired);
    EXPECT_EQ(sessions.dormant(), 0u);
    ExpectSound(sessions);
  }
}

TEST(SessionTableTest, AResumeBeginsTheSevenDaysAnew) {
  SessionTable sessions(Options(4));
  Session* session = OpenAt(&sessions, 0);
  const SessionId id = session->id;
  session->last_sequence = 1;
  sessions.Detach(session, 0);
  int64_t now_ns = 0;
  for (int week = 0; week < 5; ++week) {
    now_ns += kKeepNs - kNanosPerSecond;
    ASSERT_TRUE(sessions.Sweep(now_ns, kUnixNs + now_ns, 100'000));
    const auto resumed = sessions.Resume(id, now_ns, kUnixNs + now_ns);
    ASSERT_TRUE(resumed.has_value()) << week;
    sessions.Attach(*resumed, ProducerId(0), 1, now_ns);
    sessions.Detach(*resumed, now_ns);
  }
  ExpectSound(sessions);
}

TEST(SessionTableTest, WhatHasExpiredLeavesTheMemoryWithinAThousandthOfTheTime) {
  SessionTable sessions(Options(4));
  SplitMix64 random(1);
  for (uint32_t i = 0; i < 500; ++i) {
    sessions.Restore(MakeSessionId(random.Next(), ShardId(0), i), 0, 1,
                     kUnixNs - static_cast<int64_t>(random.Below(kKeepNs)));
  }
  EXPECT_EQ(sessions.dormant(), 500u);
  const auto sweep = [&](int64_t now_ns) {
    int calls = 1;
    while (!sessions.Sweep(now_ns, kUnixNs + now_ns, 16)) ++calls;
    return calls;
  };
  EXPECT_LE(sweep(kKeepNs / 2), 1'024 / 16 + 500 / 16 + 1) << "bounded steps, none in vain";
  EXPECT_NEAR(sessions.dormant(), 250, 60);
  sweep(kKeepNs / 1'000 * 999);
  sweep(kKeepNs + kKeepNs / 1'000);
  EXPECT_EQ(sessions.dormant(), 0u);
  EXPECT_EQ(sweep(3 * kKeepNs), 1) << "an empty table costs nothing";
  ExpectSound(sessions);
}

TEST(SessionTableTest, ASweepTakesBoundedStepsAndLeavesTheBusyOnes) {
  SessionTable sessions(Options(100));
  std::vector<Session*> all;
  for (int i = 0; i < 100; ++i) {
    all.push_back(OpenAt(&sessions, 0));
    all.back()->last_sequence = 1;
  }
  for (int i = 10; i < 100; ++i) sessions.Detach(all[static_cast<size_t>(i)], i);
  all[20]->first_forward = 1;
  sessions.Touch(all[30], 1'000);  // What came before the end of its connection.
  const int64_t now_ns = kIdleNs + 99;
  EXPECT_FALSE(sessions.Sweep(now_ns, kUnixNs + now_ns, 40));
  EXPECT_EQ(sessions.size(), 60u);
  EXPECT_FALSE(sessions.Sweep(now_ns, kUnixNs + now_ns, 40));
  EXPECT_TRUE(sessions.Sweep(now_ns, kUnixNs + now_ns, 40));
  EXPECT_EQ(sessions.size(), 12u);
  EXPECT_EQ(sessions.dormant(), 88u);
  for (size_t i = 0; i < 10; ++i) EXPECT_EQ(sessions.Find(all[i]->id), all[i]);
  EXPECT_EQ(all[20]->id.value() == 0, false) << "a forward comes back to it";
  EXPECT_EQ(all[30]->id.value() == 0, false);
  all[20]->first_forward = 0;
  EXPECT_TRUE(sessions.Sweep(now_ns, kUnixNs + now_ns, 40));
  EXPECT_EQ(sessions.size(), 11u);
  EXPECT_TRUE(sessions.Sweep(kIdleNs + 1'000, kUnixNs + kIdleNs + 1'000, 40));
  EXPECT_EQ(sessions.size(), 10u);
  ExpectSound(sessions);
}

TEST(SessionTableTest, WhereTooManyAreDormantTheOldestGiveWay) {
  SessionTableOptions options = Options(1);
  options.max_dormant = 50;
  SessionTable sessions(options);
  SplitMix64 random(2);
  constexpr int64_t kApartNs = 20 * 60 * kNanosPerSecond;
  std::vector<std::pair<int64_t, SessionId>> all;
  for (uint32_t i = 0; i < 200; ++i) {
    all.push_back({kUnixNs - i * kApartNs, MakeSessionId(random.Next(), ShardId(0), i)});
  }
  std::ranges::sort(all, {}, [](const auto& entry) { return entry.second; });
  for (const auto& [unix_ns, id] : all) sessions.Restore(id, 0, 1, unix_ns);
  EXPECT_EQ(sessions.dormant(), 50u);
  for (const auto& [unix_ns, id] : all) {
    EXPECT_EQ(sessions.SpaceOf(id, kUnixNs).has_value(), unix_ns > kUnixNs - 50 * kApartNs);
  }
  ExpectSound(sessions);
}

// Sessions of several shards, after a change of their number: the same place inside ids, other
// homes, places beyond the table.
TEST(SessionTableTest, RestoredSessionsOfOtherHomesAreKeptApart) {
  SessionTable sessions(Options(8));
  std::vector<SessionId> ids;
  for (uint16_t home = 0; home < 4; ++home) {
    for (const uint32_t place : {0u, 3u, 200'000u}) {
      // The same random bits too: they differ in the home alone.
      ids.push_back(MakeSessionId(uint64_t{0x123456789ABCDEF0}, ShardId(home), place));
    }
  }
  Session* here = OpenAt(&sessions, 0);
  for (size_t i = 0; i < ids.size(); ++i) {
    sessions.Restore(ids[i], static_cast<uint32_t>(i), 10 + i, kUnixNs);
  }
  EXPECT_EQ(sessions.dormant(), 12u);
  std::set<uint32_t> places{sessions.PlaceOf(*here)};
  for (size_t i = 0; i < 7; ++i) {
    const auto resumed = sessions.Resume(ids[i], 0, kUnixNs);
    ASSERT_TRUE(resumed.has_value());
    EXPECT_EQ((*resumed)->id, ids[i]);
    EXPECT_EQ((*resumed)->space, i);
    EXPECT_EQ((*resumed)->last_sequence, 10 + i);
    EXPECT_TRUE(places.insert(sessions.PlaceOf(**resumed)).second);
    EXPECT_EQ(sessions.At(sessions.PlaceOf(**resumed), ids[i]), *resumed);
  }
  EXPECT_EQ(sessions.Resume(ids[7], 0, kUnixNs).error(), RefusalReason::kSessionLimit);
  ExpectSound(sessions);
}

TEST(SessionTableTest, RestoreRaisesAndNeverLowers) {
  SessionTable sessions(Options(2));
  const SessionId id = MakeSessionId(~uint64_t{0}, ShardId(9), 5);
  const auto known = [&] {
    Sequence sequence = 0;
    int64_t active_ns = 0;
    uint64_t cursor = 0;
    EXPECT_LE(sessions.Visit(
                  &cursor, 100,
                  [&](SessionId visited, uint32_t space, Sequence last, int64_t last_active_ns) {
                    EXPECT_EQ(visited, id);
                    EXPECT_EQ(space, 3u);
                    sequence = last;
                    active_ns = last_active_ns;
                  }),
              1u);
    EXPECT_EQ(cursor, 0u);
    return std::pair(sequence, (active_ns - kUnixNs) / kNanosPerSecond);
  };
  sessions.Restore(SessionId(), 3, 5, kUnixNs);
  sessions.Restore(id, 3, 0, kUnixNs);
  EXPECT_EQ(sessions.dormant(), 0u) << "there is nothing to resume";
  sessions.Restore(id, 3, 5, kUnixNs + 10 * kNanosPerSecond);
  EXPECT_EQ(known(), std::pair(Sequence{5}, int64_t{10}));
  sessions.Restore(id, 3, 4, kUnixNs + 20 * kNanosPerSecond);
  EXPECT_EQ(known(), std::pair(Sequence{5}, int64_t{20}));
  sessions.Restore(id, 3, 6, kUnixNs);
  EXPECT_EQ(known(), std::pair(Sequence{6}, int64_t{20}));
  EXPECT_EQ(sessions.dormant(), 1u);
  Session* session = *sessions.Resume(id, 0, kUnixNs);
  sessions.Restore(id, 3, 5, kUnixNs);
  EXPECT_EQ(session->last_sequence, 6u);
  sessions.Restore(id, 3, 8, kUnixNs);
  EXPECT_EQ(session->last_sequence, 8u);
  EXPECT_EQ(session->told_sequence, 8u);
  EXPECT_EQ(sessions.size(), 1u);
  EXPECT_EQ(sessions.dormant(), 0u);
  ExpectSound(sessions);
}

// What was written before the clock was set back, or long ago, has no ring of its own.
TEST(SessionTableTest, TimesBeyondWhatIsKeptAreNeitherLostNorKeptForEver) {
  SessionTable sessions(Options(2));
  SplitMix64 random(3);
  const auto restore = [&](int64_t unix_ns) {
    const SessionId id = MakeSessionId(random.Next(), ShardId(0), 0);
    sessions.Restore(id, 0, 1, unix_ns);
    return id;
  };
  const SessionId ahead = restore(kUnixNs + 3 * kKeepNs);
  const SessionId ancient = restore(kUnixNs - 3 * kKeepNs);
  const SessionId before_1970 = restore(-5);
  const SessionId now = restore(kUnixNs);
  EXPECT_FALSE(sessions.SpaceOf(ancient, kUnixNs).has_value());
  EXPECT_FALSE(sessions.SpaceOf(before_1970, kUnixNs).has_value());
  EXPECT_TRUE(sessions.SpaceOf(now, kUnixNs).has_value());
  for (int64_t day = 0; day < 28; ++day) {
    const int64_t now_ns = day * kKeepNs / 7;
    while (!sessions.Sweep(now_ns, kUnixNs + now_ns, 7)) {
    }
    EXPECT_EQ(sessions.SpaceOf(ahead, kUnixNs + now_ns).has_value(), day < 28) << day;
    EXPECT_EQ(sessions.SpaceOf(now, kUnixNs + now_ns).has_value(), day < 7) << day;
    ExpectSound(sessions);
  }
  EXPECT_EQ(sessions.dormant(), 1u);
  while (!sessions.Sweep(5 * kKeepNs, kUnixNs + 5 * kKeepNs, 7)) {
  }
  EXPECT_EQ(sessions.dormant(), 0u);
  // The clock is set back: nothing is younger than now, and nothing is lost.
  const SessionId late = restore(kUnixNs);
  EXPECT_TRUE(sessions.Sweep(5 * kKeepNs, kUnixNs, 7));
  EXPECT_TRUE(sessions.SpaceOf(late, kUnixNs).has_value());
  ExpectSound(sessions);
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

// A session goes to the other tier, and back, while a visit is under way: ahead of it, behind it.
TEST(SessionTableTest, AVisitComesToEachSessionOnceHoweverItMoves) {
  for (uint64_t seed = 0; seed < 30; ++seed) {
    SplitMix64 random(seed);
    SessionTableOptions options = Options(10);
    options.max_dormant = 100;
    SessionTable sessions(options);
    std::vector<SessionId> ids;
    for (uint32_t i = 0; i < 60; ++i) {
      ids.push_back(MakeSessionId(random.Next(), ShardId(1), i));
      sessions.Restore(ids.back(), 0, i + 1, kUnixNs);
    }
    std::map<uint64_t, int> visits;
    uint64_t cursor = 0;
    int64_t now_ns = 0;
    do {
      for (uint64_t moves = random.Below(20); moves > 0; --moves) {
        now_ns += kIdleNs / 4;
        ASSERT_TRUE(sessions.Resume(ids[random.Below(60)], now_ns, kUnixNs + now_ns));
        if (random.Below(3) == 0) sessions.Sweep(now_ns, kUnixNs + now_ns, random.Below(10));
      }
      sessions.Visit(&cursor, 1 + random.Below(9),
                     [&](SessionId id, uint32_t, Sequence last_sequence, int64_t) {
                       ++visits[id.value()];
                       EXPECT_EQ(ids[last_sequence - 1], id);
                     });
    } while (cursor != 0);
    ASSERT_EQ(visits.size(), 60u);
    for (const auto& [id, count] : visits) ASSERT_EQ(count, 1);
    ExpectSound(sessions);
  }
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

// A table beside maps of what must be known, through random programs.
class SessionProgram {
 public:
  static constexpr uint32_t kPlaces = 8;
  static constexpr uint32_t kDormant = 16;
  static constexpr int64_t kIdle = 1'000 * kNanosPerMilli;
  static constexpr int64_t kKeep = 3'000 * kNanosPerSecond;
  static constexpr int64_t kAgeNs = kKeep / 1'000;

  explicit SessionProgram(uint64_t seed)
      : random_(seed),
        table_({.max_sessions = kPlaces,
                .max_dormant = kDormant,
                .idle_timeout_ns = kIdle,
                .keep_ns = kKeep,
                .unix_ns = kUnixNs,
                .seed = seed,
                .home = ShardId(2)}) {}

  void Run(int steps) {
    for (int step = 0; step < steps && !testing::Test::HasFailure(); ++step) {
      SCOPED_TRACE("step " + std::to_string(step));
      // A tick at least, so that no two are equally old.
      now_ns_ += 1 + static_cast<int64_t>(random_.Below(kIdle / 4));
      if (random_.Below(200) == 0) LetTimePass();
      Step();
      Compare();
      if (step % 16 == 0) ExpectSound(table_);
      if (step % 128 == 0) {
        for (const uint64_t id : gone_) ASSERT_FALSE(table_.SpaceOf(SessionId(id), unix_ns()));
      }
    }
  }

  struct Seen {
    int opened = 0;
    int refused = 0;
    int resumed_active = 0;
    int resumed_dormant = 0;
    int expired = 0;
    int limited = 0;
    int retired = 0;
    int gave_way = 0;
    int visits = 0;
    int dropped = 0;
  };
  const Seen& seen() const { return seen_; }

 private:
  struct Known {
    bool active = false;
    uint32_t space = 0;
    uint32_t place = 0;
    Origin origin = 0;
    uint64_t forward = 0;
    Sequence last = 0;
    int64_t active_ns = 0;       // monotonic, of an active one
    int64_t active_unix_ns = 0;  // of a dormant one, in whole seconds
    bool throughout = false;     // since the visit under way began
  };
  using Entry = std::map<uint64_t, Known>::iterator;

  int64_t unix_ns() const { return kUnixNs + now_ns_; }
  static int64_t WholeSecond(int64_t ns) {
    return (ns + kNanosPerSecond - 1) / kNanosPerSecond * kNanosPerSecond;
  }
  uint32_t Active() const {
    return static_cast<uint32_t>(
        std::ranges::count_if(known_, [](const auto& entry) { return entry.second.active; }));
  }
  Entry Any() {
    return std::next(known_.begin(), static_cast<ptrdiff_t>(random_.Below(known_.size())));
  }

  void Step() {
    switch (random_.Below(14)) {
      case 0:
      case 1:
        return Open();
      case 2:
      case 3:
        return Take();
      case 4:
      case 5:
      case 6:
        return Detach();
      case 7:
      case 8:
        return Resume();
      case 9:
        return Forward();
      case 10:
        return Restore();
      case 11:
        return Sweep();
      case 12:
        return Visit();
      default:
        if (random_.Below(20) == 0) ForgetSpace();
    }
  }

  // The longest idle one becomes dormant. False where there is none.
  bool Retire() {
    auto oldest = known_.end();
    for (auto it = known_.begin(); it != known_.end(); ++it) {
      const Known& known = it->second;
      if (!known.active || known.origin != 0 || known.forward != 0) continue;
      if (now_ns_ - known.active_ns < kIdle) continue;
      if (oldest == known_.end() || known.active_ns < oldest->second.active_ns) oldest = it;
    }
    if (oldest == known_.end()) return false;
    oldest->second.active = false;
    oldest->second.active_unix_ns = WholeSecond(kUnixNs + oldest->second.active_ns);
    ++seen_.retired;
    return true;
  }

  void Open() {
    const bool has_place = Active() < kPlaces || Retire();
    const auto space = static_cast<uint32_t>(random_.Below(3));
    Session* session = table_.Open(space, ProducerId(0), 5, now_ns_, unix_ns());
    ASSERT_EQ(session != nullptr, has_place);
    ++(has_place ? seen_.opened : seen_.refused);
    if (!has_place) return;
    ASSERT_EQ(HomeOfSession(session->id), ShardId(2));
    ASSERT_FALSE(gone_.contains(session->id.value()));
    Known known{.active = true, .space = space, .place = table_.PlaceOf(*session), .origin = 5};
    known.active_ns = now_ns_;
    ASSERT_TRUE(known_.insert({session->id.value(), known}).second);
  }

  void Take() {
    if (known_.empty()) return;
    const Entry it = Any();
    if (!it->second.active) return;
    Session* session = table_.Find(SessionId(it->first));
    if (it->second.last == 0) taken_meanwhile_.insert(it->first);
    session->last_sequence = session->told_sequence = ++it->second.last;
    table_.Touch(session, now_ns_);
    it->second.active_ns = now_ns_;
  }

  void Forward() {
    if (known_.empty()) return;
    const Entry it = Any();
    if (!it->second.active || it->second.last == 0) return;
    it->second.forward = random_.Below(2);
    table_.Find(SessionId(it->first))->first_forward = it->second.forward;
  }

  void Detach() {
    if (known_.empty()) return;
    const Entry it = Any();
    if (it->second.origin == 0) return;
    table_.Detach(table_.Find(SessionId(it->first)), now_ns_);
    it->second.origin = 0;
    it->second.active_ns = now_ns_;
    if (it->second.last == 0) Lose(it);
  }

  void Resume() {
    const auto& lost = random_.Below(2) == 0 ? gone_ : expired_;
    if (!lost.empty() && random_.Below(4) == 0) {
      auto it = lost.lower_bound(random_.Next());
      if (it == lost.end()) it = lost.begin();
      const auto resumed = table_.Resume(SessionId(*it), now_ns_, unix_ns());
      ASSERT_FALSE(resumed.has_value());
      ASSERT_EQ(resumed.error(), RefusalReason::kSessionExpired);
      seen_.expired += expired_.contains(*it);
      return;
    }
    if (known_.empty()) return;
    const Entry it = Any();
    const SessionId id(it->first);
    const bool was_active = it->second.active;
    // Time has passed since Compare.
    if (!was_active && unix_ns() - it->second.active_unix_ns >= kKeep) return;
    const bool has_place = was_active || Active() < kPlaces || Retire();
    const auto resumed = table_.Resume(id, now_ns_, unix_ns());
    if (!has_place) {
      ASSERT_FALSE(resumed.has_value());
      ASSERT_EQ(resumed.error(), RefusalReason::kSessionLimit);
      ++seen_.limited;
      return;
    }
    ASSERT_TRUE(resumed.has_value());
    ++(was_active ? seen_.resumed_active : seen_.resumed_dormant);
    Known& known = it->second;
    if (!was_active) {
      known.active = true;
      known.origin = 0;
      known.forward = 0;
      known.active_ns = now_ns_;
      known.place = table_.PlaceOf(**resumed);
      ASSERT_EQ((*resumed)->told_sequence, known.last);
    }
    if (random_.Below(2) == 0) return;
    table_.Attach(*resumed, ProducerId(1), 6, now_ns_);
    known.origin = 6;
    known.active_ns = now_ns_;
  }

  void Restore() {
    const int64_t last_ns = unix_ns() - static_cast<int64_t>(random_.Below(kKeep));
    const Sequence last = 1 + random_.Below(50);
    if (!known_.empty() && random_.Below(2) == 0) {
      const Entry it = Any();
      Known& known = it->second;
      if (!known.active && unix_ns() - known.active_unix_ns >= kKeep) return;
      if (known.last == 0) taken_meanwhile_.insert(it->first);
      table_.Restore(SessionId(it->first), known.space, last, last_ns);
      known.last = std::max(known.last, last);
      if (!known.active) {
        known.active_unix_ns = std::max(known.active_unix_ns, WholeSecond(last_ns));
      }
      return;
    }
    const SessionId id =
        MakeSessionId(random_.Next(), ShardId(static_cast<uint16_t>(random_.Below(4))),
                      static_cast<uint32_t>(random_.Below(2 * kPlaces)));
    table_.Restore(id, 1, last, last_ns);
    Known known{.active = false, .space = 1, .last = last};
    known.active_unix_ns = WholeSecond(last_ns);
    known_.insert({id.value(), known});
  }

  // Sweeps come often, as in a shard: within the time that the rings have to spare.
  void LetTimePass() {
    for (uint64_t left = random_.Below(kKeep / 2 / kAgeNs / 10); left > 0; --left) {
      now_ns_ += 10 * kAgeNs;
      bool is_done = false;
      while (!is_done && !testing::Test::HasFailure()) {
        Retire();
        is_done = table_.Sweep(now_ns_, unix_ns(), 1);
        Compare();
      }
    }
  }

  void Sweep() {
    const size_t steps = random_.Below(6);
    size_t left = steps;
    while (left > 0 && Retire()) --left;
    const bool is_done = table_.Sweep(now_ns_, unix_ns(), steps);
    ASSERT_FALSE(is_done && left == 0);
  }

  // A part; what is known throughout the parts comes once.
  void Visit() {
    if (cursor_ == 0) {
      visited_.clear();
      for (auto& [id, known] : known_) known.throughout = true;
    }
    table_.Visit(&cursor_, 1 + random_.Below(12),
                 [&](SessionId id, uint32_t space, Sequence last, int64_t last_active_ns) {
                   ASSERT_TRUE(visited_.insert(id.value()).second) << "visited twice";
                   const auto it = known_.find(id.value());
                   if (it == known_.end()) {
                     ASSERT_TRUE(expired_.contains(id.value()));
                     return;
                   }
                   const Known& known = it->second;
                   ASSERT_EQ(space, known.space);
                   ASSERT_EQ(last, known.last);
                   ASSERT_GT(last, 0u);
                   if (!known.active) {
                     ASSERT_EQ(last_active_ns, known.active_unix_ns);
                   } else if (known.origin == 0) {
                     ASSERT_EQ(last_active_ns, kUnixNs + known.active_ns);
                   } else {
                     ASSERT_GE(last_active_ns, kUnixNs + known.active_ns - kKeep);
                     ASSERT_LE(last_active_ns, unix_ns());
                   }
                 });
    if (cursor_ != 0) return;
    ++seen_.visits;
    for (auto& [id, known] : known_) {
      if (known.throughout && known.last > 0 && !taken_meanwhile_.contains(id)) {
        ASSERT_TRUE(visited_.contains(id));
      }
      known.throughout = false;
    }
    taken_meanwhile_.clear();
  }

  void ForgetSpace() {
    size_t forgotten = 0;
    uint64_t cursor = 0;
    do {
      forgotten += table_.ForgetSpace(1, &cursor, 5);
    } while (cursor != 0);
    // Beside them those of the space that have expired, and were not dropped yet.
    size_t lost = 0;
    for (auto it = known_.begin(); it != known_.end();) {
      const Known& known = it->second;
      const auto next = std::next(it);
      if (known.space == 1 && known.origin == 0 && known.forward == 0) {
        Lose(it);
        ++lost;
      }
      it = next;
    }
    ASSERT_GE(forgotten, lost);
    seen_.dropped += static_cast<int>(lost);
  }

  void Lose(Entry it) {
    gone_.insert(it->first);
    known_.erase(it);
  }

  // What has expired must not be resumable; where too many are dormant, the oldest are gone.
  void Compare() {
    for (auto it = known_.begin(); it != known_.end();) {
      const auto next = std::next(it);
      if (!it->second.active && unix_ns() - it->second.active_unix_ns >= kKeep) {
        expired_.insert(it->first);
        Lose(it);
      }
      it = next;
    }
    int64_t oldest_kept = INT64_MAX;
    int64_t youngest_lost = 0;
    uint32_t dormant = 0;
    for (auto it = known_.begin(); it != known_.end();) {
      const auto next = std::next(it);
      const SessionId id(it->first);
      const Known& known = it->second;
      const Session* session = table_.Find(id);
      ASSERT_EQ(session != nullptr, known.active);
      const int64_t age = known.active_unix_ns / kAgeNs;
      if (known.active) {
        ASSERT_EQ(table_.At(known.place, id), session);
        ASSERT_EQ(session->space, known.space);
        ASSERT_EQ(session->origin, known.origin);
        ASSERT_EQ(session->last_sequence, known.last);
      } else if (const auto space = table_.SpaceOf(id, unix_ns())) {
        ASSERT_EQ(*space, known.space);
        oldest_kept = std::min(oldest_kept, age);
        ++dormant;
      } else {
        ASSERT_EQ(table_.dormant(), kDormant);
        youngest_lost = std::max(youngest_lost, age);
        Lose(it);
        ++seen_.gave_way;
      }
      it = next;
    }
    ASSERT_LE(youngest_lost, oldest_kept);
    ASSERT_LE(dormant, table_.dormant());
    ASSERT_LE(table_.dormant(), kDormant);
    ASSERT_EQ(table_.size(), Active());
  }

  SplitMix64 random_;
  SessionTable table_;
  std::map<uint64_t, Known> known_;
  std::set<uint64_t> gone_;
  std::set<uint64_t> expired_;  // of these: may still take room
  uint64_t cursor_ = 0;
  std::set<uint64_t> visited_;
  std::set<uint64_t> taken_meanwhile_;
  int64_t now_ns_ = 0;
  Seen seen_;
};

TEST(SessionTableTest, AgreesWithAModelOverRandomPrograms) {
  SessionProgram::Seen all;
  for (uint64_t seed = 1; seed <= 60 && !HasFailure(); ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    SessionProgram program(seed);
    program.Run(1'500);
    const SessionProgram::Seen& seen = program.seen();
    all.opened += seen.opened;
    all.refused += seen.refused;
    all.resumed_active += seen.resumed_active;
    all.resumed_dormant += seen.resumed_dormant;
    all.expired += seen.expired;
    all.limited += seen.limited;
    all.retired += seen.retired;
    all.gave_way += seen.gave_way;
    all.visits += seen.visits;
    all.dropped += seen.dropped;
  }
  EXPECT_GT(all.opened, 1'000);
  EXPECT_GT(all.refused, 100);
  EXPECT_GT(all.resumed_active, 1'000);
  EXPECT_GT(all.resumed_dormant, 1'000);
  EXPECT_GT(all.expired, 100);
  EXPECT_GT(all.limited, 100);
  EXPECT_GT(all.retired, 1'000);
  EXPECT_GT(all.gave_way, 1'000);
  EXPECT_GT(all.visits, 1'000);
  EXPECT_GT(all.dropped, 100);
}

}  // namespace
}  // namespace engram
