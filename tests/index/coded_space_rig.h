#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "index/recall_job.h"
#include "index/space.h"
#include "src/core/commit_stamp.h"
#include "src/core/reader_epochs.h"
#include "tests/index/sign_testing.h"
#include "tests/index/space_testing.h"
#include "tests/index/space_upkeep.h"

namespace engram {

// Looks into a space for what CheckInvariants leaves out: codes and lists.
class SpaceTestPeer {
 public:
  // What is wrong with the codes that the graph is walked with, and with the lists; empty: nothing.
  static std::string CodesViolation(const Space& space) {
    const WalkCodes* const codes = space.walk_codes();
    if (codes == nullptr) return "";
    const VectorFormat& format = *space.code_format_;
    std::vector<float> numbers(format.dimension());
    std::vector<std::byte> wanted(codes->format().row_bytes() + kCacheLineBytes);
    for (NodeId node = 0; node < space.node_count(); ++node) {
      if (!space.graph_.IsLinked(node) && !space.graph_.IsDoomed(node)) continue;
      format.Decode(space.codes_->Row(node), numbers.data());
      codes->format().Encode(numbers.data(), wanted.data());
      if (std::memcmp(wanted.data(), codes->rows().Row(node), codes->format().row_bytes()) != 0) {
        return "node " + std::to_string(node) + " is walked to by a wrong code";
      }
    }
    return ListsViolation(space, *codes);
  }
  static bool IsEncoding(const Space& space) {
    return space.codes_step_ == Space::CodesStep::kEncoding;
  }
  static bool IsRecoding(const Space& space) {
    return space.codes_step_ == Space::CodesStep::kRecoding;
  }
  static bool IsLearning(const Space& space) {
    return space.codes_step_ == Space::CodesStep::kLearning ||
           space.codes_step_ == Space::CodesStep::kDrift;
  }
  static bool IsReleasing(const Space& space) {
    return space.codes_step_ == Space::CodesStep::kReleasing;
  }
  static uint64_t CountLearnings(const Space& space) { return space.learn_when_.begun(); }
  static uint32_t CountLists(const Space& space) {
    return space.lists_ ? space.lists_->count() : 0;
  }
  // Nodes of a batch under way that were updated or deleted meanwhile.
  static size_t CountEndedWhileLinking(const Space& space) {
    size_t count = 0;
    for (NodeId node = 0; node < space.node_count(); ++node) {
      count += static_cast<size_t>(space.nodes_[node].state == Space::NodeState::kRetiredLinking);
    }
    return count;
  }
  static const HnswGraph& Graph(const Space& space) { return space.graph_; }

 private:
  static std::string ListsViolation(const Space& space, const WalkCodes& codes) {
    const auto is_in_graph = [&space](NodeId node) {
      return space.nodes_[node].state == Space::NodeState::kLinking ||
             space.nodes_[node].state == Space::NodeState::kRetiredLinking ||
             space.graph_.IsLinked(node) || space.graph_.IsDoomed(node);
    };
    std::string violation = ListsViolation(space, codes, *space.lists_, 0);
    if (!violation.empty()) return violation;
    violation = ListsViolation(space, codes, *space.waiting_, space.lists_->count());
    if (!violation.empty()) return "waiting: " + violation;
    for (NodeId node = 0; node < space.node_count(); ++node) {
      if (space.lists_->Has(node) && !is_in_graph(node)) {
        return "a list has node " + std::to_string(node) + ", which is in no graph";
      }
    }
    // The first ones of the list of fresh nodes, and no others.
    const FreshList::Snapshot fresh = space.FreshNodes();
    if (space.waiting() > fresh.size()) return "more wait than are not linked";
    for (size_t i = 0; i < space.waiting(); ++i) {
      if (!space.waiting_->Has(fresh[i])) return "a node that waits is in no list";
    }
    if (space.waiting_->members() != space.waiting()) return "a node waits that is linked";
    return "";
  }
  // `before`: lists whose codes are replaced before these.
  static std::string ListsViolation(const Space& space, const WalkCodes& codes,
                                    const InvertedLists& lists, uint32_t before) {
    const Result<void> sound = lists.CheckInvariants();
    if (!sound) return sound.error().message;
    std::string violation;
    for (uint32_t list = 0; list < lists.count(); ++list) {
      const bool is_recoded =
          space.codes_step_ != Space::CodesStep::kRecoding || before + list < space.next_recoded_;
      if (!is_recoded) continue;
      lists.ForEachBlock(list, [&](const InvertedLists::Block& block) {
        for (size_t i = 0; i < block.nodes.size(); ++i) {
          const NodeId node = block.nodes[i];
          if (HasCode(codes.signs(), block, i, codes.rows().Row(node))) continue;
          violation = "a list has another code of node " + std::to_string(node);
        }
      });
    }
    return violation;
  }
};

// The nearest ones of some queries, by definition.
class TrueNearest {
 public:
  using Vectors = std::map<uint64_t, std::vector<float>>;
  static constexpr size_t kNearest = 10;

