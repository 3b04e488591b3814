#pragma once

#include <hwy/contrib/sort/vqsort.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "index/block_products.h"
#include "index/estimate_agreement.h"
#include "index/hnsw_graph.h"
#include "index/hnsw_linker.h"
#include "index/hnsw_params.h"
#include "index/hnsw_search.h"
#include "index/inverted_lists.h"
#include "index/vector_format.h"
#include "index/walk_codes.h"
#include "src/core/arena_heap.h"
#include "src/core/ids.h"

namespace engram {

// What a batch is linked into and with.
struct BatchTarget {
  HnswGraph* graph = nullptr;
  SearchTarget vectors;                    // int8 rows; graph and distance
  const VectorFormat* format = nullptr;    // of these rows
  WalkCodes* codes = nullptr;              // has room for the nodes
  InvertedLists* lists = nullptr;          // of the nodes in the graph, with the codes' rows
  EstimateAgreement* agreement = nullptr;  // is told of some nodes; nullptr: nobody
};

// Links many nodes into an HNSW graph at once, in slices. A graph search finds the neighbours of
// one node by hundreds of hops through memory; here they are found among the members of inverted
// lists, which lie side by side and serve all nodes of the batch that are near them (partitions
// instead of searches, after PiPNN, 2026, by RaBitQ's codes, Gao & Long 2024).
//
// Steps:
// 1. Prepare: each node gets its code.
// 2. Assign: its home and the lists to look in (InvertedLists::Choose), so many that some thousands
//    of members are compared. Then it becomes a member of its home: so
//    the later nodes of a batch see the earlier ones, as if they had been linked one by one.
// 3. Scan: list by list, its members with all nodes that look in it, by the signs of both
//    (SignBlocks). Each node keeps the nearest some hundred. One that is far from what codes were
//    learned from looks in none.
// 4. Link: node by node, what it kept is compared again by int8, and the nearest of that, with some
//    of the rest, are what HnswLinker selects its links on level 0 from; levels above it searches
//    as for any node. For one that is far it searches level 0 as well, by int8; likewise where the
//    candidates' distances show that their estimates were useless.
// 5. Lists that have grown too long are split, then those that few members are left in merged.
//
// Thread safety: the owner core's alone; readers of other cores may be in the graph at any moment.
// Invariants: the graph is sound (HnswGraph::CheckInvariants) between any two slices; the same
// batches in the same order give the same graph, whatever the slices.
class BatchLinker {
 private:
  // Room for the candidates of a node while it is compared.
  static constexpr size_t kCandidates = 512;
  static constexpr uint32_t kFartherStep = 3;

 public:
  static constexpr uint32_t kMaxBatch = 1'024;
  // What the links of a node are selected among on level 0: the nearest, and every third of those
  // behind them. What is farther seldom becomes a link, and where it does, it is for its direction,
  // for which one of a few will do.
  struct Candidates {
    uint32_t nearest;
    uint32_t farther;
    uint32_t count() const { return nearest + farther; }
    // Of which they are taken.
    uint32_t compared() const { return nearest + farther * kFartherStep; }
  };
  static constexpr Candidates CandidatesFor(uint32_t ef_construction) {
    const uint32_t ef = std::min<uint32_t>(ef_construction, kCandidates / 2 - 16);
    return {.nearest = std::max(ef * 13 / 32, 1U), .farther = ef * 3 / 16};
  }

  // `linker`: free while a batch is begun, and used until it is linked. Both outlive this. Takes
  // memory in Begin only.
  BatchLinker(ArenaHeap* heap, const HnswBuildParams& params, HnswLinker* linker);
  BatchLinker(const BatchLinker&) = delete;
  BatchLinker& operator=(const BatchLinker&) = delete;
  ~BatchLinker();

  // Begins to link `nodes` (1 to kMaxBatch), whose rows are written and which are not in the graph.
  // False when the heap is spent; nothing has changed then.
  bool Begin(const BatchTarget& target, std::span<const NodeId> nodes);
  // Goes on for about as long as `max_distances` distances take: beyond that at most one unit of
  // work, which is some ten microseconds, but for the split of a list, which is a hundred. True
  // when all are linked; the linker is free then.
  bool Step(uint32_t max_distances);

  bool active() const { return phase_ != Phase::kFree; }
  // The nodes under way, or those that were linked last.
  std::span<const NodeId> nodes() const { return {nodes_.data(), size_}; }
  // Distances evaluated so far, estimates included, but for those of the linker.
  uint64_t distances() const { return estimates_ + compared_; }

 private:
  enum class Phase : uint8_t {
    kFree,
    kPrepare,
    kAssign,
    kCount,
    kGroup,
    kScan,
    kLink,
    kSplit,
    kMerge,
  };
  struct Entry {
    SignBlocks::Query code;
    float bound;  // estimates from here on are too far
    uint32_t candidates;
    uint32_t lists;  // that it looks in
    bool is_far;     // codes do not tell its neighbours apart
  };
  // A list that a node looks in, and how many members that had before the node.
  struct Look {
    uint32_t list;
    uint32_t members;
  };
  struct Query {
    uint32_t place;  // of the node in the batch
    uint32_t members;
  };
  struct Memory {
    float* estimates = nullptr;    // kCandidates a node
    NodeId* candidates = nullptr;  // likewise
    Look* looks = nullptr;         // kMostChosen a node
    Query* queries = nullptr;      // by list
  };

  bool TakeMemory();
  void FreeMemory();
  void Advance(Phase next);
  uint32_t StepPrepare();
  uint32_t StepAssign();
  uint32_t StepCount();
  bool ReserveStarts(uint32_t count);
  uint32_t StepGroup();
  template <typename Visit>
  uint32_t ForSomeLooks(Visit&& visit);
  uint32_t StepScan();
  uint32_t NextScanned() const;
  void ScanBlock(const InvertedLists::Block& block, std::span<const Query> queries, uint32_t first,
                 InvertedLists::Codes next);
  uint32_t StepLink(uint32_t max_distances);
  void BeginLink();
  void ShrinkCandidates(uint32_t place, size_t least, size_t most);
  void ShrinkToCompared(uint32_t place);
  size_t CompareAgain(uint32_t place);
  void EncodeWalkQuery(NodeId node);
  void CheckEstimates(size_t found);
  size_t ThinOut(size_t found);

  // Constant after construction.
  ArenaHeap* heap_;
  HnswBuildParams params_;
  Candidates considered_;  // that links are selected among
  HnswLinker* linker_;
  BlockProducts products_;
  hwy::Sorter sorter_;
  // Taken from the heap.
  Memory memory_;
  uint32_t* starts_ = nullptr;  // of a batch: by list, where its nodes begin in memory_.queries
  uint32_t starts_count_ = 0;
  // The batch under way.
  Phase phase_ = Phase::kFree;
  BatchTarget target_{};
  SearchTarget walk_{};
  std::array<NodeId, kMaxBatch> nodes_;
  std::array<Entry, kMaxBatch> entries_;
  std::array<NeighbourKey, kCandidates> found_;  // of the node that is linked
  uint32_t size_ = 0;
  uint32_t compared_again_ = 0;  // candidates of a node, by int8
  uint32_t next_ = 0;            // place, or list
  uint32_t inner_ = 0;           // query of the list
  uint64_t estimates_ = 0;
  uint64_t compared_ = 0;
};

}  // namespace engram
