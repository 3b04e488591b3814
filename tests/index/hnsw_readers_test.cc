// Readers on other threads search a graph while one thread links, sweeps and uses nodes again.
// Under ThreadSanitizer a race is a failure too.

#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "index/hnsw_search.h"
#include "src/core/hash.h"
#include "src/core/reader_epochs.h"
#include "tests/index/graph_fixture.h"
#include "tests/support/sanitized.h"

namespace engram {
namespace {

constexpr uint32_t kDimension = 10;
constexpr uint32_t kReaders = 2;
constexpr NodeId kStable = 400;
constexpr NodeId kNodes = 700;  // those from kStable on come and go
constexpr int kRounds = kSanitized ? 40 : 100;

struct AllLive {
  bool operator()(NodeId) const { return true; }
};

struct Shared {
  explicit Shared(const HnswBuildParams& params)
      : fixture(Metric::kL2, kDimension, params), epochs(kReaders) {}
  GraphFixture fixture;
  ReaderEpochs epochs;
  std::atomic<bool> done{false};
  std::array<std::atomic<uint64_t>, kReaders> searches{};
};

class GraphReader {
 public:
  GraphReader(Shared* shared, uint32_t number)
      : shared_(shared), number_(number), random_(number + 5), scratch_(&shared->fixture.heap) {
    CHECK(scratch_.Reserve(kNodes), "room for a reader");  // before the threads begin
  }
  void Run() {
    while (!shared_->done.load(std::memory_order_acquire) && complaint_.empty()) {
      Search();
      shared_->searches[number_].fetch_add(1, std::memory_order_release);
    }
  }
  const std::string& complaint() const { return complaint_; }

 private:
  // A stable node finds itself; what is found is what it was when it was found.
  void Search() {
    const auto wanted = static_cast<NodeId>(random_.Below(kStable));
    const SearchTarget target = shared_->fixture.TargetOf(wanted);
    std::array<Neighbour, 20> found;
    const ReaderGuard guard(&shared_->epochs, number_);
    GraphSearch<AllLive> search;
    search.Begin(target, found.size(), kNodes, &scratch_);
    while (!search.Step(1 + random_.Below(400))) {
    }
    const size_t count = search.TakeResults(found);
    if (count != found.size()) complaint_ = "found " + std::to_string(count);
    if (count == 0 || found[0].node != wanted || found[0].distance != 0) {
      complaint_ = std::to_string(wanted) + " does not find itself";
    }
    for (size_t i = 0; i < count; ++i) {
      if (target.DistanceTo(found[i].node) != found[i].distance) {
        complaint_ = std::to_string(found[i].node) + " was used again under a reader";
      }
    }
  }

  Shared* shared_;
  uint32_t number_;
  SplitMix64 random_;
  SearchScratch scratch_;
  std::string complaint_;
};

TEST(HnswReadersTest, StableNodesAreFoundAndNothingIsUsedAgainUnderAReader) {
  for (const HnswBuildParams& params :
       {HnswBuildParams{.M = 6, .M0 = 12, .ef_construction = 30},
        HnswBuildParams{.M = 3, .M0 = 5, .ef_construction = 12, .keep_pruned = false}}) {
    Shared shared(params);
    GraphFixture& fixture = shared.fixture;
    const TestVectors data = ClusteredVectors(kNodes, kDimension, 8, 3);
    for (NodeId node = 0; node < kNodes; ++node) fixture.Link(fixture.Store(data[node]));
    std::vector<std::unique_ptr<GraphReader>> readers;
    std::vector<std::thread> threads;
    for (uint32_t i = 0; i < kReaders; ++i) {
      readers.push_back(std::make_unique<GraphReader>(&shared, i));
    }
    for (const auto& reader : readers) threads.emplace_back([&reader] { reader->Run(); });
    SplitMix64 random(1);
    std::vector<NodeId> absent;
    std::string violation;
    for (int round = 0; round < kRounds && violation.empty(); ++round) {
      // A batch leaves; the nodes of the one before come back as others between the slices.
      std::vector<NodeId> batch;
      for (NodeId node = kStable; node < kNodes; ++node) {
        if (fixture.graph.IsLinked(node) && random.Below(5) == 0) batch.push_back(node);
      }
      fixture.Sweep(batch, 100, [&] {
        if (fixture.sweep.repairing_tree() || absent.empty()) return;
        const NodeId node = absent.back();
        absent.pop_back();
        const TestVectors fresh =
            ClusteredVectors(8, kDimension, 8, static_cast<uint32_t>(random.Below(1'000'000)));
        fixture.Encode(fresh[random.Below(8)], fixture.vectors.Row(node));
        fixture.Link(node, 50);
      });
      const ReaderEpochs::Epoch closed = shared.epochs.Close();
      while (!shared.epochs.Passed(closed)) std::this_thread::yield();
      for (const NodeId node : batch) fixture.graph.Forget(node);
      absent.insert(absent.end(), batch.begin(), batch.end());
      if (const Result<void> sound = fixture.graph.CheckInvariants(); !sound) {
        violation = sound.error().message;
      }
      while (round == kRounds / 2 && (shared.searches[0] == 0 || shared.searches[1] == 0)) {
        std::this_thread::yield();
      }
    }
    shared.done.store(true, std::memory_order_release);
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(violation, "");
    for (uint32_t i = 0; i < kReaders; ++i) {
      EXPECT_EQ(readers[i]->complaint(), "");
      EXPECT_GT(shared.searches[i], 0u);
    }
  }
}

}  // namespace
}  // namespace engram
