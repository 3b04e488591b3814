// Readers on other threads walk a graph while one thread links, sweeps and uses nodes again.
// Under ThreadSanitizer a race is a failure too.

#include <gtest/gtest.h>

#include <array>
#include <cstdint>
#include <span>

#include "index/graph_walk.h"
#include "src/core/check.h"
#include "tests/index/graph_readers.h"

namespace engram {
namespace {

constexpr NodeId kStable = 300;
constexpr NodeId kNodes = 500;

class WalkReader : public GraphReader {
 public:
  WalkReader(ReadGraph* graph, uint32_t number)
      : GraphReader(graph, number),
        fixture_(graph->fixture),
        scratch_(&fixture_->heap),
        other_scratch_(&fixture_->heap) {
    CHECK(scratch_.Reserve(kNodes) && other_scratch_.Reserve(kNodes),
          "room for a reader");  // before the threads begin
  }

 private:
  void SearchFor(NodeId wanted) override {
    const SearchTarget target = fixture_->TargetOf(wanted);
    std::array<Neighbour, kFound> found;
    // With as many places as nodes the whole graph is walked, by the list or, where there are more
    // than it has, by heaps. Another walk takes its turns in between.
    static_assert(kNodes <= GraphWalk<AllLive>::kMaxListEf);
    GraphWalk<AllLive> walk;
    GraphWalk<AllLive> other;
    walk.Begin(target, found.size(), Below(4) == 0 ? 2 * kNodes : kNodes, &scratch_);
    other.Begin(target, 1, 30, &other_scratch_);
    while (!walk.Turn()) {
      other.Turn();
      if (Below(8) == 0 && walk.Step(Below(400))) break;
    }
    const auto taken = std::span(found).first(walk.TakeResults(found));
    Check(target, taken);
    CheckFindsItself(wanted, taken);
  }

  GraphFixture* fixture_;
  WalkScratch scratch_;
  WalkScratch other_scratch_;
};

TEST(GraphWalkReadersTest, StableNodesAreFoundAndNothingIsUsedAgainUnderAReader) {
  ExpectSoundOneByOne<WalkReader>(kStable, kNodes);
}

}  // namespace
}  // namespace engram
