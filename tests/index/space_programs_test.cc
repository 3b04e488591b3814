// Thousands of short random programs against an exact model, with parameters so small that graphs
// are begun, emptied and begun again within a few dozen steps. Recalls are begun inside the epochs
// and stepped between the writer's operations, as another core would.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "index/recall_job.h"
#include "index/space.h"
#include "src/core/commit_stamp.h"
#include "src/core/hash.h"
#include "src/core/reader_epochs.h"
#include "tests/index/space_testing.h"
#include "tests/index/space_upkeep.h"
#include "tests/sim/program_seeds.h"

namespace engram {
namespace {

constexpr uint32_t kWholeEf = 1'000;  // more than a program's space has nodes

// What an id held from a stamp on; without an entry: nothing.
struct Life {
  std::optional<SpaceModel::Entry> entry;
  bool is_content = true;  // an upsert or a delete; else a suppress or a restore
};
using Lives = std::map<CommitStamp, Life>;

class History {
 public:
  explicit History(Metric metric) : metric_(metric) {}
  // Suppressing and restoring hold for the content before them: one that comes in between, late,
  // supersedes it with them, but lives no longer than until the first suppress where another
  // content follows.
  void AddContent(const std::string& id, CommitStamp stamp,
                  std::optional<SpaceModel::Entry> entry) {
    Lives& lives = lives_[id];
    const bool upserts = entry.has_value();
    const auto at = lives.insert_or_assign(stamp, Life{std::move(entry), true}).first;
    auto next = std::next(at);
    const bool is_last =
        std::none_of(next, lives.end(), [](const auto& life) { return life.second.is_content; });
    bool keeps = upserts && !is_last;
    while (next != lives.end() && !next->second.is_content) {
      if (keeps && !next->second.entry) {
        keeps = false;
        ++next;
      } else {
        next = lives.erase(next);
      }
    }
  }
  // Where it is neither late nor of no effect. True where it had one.
  bool Suppress(const std::string& id, CommitStamp stamp) {
    const auto last = Last(id);
    if (!last || !last->second.entry) return false;
    if (last->first < stamp) lives_[id][stamp] = Life{std::nullopt, false};
    if (last->first < stamp) return true;
    if (ContentOf(id)->first < stamp) return false;
    AddContent(id, stamp, std::nullopt);
    return true;
  }
  bool Restore(const std::string& id, CommitStamp stamp) {
    if (!IsHidden(id) || Last(id)->first > stamp) return false;
    lives_[id][stamp] = Life{ContentOf(id)->second.entry, false};
    return true;
  }
  bool IsHidden(const std::string& id) const {
    const auto last = Last(id);
    return last && !last->second.is_content && !last->second.entry;
  }
  size_t CountHidden() const {
    size_t count = 0;
    for (const auto& [id, lives] : lives_) count += static_cast<size_t>(IsHidden(id));
    return count;
  }
  SpaceModel At(CommitStamp snapshot) const {
    SpaceModel model(metric_);
    for (const auto& [id, lives] : lives_) {
      const auto after = lives.upper_bound(snapshot);
      if (after == lives.begin()) continue;
      if (const auto& entry = std::prev(after)->second.entry) model.entries()[id] = *entry;
    }
    return model;
  }
  SpaceModel Now() const { return At(kOpenStamp); }

 private:
  using Found = std::optional<std::pair<CommitStamp, Life>>;
  Found Last(const std::string& id) const {
    const auto lives = lives_.find(id);
    if (lives == lives_.end() || lives->second.empty()) return std::nullopt;
    return *std::prev(lives->second.end());
  }
  Found ContentOf(const std::string& id) const {
    Found content;
    const auto lives = lives_.find(id);
    if (lives == lives_.end()) return content;
    for (const auto& life : lives->second) {
      if (life.second.is_content) content.emplace(life);
    }
    return content;
  }

