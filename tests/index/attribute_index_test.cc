#include "index/attribute_index.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "src/core/hash.h"
#include "tests/index/space_testing.h"

namespace engram {
namespace {

using Pairs = std::set<std::pair<std::string, std::string>>;

std::string BytesFor(const Pairs& pairs) {
  std::string bytes;
  for (const auto& [key, value] : pairs) EXPECT_TRUE(AppendAttribute(key, value, &bytes));
  return bytes;
}

struct ModelClause {
  bool excludes = false;
  std::string key;
  std::vector<std::string> values;
};

std::string FilterFor(const std::vector<ModelClause>& clauses) {
  FilterWriter writer;
  writer.SetTimes({0, kFilterToEnd});
  for (const ModelClause& clause : clauses) {
    const std::vector<std::string_view> values(clause.values.begin(), clause.values.end());
    EXPECT_TRUE(clause.excludes ? writer.Exclude(clause.key, values)
                                : writer.Require(clause.key, values));
  }
  return writer.Bytes();
}

bool Meets(const Pairs& pairs, const std::vector<ModelClause>& clauses) {
  return std::ranges::all_of(clauses, [&](const ModelClause& clause) {
    const bool has_any = std::ranges::any_of(clause.values, [&](const std::string& value) {
      return pairs.contains({clause.key, value});
    });
    return has_any != clause.excludes;
  });
}

// An index beside what each node has.
class Rig {
 public:
  explicit Rig(size_t bytes = size_t{64} << 20, std::vector<std::string> declared = {"colour"})
      : memory(bytes), index(&memory.heap, declared, 77) {}

  bool Add(NodeId node, const Pairs& pairs) {
    const std::string bytes = BytesFor(pairs);
    if (!index.Add(node, BytesOf(bytes))) return false;
    model[node] = pairs;
    return true;
  }
  void Remove(NodeId node) {
    index.Remove(node);
    model.erase(node);
  }
  Pairs Stored(NodeId node) const {
    std::vector<std::byte> bytes(index.AttributeBytes(node));
    index.WriteAttributes(node, bytes.data());
    EXPECT_EQ(CheckAttributes(bytes), RefusalReason::kNone);
    Pairs pairs;
    AttributeReader reader(bytes);
    for (Attribute attribute; reader.Next(&attribute);) {
      EXPECT_TRUE(pairs.emplace(attribute.key, attribute.value).second);
    }
    return pairs;
  }
  void ExpectSound() const {
    const Result<void> sound = index.CheckInvariants();
    ASSERT_TRUE(sound.has_value()) << sound.error().message;
    Pairs terms;
    std::set<Pairs> sets;
    for (const auto& [node, pairs] : model) {
      ASSERT_EQ(Stored(node), pairs) << node;
      terms.insert(pairs.begin(), pairs.end());
      if (!pairs.empty()) sets.insert(pairs);
    }
    ASSERT_EQ(index.terms(), terms.size());
    ASSERT_EQ(index.sets(), sets.size());
  }
  void ExpectFound(const std::vector<ModelClause>& clauses) const {
    const std::string bytes = FilterFor(clauses);
    CompiledFilter filter;
    ASSERT_EQ(index.Compile(BytesOf(bytes), &filter), RefusalReason::kNone);
    std::set<NodeId> wanted;
    for (const auto& [node, pairs] : model) {
      const bool meets = Meets(pairs, clauses);
      if (meets) wanted.insert(node);
      ASSERT_EQ(!filter.matches_none && index.Matches(index.SetOf(node), filter), meets) << node;
    }
    if (filter.matches_none) {
      ASSERT_TRUE(wanted.empty());
      return;
    }
    ASSERT_GE(filter.most, wanted.size());
    if (filter.rarest == CompiledFilter::kNoClause) return;
    ASSERT_EQ(FoundBy(filter), wanted);
  }
  std::set<NodeId> FoundBy(const CompiledFilter& filter) const {
    std::set<NodeId> found;
    AttributeIndex::Candidates candidates;
    candidates.Begin(&index, &filter);
    std::span<const NodeId> nodes;
    while (candidates.Next(&nodes)) {
      EXPECT_LE(nodes.size(), size_t{PostingLists::kInBlock});
      for (const NodeId node : nodes) EXPECT_TRUE(found.insert(node).second) << node << " twice";
    }
    return found;
  }

