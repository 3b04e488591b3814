// How a space ends what is too old, or too much (see space.h; src/design/0014-space-lifecycle.md).
//
// What ends goes the way of a delete, but leaves nothing behind: whatever else there was of its id
// is older, and ends with it. So there is no tombstone. What still comes with an earlier stamp is
// not stored (Shard::HasEnded).

#include <algorithm>
#include <utility>
#include <vector>

#include "index/space.h"
#include "src/core/check.h"

namespace engram {

CommitStamp Space::oldest_content() const {
  const NodeId node = aged_ ? aged_->oldest() : kNoNode;
  return node == kNoNode ? kOpenStamp : aged_->StampOf(node);
}

void Space::EndOldest(CommitStamp end) {
  const NodeId node = aged_->oldest();
  CHECK(node != kNoNode, "there is something to end");
  ids_.Erase(HashOf(IdOf(node)), node);
  if (nodes_[node].state == NodeState::kHidden) {
    --hidden_;
    FreeNode(node);  // No reader was ever led to it.
  } else {
    EndVersion(node, end);
  }
  // A recall of now does not see it.
  if (end > latest_stamp()) Advance(end);
}

void Space::EvictOldest(CommitStamp end) {
  evicted_up_to_ = std::max(evicted_up_to_, oldest_content());
  EndOldest(end);
}

bool Space::HasContent(std::string_view id) const {
  const NodeId node = FindId(HashOf(id), id);
  return node != kNoNode && nodes_[node].state != NodeState::kTombstone;
}

// The texts and attributes of what has ended count by their share.
uint64_t Space::content_bytes() const {
  const uint64_t contents = live_ + hidden_;
  const uint64_t texts = contents + retired_ + tombstones_;
  const uint64_t bytes = text_bytes_ + attributes_.bytes();
  return contents * NodeBytes() + (texts == 0 ? 0 : bytes * contents / texts);
}

// All that grows with each node, but its text.
uint64_t Space::NodeBytes() const {
  constexpr uint64_t kIdEntryBytes = 12;
  const uint64_t rows = (codes_ ? codes_->row_bytes() : 0) + (exact_ ? exact_->row_bytes() : 0);
  return rows + graph_.BottomBytes() + sizeof(Node) + sizeof(Stamps) + 2 * sizeof(NodeId) +
         kIdEntryBytes;
}

// After a load: all contents, in the order of their stamps. Allocates.
bool Space::QueueByAge() {
  if (!aged_) return true;
  if (!aged_->Reserve(node_count())) return false;
  std::vector<std::pair<CommitStamp, NodeId>> contents;
  contents.reserve(live_ + hidden_);
  for (uint32_t node = 0; node < node_count(); ++node) {
    if (!IsLive(node) && nodes_[node].state != NodeState::kHidden) continue;
    contents.emplace_back(ContentStamp(node), node);
  }
  std::sort(contents.begin(), contents.end());
  for (const auto& [stamp, node] : contents) aged_->Add(node, stamp);
  return true;
}

std::vector<NodeId> Space::NodesByAge() const {
  std::vector<std::pair<CommitStamp, NodeId>> stamps;
  stamps.reserve(node_count());
  for (uint32_t node = 0; node < node_count(); ++node) {
    const bool has_content = IsLive(node) || nodes_[node].state == NodeState::kHidden;
    stamps.emplace_back(has_content ? ContentStamp(node) : kNoStamp, node);
  }
  std::sort(stamps.begin(), stamps.end());
  std::vector<NodeId> nodes;
  nodes.reserve(stamps.size());
  for (const auto& [stamp, node] : stamps) nodes.push_back(node);
  return nodes;
}

}  // namespace engram