  Metric metric_;
  std::map<std::string, Lives> lives_;
};

// Memory and scratch that all programs share.
struct Workshop {
  TestHeap memory{size_t{64} << 20};
  TestHeap other_memory{size_t{64} << 20};
  RecallJob job{&other_memory.heap};
  RecallJob other_job{&other_memory.heap};
};

class Program {
 public:
  Program(uint64_t seed, Workshop* shop)
      : random_(seed),
        shop_(shop),
        dimension_(DrawDimension(&random_)),
        several_homes_(random_.Below(3) == 0),
        build_(DrawBuild(&random_)),
        space_(std::make_unique<Space>("program", DrawOptions(), &shop->memory.heap, &epochs_)),
        upkeep_(std::make_unique<SpaceUpkeep>(space_.get(), &shop->memory.heap, build_)),
        history_(space_->metric()) {}

  void Run() {
    const uint64_t steps = 20 + random_.Below(180);
    ids_ = 1 + random_.Below(random_.Below(4) == 0 ? 60 : 15);
    for (uint64_t step = 0; step < steps; ++step) {
      ASSERT_NO_FATAL_FAILURE(Step()) << "step " << step;
      if (random_.Below(4) == 0) {
        ASSERT_NO_FATAL_FAILURE(ExpectSound()) << "step " << step;
      }
    }
    ASSERT_NO_FATAL_FAILURE(FinishRecall());
    ASSERT_NO_FATAL_FAILURE(Settle());
    upkeep_.reset();
    space_.reset();
    ASSERT_EQ(shop_->memory.heap.live_bytes(), 0u) << "all is given back";
  }

 private:
  static HnswBuildParams DrawBuild(SplitMix64* random) {
    HnswBuildParams build;
    build.M = static_cast<uint32_t>(2 + random->Below(3));
    build.M0 = static_cast<uint32_t>(std::max<uint64_t>(build.M, 3) + random->Below(4));
    build.ef_construction = static_cast<uint32_t>(1 + random->Below(12));
    build.seed = random->Next();
    build.extend_candidates = random->Below(4) == 0;
    build.keep_pruned = random->Below(2) == 0;
    build.alpha = random->Below(3) == 0 ? 1.2F : 1.0F;
    return build;
  }
  SpaceOptions DrawOptions() {
    constexpr Metric kMetrics[] = {Metric::kCosine, Metric::kInnerProduct, Metric::kL2};
    SpaceOptions options = TestSpaceOptions(kMetrics[random_.Below(3)],
                                            random_.Below(2) == 0 ? 0 : dimension_, build_);
    options.traversal = DrawTraversal(&random_, dimension_);
    // Quarters are kept in bf16 without rounding.
    if (options.metric != Metric::kCosine && random_.Below(3) == 0) {
      options.precision = Precision::kBf16;
    }
    options.graph_from = static_cast<uint32_t>(random_.Below(2) == 0 ? 0 : random_.Below(20));
    return options;
  }

  void Step() {
    if (random_.Below(30) == 0) BeginRebuild();
    const uint64_t what = random_.Below(100);
    if (what < 26) {
      Upsert();
    } else if (what < 34) {
      Delete();
    } else if (what < 40) {
      Suppress();
    } else if (what < 46) {
      Restore();
    } else if (what < 62) {
      upkeep_->Step(static_cast<uint32_t>(1 + random_.Below(30)));
    } else if (what < 66) {
      for (int i = 0; i < 40; ++i) upkeep_->Step(20);
    } else if (what < 70) {
      MoveHorizon();
    } else if (what < 74) {
      if (!upkeep_->linker().active() && !upkeep_->sweep().active()) {
        space_->Reclaim(1 + random_.Below(3));
      }
    } else if (what < 84) {
      ASSERT_NO_FATAL_FAILURE(RecallAtOnce());
    } else if (what < 94) {
      ASSERT_NO_FATAL_FAILURE(StepRecall());
    } else if (what < 97) {
      ASSERT_NO_FATAL_FAILURE(ScrollAll());
    } else {
      ASSERT_NO_FATAL_FAILURE(FindAll());
    }
  }

