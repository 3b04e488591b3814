#pragma once

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
#include "index/inverted_lists.h"
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

inline constexpr uint32_t kMost = InvertedLists::kFewestMembers;  // while there are few lists
inline constexpr size_t kCodeBytes = 64;                          // of up to 384 dimensions

inline std::string Violation(const InvertedLists& lists) {
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

inline constexpr Metric kMetrics[] = {Metric::kCosine, Metric::kInnerProduct, Metric::kL2};

}  // namespace engram
