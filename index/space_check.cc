// Whether a space is sound (Space::CheckInvariants): for tests, and for a look after a fault.

#include <array>
#include <string>

#include "index/space.h"
#include "src/core/hash.h"

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
  if (stored.state != NodeState::kFree && HasEnd(node) != (Load(stamps_[node].end) != kOpenStamp)) {
    return Unsound("bit and end stamp disagree", node);
  }
  const bool has_content = live || stored.state == NodeState::kHidden;
  if (aged_ && (aged_->Has(node) != has_content ||
                (has_content && aged_->StampOf(node) != ContentStamp(node)))) {
    return Unsound("queue by age and node disagree", node);
  }
  if (Result<void> sound = CheckFiled(node); !sound) return sound;
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
  // The graph has the nodes of a batch one after the other, the space hears of it at the end.
  const bool is_linking =
      stored.state == NodeState::kLinking || stored.state == NodeState::kRetiredLinking;
  const bool fits = IsLifted(node) ? graph_.IsLinked(node) || graph_.IsDoomed(node)
                                   : is_linking || in_graph == graph_.IsLinked(node);
  if ((in_graph || is_linking) &&
      Load(stamps_[node].begin) > linked_up_to_.load(std::memory_order_relaxed)) {
    return Unsound("linked later than the space says", node);
  }
  if (!fits) return Unsound("graph and node disagree", node);
  if (stored.state == NodeState::kDoomed && !graph_.IsDoomed(node)) {
    return Unsound("doomed here and not in the graph", node);
  }
  return {};
}

// Without reading any node.
Result<void> Space::CompareCounts(const StateCounts& by_state) const {
  const auto count = [&](NodeState state) { return by_state[static_cast<size_t>(state)]; };
  const uint64_t lifted_live = count(NodeState::kLifted);
  const uint64_t unlinked = count(NodeState::kUnlinked) + count(NodeState::kLinking) + lifted_live;
  const uint64_t live = unlinked + count(NodeState::kLinked);
  const uint64_t retired = count(NodeState::kEnded) + count(NodeState::kRetired) +
                           count(NodeState::kRetiredLinking) + count(NodeState::kDoomed) +
                           count(NodeState::kWaiting) + count(NodeState::kLiftedEnded);
  if (live != live_) return Unsound("live count is off", live);
  if (unlinked != unlinked_) return Unsound("unlinked count is off", unlinked);
  if (retired != retired_) return Unsound("retired count is off", retired);
  if (count(NodeState::kRetired) != retired_linked_) return Unsound("retired list is off", retired);
  if (lifted_live != lifted_live_ || lifted_live + count(NodeState::kLiftedEnded) != lifted_) {
    return Unsound("lifted count is off", lifted_live);
  }
  if (count(NodeState::kTombstone) != tombstones_)
    return Unsound("tombstones are off", tombstones_);
  if (count(NodeState::kHidden) != hidden_) return Unsound("hidden count is off", hidden_);
  if (aged_ && aged_->size() != live + hidden_) {
    return Unsound("queue by age is off", aged_->size());
  }
  if (ids_.size() < live + hidden_ || ids_.size() > live + hidden_ + tombstones_) {
    return Unsound("id map's size is off", ids_.size());
  }
  return {};
}

Result<void> Space::CheckCounts() const {
  StateCounts by_state{};
  for (uint32_t node = 0; node < node_count(); ++node) {
    ++by_state[static_cast<size_t>(nodes_[node].state)];
  }
  if (Result<void> sound = CompareCounts(by_state); !sound) return sound;
  const FreshList::Snapshot fresh = fresh_.TakeSnapshot();
  uint64_t listed = 0;
  for (size_t i = 0; i < fresh.size(); ++i) {
    const NodeState state = nodes_[fresh[i]].state;
    listed += static_cast<uint64_t>(state == NodeState::kUnlinked || state == NodeState::kLinking ||
                                    state == NodeState::kLifted);
  }
  if (listed != unlinked_) return Unsound("the fresh list lacks nodes", listed);
  if (aged_ && !aged_->IsSound()) return Unsound("queue by age is off", aged_->size());
  uint64_t free = 0;
  for (NodeId node = first_free_; node != kNoNode; node = nodes_[node].next) ++free;
  if (free != by_state[static_cast<size_t>(NodeState::kFree)]) {
    return Unsound("free list is off", free);
  }
  return {};
}

// The same only if no count has changed: a node comes to life, or into what has ended, as it is
// taken or restored from being hidden, and leaves the graph as it is lifted; without the first and
// the last all of these go one way.
uint64_t Space::ChangesMark() const {
  uint64_t mark = MixBits(nodes_taken_ + 1);
  for (const uint64_t count :
       {live_, unlinked_, retired_, uint64_t{retired_linked_}, tombstones_, hidden_, lifted_ever_,
        uint64_t{lifted_}, uint64_t{lifted_live_}, uint64_t{node_count()}}) {
    mark = MixBits(mark ^ count);
  }
  return mark;
}

Result<CheckOutcome> Space::CheckSlice(size_t max_nodes, CheckState* state) const {
  if (state->begun == 0) *state = {.begun = 1, .mark = ChangesMark()};
  const size_t nodes = node_count();
  for (size_t i = 0; i < max_nodes && state->next < nodes; ++i, ++state->next) {
    const NodeId node = state->next;
    if (Result<void> sound = CheckNode(node); !sound) return std::unexpected(sound.error());
    if (Result<void> sound = graph_.CheckNode(node); !sound) {
      return Unsound(sound.error().message, node);
    }
    ++state->by_state[static_cast<size_t>(nodes_[node].state)];
  }
  if (state->next < nodes) return CheckOutcome::kMore;
  if (state->mark != ChangesMark()) return CheckOutcome::kChanged;
  if (Result<void> sound = CompareCounts(state->by_state); !sound) {
    return std::unexpected(sound.error());
  }
  return CheckOutcome::kSound;
}

Result<void> Space::CheckInvariants() const {
  for (uint32_t node = 0; node < node_count(); ++node) {
    if (Result<void> sound = CheckNode(node); !sound) return sound;
  }
  if (Result<void> sound = CheckCounts(); !sound) return sound;
  if (Result<void> sound = attributes_.CheckInvariants(); !sound) return sound;
  const auto when_of = [this](NodeId node) { return WhenOf(node); };
  if (Result<void> sound = times_.CheckInvariants(when_of); !sound) return sound;
  return graph_.CheckInvariants();
}

}  // namespace engram