  void BeginRebuild() {
    if (space_->is_rebuilding()) return;
    upkeep_->SetRebuildLooks(1 + random_.Below(random_.Below(2) == 0 ? 4 : 100));
    space_->BeginRebuild(1 + random_.Below(20));
  }

  std::string AnyId() {
    const uint64_t number = random_.Below(ids_);
    return number % 13 == 12 ? std::string(kMaxIdBytes, static_cast<char>('a' + number % 26))
                             : "id" + std::to_string(number);
  }
  // Rising, and with several homes also before others that came, but never one that was settled.
  CommitStamp NextStamp() {
    if (several_homes_ && random_.Below(3) == 0 && last_ > complete_ + 1) {
      const CommitStamp stamp = complete_ + 1 + random_.Below(last_ - complete_);
      if (!used_.contains(stamp)) {
        used_.insert(stamp);
        return stamp;
      }
    }
    last_ += 1 + (several_homes_ ? random_.Below(4) : 0);
    used_.insert(last_);
    return last_;
  }

  void Upsert() {
    const std::string id = AnyId();
    const std::vector<float> vector = QuarterVector(&random_, dimension_);
    const std::string payload(random_.Below(3) == 0 ? 0 : random_.Below(80), 'p');
    ObservationRef observation;
    observation.id = id;
    observation.payload = BytesOf(payload);
    observation.dtype = VectorDtype::kF32;
    observation.dimension = dimension_;
    observation.vector = reinterpret_cast<const std::byte*>(vector.data());
    observation.when_ns = static_cast<int64_t>(random_.Next());
    observation.confidence = 0.5F;
    const bool existed = history_.Now().entries().contains(id) || history_.IsHidden(id);
    const CommitStamp stamp = NextStamp();
    const StoreOutcome outcome = space_->Upsert(observation, stamp, several_homes_);
    ASSERT_EQ(outcome.reason, RefusalReason::kNone);
    ASSERT_EQ(outcome.existed, existed);
    history_.AddContent(id, stamp, SpaceModel::Entry{vector, payload, observation.when_ns, 0.5F});
  }
  void Delete() {
    // Late deletes are remembered from the first vector on.
    if (several_homes_ && space_->dimension() == 0) return;
    const std::string id = AnyId();
    const bool existed = history_.Now().entries().contains(id) || history_.IsHidden(id);
    const CommitStamp stamp = NextStamp();
    const StoreOutcome outcome = space_->Delete(id, stamp, several_homes_);
    ASSERT_EQ(outcome.reason, RefusalReason::kNone);
    ASSERT_EQ(outcome.existed, existed);
    history_.AddContent(id, stamp, std::nullopt);
  }
  void Suppress() {
    const std::string id = AnyId();
    const CommitStamp stamp = NextStamp();
    const StoreOutcome outcome = space_->Suppress(id, stamp, several_homes_);
    ASSERT_EQ(outcome.reason, RefusalReason::kNone);
    ASSERT_EQ(outcome.existed, history_.Suppress(id, stamp));
  }
  void Restore() {
    const std::string id = AnyId();
    const CommitStamp stamp = NextStamp();
    const StoreOutcome outcome = space_->Restore(id, stamp);
    ASSERT_EQ(outcome.reason, RefusalReason::kNone);
    ASSERT_EQ(outcome.existed, history_.Restore(id, stamp));
  }
  // What may still come, what may still be asked for.
  void MoveHorizon() {
    complete_ =
        std::max(complete_, last_ - std::min(last_, random_.Below(several_homes_ ? 20 : 1)));
    if (random_.Below(2) == 0) space_->ForgetTombstones(complete_);
    horizon_ = std::max(horizon_, complete_ - std::min(complete_, random_.Below(30)));
    if (random_.Below(3) != 0) space_->SetHorizon(horizon_);
  }

