#include "index/hnsw_graph.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "tests/index/graph_fixture.h"

namespace engram {

// Breaks a graph in ways that its own functions do not allow.
class HnswGraphTestPeer {
 public:
  static std::span<NodeId> List(HnswGraph* graph, NodeId node, uint32_t level) {
    return {graph->MutableLinks(node, level), graph->MaxDegree(level)};
  }
  static void RemoveLink(HnswGraph* graph, NodeId node, NodeId target) {
    graph->RemoveLink(node, 0, target);
  }
  static NodeId& Parent(HnswGraph* graph, NodeId node) { return graph->nodes_[node].parent; }
  static uint8_t& Children(HnswGraph* graph, NodeId node) { return graph->nodes_[node].children; }
  static uint8_t& Level(HnswGraph* graph, NodeId node) { return graph->nodes_[node].level; }
  static size_t& LinkedCount(HnswGraph* graph) { return graph->linked_count_; }
  static void SetEntryPoint(HnswGraph* graph, NodeId node) { graph->entry_point_ = node; }
};

namespace {

using Peer = HnswGraphTestPeer;

class HnswGraphTest : public testing::Test {
 protected:
  static constexpr uint32_t kNodes = 600;

  HnswGraphTest() { fixture_.Build(GaussianVectors(kNodes, 8, 1)); }

  // A node of exactly `level`.
  NodeId NodeOfLevel(uint32_t level) {
    for (NodeId node = 0; node < kNodes; ++node) {
      if (graph_.Level(node) == level) return node;
    }
    ADD_FAILURE() << "no node of level " << level;
    return 0;
  }
  NodeId Root() {
    for (NodeId node = 0; node < kNodes; ++node) {
      if (Peer::Parent(&graph_, node) == kNoNode) return node;
    }
    return kNoNode;
  }
  void ExpectViolation(const std::string& words) {
    const Result<void> checked = graph_.CheckInvariants();
    ASSERT_FALSE(checked.has_value()) << "not caught: " << words;
    EXPECT_EQ(checked.error().code, ErrorCode::kCorrupt);
    EXPECT_NE(checked.error().message.find(words), std::string::npos) << checked.error().message;
  }