  TestHeap memory;
  AttributeIndex index;
  std::map<NodeId, Pairs> model;
};

TEST(AttributeIndexTest, WithoutAttributesNothingIsTaken) {
  Rig rig;
  ASSERT_TRUE(rig.Add(1'000'000, {}));
  ASSERT_TRUE(rig.index.AddAs(5, 1'000'000));
  rig.Remove(1'000'000);
  EXPECT_EQ(rig.index.SetOf(1'000'000), AttributeIndex::kNoAttributes);
  EXPECT_EQ(rig.memory.heap.live_bytes(), 0u);
}

TEST(AttributeIndexTest, OnlyKeysThatAreBuiltInOrDeclaredAreKept) {
  Rig rig;
  const std::string bytes =
      BytesFor({{"", "tag"}, {"who", "me"}, {"colour", "red"}, {"size", "9"}});
  ASSERT_TRUE(rig.index.Add(3, BytesOf(bytes)));
  EXPECT_EQ(rig.Stored(3), (Pairs{{"", "tag"}, {"who", "me"}, {"colour", "red"}}));
  CompiledFilter filter;
  const std::string other = FilterFor({{false, "size", {"9"}}});
  EXPECT_EQ(rig.index.Compile(BytesOf(other), &filter), RefusalReason::kUnknownFilterKey);
  EXPECT_EQ(rig.index.Compile(BytesOf(std::string("broken")), &filter), RefusalReason::kBadFilter);
}

TEST(AttributeIndexTest, NodesThatHaveNothingKeptHaveNone) {
  Rig rig;
  const std::string bytes = BytesFor({{"size", "9"}});
  ASSERT_TRUE(rig.index.Add(3, BytesOf(bytes)));
  EXPECT_EQ(rig.index.nodes(), 0u);
  EXPECT_EQ(rig.memory.heap.live_bytes(), 0u);
}

TEST(AttributeIndexTest, AValueThatNobodyHasIsMetByNobodyAndExcludedFromNobody) {
  Rig rig;
  ASSERT_TRUE(rig.Add(1, {{"", "a"}}));
  ASSERT_TRUE(rig.Add(2, {{"who", "a"}}));
  ASSERT_NO_FATAL_FAILURE(rig.ExpectFound({{false, "", {"b"}}}));
  ASSERT_NO_FATAL_FAILURE(rig.ExpectFound({{true, "", {"b"}}}));
  ASSERT_NO_FATAL_FAILURE(rig.ExpectFound({{false, "", {"b", "a"}}}));
  ASSERT_NO_FATAL_FAILURE(rig.ExpectFound({{true, "who", {"a", "b"}}}));
}

TEST(AttributeIndexTest, TheRarestRequiredClauseIsCounted) {
  Rig rig;
  for (NodeId node = 0; node < 100; ++node) {
    Pairs pairs = {{"", "all"}, {"who", node % 10 == 0 ? "few" : "many"}};
    ASSERT_TRUE(rig.Add(node, pairs));
  }
  CompiledFilter filter;
  const std::string bytes =
      FilterFor({{false, "", {"all"}}, {false, "who", {"few"}}, {true, "who", {"many"}}});
  ASSERT_EQ(rig.index.Compile(BytesOf(bytes), &filter), RefusalReason::kNone);
  EXPECT_EQ(filter.most, 10u);
  EXPECT_EQ(filter.rarest, 1u);
  EXPECT_EQ(rig.FoundBy(filter).size(), 10u);
}

TEST(AttributeIndexTest, ANodeOfItsOwnValueIsCheapAndSoAreManyAlike) {
  constexpr NodeId kNodes = 50'000;
  Rig alike;
  for (NodeId node = 0; node < kNodes; ++node) {
    ASSERT_TRUE(alike.index.Add(node, BytesOf(BytesFor({{"", "a"}, {"who", "b"}}))));
  }
  EXPECT_LT(alike.index.bytes(), kNodes * 16 + (1U << 20));
  Rig own;
  for (NodeId node = 0; node < kNodes; ++node) {
    ASSERT_TRUE(own.index.Add(node, BytesOf(BytesFor({{"who", std::to_string(node)}}))));
  }
  EXPECT_LT(own.index.bytes(), kNodes * 130 + (1U << 20));
  ASSERT_TRUE(own.index.CheckInvariants().has_value());
}

TEST(AttributeIndexTest, RandomProgramsAgreeWithAMap) {
  constexpr std::string_view kKeys[] = {"", "who", "where_location", "memory_type", "colour"};
  for (uint64_t seed = 0; seed < 8; ++seed) {
    Rig rig;
    SplitMix64 random(seed);
    const uint64_t values = seed % 2 == 0 ? 4 : 200;
    const auto draw_value = [&] { return "v" + std::to_string(random.Below(values)); };
    for (int step = 0; step < 4'000; ++step) {
      const auto node = static_cast<NodeId>(random.Below(3'000));
      if (!rig.model.contains(node)) {
        if (random.Below(5) == 0 && !rig.model.empty()) {
          const auto other = rig.model.lower_bound(node);
          const auto& [id, pairs] = other == rig.model.end() ? *rig.model.begin() : *other;
          ASSERT_TRUE(rig.index.AddAs(node, id));
          rig.model[node] = Pairs(pairs);
          continue;
        }
        Pairs pairs;
        for (uint64_t n = random.Below(random.Below(10) == 0 ? 60 : 5); n > 0; --n) {
          pairs.emplace(kKeys[random.Below(5)], draw_value());
        }
        ASSERT_TRUE(rig.Add(node, pairs));
      } else if (random.Below(2) == 0) {
        rig.Remove(node);
      }
      if (step % 500 == 0) {
        ASSERT_NO_FATAL_FAILURE(rig.ExpectSound());
      }
      if (step % 50 != 0) continue;
      std::vector<ModelClause> clauses(random.Below(4) + 1);
      for (ModelClause& clause : clauses) {
        clause = {random.Below(3) == 0, std::string(kKeys[random.Below(5)]), {draw_value()}};
        while (random.Below(2) == 0) clause.values.push_back(draw_value());
      }
      ASSERT_NO_FATAL_FAILURE(rig.ExpectFound(clauses));
    }
    while (!rig.model.empty()) rig.Remove(rig.model.begin()->first);
    ASSERT_NO_FATAL_FAILURE(rig.ExpectSound());
  }
}

// Whatever step it is that finds no memory.
TEST(AttributeIndexTest, WhereMemoryIsSpentNothingHasChanged) {
  int refused = 0;
  for (size_t left = 0; left < 60'000; left += left / 8 + 64) {
    Rig rig(size_t{4} << 20);
    rig.memory.LeaveOnly(left);
    SplitMix64 random(left);
    for (NodeId node = 0; node < 400; ++node) {
      Pairs pairs;
      for (uint64_t n = random.Below(4) + 1; n > 0; --n) {
        pairs.emplace("", "a value of some length" + std::to_string(random.Below(40)));
      }
      if (rig.Add(node, pairs)) continue;
      ++refused;
      if (random.Below(8) != 0) continue;
      ASSERT_NO_FATAL_FAILURE(rig.ExpectSound());
      if (!rig.model.empty()) rig.Remove(rig.model.begin()->first);
    }
    ASSERT_NO_FATAL_FAILURE(rig.ExpectSound());
  }
  EXPECT_GT(refused, 1'000);
}

TEST(AttributeIndexTest, AllMemoryIsGivenBack) {
  TestHeap memory(size_t{16} << 20);
  {
    AttributeIndex index(&memory.heap, {}, 1);
    for (NodeId node = 0; node < 5'000; ++node) {
      const std::string bytes =
          BytesFor({{"", std::to_string(node % 7)}, {"who", std::to_string(node % 900)}});
      ASSERT_TRUE(index.Add(node, BytesOf(bytes)));
      if (node % 3 == 0) index.Remove(node / 2);
    }
  }
  EXPECT_EQ(memory.heap.live_bytes(), 0u);
}

}  // namespace
}  // namespace engram
