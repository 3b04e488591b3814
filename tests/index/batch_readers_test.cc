// Readers on other threads search a graph while one thread links in batches, sweeps and uses nodes
// again. They walk by int8 rows or by codes.
// Under ThreadSanitizer a race is a failure too.

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "index/hnsw_search.h"
#include "src/core/check.h"
#include "tests/index/batch_rig.h"
#include "tests/index/graph_readers.h"
#include "tests/index/graph_search.h"

namespace engram {
namespace {

constexpr uint32_t kDimension = 72;
constexpr NodeId kStable = 400;
constexpr NodeId kNodes = 700;

class BatchReader : public GraphReader {
 public:
  // The graph's fixture is a BatchRig.
  BatchReader(ReadGraph* graph, uint32_t number)
      : GraphReader(graph, number),
        rig_(static_cast<BatchRig*>(graph->fixture)),
        scratch_(&rig_->heap) {
    CHECK(scratch_.Reserve(kNodes), "room for a reader");  // before the threads begin
  }
  // Share of the searches that did not find the stable node that they asked for.
  double Missed() const { return static_cast<double>(missed_) / static_cast<double>(searched_); }

 private:
  void SearchFor(NodeId wanted) override {
    const SearchTarget target = rig_->TargetOf(wanted);
    const WalkCodes& codes = rig_->codes;
    alignas(kCacheLineBytes) std::array<std::byte, HnswLinker::kWalkQueryBytes> coded;
    std::array<float, kDimension> numbers;
    rig_->format.Decode(target.query, numbers.data());
    codes.format().EncodeQuery(numbers.data(), coded.data());
    const bool by_codes = Below(2) == 0;
    const SearchTarget walk = by_codes ? codes.TargetFor(&rig_->graph, coded.data()) : target;
    std::array<Neighbour, kFound> found;
    GraphSearch<AllLive> search;
    search.Begin(walk, found.size(), kNodes, &scratch_);
    while (!search.Step(1 + Below(400))) {
    }
    const auto taken = std::span(found).first(search.TakeResults(found));
    Check(walk, taken);
    // Codes cannot tell neighbours apart that are so much nearer to each other than to the origin.
    if (by_codes) return;
    missed_ += static_cast<uint64_t>(
        std::ranges::none_of(taken, [&](const Neighbour& at) { return at.node == wanted; }));
    ++searched_;
  }

  BatchRig* rig_;
  SearchScratch scratch_;
  uint64_t missed_ = 0;
  uint64_t searched_ = 0;
};

class BatchWriter : public GraphWriter {
 public:
  BatchWriter(ReadGraph* graph, BatchRig* rig) : GraphWriter(graph), rig_(rig) {}

 private:
  void Relink() override {
    if (rig_->batch.active()) {
      rig_->batch.Step(static_cast<uint32_t>(Below(3'000)));
      return;
    }
    if (absent() == 0) return;
    const std::vector<NodeId> nodes = TakeAbsent(1 + Below(absent()));
    const TestVectors fresh = FreshVectors(nodes.size());
    for (size_t i = 0; i < nodes.size(); ++i) rig_->Encode(fresh[i], rig_->vectors.Row(nodes[i]));
    CHECK(rig_->batch.Begin(rig_->TargetOfBatch(), nodes), "room for a batch");
  }
  void FinishRelinking() override {
    while (rig_->batch.active()) rig_->batch.Step(3'000);
  }
  void Forget(std::span<const NodeId> nodes) override { rig_->Forget(nodes); }
  std::string FindViolation() const override {
    return GraphWriter::FindViolation() + rig_->ListsViolation();
  }

  BatchRig* rig_;
};

TEST(BatchReadersTest, StableNodesAreFoundAndNothingIsUsedAgainUnderAReader) {
  for (const HnswBuildParams& params :
       {HnswBuildParams{.M = 6, .M0 = 12, .ef_construction = 30},
        HnswBuildParams{.M = 4, .M0 = 8, .ef_construction = 12, .keep_pruned = false}}) {
    BatchRig rig(Metric::kL2, kDimension, params);
    rig.BuildInBatches(ClusteredVectors(kNodes, kDimension, 8, 3), 200);
    ReadGraph graph{.fixture = &rig, .stable = kStable, .nodes = kNodes};
    BatchWriter writer(&graph, &rig);
    for (const auto& reader : ExpectSoundBesideReaders<BatchReader>(&graph, &writer, 3)) {
      RecordProperty("missed", std::to_string(reader->Missed()));
      EXPECT_LE(reader->Missed(), 0.05);
    }
  }
}

}  // namespace
}  // namespace engram
