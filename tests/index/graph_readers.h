#pragma once

#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "index/hnsw_params.h"
#include "index/hnsw_search.h"
#include "src/core/hash.h"
#include "src/core/reader_epochs.h"
#include "tests/index/graph_fixture.h"
#include "tests/support/sanitized.h"

namespace engram {

// Readers on other threads search a graph while one thread takes nodes out of it and links others
// in their places: a GraphReader each, and a GraphWriter, which tests derive from.

// What they share: a graph in which `nodes` nodes are linked at first.
struct ReadGraph {
  static constexpr uint32_t kReaders = 2;

  GraphFixture* fixture;
  NodeId stable;  // those from this one on come and go
  NodeId nodes;
  ReaderEpochs epochs{kReaders};
  std::atomic<bool> done{false};
  std::array<std::atomic<uint64_t>, kReaders> searches{};
};

class GraphReader {
 public:
  GraphReader(ReadGraph* graph, uint32_t number)
      : graph_(graph), number_(number), random_(number + 5) {}
  GraphReader(const GraphReader&) = delete;
  GraphReader& operator=(const GraphReader&) = delete;
  virtual ~GraphReader() = default;

  void Run() {
    while (!graph_->done.load(std::memory_order_acquire) && complaint_.empty()) {
      const auto wanted = static_cast<NodeId>(random_.Below(graph_->stable));
      {
        const ReaderGuard guard(&graph_->epochs, number_);
        SearchFor(wanted);
      }
      graph_->searches[number_].fetch_add(1, std::memory_order_release);
    }
  }
  const std::string& complaint() const { return complaint_; }

 protected:
  static constexpr size_t kFound = 20;

  // Searches for a stable node, and complains.
  virtual void SearchFor(NodeId wanted) = 0;

  // What is found is as many as there is room for, each what it was when it was found.
  void Check(const SearchTarget& target, std::span<const Neighbour> found) {
    if (found.size() != kFound) Complain("found " + std::to_string(found.size()));
    for (const Neighbour& neighbour : found) {
      if (target.DistanceTo(neighbour.node) != neighbour.distance) {
        Complain(std::to_string(neighbour.node) + " was used again under a reader");
      }
    }
  }
  void CheckFindsItself(NodeId wanted, std::span<const Neighbour> found) {
    if (found.empty() || found[0].node != wanted || found[0].distance != 0) {
      Complain(std::to_string(wanted) + " does not find itself");
    }
  }
  uint64_t Below(uint64_t bound) { return random_.Below(bound); }

 private:
  void Complain(const std::string& what) { complaint_ = what; }

  ReadGraph* graph_;
  uint32_t number_;
  SplitMix64 random_;
  std::string complaint_;
};

// The thread that changes the graph: it links one by one, unless a test derives another.
class GraphWriter {
 public:
  explicit GraphWriter(ReadGraph* graph) : graph_(graph) {}
  GraphWriter(const GraphWriter&) = delete;
  GraphWriter& operator=(const GraphWriter&) = delete;
  virtual ~GraphWriter() = default;

  // Rounds: of the nodes that come and go one in `share` leaves; the nodes of the round before come
  // back as others between the slices of the sweep. What is wrong with the graph; empty: nothing.
  std::string Churn(uint64_t share) {
    constexpr int kRounds = kSanitized ? 40 : 100;
    std::string violation;
    for (int round = 0; round < kRounds && violation.empty(); ++round) {
      std::vector<NodeId> leaving;
      for (NodeId node = graph_->stable; node < graph_->nodes; ++node) {
        if (fixture().graph.IsLinked(node) && random_.Below(share) == 0) leaving.push_back(node);
      }
      fixture().Sweep(leaving, 100, [&] {
        if (!fixture().sweep.repairing_tree()) Relink();
      });
      FinishRelinking();
      const ReaderEpochs::Epoch closed = graph_->epochs.Close();
      while (!graph_->epochs.Passed(closed)) std::this_thread::yield();
      Forget(leaving);
      absent_.insert(absent_.end(), leaving.begin(), leaving.end());
      violation = FindViolation();
      while (round == kRounds / 2 && (graph_->searches[0] == 0 || graph_->searches[1] == 0)) {
        std::this_thread::yield();
      }
    }
    return violation;
  }

 protected:
  // Links some of the absent nodes, or some of the way.
  virtual void Relink() {
    if (absent_.empty()) return;
    const NodeId node = TakeAbsent(1)[0];
    fixture().Encode(FreshVectors(8)[random_.Below(8)], fixture().vectors.Row(node));
    fixture().Link(node, 50);
  }
  virtual void FinishRelinking() {}
  virtual void Forget(std::span<const NodeId> nodes) {
    for (const NodeId node : nodes) fixture().graph.Forget(node);
  }
  virtual std::string FindViolation() const { return Violation(fixture().graph); }

  std::vector<NodeId> TakeAbsent(size_t count) {
    const auto from = absent_.end() - static_cast<ptrdiff_t>(count);
    const std::vector<NodeId> nodes(from, absent_.end());
    absent_.erase(from, absent_.end());
    return nodes;
  }
  TestVectors FreshVectors(size_t count) {
    return ClusteredVectors(count, fixture().format.dimension(), 8,
                            static_cast<uint32_t>(random_.Below(1'000'000)));
  }
  GraphFixture& fixture() const { return *graph_->fixture; }
  size_t absent() const { return absent_.size(); }
  uint64_t Below(uint64_t bound) { return random_.Below(bound); }

 private:
  ReadGraph* graph_;
  SplitMix64 random_{1};
  std::vector<NodeId> absent_;
};

// Churns while readers search, who have nothing to complain about; these readers.
template <typename Reader>
std::vector<std::unique_ptr<Reader>> ExpectSoundBesideReaders(ReadGraph* graph, GraphWriter* writer,
                                                              uint64_t share) {
  std::vector<std::unique_ptr<Reader>> readers;
  for (uint32_t i = 0; i < ReadGraph::kReaders; ++i) {
    readers.push_back(std::make_unique<Reader>(graph, i));
  }
  std::vector<std::thread> threads;
  for (const auto& reader : readers) threads.emplace_back([&reader] { reader->Run(); });
  EXPECT_EQ(writer->Churn(share), "");
  graph->done.store(true, std::memory_order_release);
  for (std::thread& thread : threads) thread.join();
  for (uint32_t i = 0; i < ReadGraph::kReaders; ++i) {
    EXPECT_EQ(readers[i]->complaint(), "");
    EXPECT_GT(graph->searches[i], 0u);
  }
  return readers;
}

// The same with graphs that are linked one by one, the second of such degrees as break soonest.
template <typename Reader>
void ExpectSoundOneByOne(NodeId stable, NodeId nodes) {
  constexpr uint32_t kDimension = 10;
  for (const HnswBuildParams& params :
       {HnswBuildParams{.M = 6, .M0 = 12, .ef_construction = 30},
        HnswBuildParams{.M = 3, .M0 = 5, .ef_construction = 12, .keep_pruned = false}}) {
    GraphFixture fixture(Metric::kL2, kDimension, params);
    fixture.Build(ClusteredVectors(nodes, kDimension, 8, 3));
    ReadGraph graph{.fixture = &fixture, .stable = stable, .nodes = nodes};
    GraphWriter writer(&graph);
    ExpectSoundBesideReaders<Reader>(&graph, &writer, 5);
  }
}

}  // namespace engram
