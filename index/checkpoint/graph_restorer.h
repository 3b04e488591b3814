#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "index/hnsw_graph.h"
#include "index/hnsw_search.h"
#include "src/core/ids.h"

namespace engram {

// Makes a graph of nodes whose lists were saved one after the other while it changed, so that they
// are of different moments. What was saved in one moment comes back as it was.
//
// Steps:
// 1. Add takes each node with its level, its parent in the spanning tree and its lists.
// 2. Links go that lead to nothing, to a node without that level, to the node itself or twice to
//    the same one. Their places become holes, so that the others keep theirs.
// 3. An edge of the tree stays where both ends link to each other on level 0 and the parent has
//    room for the child. Cycles are cut. What hangs together then is a group, each with a top.
// 4. As long as there are several groups: where a link leads from one to another, one end becomes
//    the parent of the other one, which is made the top of its group before.
// 5. Groups that cannot be joined leave the graph, but for the largest; links to them go as in 2.
// 6. The parents are set and the nodes finished, the saved entry point first.
//
// Thread safety: the shard's alone. No reader is in the graph.
// Invariants: parents_ is a forest from step 3 on; after Finish the graph is sound
// (HnswGraph::CheckInvariants).
class GraphRestorer {
 public:
  // `graph` is empty and outlives this.
  explicit GraphRestorer(HnswGraph* graph) : graph_(graph) {}

  // 1. Once a node. `parent` may be anything. False when the heap is spent.
  bool Add(NodeId node, uint32_t level, NodeId parent);
  // Of a node that was added: the places of a list, at most MaxDegree(level), none of them kNoNode,
  // else anything.
  void SetLinks(NodeId node, uint32_t level, std::span<const NodeId> places) {
    graph_->SetLinks(node, level, places);
  }
  bool Has(NodeId node) const { return IsIn(node); }
  // Takes one out again that was added, before Finish; links to it go as in 2.
  void Remove(NodeId node);
  // 2. to 6. `target` names vectors and distance. Returns the nodes that have left.
  std::vector<NodeId> Finish(const SearchTarget& target, NodeId entry_point);

  // One more than the last node that was added.
  size_t end() const { return levels_.size(); }
  // Links that were dropped, and groups that were joined: 0 where nothing had changed.
  uint64_t dropped_links() const { return dropped_links_; }
  uint64_t joined_groups() const { return joined_groups_; }

 private:
  static constexpr uint8_t kNotIn = 0xFF;

  bool IsIn(NodeId node) const { return node < levels_.size() && levels_[node] != kNotIn; }
  bool IsTreeEdge(NodeId a, NodeId b) const { return parents_[a] == b || parents_[b] == a; }
  void CleanLists();
  void CleanList(NodeId node, uint32_t level);
  void CutEdges();
  void FindGroups();
  NodeId TopOf(NodeId node);
  void JoinGroups();
  void Join(NodeId a, NodeId b);
  bool Attach(NodeId child, NodeId parent);
  void MakeTop(NodeId node);
  void LinkTo(NodeId from, NodeId to);
  std::vector<NodeId> LeaveSmallGroups();
  void Publish(NodeId entry_point);

  HnswGraph* graph_;
  SearchTarget target_{};
  // By node.
  std::vector<uint8_t> levels_;
  std::vector<NodeId> parents_;
  std::vector<uint8_t> children_;
  std::vector<NodeId> tops_;     // towards the top of its group
  std::vector<uint32_t> sizes_;  // of a group, by its top
  std::vector<uint32_t> seen_;   // the list in which it was seen last
  uint32_t list_ = 0;
  uint64_t groups_ = 0;
  uint64_t dropped_links_ = 0;
  uint64_t joined_groups_ = 0;
};

}  // namespace engram
