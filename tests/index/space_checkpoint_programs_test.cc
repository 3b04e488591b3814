// Random programs of one space with saves under change, and what they become after a fall.

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "index/checkpoint/space_loader.h"
#include "index/checkpoint/space_saver.h"
#include "index/recall_job.h"
#include "index/space.h"
#include "src/core/commit_stamp.h"
#include "src/core/hash.h"
#include "tests/index/space_checkpoint_rig.h"
#include "tests/sim/program_seeds.h"

namespace engram {
namespace {

struct Workshop {
  TestHeap memory{size_t{64} << 20};
  TestHeap other_memory{size_t{64} << 20};
  RecallJob job{&other_memory.heap};
  uint64_t reopened = 0;
  uint64_t duplicates = 0;
  uint64_t joined = 0;
  uint64_t dropped_links = 0;
};

// One space, its operations, saves of it, and what they become after a fall.
class Program {
 public:
  Program(uint64_t seed, Workshop* shop)
      : random_(seed),
        shop_(shop),
        dimension_(DrawDimension(&random_)),
        several_homes_(random_.Below(2) == 0),
        options_(DrawOptions()),
        rig_(options_, &shop->memory, "program") {
    rig_.in_log = random_.Below(2) == 0;
  }

  void Run() {
    ids_ = 1 + random_.Below(random_.Below(3) == 0 ? 80 : 20);
    const int saves = static_cast<int>(1 + random_.Below(2));
    for (int i = 0; i < saves; ++i) {
      Change(20 + random_.Below(120));
      ASSERT_NO_FATAL_FAILURE(SaveUnderChange(/*abort=*/i + 1 < saves && random_.Below(2) == 0));
      // The next save's log begins later.
      if (i + 1 < saves) continue;
      ASSERT_NO_FATAL_FAILURE(Change(random_.Below(40)));
      ASSERT_NO_FATAL_FAILURE(FallAndRise());
    }
  }

 private:
  SpaceOptions DrawOptions() {
    constexpr Metric kMetrics[] = {Metric::kCosine, Metric::kInnerProduct, Metric::kL2};
    HnswBuildParams build;
    build.M = static_cast<uint32_t>(2 + random_.Below(3));
    build.M0 = static_cast<uint32_t>(std::max<uint64_t>(build.M, 3) + random_.Below(4));
    build.ef_construction = static_cast<uint32_t>(1 + random_.Below(12));
    build.seed = random_.Next();
    SpaceOptions options =
        TestSpaceOptions(kMetrics[random_.Below(3)], random_.Below(2) == 0 ? 0 : dimension_, build);
    options.traversal = DrawTraversal(&random_, dimension_);
    if (options.metric != Metric::kCosine && random_.Below(3) == 0) {
      options.precision = Precision::kBf16;
    }
    options.graph_from = static_cast<uint32_t>(random_.Below(3) != 0 ? 0 : random_.Below(20));
    return options;
  }

  CommitStamp NextStamp() {
    if (several_homes_ && random_.Below(3) == 0 && last_ > complete_ + 1) {
      const CommitStamp stamp = complete_ + 1 + random_.Below(last_ - complete_);
      if (used_.insert(stamp).second) return stamp;
    }
    last_ += 1 + random_.Below(several_homes_ ? 4 : 2);
    used_.insert(last_);
    return last_;
  }
  uint64_t HomeOf(CommitStamp stamp) const { return several_homes_ ? stamp % kHomes : 0; }

  static void Apply(const LoggedOp& op, CheckpointRig* rig, bool several_homes) {
    StoreOutcome outcome;
    switch (op.kind) {
      case LoggedOp::Kind::kUpsert:
        outcome = rig->Upsert(op.id, op.vector, op.stamp, op.payload, several_homes);
        break;
      case LoggedOp::Kind::kDelete:
        outcome = rig->space.Delete(op.id, op.stamp, several_homes);
        break;
      case LoggedOp::Kind::kSuppress:
        outcome = rig->space.Suppress(op.id, op.stamp, several_homes);
        break;
      case LoggedOp::Kind::kRestore:
        outcome = rig->space.Restore(op.id, op.stamp);
        break;
    }
    ASSERT_EQ(outcome.reason, RefusalReason::kNone);
  }

