// The background work of a shard (see shard.h): giving back what has ended, sweeping it out of the
// graph, and linking what waits, in slices between what it serves.

#include <algorithm>
#include <utility>

#include "index/shard.h"

namespace engram {

namespace {

// A link's slice, with observations coming in.
constexpr uint32_t kBusyLinkDistances = 64;
// Of more slices in a round than one.
constexpr int64_t kMostSlicesNs = 100'000;
constexpr uint64_t kMostOwed = 8'192;
// A batch of so many costs little more a node than a larger one.
constexpr uint64_t kWorthwhileBatch = 100;
constexpr int64_t kLinkRetryNs = 100 * kNanosPerMilli;
// Nodes given back in one round of upkeep.
constexpr size_t kReclaimBatch = 64;
// And this share of those that hold a place, up to a bound of the round: some 100 us.
constexpr size_t kReclaimShare = 64;
constexpr size_t kMostReclaimed = 2'048;
// As many end as come, also where more than so many have, and a share of what lives.
constexpr uint64_t kMostRetired = 1'024;
constexpr uint64_t kRetiredShare = 16;
// From so many on that have ended and are listed still, upkeep takes longer slices: nothing of them
// is given back while a batch is linked.
constexpr uint64_t kMostEndedListed = 8'192;
// Of what is not linked, the share that has ended from which on the rest will too.
constexpr uint64_t kFutileShare = 8;
// Spaces that are looked at in one round of upkeep.
constexpr size_t kUpkeepSpaces = 8;
// Places that a rebuild looks at in one round: some 20 us.
constexpr size_t kRebuildLooks = 256;

}  // namespace

// A slice, and more where recalls came that it is owed a share of.
int Shard::Upkeep(bool busy) {
  const uint64_t recalled = RecallDistances();
  const uint64_t share = recalled - std::exchange(recalled_, recalled);
  owed_ = busy ? 0 : std::min(owed_ + share, kMostOwed);
  const int64_t until_ns = owed_ > kIdleLinkDistances ? clock_->MonotonicNs() + kMostSlicesNs : 0;
  int slices = 0;
  while (slices < kMostSlices && StepUpkeep(busy) > 0) {
    ++slices;
    owed_ -= std::min<uint64_t>(owed_, kIdleLinkDistances);
    if (owed_ == 0 || clock_->MonotonicNs() > until_ns) return slices;
  }
  // There is nothing more to do.
  if (slices < kMostSlices) owed_ = 0;
  return slices;
}

// A slice of the sweep or of the link under way, in turn where there are both; else a new one is
// begun.
int Shard::StepUpkeep(bool busy) {
  if (!linker_.active() && !sweep_.repairing_tree() && !BeginUpkeep(busy) && !sweep_.active()) {
    return 0;
  }
  const bool is_behind =
      linker_.active() && spaces_[linking_space_]->ended_listed() > kMostEndedListed;
  const uint32_t distances = busy && !is_behind ? kBusyLinkDistances : kIdleLinkDistances;
  sweep_turn_ = !sweep_turn_;
  if (sweep_.active() && (sweep_turn_ || !linker_.active())) {
    StepSweep(distances);
  } else if (linker_.active()) {
    StepLink(distances);
  }
  return 1;
}

// Looks at some spaces. False when none of the queue has anything to do now.
bool Shard::BeginUpkeep(bool busy) {
  for (size_t tried = 0; tried < kUpkeepSpaces && !upkeep_queue_.empty(); ++tried) {
    if (BeginUpkeepOfNext(busy)) {
      fruitless_turns_ = 0;
      return true;
    }
    ++fruitless_turns_;
  }
  return fruitless_turns_ < upkeep_queue_.size();
}

// The next space in turn: gives back, then sweeps or links. False when there is nothing to do, or
// only once recalls of earlier snapshots can no longer come; it stays in the queue then.
bool Shard::BeginUpkeepOfNext(bool busy) {
  upkeep_turn_ = (upkeep_turn_ + 1) % upkeep_queue_.size();
  const uint32_t index = upkeep_queue_[upkeep_turn_];
  if (entries_[index]->is_dropping()) return false;
  Space& space = *spaces_[index];
  const CommitStamp complete = CompleteEverywhere();
  space.SetHorizon(Horizon(complete));
  const NodeId node = space.NextToLink();
  const uint64_t kept = space.retired() + space.tombstones() + space.lifted();
  // What a sweep took out is on no linker's way once the linker was free after it, as it is now,
  // and on that of the next sweep it never was. Where as many end as come, that one is not awaited.
  bool has_more = false;
  if (entries_[index]->ends_by_age() ||
      space.retired() > kMostRetired + space.live() / kRetiredShare) {
    space.Reclaim(std::min(kReclaimBatch + space.retired() / kReclaimShare, kMostReclaimed));
  } else if (!sweep_.active()) {
    has_more = space.Reclaim(kReclaimBatch);
  }
  if (!keeps_tombstones_) space.ForgetTombstones(complete);
  const bool has_freed = space.retired() + space.tombstones() + space.lifted() < kept;
  // A batch that is begun now lets none be given back for long.
  if (has_more && has_freed && space.LinksInBatches()) {
    PublishUse(index);
    return true;
  }
  const bool has_rebuilt = space.is_rebuilding() && space.StepRebuild(kRebuildLooks);
  const bool is_behind = space.backlog() > space.unlinked_count();
  // What a space needs in memory is less by its part of what has ended.
  if (has_freed) PublishUse(index);
  if (!sweep_.active() && space.WantsSweep() && space.BeginSweep(&sweep_)) {
    sweeping_space_ = index;
    if (is_behind) AnnounceCredit(index);
    return true;
  }
  if (node != kNoNode || space.WantsCodes()) {
    if (now_ns_ < link_retry_ns_) return has_freed;
    // Codes pay under load most of all.
    if (busy && !space.WantsCodes() && EndsBeforeItIsLinked(space)) return has_freed;
    if (WaitsForBatch(index)) return has_freed;
    link_began_ns_ = now_ns_;
    switch (linker_.Begin(&space)) {
      case SpaceLinker::Begun::kStarted:
        linking_space_ = index;
        link_due_ns_[index] = 0;
        return true;
      case SpaceLinker::Begun::kNothing:
        return has_freed;
      case SpaceLinker::Begun::kMemoryShort:
        break;
    }
    // Memory is short. What is not linked stays visible by the scan.
    link_retry_ns_ = now_ns_ + kLinkRetryNs;
    return has_freed;
  }
  if (has_freed || has_rebuilt) return true;
  // It passed over some that have ended, or are on their way out of the graph.
  if (space.has_graph() && space.linkable() > 0) return true;
  const bool is_done = !space.WaitsForHorizon() && !space.has_tombstones();
  if (is_done) {
    upkeep_queued_[index] = false;
    upkeep_queue_[upkeep_turn_] = upkeep_queue_.back();
    upkeep_queue_.pop_back();
  }
  if (credit_due_[index]) {
    credit_due_[index] = false;
    announced_links_[index] = 0;
    AnnounceCredit(index);
  }
  return is_done;
}

// So much of what waited has ended within the time for which snapshots are kept that the rest will
// have before its turn comes: the time for linking is better spent on taking more.
bool Shard::EndsBeforeItIsLinked(const Space& space) {
  const uint64_t ended = space.ended_listed();
  return ended > kMostEndedListed && ended * kFutileShare > space.unlinked_count();
}

// A batch costs less a node than each of few, so these wait for others, but not long. A rebuild
// waits for them: what it takes out of the graph next comes once they are linked.
bool Shard::WaitsForBatch(uint32_t index) {
  const Space& space = *spaces_[index];
  if (space.WantsCodes() || !space.LinksInBatches() || space.is_rebuilding()) return false;
  if (space.linkable() >= kWorthwhileBatch) return false;
  if (link_due_ns_[index] == 0) link_due_ns_[index] = now_ns_ + options_.link_wait_ns;
  return now_ns_ < link_due_ns_[index];
}

void Shard::StepSweep(uint32_t distances) {
  const uint64_t before = sweep_.distances();
  if (sweep_.Step(distances)) {
    spaces_[sweeping_space_]->FinishSweep(sweep_);
    counters_[ShardCounter::kObservationsSwept].Add(sweep_.batch().size());
  }
  counters_[ShardCounter::kSweepDistances].Add(sweep_.distances() - before);
}

// What waited before there were codes is listed meanwhile, though nothing arrives.
void Shard::StepLink(uint32_t distances) {
  Space& space = *spaces_[linking_space_];
  if (list_beside_ > 0 && space.WantsListing()) list_beside_ -= space.ListSome(list_beside_);
  const uint64_t before = linker_.distances();
  if (linker_.Step(distances)) FinishLink();
  counters_[ShardCounter::kLinkDistances].Add(linker_.distances() - before);
}

void Shard::FinishLink() {
  const uint32_t linked = linker_.linked();
  if (linked == 0) return;
  counters_[ShardCounter::kObservationsLinked].Add(linked);
  const double ns = static_cast<double>(now_ns_ - link_began_ns_) / linked;
  const double weight = std::min(0.01 * linked, 0.5);
  link_ns_ = (1 - weight) * link_ns_ + weight * ns;
  announced_links_[linking_space_] += linked;
  if (announced_links_[linking_space_] >= kCreditEvery) {
    announced_links_[linking_space_] = 0;
    AnnounceCredit(linking_space_);
  }
}

void Shard::QueueForUpkeep(uint32_t space) {
  PublishUse(space);
  credit_due_[space] = true;
  fruitless_turns_ = 0;
  if (upkeep_queued_[space]) return;
  upkeep_queued_[space] = true;
  upkeep_queue_.push_back(space);
}

}  // namespace engram