  TrueNearest(Metric metric, const Vectors* vectors, std::vector<std::vector<float>> queries)
      : metric_(metric), vectors_(vectors), queries_(std::move(queries)) {
    for (const std::vector<float>& query : queries_) {
      std::vector<double> distances;
      for (const auto& [id, vector] : *vectors_) distances.push_back(Distance(vector, query));
      const size_t place = std::min(kNearest, distances.size()) - 1;
      std::nth_element(distances.begin(), distances.begin() + static_cast<ptrdiff_t>(place),
                       distances.end());
      bounds_.push_back(distances[place]);
    }
  }
  const std::vector<std::vector<float>>& queries() const { return queries_; }
  // How many of these are as near as the tenth; -1 where one is not there, or comes twice.
  int CountTrue(size_t query, const std::vector<Hit>& hits) const {
    std::set<uint64_t> seen;
    int count = 0;
    for (const Hit& hit : hits) {
      const uint64_t id = std::stoull(hit.id);
      const auto found = vectors_->find(id);
      if (found == vectors_->end() || !seen.insert(id).second) return -1;
      const double bound = bounds_[query];
      count += static_cast<int>(Distance(found->second, queries_[query]) <=
                                bound + 1e-6 * std::abs(bound));
    }
    return count;
  }

 private:
  double Distance(std::span<const float> a, std::span<const float> b) const {
    const double score = ExactScore(metric_, a, b);
    return metric_ == Metric::kL2 ? score : -score;
  }

  Metric metric_;
  const Vectors* vectors_;
  std::vector<std::vector<float>> queries_;
  std::vector<double> bounds_;
};

// A space and its upkeep beside what it must hold, by number.
class CodedSpaceRig {
 public:
  struct Setup {
    Metric metric = Metric::kL2;
    Traversal traversal = Traversal::kRabitq;
    uint32_t dimension = 96;
    uint32_t graph_from = 300;
    uint32_t list_from = SpaceOptions::kListFrom;
    HnswBuildParams build = {.M = 12, .M0 = 24, .ef_construction = 80};
    size_t arena_bytes = size_t{256} << 20;
  };

  explicit CodedSpaceRig(const Setup& setup)
      : memory(setup.arena_bytes),
        other_memory(size_t{64} << 20),
        space("coded", OptionsOf(setup), &memory.heap, &epochs),
        upkeep(&space, &memory.heap, setup.build),
        job(&other_memory.heap, nullptr, RecallJob::Core::kOfShard) {}

  RefusalReason TryStore(uint64_t id, const std::vector<float>& vector) {
    const std::string name = std::to_string(id);
    ObservationRef observation;
    observation.id = name;
    observation.dtype = VectorDtype::kF32;
    observation.dimension = static_cast<uint32_t>(vector.size());
    observation.vector = reinterpret_cast<const std::byte*>(vector.data());
    const RefusalReason reason = space.Upsert(observation, ++stamp).reason;
    if (reason == RefusalReason::kNone) vectors[id] = vector;
    return reason;
  }
  void Store(uint64_t id, const std::vector<float>& vector) {
    ASSERT_EQ(TryStore(id, vector), RefusalReason::kNone);
  }
  void Remove(uint64_t id) {
    vectors.erase(id);
    ASSERT_TRUE(space.Delete(std::to_string(id), ++stamp, false).existed);
  }
  // All is linked, what has ended is swept, codes are learned.
  void Settle() {
    space.SetHorizon(stamp);
    upkeep.Run();
    ASSERT_NO_FATAL_FAILURE(ExpectSound());
    if (!space.has_graph()) return;
    ASSERT_EQ(space.unlinked_count(), 0u);
    ASSERT_FALSE(space.WantsSweep());
    ASSERT_FALSE(space.WantsCodes());
  }
  void ExpectSound() const {
    const Result<void> sound = space.CheckInvariants();
    ASSERT_TRUE(sound.has_value()) << sound.error().message;
    ASSERT_EQ(SpaceTestPeer::CodesViolation(space), "");
    ASSERT_EQ(space.live(), vectors.size());
  }
  void ExpectAllThere() const {
    std::vector<float> stored(space.dimension());
    for (const auto& [id, vector] : vectors) {
      const NodeId node = space.FindLive(std::to_string(id));
      ASSERT_NE(node, kNoNode) << id;
      if (space.metric() == Metric::kCosine) continue;
      space.GetVector(node, stored.data());
      ASSERT_EQ(stored, vector) << id;
    }
  }
  TrueNearest NearestOf(std::vector<std::vector<float>> queries) const {
    return {space.metric(), &vectors, std::move(queries)};
  }
  // recall@10
  double Recall(const TrueNearest& truth, uint32_t ef) {
    int hits = 0;
    for (size_t query = 0; query < truth.queries().size(); ++query) {
      const RecallAnswer answer =
          RunRecall(space, &job, truth.queries()[query], {.k = TrueNearest::kNearest, .ef = ef});
      EXPECT_EQ(answer.reason, RefusalReason::kNone);
      const int found = truth.CountTrue(query, answer.hits);
      EXPECT_GE(found, 0) << "query " << query << ": a hit that is not stored, or twice";
      hits += found;
    }
    const size_t wanted =
        truth.queries().size() * std::min<size_t>(TrueNearest::kNearest, vectors.size());
    return static_cast<double>(hits) / static_cast<double>(wanted);
  }
  bool HasCodes() const { return space.walk_codes() != nullptr; }

  TestHeap memory;
  TestHeap other_memory;  // of recalls
  ReaderEpochs epochs{1};
  Space space;
  SpaceUpkeep upkeep;
  RecallJob job;
  std::map<uint64_t, std::vector<float>> vectors;
  CommitStamp stamp = 0;

 private:
  static SpaceOptions OptionsOf(const Setup& setup) {
    SpaceOptions options = TestSpaceOptions(setup.metric, setup.dimension, setup.build);
    options.traversal = setup.traversal;
    options.graph_from = setup.graph_from;
    options.list_from = setup.list_from;
    return options;
  }
};

}  // namespace engram
