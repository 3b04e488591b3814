#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "index/hnsw_graph.h"
#include "index/hnsw_params.h"
#include "index/hnsw_search.h"
#include "index/link_selection.h"
#include "index/vector_store.h"
#include "src/core/arena_heap.h"

namespace engram {

// Links nodes into an HNSW graph, one at a time, in slices (Malkov & Yashunin 2018, Algorithms 1
// and 4). It holds scratch memory only, so one linker serves all graphs of a shard, one after the
// other. Retired nodes may be link targets: they are still walked through.
//
// Steps:
// 1. Draw the node's level from the seed and its number.
// 2. Greedy descent from the entry point to the level above the node's.
// 3. On each level from there down: beam search with ef_construction, begun from what was found on
//    the level above. Where the search goes by codes, what it found is compared again.
// 4. Select up to M of what was found by Algorithm 4. On level 0 also the node's parent in the
//    graph's spanning tree (see HnswGraph). Doomed nodes are walked through and never selected.
// 5. Publish the node's own links on every level; nothing leads to the node yet.
// 6. Reverse links: each neighbour gets a link to the node. Where its list is full, the same
//    heuristic chooses which links it keeps; links of the tree are always kept.
// 7. The node counts as linked, and becomes the entry point if it has the highest level.
//
// Thread safety: the owner core's alone.
// Invariants: the graph is sound (HnswGraph::CheckInvariants) between any two slices; the same
// nodes in the same order give the same graph, whatever the slices.
class HnswLinker {
 public:
  // `heap` must outlive the linker. Takes memory in Begin only.
  HnswLinker(ArenaHeap* heap, const HnswBuildParams& params);
  HnswLinker(const HnswLinker&) = delete;
  HnswLinker& operator=(const HnswLinker&) = delete;
  ~HnswLinker();

  // Begins to link `node`, whose row is written and which is not in the graph. `target` names
  // graph, vectors and distance; its query is set here. `walk`: what the graph is searched with
  // instead, where that is something else; its query is the node's and stays until the node is
  // linked. What was found is compared again by `target` before links are selected. The graph has
  // this linker's M and M0. False when the heap is spent; nothing has changed then.
  bool Begin(HnswGraph* graph, const SearchTarget& target, NodeId node,
             const SearchTarget* walk = nullptr);
  // The same for a node that was added already, with DrawLevel's level, and whose nearest on level
  // 0 were found in another way: `found`, in ascending order, linked and not doomed; they stay
  // until the node is linked. Takes no memory after Reserve.
  void BeginFound(HnswGraph* graph, const SearchTarget& target, NodeId node,
                  const SearchTarget& walk, std::span<const NeighbourKey> found);
  // The same for a node that was added already and is to be found its nearest as by Begin.
  void BeginAdded(HnswGraph* graph, const SearchTarget& target, NodeId node);
  // Makes room for graphs of nodes 0 to `nodes` - 1. False when the heap is spent.
  bool Reserve(size_t nodes);

  // Goes on until about `max_distances` distances have been evaluated: beyond that at most one
  // candidate's expansion, or one neighbour's choice of links. True when the node is linked; the
  // linker is free then.
  bool Step(uint32_t max_distances);

  // Takes what was begun back: the node is not in the graph then. Does nothing when free.
  void Abandon();

  // Where a node's query may lie that the graph is walked with by codes: kWalkQueryBytes, aligned
  // to 64 bytes.
  static constexpr size_t kWalkQueryBytes = kMaxDimension;
  std::byte* walk_query() { return walk_query_.data(); }

  // The node that is being linked, or was last.
  NodeId node() const { return node_; }
  bool active() const { return phase_ != Phase::kFree; }
  // Distances evaluated so far, by all nodes.
  uint64_t distances() const { return scratch_.distances + selection_.distances(); }
  const HnswBuildParams& params() const { return params_; }

  // The level that `node` will have: floor(-ln(u) * m_L), u in (0, 1] from the seed and `node`.
  uint32_t DrawLevel(NodeId node) const;

 private:
  enum class Phase : uint8_t { kFree, kDescent, kBeam, kExtend, kSelect, kReverse };
  struct NotDoomed {
    const HnswGraph* graph;
    bool operator()(NodeId node) const { return !graph->IsDoomed(node); }
  };
  // The links that the node will have on one level: up to M, and the parent on level 0.
  struct Choice {
    uint32_t count;
    std::array<NodeId, HnswGraph::kMaxM + 1> nodes;
  };

  size_t ExtendedCapacity() const;
  void SetNode(HnswGraph* graph, const SearchTarget& target, NodeId node, const SearchTarget* walk);
  void BeginSearch();
  void BeginBottom();
  void StepDescent();
  void StepBeam();
  void StepExtend();
  void BeginSelect(std::span<const NeighbourKey> found);
  void StepSelect();
  void EndSelect();
  void ChooseParent();
  void PrefetchLinks(NodeId node) const;
  void StepReverse();

  // Constant after construction.
  ArenaHeap* heap_;
  HnswBuildParams params_;
  double level_scale_;  // m_L
  // Takes memory from the heap.
  SearchScratch scratch_;
  LinkSelection selection_;
  NeighbourKey* extended_ = nullptr;  // with extend_candidates only
  // The node under way.
  Phase phase_ = Phase::kFree;
  NodeId node_ = kNoNode;
  HnswGraph* graph_ = nullptr;
  SearchTarget target_{};
  SearchTarget walk_{};
  bool has_found_ = false;  // its nearest on level 0
  std::span<const NeighbourKey> found_at_bottom_;
  uint32_t node_level_ = 0;
  NeighbourKey nearest_ = 0;
  BeamSearch<NotDoomed> beam_{NotDoomed{nullptr}};
  std::array<Choice, HnswGraph::kMaxLevel + 1> choices_;
  // Where its phase is: a level, and a place among the found nodes or the chosen ones.
  uint32_t level_ = 0;
  size_t next_ = 0;
  // Selection on level_.
  std::span<const NeighbourKey> found_;
  size_t extended_count_ = 0;
  std::array<NeighbourKey, HnswGraph::kMaxM> chosen_;
  uint32_t discarded_count_ = 0;
  std::array<NodeId, HnswGraph::kMaxM> discarded_;
  // Aligned for whole registers, not against false sharing: one core's alone.
  alignas(kCacheLineBytes) std::array<std::byte, kWalkQueryBytes> walk_query_;
};

}  // namespace engram
