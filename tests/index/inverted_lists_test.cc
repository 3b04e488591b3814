#include "index/inverted_lists.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "src/core/hash.h"
#include "tests/index/graph_fixture.h"
#include "tests/index/lists_rig.h"
#include "tests/index/sign_testing.h"
#include "tests/index/space_testing.h"

namespace engram {
namespace {

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
