#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "index/chunked_array.h"
#include "index/hnsw_graph.h"
#include "index/hnsw_params.h"
#include "index/hnsw_search.h"
#include "src/core/arena_heap.h"
#include "src/core/ids.h"

namespace engram {

// Takes a batch of nodes out of an HNSW graph and mends the links around them, in slices. It holds
// scratch memory only, so one sweep serves all graphs of a shard, one after the other.
//
// One pass over all lists for a whole batch finds every link to it, without links back (after
// FreshDiskANN's consolidation, Singh et al. 2021); what a list loses is made up for from the lost
// node's own links (in-place, with few replacements, after IP-DiskANN, Xu et al. 2025).
//
// Steps:
// 1. Doom the batch: still walked through, never selected as a neighbour any more.
// 2. Each child of a doomed node in the spanning tree gets another parent: the nearest of its own
//    neighbours that has room and is not below it, else one found from an ancestor down. With none
//    left it becomes the root.
// 3. Each list of the graph loses its links to the batch. As far as it has room it gets the nearest
//    of the lost nodes' neighbours that no remaining link dominates (Algorithm 4, with a larger
//    alpha than the linker's).
// 4. The entry point is replaced if it was in the batch.
// Nothing leads to the batch then; once no reader is on it, HnswGraph::Forget ends each node.
//
// Thread safety: the owner core's alone. Readers of other cores may be in the graph at any moment.
// Invariants: the graph is sound (HnswGraph::CheckInvariants) between any two slices. No linker is
// active at Begin, nor while repairing_tree().
class HnswSweep {
 public:
  static constexpr uint32_t kMaxBatch = 8'192;

  // `heap` must outlive the sweep. Takes memory in Begin only.
  HnswSweep(ArenaHeap* heap, const HnswBuildParams& params);
  HnswSweep(const HnswSweep&) = delete;
  HnswSweep& operator=(const HnswSweep&) = delete;
  ~HnswSweep();

  // 1. `batch`: linked nodes, at most kMaxBatch. `target` names graph, vectors and distance. False
  // when the heap is spent; nothing has changed then.
  bool Begin(HnswGraph* graph, const SearchTarget& target, std::span<const NodeId> batch);
  // Goes on until about `max_distances` distances, or as much work, are done: beyond that at most
  // one node's lists. True when the sweep is complete.
  bool Step(uint32_t max_distances);

  bool active() const { return phase_ != Phase::kFree; }
  // In step 2: the graph must not be linked to.
  bool repairing_tree() const { return phase_ == Phase::kTree; }
  // The nodes of the sweep under way, or of the last one.
  std::span<const NodeId> batch() const { return {batch_, batch_size_}; }
  // Distances evaluated so far, by all sweeps.
  uint64_t distances() const { return distances_; }

 private:
  enum class Phase : uint8_t { kFree, kTree, kLists };
  // A list with more than this many doomed links is mended from these only.
  static constexpr size_t kMaxLost = 8;

  void StepTree();
  void FindNewParent(NodeId child);
  NodeId NearestAdopter(NodeId child);
  NodeId AdopterFromAbove(NodeId child) const;
  bool CanAdopt(NodeId node) const;
  void LinkTreeEdge(NodeId from, NodeId to);
  void StepLists();
  void MendList(NodeId node, uint32_t level);
  size_t GatherReplacements(NodeId node, uint32_t level, std::span<const NodeId> lost,
                            std::span<const NodeId> kept);
  bool IsDominated(NeighbourKey candidate, std::span<const NodeId> kept);
  void End();

  // Nodes that came since the beginning may lie beyond what bits_ has room for.
  bool InBatch(NodeId node) const {
    return node < end_node_ && (bits_[node / 64] >> (node % 64) & 1) != 0;
  }
  float Distance(NodeId a, NodeId b) {
    ++distances_;
    return target_.DistanceBetween(a, b);
  }

  // Constant after construction.
  ArenaHeap* heap_;
  float alpha_;
  // Takes memory from the heap.
  NodeId* batch_ = nullptr;
  ChunkedArray<uint64_t> bits_;  // by node: in the batch
  // The sweep under way.
  Phase phase_ = Phase::kFree;
  HnswGraph* graph_ = nullptr;
  SearchTarget target_{};
  size_t batch_size_ = 0;
  size_t next_ = 0;      // place in the batch, then a node
  size_t end_node_ = 0;  // nodes that were known at the beginning
  uint64_t distances_ = 0;
  uint64_t work_ = 0;  // nodes looked at, in units of a distance
  std::array<NeighbourKey, kMaxLost * HnswGraph::kMaxM0> candidates_;
};

}  // namespace engram
