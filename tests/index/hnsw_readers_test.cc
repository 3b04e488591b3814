// Readers on other threads search a graph while one thread links, sweeps and uses nodes again.
// Under ThreadSanitizer a race is a failure too.

#include <gtest/gtest.h>

#include <array>
#include <cstdint>
#include <span>

#include "index/hnsw_search.h"
#include "src/core/check.h"
#include "tests/index/graph_readers.h"
#include "tests/index/graph_search.h"

namespace engram {
namespace {

constexpr NodeId kStable = 400;
constexpr NodeId kNodes = 700;

class HnswReader : public GraphReader {
 public:
  HnswReader(ReadGraph* graph, uint32_t number)
      : GraphReader(graph, number), fixture_(graph->fixture), scratch_(&fixture_->heap) {
    CHECK(scratch_.Reserve(kNodes), "room for a reader");  // before the threads begin
  }

 private:
  void SearchFor(NodeId wanted) override {
    const SearchTarget target = fixture_->TargetOf(wanted);
    std::array<Neighbour, kFound> found;
    GraphSearch<AllLive> search;
    search.Begin(target, found.size(), kNodes, &scratch_);
    while (!search.Step(1 + Below(400))) {
    }
    const auto taken = std::span(found).first(search.TakeResults(found));
    Check(target, taken);
    CheckFindsItself(wanted, taken);
  }

  GraphFixture* fixture_;
  SearchScratch scratch_;
};

TEST(HnswReadersTest, StableNodesAreFoundAndNothingIsUsedAgainUnderAReader) {
  ExpectSoundOneByOne<HnswReader>(kStable, kNodes);
}

}  // namespace
}  // namespace engram
