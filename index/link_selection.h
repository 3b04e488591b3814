#pragma once

#include <cstdint>
#include <span>

#include "index/hnsw_graph.h"
#include "index/hnsw_search.h"
#include "src/core/ids.h"

namespace engram {

// The choice of a node's links by the heuristic of Malkov & Yashunin 2018 (Algorithm 4).
//
// Thread safety: the owner core's alone.
class LinkSelection {
 public:
  // `alpha`: see HnswBuildParams.
  explicit LinkSelection(float alpha) : alpha_(alpha) {}

  // Names graph, vectors and distance for what follows.
  void SetTarget(const SearchTarget& target) { target_ = target; }
  const SearchTarget& target() const { return target_; }

  // True where a chosen node is nearer to the candidate than the centre is. Keys hold distances to
  // the centre. A tie counts only if the candidate is no farther from the chosen node than the
  // centre is: of several equal vectors one suffices, and that one must not keep out all others.
  bool IsDominated(NeighbourKey candidate, std::span<const NeighbourKey> chosen);

  // Chooses the links of a node whose list is full among those that it has and `additional`, at
  // most kMaxM0 of them. Links of the tree stay, doomed nodes go; what the heuristic discards is
  // not kept: the room saves the next reverse links a choice.
  void Prune(HnswGraph* graph, NodeId node, uint32_t level, std::span<const NodeId> additional);

  float Distance(NodeId a, NodeId b) {
    ++distances_;
    return target_.DistanceBetween(a, b);
  }
  // Distances evaluated so far.
  uint64_t distances() const { return distances_; }

 private:
  float alpha_;
  SearchTarget target_{};
  uint64_t distances_ = 0;
};

}  // namespace engram
