#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>

#include "index/chunked_array.h"
#include "index/hnsw_params.h"
#include "src/core/ids.h"
#include "src/core/result.h"

namespace engram {

// The links of an HNSW graph (Malkov & Yashunin 2018), without the vectors. Level 0 holds every
// node, each level above about one in M of those below.
//
// Level 0 carries a spanning tree besides: every node but the root has a parent, the two link to
// each other on level 0, and pruning keeps those two links. Pruning by the paper's heuristic alone
// can drop the last link that leads to a node; with the tree every node is reachable from every
// other at any time, whatever the data.
//
// A node leaves the graph in this order: Doom (still walked through, no new links to it), then its
// children get other parents and its neighbours lose their links to it (HnswSweep), then
// ReplaceEntryPoint, then, once no reader can be on it, Forget.
//
// Nodes are of the generation in which they were finished. When a new one begins those that are in
// the graph are of the earlier one, and are counted until the last of them has left.
//
// Thread safety: writing is the owner core's alone. Other cores may follow links at any moment: a
// link list has no lock, a reader sees each of its places before or after a change. A link that
// stays in a list keeps its place, so a reader that goes through a list while it is changed misses
// none of those.
// Invariants (CheckInvariants proves them):
// - a list holds at most M links (M0 on level 0), none of them twice, none to the node itself, and
//   only to nodes that have that level; holes may lie between links; kNoNode follows the last;
// - a node's own lists are written before the first link to it, on every level;
// - the entry point has the top level;
// - a linked node that is not the root has a parent; they link to each other on level 0; the parent
//   relation has no cycle; a node has at most MaxChildren() children that are not doomed.
class HnswGraph {
 public:
  static constexpr uint32_t kMaxM = 64;
  static constexpr uint32_t kMaxM0 = 128;
  // Levels 0 to kMaxLevel; the chance of a higher draw is 2^-31 at M = 2 and vanishes above.
  static constexpr uint32_t kMaxLevel = 31;
  // A place of a list whose link was taken out.
  static constexpr NodeId kHole = kNoNode - 1;

  // `heap` must outlive the graph. Takes M and M0 of `params`.
  HnswGraph(ArenaHeap* heap, const HnswBuildParams& params);
  HnswGraph(const HnswGraph&) = delete;
  HnswGraph& operator=(const HnswGraph&) = delete;
  ~HnswGraph() { Release(); }

  // Makes room for nodes 0 to `nodes` - 1. False when the heap is spent.
  bool Reserve(size_t nodes);
  // Gives every block back to the heap; the graph is empty then.
  void Release();

  // ---- For readers on any core ----

  // Where a search begins; kNoNode while the graph is empty.
  NodeId entry_point() const { return entry_point_.load(std::memory_order_acquire); }
  // Of a node that is in the graph.
  uint32_t Level(NodeId node) const { return nodes_[node].level; }
  // The places of `node`'s list on `level`, up to Level(node): MaxDegree(level) of them. Read each
  // by LoadLink; or all links by ForEachLink.
  const NodeId* Links(NodeId node, uint32_t level) const {
    return level == 0 ? bottom_.Row(node) : nodes_[node].upper + (level - 1) * upper_stride_;
  }
  // The most links of a list on `level`.
  uint32_t MaxDegree(uint32_t level) const { return level == 0 ? max_degree0_ : max_degree_; }
  // One place of a list: a node, kHole, or kNoNode, which ends the list.
  static NodeId LoadLink(const NodeId* place) {
    return std::atomic_ref<NodeId>(*const_cast<NodeId*>(place)).load(std::memory_order_acquire);
  }
  template <typename Visit>
  void ForEachLink(NodeId node, uint32_t level, Visit&& visit) const {
    const NodeId* links = Links(node, level);
    const uint32_t places = MaxDegree(level);
    for (uint32_t place = 0; place < places; ++place) {
      const NodeId target = LoadLink(links + place);
      if (target == kNoNode) return;
      if (target != kHole) visit(target);
    }
  }

  // ---- For the owner core ----

  // One more than the highest node that there is room for.
  size_t capacity() const { return nodes_.capacity(); }
  // One more than the highest node that was ever added.
  size_t known_nodes() const { return known_nodes_; }
  // Nodes that are fully linked and not doomed.
  size_t linked_count() const { return linked_count_; }
  size_t doomed_count() const { return doomed_count_; }
  // True from FinishNode until Doom.
  bool IsLinked(NodeId node) const { return StateOf(node) == State::kLinked; }
  // True from Doom until Forget.
  bool IsDoomed(NodeId node) const { return StateOf(node) == State::kDoomed; }
  bool IsAbsent(NodeId node) const { return StateOf(node) == State::kAbsent; }
  // Linked, or doomed, before the generation began.
  bool IsEarlier(NodeId node) const {
    return (IsLinked(node) || IsDoomed(node)) && nodes_[node].generation != generation_;
  }
  size_t earlier_count() const { return earlier_count_; }
  // Level of the entry point; 0 while the graph is empty.
  uint32_t top_level() const;
  uint32_t Degree(NodeId node, uint32_t level) const;
  bool HasLink(NodeId node, uint32_t level, NodeId target) const;
  // The tree's root, kNoNode while the graph is empty.
  NodeId root() const { return root_; }
  NodeId Parent(NodeId node) const { return nodes_[node].parent; }

