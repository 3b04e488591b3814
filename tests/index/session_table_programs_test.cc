// Random programs over the table of sessions.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <map>
#include <set>
#include <string>

#include "src/core/clock.h"
#include "src/core/hash.h"
#include "src/core/session_id.h"
#include "tests/index/session_table_rig.h"

namespace engram {
namespace {

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

TEST(SessionTableProgramsTest, AgreesWithAModelOverRandomPrograms) {
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
