#include "index/inverted_lists.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "index/block_products.h"
#include "index/sign_blocks.h"
#include "index/vector_format.h"
#include "index/vector_store.h"
#include "src/core/hash.h"
#include "tests/index/graph_fixture.h"
#include "tests/index/sign_testing.h"
#include "tests/index/space_testing.h"

namespace engram {

class InvertedListsTestPeer {
 public:
  static std::vector<float> Centroid(const InvertedLists& lists, uint32_t list) {
    std::vector<float> numbers(lists.format_->dimension());
    lists.format_->Decode(lists.Centroid(list), numbers.data());
    return numbers;
  }
};

namespace {

constexpr uint32_t kMost = InvertedLists::kFewestMembers;  // while there are few lists
constexpr size_t kCodeBytes = 64;                          // of up to 384 dimensions

std::string Violation(const InvertedLists& lists) {
  const Result<void> checked = lists.CheckInvariants();
  return checked.has_value() ? "" : checked.error().message;
}

// Lists beside a model of them: nodes, the code of each, and where each was put.
class ListsRig {
 public:
  ListsRig(Metric metric, uint32_t dimension, size_t arena_bytes = size_t{64} << 20,
           uint32_t many = InvertedLists::kMany)
      : rows_memory(size_t{64} << 20),
        memory(arena_bytes),
        format(Precision::kInt8, metric, dimension),
        rows(&rows_memory.heap, format.row_bytes()),
        codes(&rows_memory.heap, kCodeBytes),
        coding(OwnFormat(metric, dimension, &rows_memory.heap)),
        lists(std::make_unique<InvertedLists>(&memory.heap, &format, &rows, coding.get(),
                                              InvertedLists::kMostCopies, many)) {
    CHECK(coding->row_bytes() == kCodeBytes, "codes of one line");
  }