  // The linker's steps, in this order. `node` has room and is not in the graph.
  // False when the heap is spent; nothing has changed then.
  bool AddNode(NodeId node, uint32_t level);
  // The lists of a node to which nothing leads yet.
  void SetLinks(NodeId node, uint32_t level, std::span<const NodeId> links);
  // False when the list is full.
  bool AppendLink(NodeId node, uint32_t level, NodeId target);
  // Makes `wanted` the links of a list that readers may be in: those that stay keep their places.
  void EditLinks(NodeId node, uint32_t level, std::span<const NodeId> wanted);
  void RemoveLink(NodeId node, uint32_t level, NodeId target);
  // Records the tree's edge, in place of the node's edge to an earlier parent; the two links are
  // made by the caller. kNoNode: it becomes the root.
  void SetParent(NodeId node, NodeId parent);
  // Counts `node` as linked and makes it the entry point if it has the highest level.
  void FinishNode(NodeId node);
  // Takes a node that was added and not finished out again, with the links to it from the nodes
  // that it links to. For readers on other cores it must first be certain that none is on it.
  void RemoveNode(NodeId node);

  // Before the first Doom of a sweep: forgets the nodes that were offered before it.
  void BeginSweep() { next_entry_ = kNoNode; }
  // A linked node begins to leave.
  void Doom(NodeId node);
  // `node` may take the entry point's place once that is doomed; see ReplaceEntryPoint.
  void OfferAsEntryPoint(NodeId node);
  // Where the entry point is doomed, the highest of the nodes that were offered since takes its
  // place; every node that is linked was offered then.
  void ReplaceEntryPoint();
  // Ends a doomed node: nothing leads to it and no reader is on it.
  void Forget(NodeId node);

  // What is finished from here on is of a new generation. None of an earlier one is left.
  void BeginGeneration();

  // True where the two are parent and child, so that pruning must keep their links on level 0.
  bool IsTreeEdge(NodeId a, NodeId b) const {
    return nodes_[a].parent == b || nodes_[b].parent == a;
  }
  bool MayHaveChild(NodeId node) const { return nodes_[node].children < MaxChildren(); }
  // A parent for a new node, at or below `near` in the tree, that may have one more child. `near`
  // is linked. Never a doomed node, nor one below a doomed node.
  NodeId FindParent(NodeId near) const;
  // True when `above` is among the first `max_steps` ancestors of `node`, or it cannot be told.
  bool MayBeBelow(NodeId node, NodeId above, uint32_t max_steps) const;
  // The most children of a node: half of its links on level 0, so that pruning keeps its freedom.
  uint32_t MaxChildren() const { return max_degree0_ / 2; }

  // What the links of a node of `level` take above level 0, in bytes.
  size_t UpperBytes(uint32_t level) const { return level * upper_stride_ * sizeof(NodeId); }
  size_t BottomBytes() const { return bottom_.stride() * sizeof(NodeId); }
  // What it takes of the heap.
  size_t bytes() const { return bottom_.bytes() + nodes_.bytes() + upper_bytes_; }

  // kCorrupt with the node, level and violation. True between any two slices of linking or
  // sweeping. Reads the whole graph and takes memory by malloc: for tests and for a look after a
  // fault.
  Result<void> CheckInvariants() const;
  // What of it one node shows alone: its lists, and its parent in the tree.
  Result<void> CheckNode(NodeId node) const;

 private:
  friend class HnswGraphTestPeer;

  enum class State : uint8_t { kAbsent = 0, kLinking = 1, kLinked = 2, kDoomed = 3 };
  struct Node {
    NodeId* upper;  // lists of levels 1 and up, upper_stride_ places each
    NodeId parent;  // kNoNode for the root
    State state;
    uint8_t level;
    uint8_t children;  // that are not doomed
    uint8_t generation;
  };
  static_assert(sizeof(Node) == 16);

  static void StoreLink(NodeId* place, NodeId target) {
    std::atomic_ref<NodeId>(*place).store(target, std::memory_order_release);
  }
  State StateOf(NodeId node) const {
    return node < nodes_.capacity() ? nodes_[node].state : State::kAbsent;
  }
  NodeId* MutableLinks(NodeId node, uint32_t level) {
    return const_cast<NodeId*>(Links(node, level));
  }
  static void TrimHoles(NodeId* links, uint32_t places);
  void FreeUpper(NodeId node);
  Result<void> CheckNodes(NodeId entry) const;
  Result<void> CheckLists(NodeId node) const;
  Result<void> CheckLink(NodeId node, uint32_t level, NodeId target) const;
  Result<void> CheckTree() const;
  Result<void> CheckParent(NodeId node) const;
  Result<void> CheckAncestors() const;
  Result<void> CheckReachable() const;

  // Constant after construction.
  ArenaHeap* heap_;
  uint32_t max_degree_;
  uint32_t max_degree0_;
  size_t upper_stride_;
  // Readable by other cores once published; written by the owner core only.
  ChunkedArray<NodeId, kRunTimeStride> bottom_;
  ChunkedArray<Node> nodes_;
  std::atomic<NodeId> entry_point_{kNoNode};
  // Owner core only.
  NodeId root_ = kNoNode;
  NodeId next_entry_ = kNoNode;
  size_t linked_count_ = 0;
  size_t doomed_count_ = 0;
  size_t known_nodes_ = 0;
  uint8_t generation_ = 0;  // one of two
  size_t earlier_count_ = 0;
  size_t upper_bytes_ = 0;  // of the heap
};

}  // namespace engram