  void Operate() {
    const uint64_t what = random_.Below(20);
    LoggedOp op;
    op.id = "id" + std::to_string(random_.Below(ids_));
    op.stamp = NextStamp();
    if (what < 9) {
      op.kind = LoggedOp::Kind::kUpsert;
      op.vector = QuarterVector(&random_, dimension_);
      op.payload = std::string(random_.Below(20), 'p') + std::to_string(op.stamp);
    } else if (what < 12) {
      op.kind = LoggedOp::Kind::kDelete;
    } else {
      op.kind = what < 16 ? LoggedOp::Kind::kSuppress : LoggedOp::Kind::kRestore;
    }
    ASSERT_NO_FATAL_FAILURE(Apply(op, &rig_, several_homes_));
    if (replay_from_.has_value()) {
      CommitStamp& from = (*replay_from_)[HomeOf(op.stamp)];
      from = std::min(from, op.stamp);
    }
    ops_.push_back(std::move(op));
  }

  void ChangeOnce() {
    if (random_.Below(30) == 0 && !rig_.space.is_rebuilding()) {
      rig_.space.BeginRebuild(1 + random_.Below(30));
    }
    const uint64_t what = random_.Below(100);
    if (what < 45) {
      ASSERT_NO_FATAL_FAILURE(Operate());
    } else if (what < 70) {
      rig_.upkeep.Step(static_cast<uint32_t>(1 + random_.Below(30)));
    } else if (what < 78) {
      for (int i = 0; i < 40; ++i) rig_.upkeep.Step(20);
    } else if (what < 88) {
      complete_ =
          std::max(complete_, last_ - std::min(last_, random_.Below(several_homes_ ? 20 : 1)));
      // The shard holds tombstones from the moment on at which a checkpoint notes its stamps.
      rig_.space.ForgetTombstones(hold_ == kNoStamp ? complete_ : std::min(complete_, hold_));
      if (save_active_) rig_.space.ForgetTombstones(complete_);
      rig_.space.SetHorizon(random_.Below(2) == 0 ? rig_.space.latest_stamp() : complete_);
    } else if (!rig_.upkeep.linker().active() && !rig_.upkeep.sweep().active()) {
      rig_.space.Reclaim(1 + random_.Below(30));
    }
  }
  void Change(uint64_t steps) {
    for (uint64_t i = 0; i < steps; ++i) {
      ASSERT_NO_FATAL_FAILURE(ChangeOnce());
    }
  }

