// The two tiers of the table of sessions: the active ones with their places, and the dormant ones
// that wait for a resume, are restored, visited, and forgotten after their time.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "src/core/clock.h"
#include "src/core/hash.h"
#include "src/core/session_id.h"
#include "tests/index/session_table_rig.h"

namespace engram {
namespace {

TEST(DormantSessionsTest, WhereNoPlaceIsFreeTheLongestIdleOneMakesOne) {
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

TEST(DormantSessionsTest, ADormantSessionComesBackAsItWas) {
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

TEST(DormantSessionsTest, AResumeOfAnActiveSessionLeavesItsConnectionToBeFenced) {
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

TEST(DormantSessionsTest, NoPlaceForAResumeIsNotTakenForAnUnknownSession) {
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
TEST(DormantSessionsTest, TwoSessionsTakeTurnsWhereEachTierHoldsOne) {
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

TEST(DormantSessionsTest, SevenDaysAfterItWasLastActiveASessionIsForgotten) {
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

TEST(DormantSessionsTest, AResumeBeginsTheSevenDaysAnew) {
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

TEST(DormantSessionsTest, WhatHasExpiredLeavesTheMemoryWithinAThousandthOfTheTime) {
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

TEST(DormantSessionsTest, ASweepTakesBoundedStepsAndLeavesTheBusyOnes) {
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

TEST(DormantSessionsTest, WhereTooManyAreDormantTheOldestGiveWay) {
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
TEST(DormantSessionsTest, RestoredSessionsOfOtherHomesAreKeptApart) {
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

TEST(DormantSessionsTest, RestoreRaisesAndNeverLowers) {
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
TEST(DormantSessionsTest, TimesBeyondWhatIsKeptAreNeitherLostNorKeptForEver) {
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

// A session goes to the other tier, and back, while a visit is under way: ahead of it, behind it.
TEST(DormantSessionsTest, AVisitComesToEachSessionOnceHoweverItMoves) {
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

}  // namespace
}  // namespace engram
