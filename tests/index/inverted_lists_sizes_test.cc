// How inverted lists stay of one size: splits and merges.

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <set>
#include <string>
#include <vector>

#include "index/inverted_lists.h"
#include "src/core/hash.h"
#include "tests/index/graph_fixture.h"
#include "tests/index/lists_rig.h"

namespace engram {
namespace {

// Whatever the data, what is split is short, and no list is left with next to nothing.
struct Shape {
  const char* name;
  TestVectors (*draw)(size_t count, uint32_t dimension);
};
TestVectors AllEqual(size_t count, uint32_t dimension) {
  TestVectors data{dimension, std::vector<float>(count * dimension)};
  for (size_t i = 0; i < data.values.size(); ++i) {
    data.values[i] = static_cast<float>(i % dimension) - 0.25F;
  }
  return data;
}
TestVectors Zeros(size_t count, uint32_t dimension) {
  return {dimension, std::vector<float>(count * dimension)};
}
TestVectors HalfZeros(size_t count, uint32_t dimension) {
  TestVectors data = GaussianVectors(count, dimension, 5);
  for (size_t i = 0; i < count; i += 2) {
    std::fill_n(data.values.begin() + static_cast<ptrdiff_t>(i * dimension), dimension, 0.0F);
  }
  return data;
}
// Nine in ten are copies of one.
TestVectors MostlyEqual(size_t count, uint32_t dimension) {
  TestVectors data = GaussianVectors(count, dimension, 6);
  for (size_t i = 0; i < count; ++i) {
    if (i % 10 == 3) continue;
    std::copy_n(data.values.begin(), dimension,
                data.values.begin() + static_cast<ptrdiff_t>(i * dimension));
  }
  return data;
}
TestVectors Scaled(size_t count, uint32_t dimension, float scale) {
  TestVectors data = GaussianVectors(count, dimension, 7);
  for (float& value : data.values) value *= scale;
  return data;
}
TestVectors OfAllSizes(size_t count, uint32_t dimension) {
  TestVectors data = GaussianVectors(count, dimension, 8);
  for (size_t i = 0; i < data.values.size(); ++i) {
    data.values[i] *= std::pow(10.0F, static_cast<float>(i / dimension % 60) - 30);
  }
  return data;
}
const Shape kShapes[] = {
    {"Gaussian", [](size_t n, uint32_t d) { return GaussianVectors(n, d, 1); }},
    {"TwoClusters", [](size_t n, uint32_t d) { return ClusteredVectors(n, d, 2, 2); }},
    {"ThirtyClusters", [](size_t n, uint32_t d) { return ClusteredVectors(n, d, 30, 3); }},
    {"AllEqual", AllEqual},
    {"Zeros", Zeros},
    {"HalfZeros", HalfZeros},
    {"MostlyEqual", MostlyEqual},
    {"Tiny", [](size_t n, uint32_t d) { return Scaled(n, d, 1e-30F); }},
    {"Tiniest", [](size_t n, uint32_t d) { return Scaled(n, d, 1e-42F); }},
    {"Large", [](size_t n, uint32_t d) { return Scaled(n, d, 1e17F); }},
    {"Huge", [](size_t n, uint32_t d) { return Scaled(n, d, 1e30F); }},
    {"Hugest", [](size_t n, uint32_t d) { return Scaled(n, d, 5e37F); }},
    {"OfAllSizes", OfAllSizes},
};

TEST(InvertedListsSizesTest, ListsStayShortWhateverTheData) {
  constexpr size_t kCount = 2'500;
  for (const Shape& shape : kShapes) {
    for (const Metric metric : kMetrics) {
      for (const uint32_t dimension : {1U, 3U, 64U, 100U}) {
        const std::string name = std::string(shape.name) + " " + std::string(MetricName(metric)) +
                                 " " + std::to_string(dimension);
        SCOPED_TRACE(name);
        const TestVectors data = shape.draw(kCount, dimension);
        // Under cosine a space refuses zero vectors, and norms that float does not hold.
        const std::string what = shape.name;
        if (metric == Metric::kCosine && (what.ends_with("Zeros") || what == "Tiniest")) continue;
        ListsRig rig(metric, dimension);
        for (NodeId node = 0; node < kCount; ++node) {
          rig.WriteRow(node, data[node]);
          ASSERT_TRUE(rig.Add(node));
          if (node % 64 == 0) {
            ASSERT_NO_FATAL_FAILURE(rig.SplitAll()) << node;
          }
        }
        ASSERT_NO_FATAL_FAILURE(rig.SplitAll());
        ASSERT_NO_FATAL_FAILURE(rig.ExpectAsModelled());
        // A list ends with at least a quarter of those that it was split from, but for what a
        // sample cannot see.
        EXPECT_LE(rig.lists->count(), kCount / (kMost / 6)) << "lists of next to nothing";
      }
    }
  }
}

// Where most leave, the lists that stay are few, and hold what is left; whatever the data.
TEST(InvertedListsSizesTest, ListsOfFewMembersAreMerged) {
  constexpr NodeId kCount = 2'500;
  for (const Shape& shape : kShapes) {
    for (const Metric metric : {Metric::kL2, Metric::kInnerProduct}) {
      SCOPED_TRACE(std::string(shape.name) + " " + std::string(MetricName(metric)));
      const TestVectors data = shape.draw(kCount, 64);
      ListsRig rig(metric, 64);
      for (NodeId node = 0; node < kCount; ++node) rig.WriteRow(node, data[node]);
      ASSERT_NO_FATAL_FAILURE(rig.AddAndSplit(kCount));
      SplitMix64 random(3);
      for (const uint64_t kept_of_100 : {60U, 10U, 1U, 0U}) {
        for (NodeId node = 0; node < kCount; ++node) {
          if (random.Below(100) >= kept_of_100) rig.Remove(node);
        }
        ASSERT_NO_FATAL_FAILURE(rig.MergeAll());
        ASSERT_NO_FATAL_FAILURE(rig.ExpectAsModelled());
        ASSERT_NO_FATAL_FAILURE(rig.SplitAll());
        EXPECT_LE(rig.lists->count(), 1 + rig.members.size() / rig.lists->least_members());
      }
      EXPECT_EQ(rig.lists->count(), 1u);
      ASSERT_NO_FATAL_FAILURE(rig.AddAndSplit(kCount));
      ASSERT_NO_FATAL_FAILURE(rig.ExpectAsModelled());
      rig.lists.reset();
      EXPECT_EQ(rig.memory.heap.live_bytes(), 0u);
    }
  }
}

// What is left of a list goes to what is like it.
TEST(InvertedListsSizesTest, AListIsMergedIntoTheNearest) {
  constexpr NodeId kCount = 8 * kMost;
  for (const Metric metric : kMetrics) {
    SCOPED_TRACE(MetricName(metric));
    ListsRig rig(metric, 64);
    const TestVectors data = ClusteredVectors(kCount, 64, 2, 9);
    for (NodeId node = 0; node < kCount; ++node) {
      rig.WriteRow(node, data[node]);
      rig.Encode(node);
    }
    ASSERT_NO_FATAL_FAILURE(rig.AddAndSplit(kCount));
    const uint32_t before = rig.lists->count();
    // Of every third list a few are left, and of one none.
    for (uint32_t list = 0; list < before; list += 3) {
      const std::vector<NodeId> nodes = rig.MembersOf(list);
      for (size_t i = list == 3 ? 0 : 9; i < nodes.size(); ++i) rig.Remove(nodes[i]);
    }
    ASSERT_NO_FATAL_FAILURE(rig.MergeAll());
    EXPECT_EQ(rig.lists->count(), before - (before + 2) / 3);
    for (uint32_t list = 0; list < rig.lists->count(); ++list) {
      std::set<NodeId> parities;
      for (const NodeId node : rig.MembersOf(list)) parities.insert(node % 2);
      EXPECT_EQ(parities.size(), 1u) << "list " << list;
    }
    ASSERT_NO_FATAL_FAILURE(rig.ExpectAsModelled());
    // Each list is found by its centroid, also those that have another's number now.
    for (const NodeId node : rig.members) {
      const InvertedLists::Choice choice = rig.Choose({&node, 1}, kMost)[0];
      EXPECT_EQ(rig.MembersOf(choice.home).front() % 2, node % 2);
      std::array<uint32_t, 1 + kSelectionSlack> nearest;
      const InvertedLists::Row row{rig.rows.Row(node), rig.codes.Row(node)};
      ASSERT_EQ(rig.lists->ChooseMany(rig.products, row, 1, nearest), 1u);
      EXPECT_EQ(rig.MembersOf(nearest[0]).front() % 2, node % 2) << "by signs";
    }
  }
}

// Two far clusters are told apart, not cut through.
TEST(InvertedListsSizesTest, ASplitFollowsTheClusters) {
  for (const Metric metric : kMetrics) {
    ListsRig rig(metric, 64);
    const TestVectors data = ClusteredVectors(kMost + 1, 64, 2, 9);
    for (NodeId node = 0; node <= kMost; ++node) {
      rig.WriteRow(node, data[node]);
      ASSERT_TRUE(rig.Add(node));
    }
    ASSERT_TRUE(rig.lists->SplitOne());
    ASSERT_EQ(rig.lists->count(), 2u);
    for (uint32_t list = 0; list < 2; ++list) {
      std::set<NodeId> parities;
      rig.lists->ForEachBlock(list, [&](const InvertedLists::Block& block) {
        for (const NodeId node : block.nodes) parities.insert(node % 2);
      });
      EXPECT_EQ(parities.size(), 1u) << MetricName(metric) << " list " << list;
    }
    ASSERT_FALSE(rig.lists->SplitOne());
    ASSERT_NO_FATAL_FAILURE(rig.ExpectAsModelled());
  }
}

// An empty list is used again rather than a new one made.
TEST(InvertedListsSizesTest, AnEmptyListIsUsedAgain) {
  ListsRig rig(Metric::kL2, 8);
  const TestVectors data = ClusteredVectors(2 * kMost + 2, 8, 2, 10);
  for (NodeId node = 0; node < data.size(); ++node) rig.WriteRow(node, data[node]);
  for (int round = 0; round < 20; ++round) {
    for (NodeId node = 0; node < data.size(); ++node) {
      ASSERT_TRUE(rig.Add(node));
      ASSERT_NO_FATAL_FAILURE(rig.SplitAll());
    }
    // One cluster goes, and with it its lists; then it comes back.
    for (NodeId node = 0; node < data.size(); node += 1 + (round % 2)) rig.Remove(node);
    ASSERT_NO_FATAL_FAILURE(rig.ExpectAsModelled());
    while (!rig.members.empty()) rig.Remove(*rig.members.begin());
  }
  EXPECT_LE(rig.lists->count(), 16u);
}

}  // namespace
}  // namespace engram
