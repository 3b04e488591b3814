// Whether a space is sound (Space::CheckInvariants): for tests, and for a look after a fault.

#include <array>
#include <string>

#include "index/space.h"

namespace engram {

std::unexpected<Error> Space::Unsound(const std::string& what, uint64_t node) const {
  return Fail(ErrorCode::kCorrupt,
              "space " + name_ + ": " + what + " (node " + std::to_string(node) + ")");
}

Result<void> Space::CheckNode(NodeId node) const {
  const Node& stored = nodes_[node];
  const bool live = IsLive(node);
  if (live && FindId(HashOf(IdOf(node)), IdOf(node)) != node) {
    return Unsound("id not in the map", node);
  }
  if (live && Load(stamps_[node].end) != kOpenStamp) return Unsound("live but ended", node);
  const bool has_content = live || stored.state == NodeState::kHidden;
  if (aged_ && (aged_->Has(node) != has_content ||
                (has_content && aged_->StampOf(node) != ContentStamp(node)))) {
    return Unsound("queue by age and node disagree", node);
  }
  if (stored.state == NodeState::kHidden) {
    if (FindId(HashOf(IdOf(node)), IdOf(node)) != node) return Unsound("hidden id is lost", node);
    if (Load(stamps_[node].begin) != Load(stamps_[node].end)) {
      return Unsound("hidden but visible", node);
    }
    if (ContentStamp(node) >= Load(stamps_[node].begin)) {
      return Unsound("hidden before it was there", node);
    }
  }
  const bool in_graph = stored.state == NodeState::kLinked || stored.state == NodeState::kRetired;
  if (in_graph != graph_.IsLinked(node)) return Unsound("graph and node disagree", node);
  if (stored.state == NodeState::kDoomed && !graph_.IsDoomed(node)) {
    return Unsound("doomed here and not in the graph", node);
  }
  return {};
}

Result<void> Space::CheckCounts() const {
  std::array<uint64_t, static_cast<size_t>(NodeState::kCount)> by_state{};
  for (uint32_t node = 0; node < node_count(); ++node) {
    ++by_state[static_cast<size_t>(nodes_[node].state)];
  }
  const auto count = [&](NodeState state) { return by_state[static_cast<size_t>(state)]; };
  const uint64_t unlinked = count(NodeState::kUnlinked) + count(NodeState::kLinking);
  const uint64_t live = unlinked + count(NodeState::kLinked);
  const uint64_t retired = count(NodeState::kEnded) + count(NodeState::kRetired) +
                           count(NodeState::kRetiredLinking) + count(NodeState::kDoomed) +
                           count(NodeState::kWaiting);
  if (live != live_) return Unsound("live count is off", live);
  if (unlinked != unlinked_) return Unsound("unlinked count is off", unlinked);
  const FreshList::Snapshot fresh = fresh_.TakeSnapshot();
  uint64_t listed = 0;
  for (size_t i = 0; i < fresh.size(); ++i) {
    const NodeState state = nodes_[fresh[i]].state;
    listed += static_cast<uint64_t>(state == NodeState::kUnlinked || state == NodeState::kLinking);
  }
  if (listed != unlinked) return Unsound("the fresh list lacks nodes", listed);
  if (retired != retired_) return Unsound("retired count is off", retired);
  if (count(NodeState::kRetired) != retired_linked_) return Unsound("retired list is off", retired);
  if (count(NodeState::kTombstone) != tombstones_)
    return Unsound("tombstones are off", tombstones_);
  if (count(NodeState::kHidden) != hidden_) return Unsound("hidden count is off", hidden_);
  if (aged_ && (aged_->size() != live + hidden_ || !aged_->IsSound())) {
    return Unsound("queue by age is off", aged_->size());
  }
  if (ids_.size() < live + hidden_ || ids_.size() > live + hidden_ + tombstones_) {
    return Unsound("id map's size is off", ids_.size());
  }
  uint64_t free = 0;
  for (NodeId node = first_free_; node != kNoNode; node = nodes_[node].next) ++free;
  if (free != count(NodeState::kFree)) return Unsound("free list is off", free);
  return {};
}

Result<void> Space::CheckInvariants() const {
  for (uint32_t node = 0; node < node_count(); ++node) {
    if (Result<void> sound = CheckNode(node); !sound) return sound;
  }
  if (Result<void> sound = CheckCounts(); !sound) return sound;
  return graph_.CheckInvariants();
}

}  // namespace engram
