// Random programs with spaces that are dropped and made again, with another metric and dimension,
// over shards whose logs are replayed each for itself, on a simulated disk: with observations under
// way, checkpoints at any moment, several drops at a time, crashes in the midst of a drop and of a
// recovery, and restarts with other numbers of shards. What is there is compared with a map, and
// which sessions are.
//
// ENGRAM_DROP_SEED=n runs the programs of that seed alone, ENGRAM_DROP_SEEDS=n so many from
// ENGRAM_DROP_FIRST on.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "src/core/hash.h"
#include "src/core/space_catalogue.h"
#include "tests/sim/durable_rig.h"
#include "tests/sim/program_seeds.h"

namespace engram {
namespace {

uint64_t DropSeeds() { return UsualSeeds(500, 40); }

struct Stats {
  uint64_t drops = 0;
  uint64_t unanswered_in_drops = 0;
  uint64_t refused_in_drops = 0;
  uint64_t crashes_in_drops = 0;
  uint64_t dropped_by_crash = 0;
  uint64_t kept_by_crash = 0;
  uint64_t checkpoints = 0;
  uint64_t crashes_in_checkpoints = 0;
  uint64_t crashes_in_recoveries = 0;
  uint64_t unanswered_in_crashes = 0;
  uint64_t reshards = 0;
  uint64_t compared = 0;
  uint64_t sessions_expired = 0;
  uint64_t sessions_resumed = 0;
};

// What an observation leaves of its id: the number that its payload begins with, or kNothing.
using Content = uint64_t;
constexpr Content kNothing = 0;

// What a space is and holds in its present incarnation.
struct SpaceModel {
  uint16_t dimension = 0;  // 0: nothing of it is there
  Metric metric = Metric::kL2;
  std::map<std::string, Content> ids;
  // What an id may be after a crash, as well: nobody was told.
  std::map<std::string, std::set<Content>> maybe;
  uint64_t incarnation = 0;
  bool is_acknowledged = false;  // something of it
  bool is_dropping = false;
  CommitStamp birth = kNoStamp;  // when the drop began
};

class DropProgram {
 public:
  DropProgram(uint64_t seed, bool reshards, Stats* stats)
      : random_(seed), stats_(stats), reshards_(reshards), rig_(seed) {
    setup_ = DurableRig::SmallSetup();
    setup_.shard.max_sessions = 512;
    DrawShards();
    for (const char* name : {"a", "b", "c"}) spaces_[name];
    if (!Chance(2)) return;
    // It is there from the start, and again once it was dropped.
    spaces_[kConfigured];
    setup_.spaces.push_back({kConfigured, {.metric = Metric::kL2}});
  }

  void Run() {
    ASSERT_NO_FATAL_FAILURE(Start());
    const int lives = 2 + static_cast<int>(random_.Next() % 4);
    for (int life = 0; life < lives; ++life) {
      const int steps = 5 + static_cast<int>(random_.Next() % 100);
      for (int step = 0; step < steps; ++step) {
        ASSERT_NO_FATAL_FAILURE(Step());
      }
      ASSERT_NO_FATAL_FAILURE(CrashAndStart());
    }
  }

 private:
  struct KnownSession {
    RigSession session;
    uint64_t incarnation = 0;
    Sequence sent = 0;  // session.next: behind the last one that was acknowledged
  };
  // An observation that nobody waits for.
  struct Unanswered {
    SlotId slot = kNoSlot;
    size_t from = 0;  // of the completions
    std::string space;
    Sequence sequence = 0;
    std::string id;
    Content content = kNothing;
  };

  bool Chance(uint64_t of) { return random_.Next() % of == 0; }

  void DrawShards() {
    const auto drawn = static_cast<uint16_t>(1 + random_.Next() % 3);
    const uint16_t shards = running_ && !reshards_ ? setup_.shards : drawn;
    if (running_ && shards != setup_.shards) ++stats_->reshards;
    setup_.shards = shards;
    setup_.max_partitions = shards;
  }

  std::string DrawSpace() {
    auto at = spaces_.begin();
    std::advance(at, random_.Next() % spaces_.size());
    return at->first;
  }

