#include "index/code_learning.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <set>
#include <vector>

#include "index/inverted_lists.h"
#include "index/vector_format.h"
#include "index/vector_store.h"
#include "tests/index/sign_testing.h"
#include "tests/index/space_testing.h"

namespace engram {
namespace {

constexpr size_t kCodeBytes = 64;
constexpr uint32_t kDimension = 8;

bool Lives(NodeId node) { return node % 7 != 3; }

// Nodes along a line, so that lists are stretches of it.
class LearningRig {
 public:
  explicit LearningRig(uint32_t nodes)
      : memory_(size_t{256} << 20),
        format_(Precision::kInt8, Metric::kL2, kDimension),
        rows_(&memory_.heap, format_.row_bytes()),
        coding_(OwnFormat(Metric::kL2, kDimension, &memory_.heap)),
        lists(&memory_.heap, &format_, &rows_, coding_.get()),
        learning(std::make_unique<CodeLearning>(&memory_.heap)) {
    EXPECT_TRUE(rows_.Reserve(nodes) && lists.Reserve(nodes));
    alignas(64) std::byte code[kCodeBytes] = {};
    const BlockProducts products;
    for (NodeId node = 0; node < nodes; ++node) {
      std::vector<float> numbers(kDimension, static_cast<float>(node));
      numbers[0] = static_cast<float>(nodes);
      format_.Encode(numbers.data(), rows_.Row(node));
      std::memcpy(code, &node, sizeof(node));
      const InvertedLists::Row row{rows_.Row(node), nullptr};
      InvertedLists::Choice choice;
      lists.Choose(products, {&row, 1}, 0, &choice);
      EXPECT_TRUE(lists.Add(choice.home, node, code));
      lists.SplitOne();
    }
  }
  // The nodes that are judged apart, after looking whether the sample is sound.
  std::set<NodeId> Near() {
    const std::set<NodeId> sampled(learning->sample.begin(),
                                   learning->sample.begin() + learning->sample_size);
    EXPECT_EQ(sampled.size(), learning->sample_size) << "one of them twice";
    EXPECT_TRUE(std::all_of(sampled.begin(), sampled.end(), Lives));
    std::set<NodeId> near;
    for (const uint32_t index : learning->ChooseNear()) {
      EXPECT_LT(index, learning->sample_size);
      EXPECT_TRUE(near.insert(learning->sample[index]).second) << "asked for twice";
    }
    return near;
  }
  std::set<uint32_t> HomesOf(const std::set<NodeId>& nodes) const {
    std::set<uint32_t> homes;
    for (const NodeId node : nodes) homes.insert(lists.HomeOf(node));
    return homes;
  }

 private:
  TestHeap memory_;
  VectorFormat format_;
  VectorStore rows_;
  OwnedFormat coding_;

 public:
  InvertedLists lists;
  std::unique_ptr<CodeLearning> learning;
};

// Where all are in the sample anyway, and where one in seven is.
TEST(CodeLearningTest, MembersOfListsAreSampledOnceAndJudgedApart) {
  for (const uint32_t nodes : {1'000U, 20'000U}) {
    LearningRig rig(nodes);
    rig.learning->TakeSpread(nodes, CodeLearning::kMostSpread, Lives);
    const size_t spread = rig.learning->spread_size;
    EXPECT_NEAR(static_cast<double>(spread),
                std::min<double>(nodes, CodeLearning::kMostSpread) * 6 / 7, 40);
    EXPECT_TRUE(rig.Near().empty());
    const std::set<uint32_t> taken{0, 2, 5};
    for (const uint32_t list : taken) {
      rig.learning->TakeNear(rig.lists, list, Lives);
      rig.learning->TakeNear(rig.lists, list, Lives);
    }
    EXPECT_EQ(rig.learning->spread_size, spread) << "the mean is of these alone";
    EXPECT_EQ(rig.learning->sample_size == spread, nodes == 1'000);
    const std::set<NodeId> near = rig.Near();
    EXPECT_EQ(near.size(), RabitqLearner::kQueries);
    EXPECT_EQ(rig.HomesOf(near), taken);
  }
}

TEST(CodeLearningTest, NoMoreIsTakenThanThereIsRoomFor) {
  LearningRig rig(20'000);
  for (int round = 0; round < 2; ++round) {
    rig.learning->TakeSpread(20'000, CodeLearning::kMostSpread, [](NodeId) { return true; });
    for (uint32_t list = 0; list < rig.lists.count(); ++list) {
      rig.learning->TakeNear(rig.lists, list, Lives);
    }
    EXPECT_LE(rig.learning->sample_size, RabitqLearner::kMaxSample);
    EXPECT_LE(rig.HomesOf([&] {
                   std::set<NodeId> near;
                   for (const uint32_t index : rig.learning->ChooseNear()) {
                     near.insert(rig.learning->sample[index]);
                   }
                   return near;
                 }())
                  .size(),
              8u);
  }
}

}  // namespace
}  // namespace engram
