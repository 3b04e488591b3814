// What a space is kept in order with (see space.h): which node is linked next, sweeps of what has
// ended, and giving back what no reader can see any more.

#include <algorithm>
#include <utility>

#include "index/space.h"

namespace engram {

namespace {

// A sweep looks at every list of the graph once, whatever it takes out: this share of the graph
// makes it worth while when there is linking to do, and this one when there is not.
constexpr uint64_t kBusySweepShare = 16;
constexpr uint64_t kIdleSweepShare = 1024;
constexpr uint64_t kLeastBusySweep = 64;
// The share of retired ones in the graph from which on they count as backlog: some sweeps' worth,
// as they wait for the horizon first.
constexpr uint64_t kGatheredShare = 4;
constexpr uint64_t kEndedAtOnce = 64;
// And where as many end as come, this share of all that are listed still, up to a bound of the
// round: some 100 us.
constexpr uint64_t kEndedAtOnceShare = 16;
constexpr uint64_t kMostEndedAtOnce = 2'048;
// What has ended and is still wanted goes behind what is to be linked, unless it is more than this:
// each that goes there is listed, and scanned, once more.
constexpr uint64_t kMostMoved = 4'096;

}  // namespace

NodeId Space::NextToLink() {
  const uint64_t most =
      std::min(kEndedAtOnce + ended_listed() / kEndedAtOnceShare, kMostEndedAtOnce);
  for (uint64_t passed = 0; passed < most; ++passed) {
    const NodeId node = fresh_.first();
    if (node != kNoNode && nodes_[node].state == NodeState::kEnded && IsPast(node)) {
      PopFresh();
      PutInLine(node);
    } else if (!has_graph_) {
      DropEnded();
      return kNoNode;
    } else if (node == kNoNode || (nodes_[node].state != NodeState::kEnded && !IsLifted(node))) {
      return node;
    } else if (linkable() == 0 || ended_listed() > kMostMoved || !ReserveFresh()) {
      return kNoNode;
    } else {
      MoveFreshToEnd();  // Still wanted; those behind it need not wait for the horizon.
    }
  }
  return kNoNode;
}

// The run of unlinked nodes at the front of the list. Where what has ended stands between them, and
// is still wanted, the list is put in order first.
size_t Space::NextToLink(std::span<NodeId> nodes) {
  if (nodes.empty() || NextToLink() == kNoNode) return 0;
  const auto is_unlinked = [this](NodeId node) {
    return nodes_[node].state == NodeState::kUnlinked;
  };
  const auto take_run = [&] {
    const FreshList::Snapshot fresh = fresh_.TakeSnapshot();
    const size_t most = std::min(nodes.size(), fresh.size());
    size_t count = 0;
    while (count < most && is_unlinked(fresh[count])) {
      nodes[count] = fresh[count];
      ++count;
    }
    return count;
  };
  const size_t count = take_run();
  if (2 * count >= std::min<size_t>(nodes.size(), linkable())) return count;
  if (ended_listed() > kMostMoved) return count;
  // What goes behind those that are unlinked is scanned from now on.
  uint64_t listed = waiting_count_;
  uint64_t still_listed = 0;
  const auto leads = [&](NodeId node) {
    const bool unlinked = is_unlinked(node);
    if (listed > 0) {
      --listed;
      still_listed += static_cast<uint64_t>(unlinked);
      if (!unlinked) waiting_->Remove(node);
    }
    return unlinked;
  };
  if (!fresh_.Renew([](NodeId) { return true; }, [](NodeId) {}, leads)) return count;
  waiting_count_ = still_listed;
  return take_run();
}

bool Space::WaitsForHorizon() const {
  if (is_rebuilding() || WantsSweep() || has_retired_codes()) return true;
  const uint64_t outside = retired_ - retired_linked_;
  const uint64_t ended = fresh_.size() - unlinked_;
  if (outside > ended) return true;
  if (ended == 0) return false;
  return has_graph_ || WantsDrop() || nodes_[fresh_.first()].state == NodeState::kEnded;
}

bool Space::WantsSweep() const {
  return rebuild_.step == Rebuild::Step::kLeaving || WantsRetiredSweep();
}

bool Space::WantsRetiredSweep() const {
  if (retired_linked_ == 0) return false;
  if (sweeps_all_ || rebuild_.step == Rebuild::Step::kEnding) return true;
  const uint64_t nodes = graph_.linked_count();
  if (unlinked_ == 0) return retired_linked_ * kIdleSweepShare >= nodes;
  return retired_linked_ >= std::max(kLeastBusySweep, nodes / kBusySweepShare);
}

uint64_t Space::backlog() const {
  if (!has_graph_) return 0;
  const uint64_t gather = graph_.linked_count() / kGatheredShare;
  return unlinked_ + (retired_linked_ > gather ? retired_linked_ - gather : 0);
}

bool Space::BeginSweep(HnswSweep* sweep) {
  if (rebuild_.step == Rebuild::Step::kLeaving && BeginLiftedSweep(sweep)) return true;
  return WantsRetiredSweep() && BeginRetiredSweep(sweep);
}

bool Space::BeginRetiredSweep(HnswSweep* sweep) {
  if (first_sweepable_ == kNoNode) {
    first_sweepable_ = std::exchange(first_retired_, kNoNode);
    sweep_end_ = latest_stamp();
    sweep_epoch_ = kNoEpoch;
  }
  // Recalls of snapshots before these were updated or deleted may still have to find them. Whoever
  // enters once the horizon is past all of them is refused such a snapshot, so the epoch is closed
  // then and not before.
  if (horizon() < sweep_end_) return false;
  if (sweep_epoch_ == kNoEpoch) sweep_epoch_ = epochs_->Close();
  if (!epochs_->Passed(sweep_epoch_)) return false;
  const uint64_t most = std::max<uint64_t>(graph_.linked_count() / kMostSweepShare, 1);
  std::array<NodeId, HnswSweep::kMaxBatch> batch;
  size_t count = 0;
  NodeId node = first_sweepable_;
  for (; node != kNoNode && count < std::min<uint64_t>(most, batch.size()); ++count) {
    batch[count] = node;
    node = nodes_[node].next;
  }
  const std::span<const NodeId> taken(batch.data(), count);
  if (!sweep->Begin(&graph_, LinkTarget(), taken)) return false;
  first_sweepable_ = node;
  retired_linked_ -= static_cast<uint32_t>(count);
  for (const NodeId doomed : taken) nodes_[doomed].state = NodeState::kDoomed;
  return true;
}

void Space::FinishSweep(const HnswSweep& sweep) {
  const bool was_lifted = !sweep.batch().empty() && IsLifted(sweep.batch().front());
  for (const NodeId node : sweep.batch()) {
    if (was_lifted) {
      AwaitReaders(node);
    } else {
      PutInLine(node);
    }
  }
  if (was_lifted) rebuild_.step = Rebuild::Step::kForgetting;
}

void Space::PutInLine(NodeId node) {
  nodes_[node].state = NodeState::kWaiting;
  AwaitReaders(node);
}

void Space::AwaitReaders(NodeId node) {
  nodes_[node].next = first_waiting_;
  first_waiting_ = node;
}

bool Space::Reclaim(size_t max_nodes) {
  fresh_.Reclaim();
  ReclaimCodes();
  for (size_t freed = 0; freed < max_nodes; ++freed) {
    if (first_closing_ == kNoNode) {
      if (first_waiting_ == kNoNode) return false;
      first_closing_ = std::exchange(first_waiting_, kNoNode);
      closing_epoch_ = epochs_->Close();
    }
    if (!epochs_->Passed(closing_epoch_)) return true;
    const NodeId node = first_closing_;
    first_closing_ = nodes_[node].next;
    if (IsLifted(node)) {
      PutBack(node);
      continue;
    }
    if (save_ != nullptr && save_->MustKeep(node)) {
      if (first_kept_ == kNoNode) last_kept_ = node;
      nodes_[node].next = std::exchange(first_kept_, node);
      continue;
    }
    if (graph_.IsDoomed(node)) {
      if (lists_) lists_->Remove(node);
      graph_.Forget(node);
    }
    --retired_;
    ++reclaimed_;
    FreeNode(node);
  }
  return first_closing_ != kNoNode || first_waiting_ != kNoNode;
}

bool Space::Dismantle(size_t max_nodes) {
  const uint32_t count = node_count();
  for (; max_nodes > 0 && dismantled_ < count; --max_nodes) {
    attributes_.Remove(dismantled_);
    FreeText(&nodes_[dismantled_++]);
  }
  if (dismantled_ < count) return false;
  node_count_.store(0, std::memory_order_relaxed);
  return true;
}

// What was kept for it may be given back.
void Space::EndSave() {
  save_ = nullptr;
  if (first_kept_ == kNoNode) return;
  nodes_[last_kept_].next = std::exchange(first_waiting_, first_kept_);
  first_kept_ = kNoNode;
}

}  // namespace engram