  RecallParams DrawParams() {
    return {.k = static_cast<uint32_t>(1 + random_.Below(70)),
            .ef = kWholeEf,
            .with_payload = true,
            .slice = static_cast<uint32_t>(1 + random_.Below(20))};
  }
  // A snapshot that may be asked for; with several homes one at which nothing may still come.
  CommitStamp DrawSnapshot() {
    const CommitStamp from = space_->horizon();
    const CommitStamp to = several_homes_ ? complete_ : last_;
    return to <= from ? from : from + random_.Below(to - from + 1);
  }

  void RecallAtOnce() {
    if (space_->dimension() == 0) return;
    const std::vector<float> query = QuarterVector(&random_, dimension_);
    RecallParams params = DrawParams();
    const bool past = random_.Below(2) == 0 && space_->horizon() != kNoStamp;
    if (past) params.snapshot = DrawSnapshot();
    const RecallAnswer answer = RunRecall(*space_, &shop_->job, query, params);
    ASSERT_EQ(answer.reason, RefusalReason::kNone);
    const SpaceModel model = past ? history_.At(params.snapshot) : history_.Now();
    ASSERT_NO_FATAL_FAILURE(model.ExpectExact(answer.hits, query, params.k, true))
        << (past ? "at " + std::to_string(params.snapshot) : "now");
    if (space_->horizon() > 1) {
      params.snapshot = space_->horizon() - 1;
      EXPECT_EQ(RunRecall(*space_, &shop_->job, query, params).reason,
                RefusalReason::kSnapshotTooOld);
    }
  }