  void WriteRow(NodeId node, std::span<const float> vector) {
    ASSERT_TRUE(rows.Reserve(node + 1) && codes.Reserve(node + 1));
    std::vector<float> numbers(vector.begin(), vector.end());
    if (format.metric() == Metric::kCosine) NormaliseInPlace(numbers.data(), numbers.size());
    format.Encode(numbers.data(), rows.Row(node));
    WriteCode(node, 0);
  }
  void WriteCode(NodeId node, uint32_t version) {
    std::memset(codes.Row(node), 0, kCodeBytes);
    const std::array<uint32_t, 2> label{node, version};
    std::memcpy(codes.Row(node), label.data(), sizeof(label));
  }
  // What the numbers' code is.
  void Encode(NodeId node) {
    std::vector<float> numbers(format.dimension());
    format.Decode(rows.Row(node), numbers.data());
    coding->Encode(numbers.data(), codes.Row(node));
  }
  // By products, or where there are many lists by signs.
  std::vector<InvertedLists::Choice> Choose(std::span<const NodeId> nodes, float asked,
                                            bool by_signs = false) {
    std::vector<InvertedLists::Row> at;
    for (const NodeId node : nodes) {
      at.push_back({rows.Row(node), by_signs ? codes.Row(node) : nullptr});
    }
    std::vector<InvertedLists::Choice> choices(nodes.size());
    lists->Choose(products, at, asked, choices.data());
    return choices;
  }
  // False when the heap is spent.
  bool Add(NodeId node) {
    if (!lists->Reserve(node + 1)) return false;
    const uint32_t home = Choose({&node, 1}, 1)[0].home;
    if (home >= lists->count()) ADD_FAILURE() << "no such list";
    if (!lists->Add(home, node, codes.Row(node))) return false;
    members.insert(node);
    return true;
  }
  void Remove(NodeId node) {
    lists->Remove(node);
    members.erase(node);
  }
  // Splits until nothing is left to do; no list is too long then.
  void SplitAll() {
    for (int splits = 0; lists->SplitOne(); ++splits) ASSERT_LT(splits, 1'000) << "it goes on";
    for (uint32_t list = 0; list < lists->count(); ++list) ASSERT_LE(lists->size(list), kMost);
  }
  // Merges until nothing is left to do; no list is too short then, but for the only one.
  void MergeAll() {
    for (int merges = 0; lists->MergeOne(products); ++merges) ASSERT_LT(merges, 1'000);
    if (lists->count() == 1) return;
    for (uint32_t list = 0; list < lists->count(); ++list) {
      ASSERT_GE(lists->size(list), lists->least_members());
    }
  }
  // Nodes 0 to `count` - 1, with their rows written.
  void AddAndSplit(NodeId count) {
    for (NodeId node = 0; node < count; ++node) {
      ASSERT_TRUE(Add(node));
      if (node % 64 == 0) {
        ASSERT_NO_FATAL_FAILURE(SplitAll());
      }
    }
  }
  std::vector<NodeId> MembersOf(uint32_t list) const {
    std::vector<NodeId> nodes;
    lists->ForEachBlock(list, [&](const InvertedLists::Block& block) {
      nodes.insert(nodes.end(), block.nodes.begin(), block.nodes.end());
    });
    return nodes;
  }
  // The lists hold the members, each once and with its code.
  void ExpectAsModelled() {
    ASSERT_EQ(Violation(*lists), "");
    ASSERT_EQ(lists->members(), members.size());
    std::set<NodeId> seen;
    for (uint32_t list = 0; list < lists->count(); ++list) {
      uint32_t size = 0;
      lists->ForEachBlock(list, [&](const InvertedLists::Block& block) {
        size += static_cast<uint32_t>(block.nodes.size());
        for (size_t i = 0; i < block.nodes.size(); ++i) {
          const NodeId node = block.nodes[i];
          ASSERT_TRUE(seen.insert(node).second) << node << " is listed twice";
          ASSERT_TRUE(members.contains(node)) << node;
          ASSERT_TRUE(lists->Has(node));
          ASSERT_TRUE(HasCode(SignBlocks(*coding), block, i, codes.Row(node)))
              << node << " has another's code";
        }
      });
      ASSERT_EQ(size, lists->size(list));
    }
    ASSERT_EQ(seen.size(), members.size());
    ASSERT_LE(lists->bytes(), memory.heap.live_bytes());
  }

  TestHeap rows_memory;
  TestHeap memory;
  VectorFormat format;
  VectorStore rows;
  VectorStore codes;
  BlockProducts products;
  OwnedFormat coding;
  std::unique_ptr<InvertedLists> lists;
  std::set<NodeId> members;
};

constexpr Metric kMetrics[] = {Metric::kCosine, Metric::kInnerProduct, Metric::kL2};

// Any order of all operations, against a set.
TEST(InvertedListsTest, EveryProgramAgreesWithItsModel) {
  for (uint64_t seed = 0; seed < 24; ++seed) {
    SCOPED_TRACE(seed);
    SplitMix64 random(seed);
    constexpr uint32_t kDimensions[] = {1, 3, 64, 100};
    const uint32_t dimension = kDimensions[seed % 4];
    ListsRig rig(kMetrics[seed / 4 % 3], dimension);
    constexpr NodeId kNodes = 3'000;
    const TestVectors data =
        seed % 2 == 0 ? GaussianVectors(kNodes, dimension, static_cast<uint32_t>(seed))
                      : ClusteredVectors(kNodes, dimension, 4, static_cast<uint32_t>(seed));
    for (NodeId node = 0; node < kNodes; ++node) rig.WriteRow(node, data[node]);
    bool grows = true;
    for (int step = 0; step < 7'000; ++step) {
      if (step % 2'000 == 1'999) grows = !grows;
      const auto node = static_cast<NodeId>(random.Below(kNodes));
      const uint64_t what = random.Below(100);
      if (what < (grows ? 80 : 15)) {
        if (!rig.members.contains(node)) {
          ASSERT_TRUE(rig.Add(node));
        }
      } else if (what < 96) {
        rig.Remove(node);  // also of one that is in no list
        ASSERT_FALSE(rig.lists->Has(node));
      } else if (what == 96) {
        (void)rig.lists->MergeOne(rig.products);
      } else if (what == 97) {
        (void)rig.lists->SplitOne();
      } else if (what == 98) {
        ASSERT_NO_FATAL_FAILURE(rig.SplitAll());
      } else if (rig.lists->count() > 0) {
        rig.lists->Use(rig.coding.get());
        for (uint32_t list = 0; list < rig.lists->count(); ++list) {
          rig.lists->Recode(list, [&](NodeId member) {
            rig.WriteCode(member, static_cast<uint32_t>(step));
            return rig.codes.Row(member);
          });
        }
      }
      if (step % 250 == 0 || what == 96 || what == 97) {
        ASSERT_NO_FATAL_FAILURE(rig.ExpectAsModelled()) << "step " << step;
      }
    }
    ASSERT_NO_FATAL_FAILURE(rig.ExpectAsModelled());
    while (!rig.members.empty()) rig.Remove(*rig.members.begin());
    ASSERT_NO_FATAL_FAILURE(rig.ExpectAsModelled());
    rig.lists.reset();
    EXPECT_EQ(rig.memory.heap.live_bytes(), 0u) << "all is given back";
  }
}

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

TEST(InvertedListsTest, ListsStayShortWhateverTheData) {
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
TEST(InvertedListsTest, ListsOfFewMembersAreMerged) {
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
TEST(InvertedListsTest, AListIsMergedIntoTheNearest) {
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
TEST(InvertedListsTest, ASplitFollowsTheClusters) {
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
TEST(InvertedListsTest, AnEmptyListIsUsedAgain) {
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

// Many lists have few members each, or a few more than fill their blocks.
TEST(InvertedListsTest, AListTakesLittleMoreThanItsMembers) {
  ListsRig rig(Metric::kL2, 64);
  const TestVectors data = ClusteredVectors(kMost, 64, 1, 11);
  for (NodeId node = 0; node < data.size(); ++node) rig.WriteRow(node, data[node]);
  // No chunk of what is by node is made later.
  ASSERT_TRUE(rig.lists->Reserve(kMost));
  const size_t empty = rig.lists->bytes();
  const auto taken = [&] { return rig.lists->bytes() - empty; };
  ASSERT_TRUE(rig.Add(0));
  constexpr size_t kMemberBytes = 8 + 8 + 2 * sizeof(uint32_t);  // code, factors, node and hash
  EXPECT_LE(taken(), 17 * kMemberBytes + 256);
  for (NodeId node = 1; node < kMost; ++node) {
    ASSERT_TRUE(rig.Add(node));
    const size_t members = node + 1;
    const size_t blocks = members / InvertedLists::kBlockMembers + 1;
    const size_t over = members % InvertedLists::kBlockMembers;
    ASSERT_LE(taken(), (members + std::max<size_t>(over, 16)) * kMemberBytes + blocks * 256)
        << members;
  }
  for (NodeId node = 0; node + 4 < kMost; ++node) rig.Remove(node);
  EXPECT_LE(taken(), 17 * kMemberBytes + 256);
  // One that comes and goes at the end of a block has it doubled and halved once at most.
  for (NodeId node = 0; node < 13; ++node) ASSERT_TRUE(rig.Add(node));
  const size_t doubled = taken();
  for (int turn = 0; turn < 10; ++turn) {
    rig.Remove(0);
    EXPECT_EQ(taken(), doubled);
    ASSERT_TRUE(rig.Add(0));
    EXPECT_EQ(taken(), doubled);
  }
  ASSERT_NO_FATAL_FAILURE(rig.ExpectAsModelled());
}

// Some members at a time, and sound between: what is removed or added meanwhile is as ever.
TEST(InvertedListsTest, AreGivenBackInParts) {
  ListsRig rig(Metric::kL2, 8);
  constexpr NodeId kNodes = 2'000;
  const TestVectors data = ClusteredVectors(kNodes + 40, 8, 20, 10);
  for (NodeId node = 0; node < data.size(); ++node) rig.WriteRow(node, data[node]);
  for (NodeId node = 0; node < kNodes; ++node) {
    ASSERT_TRUE(rig.Add(node));
    ASSERT_NO_FATAL_FAILURE(rig.SplitAll());
  }
  const size_t bytes = rig.lists->bytes();
  NodeId next = kNodes;
  int parts = 0;
  for (bool is_done = false; !is_done; ++parts) {
    const size_t before = rig.members.size();
    is_done = rig.lists->ReleaseSome(100);
    std::erase_if(rig.members, [&](NodeId node) { return !rig.lists->Has(node); });
    ASSERT_NO_FATAL_FAILURE(rig.ExpectAsModelled());
    ASSERT_EQ(is_done, rig.members.empty());
    ASSERT_LE(before - rig.members.size(), 100 + kMost) << "one list more than was asked for";
    if (is_done || parts >= 10) continue;
    ASSERT_TRUE(rig.Add(next++));
    rig.Remove(*rig.members.begin());
    ASSERT_NO_FATAL_FAILURE(rig.ExpectAsModelled());
  }
  EXPECT_GE(parts, 9);
  EXPECT_LT(rig.lists->bytes(), bytes / 2);
  ASSERT_TRUE(rig.Add(0)) << "and are lists still";
  ASSERT_NO_FATAL_FAILURE(rig.ExpectAsModelled());
  rig.lists.reset();
  EXPECT_EQ(rig.memory.heap.live_bytes(), 0u);
}

TestVectors WideClouds(size_t count, uint32_t dimension, uint32_t clouds, float width) {
  TestVectors data = ClusteredVectors(count, dimension, clouds, 11);
  const TestVectors noise = GaussianVectors(count, dimension, 12);
  for (size_t i = 0; i < data.values.size(); ++i) data.values[i] += width * noise.values[i];
  return data;
}

// The home of a row is the list with the nearest centroid, by L2, and the lists to look in are the
// nearest by the metric, of about as many members as were asked for. All but for the rounding of
// rows and centroids to int8, which is no part of this: both are taken as they are kept.
TEST(InvertedListsTest, ChoosesTheNearestLists) {
  constexpr NodeId kNodes = 30'000;
  constexpr uint32_t kDimension = 100;
  for (const Metric metric : kMetrics) {
    SCOPED_TRACE(MetricName(metric));
    ListsRig rig(metric, kDimension);
    // Wide clouds, so that many lists are about as far.
    const TestVectors data = WideClouds(kNodes, kDimension, 40, 8);
    for (NodeId node = 0; node < kNodes; ++node) rig.WriteRow(node, data[node]);
    ASSERT_NO_FATAL_FAILURE(rig.AddAndSplit(kNodes));
    // Some lists have next to no members, some none.
    for (uint32_t list = 0; list < rig.lists->count(); list += 9) {
      std::vector<NodeId> nodes = rig.MembersOf(list);
      if (list % 2 == 0) nodes.resize(nodes.size() / 2);
      for (const NodeId node : nodes) rig.Remove(node);
    }
    const uint32_t lists = rig.lists->count();
    ASSERT_GT(lists, 64u) << "more than lie in one group";
    std::vector<std::vector<float>> centroids;
    for (uint32_t list = 0; list < lists; ++list) {
      centroids.push_back(InvertedListsTestPeer::Centroid(*rig.lists, list));
    }
    constexpr size_t kQueries = 150;
    const TestVectors queries = ClusteredVectors(kQueries, kDimension, 40, 11);
    for (NodeId first = 0; first < kQueries;) {
      std::vector<NodeId> nodes;
      for (size_t i = 0; i < 1 + first % 16 && first < kQueries; ++i, ++first) {
        nodes.push_back(kNodes + first);
        rig.WriteRow(nodes.back(), queries[first]);
      }
      constexpr float kAsked = 2'000;
      const std::vector<InvertedLists::Choice> choices = rig.Choose(nodes, kAsked);
      for (size_t i = 0; i < nodes.size(); ++i) {
        SCOPED_TRACE(nodes[i]);
        const InvertedLists::Choice& choice = choices[i];
        // A row alone is given the same as in a block.
        const InvertedLists::Choice alone = rig.Choose({&nodes[i], 1}, kAsked)[0];
        EXPECT_EQ(alone.home, choice.home);
        ASSERT_EQ(alone.count, choice.count);
        EXPECT_TRUE(std::equal(choice.lists.begin(), choice.lists.begin() + choice.count,
                               alone.lists.begin()));
        std::vector<float> numbers(kDimension);
        rig.format.Decode(rig.rows.Row(nodes[i]), numbers.data());
        std::vector<double> by_l2;
        std::vector<double> by_metric;
        for (const std::vector<float>& centroid : centroids) {
          double dot = 0;
          double apart = 0;
          for (size_t d = 0; d < kDimension; ++d) {
            dot += double{numbers[d]} * centroid[d];
            apart += (double{numbers[d]} - centroid[d]) * (double{numbers[d]} - centroid[d]);
          }
          by_l2.push_back(apart);
          by_metric.push_back(metric == Metric::kL2 ? apart : -dot);
        }
        const double nearest = *std::min_element(by_l2.begin(), by_l2.end());
        EXPECT_LE(by_l2[choice.home], nearest + 1e-4 * std::fabs(nearest) + 1e-6);
        // No list that was left out is nearer than one that was taken.
        std::set<uint32_t> chosen(choice.lists.begin(), choice.lists.begin() + choice.count);
        ASSERT_EQ(chosen.size(), choice.count);
        double farthest = -HUGE_VAL;
        uint32_t taken = 0;
        for (const uint32_t list : chosen) {
          ASSERT_LT(list, lists);
          EXPECT_GT(rig.lists->size(list), 0u);
          farthest = std::max(farthest, by_metric[list]);
          taken += rig.lists->size(list);
        }
        for (uint32_t list = 0; list < lists; ++list) {
          if (chosen.contains(list) || rig.lists->size(list) == 0) continue;
          EXPECT_GE(by_metric[list], farthest - 1e-4 * std::fabs(farthest) - 1e-6) << list;
        }
        EXPECT_GE(static_cast<float>(taken), kAsked);
        EXPECT_LE(static_cast<float>(taken), 1.15F * kAsked + kMost);
      }
    }
  }
}

// By signs nearly the same lists are chosen as by products, also once codes were learned anew. The
// inner product's nearest are not L2's, so there they are the same.
TEST(InvertedListsTest, ChoosesNearlyTheSameBySigns) {
  constexpr NodeId kNodes = 40'000;
  constexpr NodeId kQueries = 200;
  constexpr uint32_t kDimension = 256;
  for (const Metric metric : kMetrics) {
    SCOPED_TRACE(MetricName(metric));
    constexpr uint32_t kMany = 200;
    ListsRig rig(metric, kDimension, size_t{128} << 20, kMany);
    const TestVectors data = WideClouds(kNodes + kQueries, kDimension, 60, 4);
    for (NodeId node = 0; node < kNodes + kQueries; ++node) {
      rig.WriteRow(node, data[node]);
      rig.Encode(node);
    }
    ASSERT_NO_FATAL_FAILURE(rig.AddAndSplit(kNodes));
    // Some lists are left without members.
    for (uint32_t list = 0; list < rig.lists->count(); list += 9) {
      for (const NodeId node : rig.MembersOf(list)) rig.Remove(node);
    }
    ASSERT_GT(rig.lists->count(), kMany);
    for (const uint64_t seed : {1, 2}) {
      SCOPED_TRACE(seed);
      if (seed > 1) {
        const OwnedFormat before = std::move(rig.coding);
        rig.coding = OwnFormat(metric, kDimension, &rig.rows_memory.heap, seed);
        rig.lists->Use(rig.coding.get());
        for (NodeId node = 0; node < kNodes + kQueries; ++node) rig.Encode(node);
        for (uint32_t list = 0; list < rig.lists->count(); ++list) {
          rig.lists->Recode(list, [&](NodeId node) { return rig.codes.Row(node); });
        }
        ASSERT_NO_FATAL_FAILURE(rig.ExpectAsModelled());
      }
      uint32_t same_home = 0;
      uint32_t of_both = 0;
      uint32_t of_products = 0;
      for (NodeId query = kNodes; query < kNodes + kQueries; ++query) {
        constexpr float kAsked = 2'000;
        const InvertedLists::Choice by_products = rig.Choose({&query, 1}, kAsked)[0];
        const InvertedLists::Choice by_signs = rig.Choose({&query, 1}, kAsked, true)[0];
        same_home += static_cast<uint32_t>(by_signs.home == by_products.home);
        const auto end = by_signs.lists.begin() + by_signs.count;
        const std::set<uint32_t> chosen(by_signs.lists.begin(), end);
        EXPECT_EQ(chosen.size(), by_signs.count);
        uint32_t members = 0;
        for (const uint32_t list : chosen) {
          EXPECT_GT(rig.lists->size(list), 0u);
          members += rig.lists->size(list);
        }
        EXPECT_GE(static_cast<float>(members), kAsked);
        EXPECT_LE(static_cast<float>(members), 1.15F * kAsked + kMost);
        for (uint32_t i = 0; i < by_products.count; ++i) {
          of_both += static_cast<uint32_t>(chosen.contains(by_products.lists[i]));
        }
        of_products += by_products.count;
      }
      if (metric == Metric::kInnerProduct) {
        EXPECT_EQ(same_home, kQueries);
        EXPECT_EQ(of_both, of_products);
      } else {
        EXPECT_GE(same_home, kQueries * 4 / 5);
        EXPECT_GE(of_both, of_products * 2 / 3);
      }
    }
    // All leave, and come back.
    while (!rig.members.empty()) rig.Remove(*rig.members.begin());
    constexpr NodeId kFirst = 0;
    EXPECT_EQ(rig.Choose({&kFirst, 1}, 2'000, true)[0].count, 0u);
    ASSERT_TRUE(rig.Add(kFirst));
    EXPECT_EQ(rig.Choose({&kFirst, 1}, 2'000, true)[0].count, 1u);
    ASSERT_NO_FATAL_FAILURE(rig.ExpectAsModelled());
  }
}

// Many short lists, as deletions leave them: more than one node may look in. The nearest it is
// then, and not the first; and those without members take no other's place.
TEST(InvertedListsTest, OfTooManyListsTheNearest) {
  constexpr NodeId kNodes = 80'000;
  ListsRig rig(Metric::kL2, 3, size_t{128} << 20);
  const TestVectors data = GaussianVectors(kNodes, 3, 16);
  for (NodeId node = 0; node < kNodes; ++node) {
    rig.WriteRow(node, data[node]);
    ASSERT_TRUE(rig.Add(node));
    if (node % 64 == 0) {
      ASSERT_NO_FATAL_FAILURE(rig.SplitAll());
    }
  }
  const uint32_t lists = rig.lists->count();
  ASSERT_GT(lists, 2 * InvertedLists::kMostChosen);
  // Every third list ends without a member, the others with few.
  for (uint32_t list = 0; list < lists; ++list) {
    std::vector<NodeId> nodes = rig.MembersOf(list);
    nodes.resize(nodes.size() - (list % 3 == 0 ? 0 : 5));
    for (const NodeId node : nodes) rig.Remove(node);
  }
  for (const float asked : {1e9F, 6'000.0F, 300.0F}) {
    for (NodeId node = 0; node < 50; ++node) {
      const InvertedLists::Choice choice = rig.Choose({&node, 1}, asked)[0];
      EXPECT_LT(choice.home, lists);
      const std::set<uint32_t> chosen(choice.lists.begin(), choice.lists.begin() + choice.count);
      EXPECT_EQ(chosen.size(), choice.count);
      EXPECT_LE(choice.count, InvertedLists::kMostChosen);
      EXPECT_GE(choice.count * 5, std::min(asked, InvertedLists::kMostChosen * 4.0F));
      double farthest = 0;
      double nearest_left = HUGE_VAL;
      std::array<float, 3> numbers;
      rig.format.Decode(rig.rows.Row(node), numbers.data());
      for (uint32_t list = 0; list < lists; ++list) {
        if (rig.lists->size(list) == 0) {
          EXPECT_FALSE(chosen.contains(list));
          continue;
        }
        const std::vector<float> centroid = InvertedListsTestPeer::Centroid(*rig.lists, list);
        double apart = 0;
        for (size_t d = 0; d < 3; ++d) {
          apart += (double{numbers[d]} - centroid[d]) * (double{numbers[d]} - centroid[d]);
        }
        if (chosen.contains(list)) {
          farthest = std::max(farthest, apart);
        } else {
          nearest_left = std::min(nearest_left, apart);
        }
      }
      EXPECT_LE(farthest, nearest_left * 1.0001 + 1e-6);
    }
  }
}

// Memory runs out at any allocation: what was there is there still, and it goes on once there is
// some.
TEST(InvertedListsTest, WithoutMemoryNothingIsLost) {
  const TestVectors data = ClusteredVectors(3'000, 64, 5, 15);
  // From what fits nothing to what fits all.
  size_t spent = 0;
  for (size_t room = 256; room < (size_t{1} << 20); room += room / 7 / 64 * 64 + 64) {
    SCOPED_TRACE(room);
    ListsRig rig(Metric::kL2, 64, size_t{4} << 20);
    rig.memory.LeaveOnly(room);
    bool failed = false;
    for (NodeId node = 0; node < data.size(); ++node) {
      rig.WriteRow(node, data[node]);
      const bool added = rig.Add(node);
      failed = failed || !added;
      ASSERT_EQ(rig.lists->Has(node), added);
      (void)rig.lists->SplitOne();
      if (node % 200 == 0 || !added) {
        ASSERT_NO_FATAL_FAILURE(rig.ExpectAsModelled()) << node;
        if (!added && node % 16 != 0) break;
      }
    }
    spent += static_cast<size_t>(failed);
    // What leaves makes room for others.
    const std::vector<NodeId> all(rig.members.begin(), rig.members.end());
    for (size_t i = 0; i < all.size(); i += 2) rig.Remove(all[i]);
    (void)rig.lists->MergeOne(rig.products);
    ASSERT_NO_FATAL_FAILURE(rig.ExpectAsModelled());
    for (size_t i = 0; i < all.size(); i += 2) {
      (void)rig.Add(all[i]);
      (void)rig.lists->SplitOne();
    }
    ASSERT_NO_FATAL_FAILURE(rig.ExpectAsModelled());
    rig.lists.reset();
    ASSERT_EQ(rig.memory.heap.live_bytes(), 0u);
  }
  EXPECT_GT(spent, 10u);
}

TEST(InvertedListsTest, AFirstListIsThereFromReserveOn) {
  ListsRig rig(Metric::kCosine, 3);
  EXPECT_EQ(rig.lists->count(), 0u);
  EXPECT_FALSE(rig.lists->Has(0));
  rig.lists->Remove(7);
  ASSERT_TRUE(rig.lists->Reserve(1));
  EXPECT_EQ(rig.lists->count(), 1u);
  EXPECT_EQ(rig.lists->members(), 0u);
  EXPECT_FALSE(rig.lists->SplitOne());
  EXPECT_EQ(Violation(*rig.lists), "");
}

}  // namespace
}  // namespace engram
