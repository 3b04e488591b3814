// Readers on other threads recall while one thread does all that a shard does to a space: upserts,
// deletes, links, sweeps, gives back, links anew, moves the horizon. Under ThreadSanitizer a race
// is a failure too.

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "index/distance.h"
#include "index/space.h"
#include "src/core/commit_stamp.h"
#include "src/core/hash.h"
#include "src/core/observation.h"
#include "src/core/reader_epochs.h"
#include "tests/index/cloud_vector.h"
#include "tests/index/latent_vector.h"
#include "tests/index/space_testing.h"
#include "tests/index/space_upkeep.h"
#include "tests/support/sanitized.h"

namespace engram {
namespace {

constexpr HnswBuildParams kBuild{.M = 8, .M0 = 16, .ef_construction = 48};
constexpr uint32_t kDimension = 16;
constexpr uint32_t kCodedDimension = 80;  // of a case whose graph is walked with codes
constexpr uint32_t kReaders = 2;
constexpr uint32_t kStable = 700;
constexpr uint32_t kGraphFrom = 1'000;
constexpr uint32_t kChurnIds = 300;
constexpr CommitStamp kKeep = 150;  // operations of the past that snapshots may ask for
constexpr CommitStamp kRebuildEvery = 500;
constexpr uint64_t kRebuildMost = 60;
constexpr uint32_t kQueries = 60;
constexpr uint32_t kEf = 150;
constexpr uint32_t kWholeEf = 8'000;  // more than there are nodes
constexpr uint64_t kOperations = kSanitized ? 6'000 : 30'000;

// Of the case under way; constant while there are threads.
uint32_t dimension = kDimension;

// A version is one upsert; its number gives its vector.
using Version = uint32_t;

std::vector<float> CloudPoint(uint64_t seed, uint64_t cloud) {
  if (dimension == kCodedDimension) return LatentVector(seed, dimension);
  return CloudVector(SplitMix64(MixBits(cloud)), SplitMix64(MixBits(seed + 1'000'000)), dimension,
                     0.4F);
}
std::vector<float> VectorOf(Version version) { return CloudPoint(version, version % 12); }

// What a payload says of its observation: enough to tell when parts of two were mixed.
struct Label {
  Version version;
  uint32_t id_number;
  uint64_t vector_hash;
};
uint64_t HashOfVector(const std::vector<float>& vector) {
  return HashString({reinterpret_cast<const char*>(vector.data()), vector.size() * sizeof(float)},
                    3);
}
std::string PayloadOf(Version version, uint32_t id_number) {
  const Label label{version, id_number, HashOfVector(VectorOf(version))};
  std::string payload(sizeof(label), '\0');
  std::memcpy(payload.data(), &label, sizeof(label));
  payload.resize(payload.size() + version % 150, static_cast<char>('a' + version % 26));
  return payload;
}
std::string IdOf(uint32_t id_number) { return "id" + std::to_string(id_number * 7'919); }

// When each version began and ended, for the readers' checks. A stamp is an operation's number;
// an operation is noted here before it is counted as acknowledged.
struct Journal {
  struct Life {
    std::atomic<uint32_t> id_number{0};
    std::atomic<CommitStamp> begin{kNoStamp};
    std::atomic<CommitStamp> end{kOpenStamp};
  };
  explicit Journal(size_t most_versions) : lives(most_versions) {}

  std::vector<Life> lives;                   // by version
  std::atomic<Version> versions{0};          // acknowledged
  std::atomic<CommitStamp> acked{kNoStamp};  // the last acknowledged operation
  std::atomic<bool> done{false};
  std::array<std::atomic<uint64_t>, kReaders> recalls{};
};

class Writer {
 public:
  Writer(Space* space, ArenaHeap* heap, Journal* journal)
      : space_(space),
        journal_(journal),
        upkeep_(space, heap, kBuild),
        current_(kStable + kChurnIds, kNoNode) {}

  void Upsert(uint32_t id_number) {
    if (id_number >= current_.size()) current_.resize(id_number + 1, kNoNode);
    const Version version = journal_->versions.load(std::memory_order_relaxed);
    const std::string id = IdOf(id_number);
    const std::vector<float> vector = VectorOf(version);
    const std::string payload = PayloadOf(version, id_number);
    ObservationRef observation;
    observation.id = id;
    observation.payload = BytesOf(payload);
    observation.dtype = VectorDtype::kF32;
    observation.dimension = dimension;
    observation.vector = reinterpret_cast<const std::byte*>(vector.data());
    observation.when_ns = version;
    const StoreOutcome outcome = space_->Upsert(observation, ++stamp_);
    ASSERT_EQ(outcome.reason, RefusalReason::kNone);
    ASSERT_EQ(outcome.existed, current_[id_number] != kNoNode);
    Journal::Life& life = journal_->lives[version];
    life.id_number.store(id_number, std::memory_order_relaxed);
    life.begin.store(stamp_, std::memory_order_relaxed);
    NoteEnd(id_number);
    current_[id_number] = version;
    journal_->versions.store(version + 1, std::memory_order_release);
    Acknowledge();
  }
  void Delete(uint32_t id_number) {
    ++stamp_;
    const StoreOutcome outcome = space_->Delete(IdOf(id_number), stamp_, stamp_ % 3 == 0);
    ASSERT_EQ(outcome.existed, current_[id_number] != kNoNode);
    NoteEnd(id_number);
    current_[id_number] = kNoNode;
    Acknowledge();
  }
  // Slices of upkeep, as many as keep the fresh list short; the horizon follows. Every now and then
  // all is linked anew meanwhile.
  void Upkeep() {
    if (stamp_ % kRebuildEvery == 0 && !space_->is_rebuilding()) space_->BeginRebuild(kRebuildMost);
    space_->SetHorizon(stamp_ - std::min(stamp_, kKeep));
    space_->ForgetTombstones(stamp_ - std::min(stamp_, kKeep));
    const int slices = space_->unlinked_count() > 150 ? 40 : 4;
    for (int i = 0; i < slices; ++i) {
      if (!upkeep_.Step(i % 2 == 0 ? 64 : 256)) return;
    }
  }
  // Where less than `relinked` is linked anew, upkeep goes on until each reader has recalled again:
  // a rebuild waits for them to leave what it takes out, and they may be slow.
  void KeepUpRebuild(uint64_t relinked) {
    if (!space_->is_rebuilding() || space_->relinked() >= relinked) return;
    for (const std::atomic<uint64_t>& recalls : journal_->recalls) {
      const uint64_t before = recalls.load(std::memory_order_acquire);
      while (recalls.load(std::memory_order_acquire) == before) {
        Upkeep();
        std::this_thread::yield();
      }
    }
  }
  void Finish() {
    space_->SetHorizon(stamp_);
    space_->ForgetTombstones(stamp_);
    while (upkeep_.Step(UINT32_MAX) || space_->retired() > 0) space_->ForgetTombstones(stamp_);
  }
  const SpaceUpkeep& upkeep() const { return upkeep_; }

 private:
  void NoteEnd(uint32_t id_number) {
    if (current_[id_number] == kNoNode) return;
    journal_->lives[current_[id_number]].end.store(stamp_, std::memory_order_relaxed);
  }
  void Acknowledge() { journal_->acked.store(stamp_, std::memory_order_release); }

  Space* space_;
  Journal* journal_;
  SpaceUpkeep upkeep_;
  std::vector<Version> current_;  // by id number; kNoNode: none lives
  CommitStamp stamp_ = 0;
};

// One reading thread: recalls by a job of its own, and complains where an answer is wrong.
class Reader {
 public:
  Reader(const Space* space, ReaderEpochs* epochs, Journal* journal, uint32_t number)
      : space_(space),
        epochs_(epochs),
        journal_(journal),
        number_(number),
        memory_(size_t{32} << 20),
        job_(&memory_.heap),
        random_(number + 77) {}

  void Run() {
    while (!journal_->done.load(std::memory_order_acquire)) {
      FindOne();
      FindInThePast();
      CountOne();
      journal_->recalls[number_].fetch_add(1, std::memory_order_release);
    }
  }
  // Only the queries of recall@10, each once.
  double MeasureRecall() {
    counted_ = 0;
    true_ = 0;
    for (uint32_t i = 0; i < kQueries; ++i) CountOne();
    return RecallAt10();
  }
  // Over whole rounds of the queries.
  double RecallAt10() const {
    return static_cast<double>(true_) / static_cast<double>(10 * counted_);
  }
  uint64_t counted() const { return counted_; }
  // Share of the vectors that did not find themselves with kEf.
  double Missed() const { return static_cast<double>(missed_) / static_cast<double>(searched_); }
  uint64_t past_recalls() const { return past_recalls_; }
  const std::vector<std::string>& complaints() const { return complaints_; }

  // The vector of an acknowledged version that nothing has ended finds itself first: surely where
  // the search may look at everything, and hardly ever not where it looks at kEf.
  void FindOne() {
    const CommitStamp acked = journal_->acked.load(std::memory_order_acquire);
    const Version versions = journal_->versions.load(std::memory_order_acquire);
    const Version version = random_.Below(2) == 0 ? static_cast<Version>(random_.Below(kStable))
                                                  : RecentVersion(versions);
    const uint32_t ef = random_.Below(2) == 0 ? kEf : kWholeEf;
    const std::vector<Hit> hits = Recall(VectorOf(version), 3, ef, kNoStamp);
    CheckHits(hits, kNoStamp, acked);
    // It may have ended since; then it need not be there.
    if (EndOf(version) != kOpenStamp) return;
    const bool found = !hits.empty() && VersionOf(hits[0]) == version;
    if (ef == kEf) {
      ++searched_;
      missed_ += static_cast<uint64_t>(!found);
    } else if (!found) {
      Complain("not found", version, hits);
    }
  }

  // What lived at a snapshot is found there, as long as that may be asked for.
  void FindInThePast() {
    const CommitStamp acked = journal_->acked.load(std::memory_order_acquire);
    const Version versions = journal_->versions.load(std::memory_order_acquire);
    const CommitStamp snapshot = acked - random_.Below(kKeep + 10);
    const Version version = RecentVersion(versions);
    if (!LivedAt(version, snapshot)) return;
    RefusalReason reason = RefusalReason::kNone;
    const std::vector<Hit> hits = Recall(VectorOf(version), 3, kWholeEf, snapshot, &reason);
    if (reason == RefusalReason::kSnapshotTooOld) return;
    ++past_recalls_;
    CheckHits(hits, snapshot, acked);
    if (hits.empty() || VersionOf(hits[0]) != version) {
      Complain("not found at " + std::to_string(snapshot), version, hits);
    }
  }

  // recall@10 among the stable vectors, which nothing changes.
  void CountOne() {
    const CommitStamp acked = journal_->acked.load(std::memory_order_acquire);
    const uint64_t number = next_query_++ % kQueries;
    const std::vector<float> query = CloudPoint(90'000 + number, number % 12);
    const std::vector<Hit> hits = Recall(query, 60, kEf, kNoStamp);
    CheckHits(hits, kNoStamp, acked);
    const std::vector<double>& best = BestStable(number, query);
    int seen = 0;
    for (const Hit& hit : hits) {
      if (VersionOf(hit) >= kStable) continue;
      if (++seen > 10) break;
      const double score = ExactScore(space_->metric(), VectorOf(VersionOf(hit)), query);
      const bool nearer = space_->metric() == Metric::kL2 ? score <= best[9] : score >= best[9];
      true_ += static_cast<uint64_t>(nearer);
    }
    ++counted_;
  }

 private:
  std::vector<Hit> Recall(const std::vector<float>& query, uint32_t k, uint32_t ef,
                          CommitStamp snapshot, RefusalReason* reason = nullptr) {
    const ReaderGuard guard(epochs_, number_);
    RecallAnswer answer = RunRecall(*space_, &job_, query,
                                    {.k = k,
                                     .ef = ef,
                                     .with_payload = true,
                                     .with_vector = true,
                                     .snapshot = snapshot,
                                     .slice = static_cast<uint32_t>(20 + random_.Below(500))});
    if (reason != nullptr) *reason = answer.reason;
    if (reason == nullptr && answer.reason != RefusalReason::kNone) {
      Complain("refused: " + std::to_string(static_cast<int>(answer.reason)), 0, {});
    }
    return std::move(answer.hits);
  }

  // Each hit is whole, lived at the snapshot, or was not ended before the recall began, and comes
  // once.
  void CheckHits(const std::vector<Hit>& hits, CommitStamp snapshot, CommitStamp acked) {
    std::vector<std::string> ids;
    for (const Hit& hit : hits) {
      ids.push_back(hit.id);
      Label label{};
      if (hit.payload.size() < sizeof(label)) {
        Complain("torn payload", 0, hits);
        return;
      }
      std::memcpy(&label, hit.payload.data(), sizeof(label));
      std::vector<float> vector = VectorOf(label.version);
      if (hit.payload != PayloadOf(label.version, label.id_number) ||
          hit.id != IdOf(label.id_number) || hit.when_ns != label.version ||
          label.vector_hash != HashOfVector(vector)) {
        Complain("torn observation", label.version, hits);
        continue;
      }
      if (space_->metric() == Metric::kCosine) NormaliseInPlace(vector.data(), vector.size());
      if (hit.vector != vector) Complain("torn vector", label.version, hits);
      const CommitStamp end = EndOf(label.version);
      const CommitStamp begin = BeginOf(label.version);
      if (begin != kNoStamp && begin != hit.stamp) Complain("stamp", label.version, hits);
      if (snapshot == kNoStamp ? end <= acked : end <= snapshot) {
        Complain("ended before", label.version, hits);
      }
      if (snapshot != kNoStamp && hit.stamp > snapshot) Complain("later", label.version, hits);
    }
    std::sort(ids.begin(), ids.end());
    if (std::adjacent_find(ids.begin(), ids.end()) != ids.end()) Complain("id twice", 0, hits);
  }

  Version VersionOf(const Hit& hit) const { return static_cast<Version>(hit.when_ns); }
  Version RecentVersion(Version versions) {
    const uint64_t recent = std::min<uint64_t>(versions, 2'000);
    return static_cast<Version>(versions - 1 - random_.Below(recent));
  }
  CommitStamp BeginOf(Version version) const {
    return journal_->lives[version].begin.load(std::memory_order_relaxed);
  }
  CommitStamp EndOf(Version version) const {
    return journal_->lives[version].end.load(std::memory_order_relaxed);
  }
  bool LivedAt(Version version, CommitStamp snapshot) const {
    return BeginOf(version) <= snapshot && snapshot < EndOf(version);
  }
  // Scores of the ten nearest stable vectors, nearest first.
  const std::vector<double>& BestStable(uint64_t number, const std::vector<float>& query) {
    std::vector<double>& best = best_[number];
    if (!best.empty()) return best;
    for (Version version = 0; version < kStable; ++version) {
      best.push_back(ExactScore(space_->metric(), VectorOf(version), query));
    }
    std::sort(best.begin(), best.end());
    if (space_->metric() != Metric::kL2) std::reverse(best.begin(), best.end());
    best.resize(10);
    return best;
  }
  void Complain(const std::string& what, Version version, const std::vector<Hit>& hits) {
    if (complaints_.size() >= 5) return;
    complaints_.push_back(
        what + ": version " + std::to_string(version) + ", lived from " +
        std::to_string(BeginOf(version)) + " to " + std::to_string(EndOf(version)) + ", acked " +
        std::to_string(journal_->acked.load()) + ", " + std::to_string(hits.size()) +
        " hits, first of " + (hits.empty() ? "none" : std::to_string(VersionOf(hits[0]))));
  }

  const Space* space_;
  ReaderEpochs* epochs_;
  Journal* journal_;
  uint32_t number_;
  TestHeap memory_;
  RecallJob job_;
  SplitMix64 random_;
  std::array<std::vector<double>, kQueries> best_;
  std::vector<std::string> complaints_;
  uint64_t next_query_ = 0;
  uint64_t counted_ = 0;
  uint64_t true_ = 0;
  uint64_t past_recalls_ = 0;
  uint64_t searched_ = 0;
  uint64_t missed_ = 0;
};

struct Case {
  const char* name;
  Metric metric;
  Traversal traversal;
};
class SpaceReadersTest : public testing::TestWithParam<Case> {};

TEST_P(SpaceReadersTest, NothingIsTornMissingOrBackWhileTheWriterGoesOn) {
  TestHeap memory(size_t{192} << 20);
  ReaderEpochs epochs(kReaders);
  dimension = GetParam().traversal == Traversal::kRabitq ? kCodedDimension : kDimension;
  SpaceOptions options = TestSpaceOptions(GetParam().metric, dimension, kBuild);
  options.traversal = GetParam().traversal;
  options.graph_from = kGraphFrom;
  Space space("read", options, &memory.heap, &epochs);
  Journal journal(kStable + kOperations + 1);
  Writer writer(&space, &memory.heap, &journal);
  for (uint32_t id = 0; id < kStable; ++id) {
    ASSERT_NO_FATAL_FAILURE(writer.Upsert(id));
  }

  std::vector<std::unique_ptr<Reader>> readers;
  std::vector<std::thread> threads;
  for (uint32_t i = 0; i < kReaders; ++i) {
    readers.push_back(std::make_unique<Reader>(&space, &epochs, &journal, i));
    threads.emplace_back([reader = readers[i].get()] { reader->Run(); });
  }
  SplitMix64 random(5);
  uint32_t next_id = kStable + kChurnIds;
  for (uint64_t operation = 0; operation < kOperations; ++operation) {
    const auto churned = static_cast<uint32_t>(kStable + random.Below(kChurnIds));
    const uint64_t what = random.Below(10);
    if (what < 2 && next_id < 3 * kStable) {
      writer.Upsert(next_id++);  // It stays.
    } else if (what < 4) {
      writer.Delete(churned);
    } else {
      writer.Upsert(churned);
    }
    if (HasFatalFailure()) break;
    writer.Upkeep();
    writer.KeepUpRebuild(3 * kStable * operation / kOperations);
    // The readers are to be at it all the time, also where there are fewer processors than threads.
    while (journal.recalls[0].load(std::memory_order_acquire) +
               journal.recalls[1].load(std::memory_order_acquire) <
           operation / 8) {
      std::this_thread::yield();
    }
  }
  journal.done.store(true, std::memory_order_release);
  for (std::thread& thread : threads) thread.join();
  for (const auto& reader : readers) {
    for (const std::string& complaint : reader->complaints()) ADD_FAILURE() << complaint;
  }
  if (HasFailure()) return;

  const uint64_t sweeps_beside_readers = writer.upkeep().sweeps();
  const uint64_t relinked_beside_readers = space.relinked();
  EXPECT_GT(sweeps_beside_readers, 3u);
  EXPECT_GT(writer.upkeep().links(), kOperations / 2);
  const uint64_t past_recalls = readers[0]->past_recalls() + readers[1]->past_recalls();
  RecordProperty("past_recalls", std::to_string(past_recalls));
  EXPECT_GT(past_recalls, kOperations / 64);
  writer.Finish();
  EXPECT_EQ(space.unlinked_count(), 0u);
  EXPECT_EQ(space.retired(), 0u);
  EXPECT_FALSE(space.is_rebuilding());
  EXPECT_EQ(space.walk_codes() != nullptr, GetParam().traversal == Traversal::kRabitq);
  RecordProperty("relinked", std::to_string(relinked_beside_readers));
  EXPECT_GT(relinked_beside_readers, 2 * kStable) << "two rebuilds at least";
  const Result<void> sound = space.CheckInvariants();
  ASSERT_TRUE(sound.has_value()) << sound.error().message;
  double during = 0;
  for (const auto& reader : readers) {
    during += reader->RecallAt10() / kReaders;
    EXPECT_LE(reader->Missed(), 0.005);
    RecordProperty("recalls", std::to_string(3 * reader->counted()));
    RecordProperty("missed", std::to_string(reader->Missed()));
  }
  const double at_rest = readers[0]->MeasureRecall();
  RecordProperty("recall_at_10_during", std::to_string(during));
  RecordProperty("recall_at_10_at_rest", std::to_string(at_rest));
  EXPECT_GE(during, at_rest - 0.01);
  EXPECT_GE(at_rest, 0.98);
  for (const std::string& complaint : readers[0]->complaints()) ADD_FAILURE() << complaint;
}

INSTANTIATE_TEST_SUITE_P(Rows, SpaceReadersTest,
                         testing::Values(Case{"CodesAndExact", Metric::kCosine, Traversal::kInt8},
                                         Case{"ExactAlone", Metric::kL2, Traversal::kExact},
                                         Case{"Rabitq", Metric::kCosine, Traversal::kRabitq}),
                         [](const auto& param) { return std::string(param.param.name); });

}  // namespace
}  // namespace engram