  // A recall by another core: begun here, stepped and answered later, between the operations.
  void StepRecall() {
    if (space_->dimension() == 0) return;
    if (under_way_ == nullptr) {
      under_way_ = std::make_unique<UnderWay>(UnderWay{.query = QuarterVector(&random_, dimension_),
                                                       .params = DrawParams(),
                                                       .model = history_.Now()});
      epochs_.Enter(0);
      RecallRequest request;
      request.dtype = VectorDtype::kF32;
      request.with_payload = true;
      request.dimension = static_cast<uint16_t>(dimension_);
      request.k = under_way_->params.k;
      request.ef = kWholeEf;
      const bool past = several_homes_ || random_.Below(2) == 0;
      if (past) {
        request.snapshot = DrawSnapshot();
        under_way_->model = history_.At(request.snapshot);
      }
      if (request.snapshot == kNoStamp && past) {  // Nothing is complete yet.
        epochs_.Leave(0);
        under_way_.reset();
        return;
      }
      ASSERT_EQ(
          shop_->other_job.Begin(*space_, request,
                                 reinterpret_cast<const std::byte*>(under_way_->query.data()), 1),
          RefusalReason::kNone);
      return;
    }
    if (!under_way_->ready) {
      under_way_->ready = shop_->other_job.Search(under_way_->params.slice);
      return;
    }
    std::vector<std::byte> slot(shop_->other_job.NextBatchBytes(4'096));
    const bool last = shop_->other_job.EmitBatch(slot);
    ReadBatch(slot.data(), &under_way_->hits);
    if (!last) return;
    epochs_.Leave(0);
    const std::unique_ptr<UnderWay> done = std::move(under_way_);
    ASSERT_NO_FATAL_FAILURE(done->model.ExpectExact(done->hits, done->query, done->params.k, true))
        << "a recall under way";
  }
  void FinishRecall() {
    while (under_way_ != nullptr) {
      ASSERT_NO_FATAL_FAILURE(StepRecall());
    }
  }

  void ScrollAll() {
    std::set<std::string> seen;
    uint64_t cursor = 0;
    do {
      std::vector<NodeId> nodes;
      space_->Scroll(&cursor, 1 + random_.Below(9), &nodes);
      for (const NodeId node : nodes) {
        ASSERT_TRUE(seen.insert(std::string(space_->Get(node).id)).second) << "twice";
      }
    } while (cursor != 0);
    std::set<std::string> wanted;
    const SpaceModel model = history_.Now();
    for (const auto& [id, entry] : model.entries()) wanted.insert(id);
    ASSERT_EQ(seen, wanted);
  }
  void FindAll() {
    const SpaceModel model = history_.Now();
    for (uint64_t number = 0; number < ids_; ++number) {
      const std::string id = "id" + std::to_string(number);
      const NodeId node = space_->FindLive(id);
      ASSERT_EQ(node != kNoNode, model.entries().contains(id)) << id;
      if (node == kNoNode) continue;
      const StoredObservation stored = space_->Get(node);
      ASSERT_EQ(stored.id, id);
      ASSERT_EQ(stored.when_ns, model.entries().at(id).when_ns);
    }
  }
  void ExpectSound() {
    const Result<void> sound = space_->CheckInvariants();
    ASSERT_TRUE(sound.has_value()) << sound.error().message;
    ASSERT_EQ(space_->live(), history_.Now().entries().size());
    ASSERT_EQ(space_->hidden(), history_.CountHidden());
    ASSERT_EQ(space_->linked() + space_->unlinked_count(), space_->live());
  }

  // Nothing may be asked for but the present: all that has ended gives its place.
  void Settle() {
    complete_ = last_ + 1;
    space_->SetHorizon(space_->latest_stamp() + 1);
    while (space_->has_tombstones()) space_->ForgetTombstones(space_->latest_stamp());
    upkeep_->Run();
    ASSERT_NO_FATAL_FAILURE(ExpectSound());
    ASSERT_FALSE(space_->is_rebuilding()) << space_->rebuild_left() << " are left";
    const uint64_t before = space_->relinked();
    BeginRebuild();
    upkeep_->Run();
    ASSERT_NO_FATAL_FAILURE(ExpectSound());
    ASSERT_FALSE(space_->is_rebuilding()) << space_->rebuild_left() << " are left";
    ASSERT_EQ(space_->relinked() - before, space_->linked()) << "each is linked anew, once";
    if (space_->has_graph()) {
      ASSERT_EQ(space_->unlinked_count(), 0u);
      ASSERT_EQ(space_->retired(), 0u);
    }
    const SpaceModel model = history_.Now();
    for (const auto& [id, entry] : model.entries()) {
      const RecallAnswer answer =
          RunRecall(*space_, &shop_->job, entry.vector, {.k = 3, .ef = kWholeEf});
      ASSERT_NO_FATAL_FAILURE(model.ExpectExact(answer.hits, entry.vector, 3, false)) << id;
    }
  }

  struct UnderWay {
    std::vector<float> query;
    RecallParams params;
    SpaceModel model;
    bool ready = false;
    std::vector<Hit> hits = {};
  };

  SplitMix64 random_;
  Workshop* shop_;
  const uint32_t dimension_;
  const bool several_homes_;
  const HnswBuildParams build_;
  ReaderEpochs epochs_{1};
  std::unique_ptr<Space> space_;
  std::unique_ptr<SpaceUpkeep> upkeep_;
  History history_;
  uint64_t ids_ = 1;
  CommitStamp last_ = 100;
  CommitStamp complete_ = 0;
  CommitStamp horizon_ = 0;
  std::set<CommitStamp> used_;
  std::unique_ptr<UnderWay> under_way_;
};

// ENGRAM_SPACE_SEED=n runs the program of that seed alone; ENGRAM_SPACE_SEEDS=n so many.
TEST(SpaceProgramsTest, EveryProgramAgreesWithItsModel) {
  Workshop shop;
  Seeds::FromPrefix("ENGRAM_SPACE", UsualSeeds(4'000, 400)).ForEach([&](uint64_t seed) {
    Program(seed, &shop).Run();
  });
}

}  // namespace
}  // namespace engram