  void Step() {
    const uint64_t dice = random_.Next() % 32;
    if (dice < checkpoints_ && !rig_.checkpointer->busy()) rig_.checkpointer->Request();
    if (dice == 3) {
      ASSERT_NO_FATAL_FAILURE(Compare());
    }
    if (dice == 4) rig_.clock.AdvanceNs(static_cast<int64_t>(random_.Next() % 20) * kTickNs);
    for (uint64_t polls = random_.Next() % 8; polls > 0; --polls) Poll();
    if (commands_ > 0 && rig_.shards->commands_under_way == 0) FinishDrops();
    const std::string space = DrawSpace();
    SpaceModel& model = spaces_[space];
    if (model.is_dropping) {
      RefusedWhileDropping(space);
    } else if (dice >= 5 && dice <= 6 && model.dimension != 0) {
      BeginDrop(space);
      if (Chance(2)) AwaitDrops();
    } else if (dice == 7 && model.dimension != 0) {
      // More partitions, as if it were full.
      SpaceEntry* entry = rig_.shards->entry(space);
      if (entry != nullptr) (void)entry->Grow(entry->partitions());
    } else if (dice == 8) {
      Resume();
    } else if (dice == 9 && sessions_.contains(space)) {
      // Another one goes on with the space, maybe in another shard.
      old_sessions_.push_back(sessions_[space]);
      sessions_.erase(space);
    } else if (dice == 10 && checkpoints_ > 0 && Chance(4)) {
      rig_.checkpointer->RequestCompaction();
    } else {
      Observe(space);
    }
  }

  void Open(const std::string& space) {
    SpaceModel& model = spaces_[space];
    if (model.dimension == 0) {
      model.dimension = static_cast<uint16_t>(1 + random_.Next() % 6);
      model.metric = space == kConfigured || Chance(2) ? Metric::kL2 : Metric::kInnerProduct;
      sessions_.erase(space);
    }
    if (sessions_.contains(space)) return;
    const auto shard = static_cast<size_t>(random_.Next() % setup_.shards);
    const auto [reason, answer] =
        rig_.shards->Hello(0, ++origins_, space, {.metric = model.metric, .shard = shard});
    ASSERT_EQ(reason, RefusalReason::kNone) << DescribeRefusal(reason).name;
    sessions_[space] = {.session = SessionOf(answer, space, shard),
                        .incarnation = model.incarnation};
  }

  // Each with another payload.
  Observation DrawObservation(const SpaceModel& model) {
    Observation observation{.id = "id" + std::to_string(random_.Next() % 40)};
    if (Chance(5)) {
      observation.op = ObservationOp::kDelete;
    } else {
      observation.vector.assign(model.dimension, 1.0F + static_cast<float>(random_.Next() % 9));
      observation.payload = std::to_string(++payloads_);
      observation.payload.append(random_.Next() % 300, 'p');
    }
    return observation;
  }
  static Content ContentOf(const Observation& observation) {
    if (observation.op == ObservationOp::kDelete) return kNothing;
    return std::stoull(observation.payload);
  }
  static void Acknowledge(const std::string& id, Content content, SpaceModel* model) {
    model->is_acknowledged = true;
    if (content != kNothing) {
      model->ids[id] = content;
    } else {
      model->ids.erase(id);
    }
  }