  void SaveUnderChange(bool abort) {
    replay_from_.emplace();
    replay_from_->fill(kOpenStamp);
    hold_ = complete_;
    ASSERT_NO_FATAL_FAILURE(Change(random_.Below(2) == 0 ? 0 : random_.Below(40)));
    SpaceSaver saver(&shop_->memory.heap);
    ASSERT_TRUE(saver.Begin(&rig_.space, hold_));
    save_active_ = true;
    bytes_.clear();
    Bytes buffer(random_.Below(2) == 0 ? kMaxExtentBytes : 4'000);
    const uint64_t pace = 1 + random_.Below(30);
    for (uint64_t slices = 0; !saver.done(); ++slices) {
      if (abort && slices > 3) break;
      SaveStep(&saver, 1 + random_.Below(8), &buffer, &bytes_);
      ASSERT_NO_FATAL_FAILURE(Change(random_.Below(pace)));
      if (random_.Below(8) == 0) {
        const Result<void> sound = rig_.space.CheckInvariants();
        ASSERT_TRUE(sound.has_value()) << sound.error().message;
      }
    }
    saver.Abort();
    save_active_ = false;
    hold_ = kNoStamp;
  }

  // What is replayed, in the order of stamps, or any that keeps each home's.
  std::vector<const LoggedOp*> ToReplay(bool in_stamp_order) {
    std::array<std::vector<const LoggedOp*>, kHomes> homes;
    for (const LoggedOp& op : ops_) {
      const uint64_t home = HomeOf(op.stamp);
      if (op.stamp >= (*replay_from_)[home]) homes[home].push_back(&op);
    }
    const auto by_stamp = [](const LoggedOp* a, const LoggedOp* b) { return a->stamp < b->stamp; };
    std::vector<const LoggedOp*> order;
    for (auto& home : homes) {
      std::sort(home.begin(), home.end(), by_stamp);
      order.insert(order.end(), home.begin(), home.end());
    }
    if (in_stamp_order) {
      std::sort(order.begin(), order.end(), by_stamp);
      return order;
    }
    order.clear();
    std::array<size_t, kHomes> next{};
    for (;;) {
      std::vector<uint64_t> left;
      for (uint64_t home = 0; home < kHomes; ++home) {
        if (next[home] < homes[home].size()) left.push_back(home);
      }
      if (left.empty()) return order;
      const uint64_t home = left[random_.Below(left.size())];
      order.push_back(homes[home][next[home]++]);
    }
  }

  // By the order of the stamps alone.
  struct Expected {
    const LoggedOp* content = nullptr;  // nullptr: never stored, or deleted
    bool is_hidden = false;
  };
  std::map<std::string, Expected> ByStamps() const {
    std::vector<const LoggedOp*> order;
    for (const LoggedOp& op : ops_) order.push_back(&op);
    std::sort(order.begin(), order.end(),
              [](const LoggedOp* a, const LoggedOp* b) { return a->stamp < b->stamp; });
    std::map<std::string, Expected> expected;
    for (const LoggedOp* op : order) {
      Expected& of = expected[op->id];
      switch (op->kind) {
        case LoggedOp::Kind::kUpsert:
          of = {op, false};
          break;
        case LoggedOp::Kind::kDelete:
          of = {};
          break;
        case LoggedOp::Kind::kSuppress:
          of.is_hidden = of.content != nullptr;
          break;
        case LoggedOp::Kind::kRestore:
          of.is_hidden = false;
          break;
      }
    }
    return expected;
  }

  void FallAndRise() {
    SpaceOptions options = options_;
    options.hash_seed = random_.Next();
    CheckpointRig risen(options, &shop_->memory, "program");
    risen.in_log = rig_.in_log;
    SpaceLoader loader(&risen.space);
    const Result<void> taken = loader.Take(bytes_);
    ASSERT_TRUE(taken.has_value()) << taken.error().message;
    const Result<void> finished = loader.Finish();
    ASSERT_TRUE(finished.has_value()) << finished.error().message;
    ASSERT_NO_FATAL_FAILURE(ExpectSound(risen)) << "loaded";
    shop_->duplicates += loader.ended_duplicates();
    shop_->joined += loader.graph().joined_groups();
    shop_->dropped_links += loader.graph().dropped_links();

    const bool in_stamp_order = !several_homes_ || random_.Below(2) == 0;
    for (const LoggedOp* op : ToReplay(in_stamp_order)) {
      ASSERT_NO_FATAL_FAILURE(Apply(*op, &risen, several_homes_));
      if (random_.Below(4) == 0) risen.upkeep.Step(20);
    }
    ASSERT_NO_FATAL_FAILURE(ExpectSound(risen)) << "replayed";
    ASSERT_NO_FATAL_FAILURE(Compare(risen, in_stamp_order));
    risen.space.ForgetTombstones(last_);
    risen.Settle();
    ASSERT_NO_FATAL_FAILURE(ExpectSound(risen)) << "settled";
    if (risen.space.has_graph()) {
      ASSERT_EQ(risen.space.unlinked_count(), 0u);
    }
    ASSERT_NO_FATAL_FAILURE(RecallAll(risen));
  }

  static void ExpectSound(const CheckpointRig& rig) {
    const Result<void> sound = rig.space.CheckInvariants();
    ASSERT_TRUE(sound.has_value()) << sound.error().message;
  }

  // Contents are those of the latest stamps. What arrived in another order than that of the stamps
  // may be hidden as it was, or as if it had come in order.
  void Compare(const CheckpointRig& risen, bool in_stamp_order) {
    uint64_t contents = 0;
    for (const auto& [id, expected] : ByStamps()) {
      const NodeId before = rig_.space.FindLive(id);
      const NodeId after = risen.space.FindLive(id);
      if (expected.content == nullptr) {
        ASSERT_EQ(before, kNoNode) << id;
        ASSERT_EQ(after, kNoNode) << id << " was deleted";
        continue;
      }
      ++contents;
      if (!several_homes_) {
        ASSERT_EQ(before == kNoNode, expected.is_hidden) << id;
      }
      const bool is_hidden = after == kNoNode;
      if (in_stamp_order) {
        ASSERT_TRUE(is_hidden == expected.is_hidden || is_hidden == (before == kNoNode))
            << id << (is_hidden ? " is hidden, or lost" : " is live");
      }
      if (is_hidden) continue;
      const StoredObservation stored = risen.space.Get(after);
      ASSERT_EQ(stored.origin, rig_.in_log ? expected.content->stamp * 8 : kNoLogAddress) << id;
      ASSERT_EQ(stored.payload_bytes, expected.content->payload.size()) << id;
      ASSERT_EQ(stored.when_ns, static_cast<int64_t>(expected.content->stamp) * 7);
      ASSERT_EQ(risen.PayloadOf(after), rig_.in_log ? "" : expected.content->payload) << id;
      if (before == kNoNode) continue;
      std::vector<float> a(dimension_);
      std::vector<float> b(dimension_);
      rig_.space.GetVector(before, a.data());
      risen.space.GetVector(after, b.data());
      ASSERT_EQ(a, b) << id;
    }
    ASSERT_EQ(risen.space.live() + risen.space.hidden(), contents) << "live and hidden ones";
  }

  // Each live one by its vector.
  void RecallAll(const CheckpointRig& risen) {
    SpaceModel model(options_.metric);
    for (const auto& [id, expected] : ByStamps()) {
      const NodeId node = risen.space.FindLive(id);
      if (node == kNoNode) continue;
      model.entries()[id] = {expected.content->vector, expected.content->payload,
                             risen.space.Get(node).when_ns, 0.25F};
    }
    for (const auto& [id, entry] : model.entries()) {
      const RecallAnswer answer = RunRecall(risen.space, &shop_->job, entry.vector,
                                            {.k = 3, .ef = 1'000, .with_payload = !rig_.in_log});
      ASSERT_NO_FATAL_FAILURE(
          model.ExpectExact(answer.hits, entry.vector, 3, /*with_payload=*/!rig_.in_log))
          << id;
    }
  }

  static constexpr uint64_t kHomes = 3;

  SplitMix64 random_;
  Workshop* shop_;
  const uint32_t dimension_;
  const bool several_homes_;
  const SpaceOptions options_;
  CheckpointRig rig_;
  uint64_t ids_ = 1;
  CommitStamp last_ = 100;
  CommitStamp complete_ = 1;
  std::set<CommitStamp> used_;
  std::vector<LoggedOp> ops_;
  // The checkpoint: by home, the stamp of the first that is replayed.
  std::optional<std::array<CommitStamp, kHomes>> replay_from_;
  CommitStamp hold_ = kNoStamp;
  bool save_active_ = false;
  Bytes bytes_;
};

// ENGRAM_SPACE_SEED=n runs the program of that seed alone; ENGRAM_SPACE_SEEDS=n so many.
TEST(SpaceCheckpointProgramsTest, EveryProgramRisesAsItFell) {
  constexpr uint64_t kPrograms = UsualSeeds(6'000, 600);
  Workshop shop;
  const auto seeds = Seeds::FromPrefix("ENGRAM_SPACE", kPrograms);
  seeds.ForEach([&](uint64_t seed) {
    ASSERT_NO_FATAL_FAILURE(Program(seed, &shop).Run());
    ASSERT_EQ(shop.memory.heap.live_bytes(), 0u);
  });
  if (HasFailure() || seeds.count < kPrograms) return;
  // The programs come to what they are for.
  EXPECT_GT(shop.duplicates, kPrograms / 10);
  EXPECT_GT(shop.joined, kPrograms / 10);
  EXPECT_GT(shop.dropped_links, kPrograms / 10);
}

}  // namespace
}  // namespace engram
