// How a space has all that is in its graph linked anew, while it serves (see space.h;
// src/design/0014-space-lifecycle.md).
//
// Each node stays where it is, with all that it has; only its links go. Batch after batch:
// 1. Lift: some of the nodes that are linked as before are listed as fresh nodes again. From now on
//    recalls scan them, whatever becomes of their links.
// 2. Once no reader is inside that has not seen them in the list, a sweep takes them out of the
//    graph and mends the lists around them.
// 3. Once no reader can be on them the graph forgets them (Reclaim). They are unlinked nodes like
//    others then, or ended ones.
// 4. They are linked in their turn, with the others that wait. Then comes the next batch.
// 5. After the last batch: what had ended before, and was still in the graph, is swept out as soon
//    as no recall may ask for it.
//
// The graph counts what is left of the earlier generation (HnswGraph::BeginGeneration). So at the
// end every link is between nodes that were both linked, or linked anew, since the rebuild began.

#include <algorithm>
#include <array>
#include <bit>
#include <span>
#include <utility>

#include "index/space.h"
#include "src/core/check.h"

namespace engram {

namespace {

// Places are visited so that each batch is spread over all of them: those that came together are
// often neighbours, and lists lose few of their links at once. Odd, so that every place of a power
// of two comes once; the golden ratio, so that any stretch of the visit is spread evenly (Knuth,
// TAOCP 3, 6.4).
constexpr uint64_t kStride = 0x9E3779B97F4A7C15;

}  // namespace

void Space::BeginRebuild(uint64_t most) {
  CHECK(!is_rebuilding(), "one rebuild at a time");
  graph_.BeginGeneration();
  rebuild_ = Rebuild{.step = Rebuild::Step::kLinking,
                     .most = std::max<uint64_t>(most, 1),
                     .turns = std::bit_ceil(uint64_t{node_count()})};
}

bool Space::StepRebuild(size_t max_nodes) {
  const Rebuild::Step before = rebuild_.step;
  switch (before) {
    case Rebuild::Step::kLifting:
      return LiftSome(max_nodes);
    case Rebuild::Step::kForgetting:
      if (lifted_ > 0) break;
      rebuild_.linked_when = taken_first_ + fresh_.size();
      rebuild_.step = Rebuild::Step::kLinking;
      break;
    case Rebuild::Step::kLinking:
      if (taken_first_ < rebuild_.linked_when) break;
      rebuild_.step = graph_.earlier_count() > 0 && rebuild_.visited < rebuild_.turns
                          ? Rebuild::Step::kLifting
                          : Rebuild::Step::kEnding;
      // No sweep takes more than its share.
      rebuild_.most_now =
          std::clamp<uint64_t>(graph_.linked_count() / kMostSweepShare, 1,
                               std::min<uint64_t>(rebuild_.most, HnswSweep::kMaxBatch));
      break;
    case Rebuild::Step::kEnding:
      if (graph_.earlier_count() == 0) rebuild_ = Rebuild{};
      break;
    case Rebuild::Step::kNone:
    case Rebuild::Step::kLeaving:
    case Rebuild::Step::kSweeping:
      break;
  }
  return rebuild_.step != before;
}

// 1. Where memory is short it goes on with what it has, or waits.
bool Space::LiftSome(size_t max_nodes) {
  const uint64_t before = rebuild_.visited;
  bool is_full = false;
  for (size_t i = 0; i < max_nodes && rebuild_.visited < rebuild_.turns && !is_full; ++i) {
    const auto node = static_cast<NodeId>(rebuild_.visited * kStride & (rebuild_.turns - 1));
    if (node < node_count() && nodes_[node].state == NodeState::kLinked && graph_.IsEarlier(node)) {
      if (!ReserveFresh()) {
        is_full = lifted_ > 0;
        break;
      }
      fresh_.Append(node);
      nodes_[node].state = NodeState::kLifted;
      nodes_[node].next = std::exchange(first_lifted_, node);
      ++unlinked_;
      ++lifted_;
      ++lifted_live_;
      ++lifted_ever_;
      is_full = lifted_ >= rebuild_.most_now;
    }
    ++rebuild_.visited;
  }
  if (lifted_ > 0 && (is_full || rebuild_.visited == rebuild_.turns)) {
    rebuild_.epoch = epochs_->Close();
    rebuild_.step = Rebuild::Step::kLeaving;
    return true;
  }
  if (rebuild_.visited == rebuild_.turns) rebuild_.step = Rebuild::Step::kEnding;
  return rebuild_.visited > before;
}

// 2.
bool Space::BeginLiftedSweep(HnswSweep* sweep) {
  if (!epochs_->Passed(rebuild_.epoch)) return false;
  std::array<NodeId, HnswSweep::kMaxBatch> batch;
  size_t count = 0;
  for (NodeId node = first_lifted_; node != kNoNode; node = nodes_[node].next) {
    batch[count++] = node;
  }
  if (!sweep->Begin(&graph_, LinkTarget(), std::span(batch).first(count))) return false;
  first_lifted_ = kNoNode;
  rebuild_.step = Rebuild::Step::kSweeping;
  return true;
}

// 3. Nothing leads to it, and no reader is on it.
void Space::PutBack(NodeId node) {
  if (lists_) lists_->Remove(node);
  graph_.Forget(node);
  --lifted_;
  if (nodes_[node].state == NodeState::kLiftedEnded) {
    nodes_[node].state = NodeState::kEnded;
    return;
  }
  nodes_[node].state = NodeState::kUnlinked;
  --lifted_live_;
  ++relinked_;
}

uint64_t Space::rebuild_left() const {
  if (!is_rebuilding()) return 0;
  const bool is_linking = rebuild_.step == Rebuild::Step::kLinking;
  return graph_.earlier_count() + (is_linking && rebuild_.linked_when > taken_first_
                                       ? rebuild_.linked_when - taken_first_
                                       : 0);
}

}  // namespace engram