  void Observe(const std::string& space) {
    SpaceModel& model = spaces_[space];
    ASSERT_NO_FATAL_FAILURE(Open(space));
    const Observation observation = DrawObservation(model);
    for (int tries = 0; tries < 2'000; ++tries) {
      const Completion completion = rig_.shards->Observe(&sessions_[space].session, observation);
      if (completion.reason == RefusalReason::kNone) {
        Acknowledge(observation.id, ContentOf(observation), &model);
        return;
      }
      ASSERT_TRUE(HasEffect(completion.reason, RefusalEffect::kWaits))
          << DescribeRefusal(completion.reason).name;
      for (int polls = 0; polls < 20; ++polls) Poll();
    }
    ADD_FAILURE() << "the log takes nothing";
  }
  // Some that are under way when a drop begins, or when all ends.
  void ObserveUnanswered(const std::string& space) {
    ASSERT_NO_FATAL_FAILURE(Open(space));
    KnownSession& known = sessions_[space];
    known.sent = std::max(known.sent, known.session.next - 1);
    for (uint64_t count = random_.Next() % 6; count > 0; --count) {
      if (unanswered_.size() == kMostUnanswered || rig_.shards->LaneFull(known.session)) return;
      const Observation observation = DrawObservation(spaces_[space]);
      const size_t from = rig_.shards->completions.size();
      ++known.sent;
      unanswered_.push_back(
          {.slot = rig_.shards->PushObserve(known.session, known.sent, observation),
           .from = from,
           .space = space,
           .sequence = known.sent,
           .id = observation.id,
           .content = ContentOf(observation)});
      if (Chance(2)) Poll();
    }
  }
  // What has become of them: of a space that is not dropped all that was acknowledged stands, and
  // what was not refused may.
  void TakeAnswers() {
    const auto& completions = rig_.shards->completions;
    for (const Unanswered& each : unanswered_) {
      SpaceModel& model = spaces_[each.space];
      const Completion* found = nullptr;
      for (size_t i = each.from; i < completions.size() && found == nullptr; ++i) {
        if (completions[i].second.slot == each.slot) found = &completions[i].second;
      }
      if (found == nullptr) {
        model.maybe[each.id].insert(each.content);
        ++stats_->unanswered_in_crashes;
      } else if (found->reason == RefusalReason::kNone) {
        Acknowledge(each.id, each.content, &model);
        sessions_[each.space].session.next = each.sequence + 1;
      }
    }
    unanswered_.clear();
  }