  HnswBuildParams params_{.M = 4, .M0 = 8, .ef_construction = 40};
  GraphFixture fixture_{Metric::kL2, 8, params_};
  HnswGraph& graph_ = fixture_.graph;
};

TEST_F(HnswGraphTest, ASoundGraphPasses) {
  const Result<void> checked = graph_.CheckInvariants();
  EXPECT_TRUE(checked.has_value()) << checked.error().message;
  EXPECT_EQ(graph_.linked_count(), kNodes);
  EXPECT_GE(graph_.top_level(), 2u);
  EXPECT_EQ(graph_.Level(graph_.entry_point()), graph_.top_level());
}

TEST_F(HnswGraphTest, CatchesALinkToANodeThatIsNotThere) {
  Peer::List(&graph_, 7, 0)[0] = kNodes;
  ExpectViolation("node 7 links to 600 on level 0, which is not in the graph");
}

TEST_F(HnswGraphTest, CatchesASelfLink) {
  Peer::List(&graph_, 7, 0)[1] = 7;
  ExpectViolation("node 7 links to 7 on level 0, itself");
}

TEST_F(HnswGraphTest, CatchesALinkTwice) {
  const std::span<NodeId> list = Peer::List(&graph_, 7, 0);
  list[1] = list[0];
  ExpectViolation("twice");
}

TEST_F(HnswGraphTest, CatchesALinkToANodeThatLacksTheLevel) {
  const NodeId high = NodeOfLevel(2);
  const NodeId low = NodeOfLevel(0);
  Peer::List(&graph_, high, 1)[0] = low;
  ExpectViolation("which lacks that level");
}

TEST_F(HnswGraphTest, CatchesAHoleInAList) {
  Peer::List(&graph_, 7, 0)[0] = kNoNode;
  ExpectViolation("node 7 has a link beyond its degree on level 0");
}

// The list's block has room for 16 links, so a degree beyond M0 = 8 would go unseen by the reader.
TEST_F(HnswGraphTest, CatchesADegreeBeyondItsLimit) {
  const std::span<NodeId> list = Peer::List(&graph_, 7, 0);
  NodeId filler = 100;
  for (NodeId& link : list) {
    if (link == kNoNode) link = filler++;
  }
  list.data()[list.size()] = 200;
  ExpectViolation("node 7 has too many links");
}

TEST_F(HnswGraphTest, CatchesAListThatEndsInAHole) {
  for (NodeId node = 0;; ++node) {
    const std::span<NodeId> list = Peer::List(&graph_, node, 0);
    const auto end = std::find(list.begin(), list.end(), kNoNode);
    if (end == list.end()) continue;
    *end = HnswGraph::kHole;
    break;
  }
  ExpectViolation("has a list that ends in a hole on level 0");
}

// What stays keeps its place, so that a reader in the list misses nothing.
TEST_F(HnswGraphTest, EditingAListMovesNoLink) {
  const std::span<NodeId> list = Peer::List(&graph_, 7, 0);
  std::vector<NodeId> before(list.begin(), list.end());
  const uint32_t degree = graph_.Degree(7, 0);
  ASSERT_GE(degree, 4u);
  const NodeId gone = list[1];
  std::vector<NodeId> wanted;
  for (const NodeId link : list) {
    if (link != kNoNode && link != gone) wanted.push_back(link);
  }
  graph_.EditLinks(7, 0, wanted);
  EXPECT_EQ(list[1], HnswGraph::kHole);
  for (uint32_t place = 0; place < degree; ++place) {
    if (place != 1) {
      EXPECT_EQ(list[place], before[place]);
    }
  }
  EXPECT_EQ(graph_.Degree(7, 0), degree - 1);
  // The next link goes into the hole; one taken from the end leaves none.
  ASSERT_TRUE(graph_.AppendLink(7, 0, gone));
  EXPECT_EQ(std::vector<NodeId>(list.begin(), list.end()), before);
  wanted.assign({list[0]});
  graph_.EditLinks(7, 0, wanted);
  EXPECT_EQ(list[1], kNoNode);
  // All is replaced at once.
  wanted.assign({100, 101, 102});
  graph_.EditLinks(7, 0, wanted);
  EXPECT_EQ(graph_.Degree(7, 0), 3u);
  for (const NodeId link : wanted) EXPECT_TRUE(graph_.HasLink(7, 0, link));
}

TEST_F(HnswGraphTest, CatchesALevelThatDoesNotFitTheLists) {
  Peer::Level(&graph_, NodeOfLevel(0)) = 1;
  ExpectViolation("has lists that do not fit its level");
}

TEST_F(HnswGraphTest, CatchesAnEntryPointBelowTheTop) {
  Peer::SetEntryPoint(&graph_, NodeOfLevel(0));
  ExpectViolation("is above the entry point's level");
}

TEST_F(HnswGraphTest, CatchesAnEntryPointThatIsNotLinked) {
  Peer::SetEntryPoint(&graph_, kNodes);
  ExpectViolation("is the entry point and not linked");
}

TEST_F(HnswGraphTest, CatchesAMiscount) {
  ++Peer::LinkedCount(&graph_);
  ExpectViolation("600 nodes are linked and 0 doomed, 601 and 0 are counted");
}

TEST_F(HnswGraphTest, CatchesALostLinkOfTheTree) {
  const NodeId node = 500;
  const NodeId parent = Peer::Parent(&graph_, node);
  Peer::RemoveLink(&graph_, parent, node);
  ExpectViolation("node 500 has no link from its parent");
  ASSERT_TRUE(graph_.AppendLink(parent, 0, node));
  ASSERT_TRUE(graph_.CheckInvariants().has_value());
  Peer::RemoveLink(&graph_, node, parent);
  ExpectViolation("node 500 does not link to its parent");
}

TEST_F(HnswGraphTest, CatchesASecondRoot) {
  const NodeId node = Root() == 500 ? 501 : 500;
  --Peer::Children(&graph_, Peer::Parent(&graph_, node));
  Peer::Parent(&graph_, node) = kNoNode;
  ExpectViolation("is a second root");
}

TEST_F(HnswGraphTest, CatchesMiscountedChildren) {
  ++Peer::Children(&graph_, 3);
  ExpectViolation("node 3 miscounts its children");
}

// Two nodes that link to each other and call each other parent: every local rule holds.
TEST_F(HnswGraphTest, CatchesACycleOfParents) {
  const NodeId root = Root();
  for (NodeId node = 0; node < kNodes; ++node) {
    const NodeId parent = Peer::Parent(&graph_, node);
    if (parent == kNoNode || parent == root) continue;
    // The parent becomes the child of its child; its old parent has one less.
    const NodeId grandparent = Peer::Parent(&graph_, parent);
    if (Peer::Children(&graph_, node) == graph_.MaxChildren()) continue;
    --Peer::Children(&graph_, grandparent);
    ++Peer::Children(&graph_, node);
    Peer::Parent(&graph_, parent) = node;
    break;
  }
  ExpectViolation("has a cycle among its ancestors");
}

// Nodes 0 and 1 know each other, 2 and 3 too, and nobody else.
TEST(HnswGraphIslandTest, CatchesAnIsland) {
  GraphFixture fixture(Metric::kL2, 4, {.M = 2, .M0 = 4, .ef_construction = 4});
  HnswGraph& graph = fixture.graph;
  const auto add_pair = [&graph](NodeId a, NodeId b) {
    ASSERT_TRUE(graph.AddNode(a, 0));
    ASSERT_TRUE(graph.AddNode(b, 0));
    graph.SetLinks(a, 0, std::vector<NodeId>{b});
    graph.SetLinks(b, 0, std::vector<NodeId>{a});
    graph.SetParent(b, a);
    graph.FinishNode(a);
    graph.FinishNode(b);
  };
  add_pair(0, 1);
  ASSERT_TRUE(graph.CheckInvariants().has_value());
  add_pair(2, 3);
  const Result<void> checked = graph.CheckInvariants();
  ASSERT_FALSE(checked.has_value());
  EXPECT_EQ(checked.error().message,
            "graph: node 2 cannot be reached from the entry point on level 0");
}

TEST(HnswGraphStorageTest, ReleaseGivesAllBackAndTheGraphMayGrowAgain) {
  GraphFixture fixture(Metric::kL2, 4, {.M = 4, .M0 = 8, .ef_construction = 20});
  const TestVectors data = GaussianVectors(2'000, 4, 2);
  fixture.Build(data);
  const size_t used = fixture.arena.used_bytes();
  fixture.graph.Release();
  EXPECT_EQ(fixture.graph.linked_count(), 0u);
  EXPECT_EQ(fixture.graph.entry_point(), kNoNode);
  EXPECT_TRUE(fixture.graph.CheckInvariants().has_value());
  for (NodeId node = 0; node < data.size(); ++node) fixture.Link(node);
  EXPECT_TRUE(fixture.graph.CheckInvariants().has_value());
  EXPECT_EQ(fixture.arena.used_bytes(), used) << "blocks were not reused";
}

// Refused for want of memory, a node leaves no trace.
TEST(HnswGraphStorageTest, ASpentHeapRefusesANodeAndKeepsTheGraphSound) {
  HnswBuildParams params{.M = 2, .M0 = 4, .ef_construction = 10};
  GraphFixture fixture(Metric::kL2, 1, params, size_t{4} << 20);
  uint32_t refused = 0;
  std::vector<float> value(1);
  for (NodeId node = 0; refused == 0 && fixture.vectors.Reserve(node + 1); ++node) {
    value[0] = static_cast<float>(node * 7919 % 104729);
    fixture.Encode(value, fixture.vectors.Row(node));
    if (!fixture.linker.Begin(&fixture.graph, fixture.Target(), node)) {
      ++refused;
      EXPECT_FALSE(fixture.linker.active());
      EXPECT_FALSE(fixture.graph.IsLinked(node));
      continue;
    }
    while (!fixture.linker.Step(1'000)) {
    }
  }
  EXPECT_TRUE(fixture.graph.CheckInvariants().has_value());
  EXPECT_GT(fixture.graph.linked_count(), 1'000u);
}

}  // namespace
}  // namespace engram
