// How a space's nodes are filed, for recalls with a filter (see space.h;
// src/design/0019-filters.md).
//
// A node is filed with its text, before anyone may find it, and leaves the files as its place is
// given back. Tombstones are in neither, nor is what a loader keeps for its links alone.

#include "index/space.h"

namespace engram {

bool Space::FileByTime(NodeId node) {
  return times_.Add(node, nodes_[node].when_ns, [this](NodeId other) { return WhenOf(other); });
}

// With its text. False when the heap is spent; whoever gives the place back takes it out again.
bool Space::FileNode(NodeId node, std::span<const std::byte> attributes) {
  return attributes_.Add(node, attributes) && FileByTime(node);
}

bool Space::FileAs(NodeId node, NodeId other) {
  return attributes_.AddAs(node, other) && FileByTime(node);
}

// Also where it was filed in part, or not at all.
void Space::Unfile(NodeId node) {
  attributes_.Remove(node);
  times_.Remove(node, nodes_[node].when_ns);
}

// What may be seen, now or once it is restored, or may have been.
Result<void> Space::CheckFiled(NodeId node) const {
  const NodeState state = nodes_[node].state;
  const bool is_filed = times_.Has(node, WhenOf(node));
  if ((IsLive(node) || state == NodeState::kHidden) && !is_filed) {
    return Unsound("not filed by its time", node);
  }
  const bool is_empty = state == NodeState::kFree || state == NodeState::kTombstone;
  if (is_empty && (is_filed || attributes_.SetOf(node) != AttributeIndex::kNoAttributes)) {
    return Unsound("filed and not there", node);
  }
  return {};
}

}  // namespace engram