  void BeginDrop(const std::string& space) {
    const SpaceEntry* entry = rig_.shards->entry(space);
    if (entry == nullptr) return;  // Nothing of it was ever acknowledged.
    ASSERT_NO_FATAL_FAILURE(ObserveUnanswered(space));
    spaces_[space].birth = entry->birth();
    rig_.shards->PushCommand(SpaceCommand::kDrop, space);
    ++commands_;
    spaces_[space].is_dropping = true;
    // So that one shard is saved before it, and another one after.
    slowness_ = Chance(2) ? 1 : 1 + random_.Next() % 40;
    if (checkpoints_ > 0 && Chance(4) && !rig_.checkpointer->busy()) {
      rig_.checkpointer->Request();
    }
  }
  void AwaitDrops() {
    for (int i = 0; i < 50'000 && rig_.shards->commands_under_way > 0; ++i) Poll();
    ASSERT_EQ(rig_.shards->commands_under_way, 0u);
    FinishDrops();
  }
  void FinishDrops() {
    commands_ = 0;
    stats_->unanswered_in_drops += unanswered_.size();
    // All of them are answered now, and of spaces that are gone.
    TakeAnswers();
    for (auto& [name, model] : spaces_) {
      if (!model.is_dropping) continue;
      ++stats_->drops;
      NoteDropped(name);
      SpaceEntry* entry = rig_.shards->entry(name);
      ASSERT_EQ(entry != nullptr, name == kConfigured) << name;
    }
  }
  void NoteDropped(const std::string& space) {
    SpaceModel& model = spaces_[space];
    if (sessions_.contains(space)) old_sessions_.push_back(sessions_[space]);
    sessions_.erase(space);
    model = SpaceModel{.ids = {}, .maybe = {}, .incarnation = model.incarnation + 1};
  }
  // Nothing is taken for it, with a session or without.
  void RefusedWhileDropping(const std::string& space) {
    if (rig_.shards->commands_under_way == 0) return;
    const auto shard = static_cast<size_t>(random_.Next() % setup_.shards);
    const bool alone = Chance(2);
    const Metric metric = alone && space != kConfigured ? Metric::kCosine : Metric::kL2;
    SpaceModel next;
    next.dimension = 3;
    next.metric = metric;
    const Observation observation = DrawObservation(next);
    RefusalReason reason;
    RigSession session{.producer = 0, .shard = shard, .origin = ++origins_, .space = space};
    if (alone) {
      reason = rig_.shards->ObserveAlone(session, observation).first.reason;
    } else {
      const auto answer =
          rig_.shards->Hello(0, origins_, space, {.metric = metric, .shard = shard});
      reason = answer.first;
      session = SessionOf(answer.second, space, shard);
    }
    if (reason != RefusalReason::kNone) {
      ASSERT_EQ(reason, RefusalReason::kSpaceDropping) << DescribeRefusal(reason).name;
      ++stats_->refused_in_drops;
      return;
    }
    // It has come to its end meanwhile, in all shards, and this was the first of the next
    // incarnation.
    const auto dropping =
        std::ranges::count_if(spaces_, [](const auto& each) { return each.second.is_dropping; });
    ASSERT_TRUE(dropping > 1 || rig_.shards->commands_under_way == 0) << space;
    std::erase_if(unanswered_, [&](const Unanswered& each) { return each.space == space; });
    NoteDropped(space);
    ++stats_->drops;
    SpaceModel& model = spaces_[space];
    next.incarnation = model.incarnation;
    model = next;
    if (alone) {
      Acknowledge(observation.id, ContentOf(observation), &model);
    } else {
      sessions_[space] = {.session = session, .incarnation = model.incarnation};
    }
  }
  RigSession SessionOf(const HelloRequest& answer, const std::string& space, size_t shard) const {
    return {.producer = 0,
            .shard = shard,
            .origin = origins_,
            .space = space,
            .id = answer.session,
            .slot = answer.session_slot,
            .next = answer.last_sequence + 1};
  }

  // A session of before a crash or a drop, if it can be resumed.
  void Resume() {
    if (old_sessions_.empty()) return;
    const size_t which = random_.Next() % old_sessions_.size();
    const KnownSession known = old_sessions_[which];
    old_sessions_.erase(old_sessions_.begin() + static_cast<ptrdiff_t>(which));
    const RigSession& session = known.session;
    const SpaceModel& model = spaces_[session.space];
    if (session.next == 1 || model.is_dropping || known.incarnation != model.incarnation) return;
    const size_t home = HomeOf(session);
    const auto [reason, answer] =
        rig_.shards->Hello(0, ++origins_, session.space, {.session = session.id, .shard = home});
    ASSERT_EQ(reason, RefusalReason::kNone)
        << session.space << " " << known.incarnation << " " << DescribeRefusal(reason).name;
    ++stats_->sessions_resumed;
    ASSERT_GE(answer.last_sequence + 1, session.next);
    if (sessions_.contains(session.space)) old_sessions_.push_back(sessions_[session.space]);
    const std::string space = session.space;
    sessions_[space] = {.session = SessionOf(answer, space, home),
                        .incarnation = known.incarnation};
  }
  size_t HomeOf(const RigSession& session) const {
    return HomeOfSession(session.id).value() % setup_.shards;
  }
  // Those of spaces that were dropped since are not.
  void CheckSessions() {
    for (const KnownSession& known : old_sessions_) {
      const RigSession& session = known.session;
      const SpaceModel& model = spaces_[session.space];
      if (model.is_dropping || known.incarnation == model.incarnation) continue;
      const auto [reason, answer] = rig_.shards->Hello(
          0, ++origins_, session.space, {.session = session.id, .shard = HomeOf(session)});
      ASSERT_EQ(reason, RefusalReason::kSessionExpired)
          << session.space << " " << known.incarnation << " " << DescribeRefusal(reason).name;
      ++stats_->sessions_expired;
    }
  }

  void Poll() {
    if (Chance(2)) {
      rig_.shards->Poll();
    } else {
      const size_t shard = random_.Next() % setup_.shards;
      for (uint64_t polls = random_.Next() % 6; polls > 0; --polls) {
        rig_.shards->PollShard(shard);
        rig_.clock.AdvanceNs(static_cast<int64_t>(random_.Next() % 100) * kNanosPerMicro);
      }
    }
    rig_.store->Poll();
    // Seldom, so that much happens between the steps of a checkpoint.
    if (Chance(slowness_)) rig_.checkpointer->Poll([](const Note&) {});
  }

  std::map<std::string, Content> Stored(const std::string& space) {
    std::map<std::string, Content> stored;
    for (const auto& shard : rig_.shards->shards) {
      const Space* part = shard->FindSpace(space);
      if (part == nullptr) continue;
      for (const NodeId node : LiveNodes(*part)) {
        const StoredObservation found = part->Get(node);
        const std::string id(found.id);
        const auto payload = rig_.PayloadOf(found);
        EXPECT_TRUE(payload.has_value()) << id << " of " << space << " has lost its record";
        const Content content = std::stoull(payload.value_or("0"));
        EXPECT_TRUE(stored.emplace(id, content).second) << id << " twice in " << space;
      }
    }
    return stored;
  }
  void Compare() {
    ++stats_->compared;
    for (const auto& shard : rig_.shards->shards) {
      const auto sound = shard->CheckInvariants();
      ASSERT_TRUE(sound.has_value()) << sound.error().message;
    }
    for (const auto& [name, model] : spaces_) {
      if (model.is_dropping) continue;
      ASSERT_EQ(Stored(name), model.ids) << name;
      if (!model.is_acknowledged) continue;
      const SpaceEntry* entry = rig_.shards->entry(name);
      ASSERT_NE(entry, nullptr) << name;
      ASSERT_EQ(entry->metric(), model.metric) << name;
      if (model.ids.empty()) continue;
      ASSERT_EQ(entry->dimension(), model.dimension) << name;
    }
    ASSERT_NO_FATAL_FAILURE(CheckSessions());
  }

  // With drops under way at times: all of each has happened then, or nothing.
  void CrashAndStart() {
    if (commands_ > 0 && Chance(2)) {
      ASSERT_NO_FATAL_FAILURE(AwaitDrops());
    }
    if (rig_.checkpointer->busy()) ++stats_->crashes_in_checkpoints;
    stats_->checkpoints += rig_.checkpointer->completed();
    for (uint64_t more = random_.Next() % 4; more > 0; --more) {
      const std::string space = DrawSpace();
      if (spaces_[space].is_dropping) continue;
      if (more % 2 == 0) {
        ASSERT_NO_FATAL_FAILURE(ObserveUnanswered(space));
      } else {
        ASSERT_NO_FATAL_FAILURE(BeginDrop(space));
      }
    }
    for (uint64_t polls = random_.Next() % 40; polls > 0; --polls) {
      rig_.shards->PollShard(random_.Next() % setup_.shards);
      rig_.clock.AdvanceNs(static_cast<int64_t>(random_.Next() % 200) * kNanosPerMicro);
    }
    const bool answered = commands_ > 0 && rig_.shards->commands_under_way == 0;
    commands_ = 0;
    TakeAnswers();
    Crash();
    DrawShards();
    ASSERT_NO_FATAL_FAILURE(Start());
    for (auto& [name, known] : sessions_) old_sessions_.push_back(known);
    sessions_.clear();
    for (auto& [name, model] : spaces_) {
      const SpaceEntry* entry = rig_.shards->entry(name);
      if (model.is_dropping) {
        ++stats_->crashes_in_drops;
        const bool gone = entry == nullptr || entry->birth() > model.birth;
        ASSERT_TRUE(gone || !answered) << name;
        ++(gone ? stats_->dropped_by_crash : stats_->kept_by_crash);
        if (gone) NoteDropped(name);
        model.is_dropping = false;
      }
      // Whoever had never been told of anything, and is open again.
      if (entry == nullptr && !model.is_acknowledged) model.dimension = 0;
      ASSERT_NO_FATAL_FAILURE(TakeWhatStood(name));
    }
    ASSERT_NO_FATAL_FAILURE(Compare());
  }
  // Of what was not acknowledged.
  void TakeWhatStood(const std::string& space) {
    SpaceModel& model = spaces_[space];
    if (model.maybe.empty()) return;
    const std::map<std::string, Content> stored = Stored(space);
    for (const auto& [id, contents] : std::exchange(model.maybe, {})) {
      const auto at = stored.find(id);
      const Content content = at == stored.end() ? kNothing : at->second;
      if (!contents.contains(content)) continue;  // Then it is as it was.
      Acknowledge(id, content, &model);
      // What was taken and is gone again may have left nothing of its space.
      model.is_acknowledged = rig_.shards->entry(space) != nullptr;
    }
  }
  void Crash() { Chance(2) ? rig_.CutPower() : rig_.Kill(); }

  void Start() {
    for (;;) {
      running_ = true;
      setup_.shard.seed = random_.Next();  // Ids of sessions are drawn by it.
      auto started = rig_.Start(setup_);
      ASSERT_TRUE(started.has_value()) << started.error().message;
      // At times it crashes again before it is there.
      uint64_t crashes_in = Chance(4) ? 1 + random_.Next() % 200 : 0;
      for (int i = 0; i < 200'000 && rig_.IsRecovering(); ++i) {
        // In any order, so that one reads of a drop long before the others.
        rig_.shards->PollShard(random_.Next() % setup_.shards);
        if (i % 8 == 0) rig_.clock.AdvanceNs(10 * kNanosPerMicro);
        ASSERT_EQ(rig_.RecoveryError(), "");
        if (crashes_in > 0 && --crashes_in == 0) break;
      }
      if (!rig_.IsRecovering()) break;
      ASSERT_EQ(crashes_in, 0u) << "it does not come to an end";
      ++stats_->crashes_in_recoveries;
      Crash();
      DrawShards();
    }
    auto prepared = rig_.store->PrepareFirst();
    ASSERT_TRUE(prepared.has_value()) << prepared.error().message;
  }

  static constexpr int64_t kTickNs = 50 * kNanosPerMilli;
  static constexpr size_t kMostUnanswered = 20;
  static constexpr const char* kConfigured = "d";

  SplitMix64 random_;
  Stats* const stats_;
  const bool reshards_;
  DurableRig rig_;
  DurableSetup setup_;
  std::map<std::string, SpaceModel> spaces_;
  std::map<std::string, KnownSession> sessions_;  // by space, with a connection
  std::vector<KnownSession> old_sessions_;
  std::vector<Unanswered> unanswered_;
  size_t commands_ = 0;  // drops that were begun, and are not known to have ended
  bool running_ = false;
  Origin origins_ = 1'000;
  uint64_t payloads_ = 0;
  const uint64_t checkpoints_ = random_.Next() % 4;  // of 32 steps begin one
  uint64_t slowness_ = 1 + random_.Next() % 40;      // of the checkpointer
};

// Of programs with and without other numbers of shards.
void RunPrograms(bool reshards) {
  Stats stats;
  const auto seeds = Seeds::FromPrefix("ENGRAM_DROP", DropSeeds());
  seeds.ForEach([&](uint64_t seed) { DropProgram(seed, reshards, &stats).Run(); });
  if (testing::Test::HasFailure()) return;
  std::vector<std::pair<std::string, uint64_t>> counts = {
      {"drops", stats.drops},
      {"unanswered_in_drops", stats.unanswered_in_drops},
      {"refused_in_drops", stats.refused_in_drops},
      {"crashes_in_drops", stats.crashes_in_drops},
      {"dropped_by_crash", stats.dropped_by_crash},
      {"kept_by_crash", stats.kept_by_crash},
      {"checkpoints", stats.checkpoints},
      {"crashes_in_checkpoints", stats.crashes_in_checkpoints},
      {"crashes_in_recoveries", stats.crashes_in_recoveries},
      {"unanswered_in_crashes", stats.unanswered_in_crashes},
      {"compared", stats.compared},
      {"sessions_expired", stats.sessions_expired},
      {"sessions_resumed", stats.sessions_resumed}};
  if (reshards) counts.emplace_back("other_shards", stats.reshards);
  ExpectAllHappened(counts, seeds.count >= DropSeeds());
}

TEST(DropProgramsTest, WhatWasDroppedNeverComesBackAndNothingElseGoes) { RunPrograms(false); }

TEST(DropProgramsTest, NorWithOtherNumbersOfShards) { RunPrograms(true); }

}  // namespace
}  // namespace engram
