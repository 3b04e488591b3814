// What ends in a shard by age, and what its spaces may take (see shard.h;
// src/design/0014-space-lifecycle.md).
//
// TTL: an observation ends `ttl_ns` after its stamp. The shard that stores it ends it, in slices,
// in each round in which no recall is under way, and once more before a recall of its space begins.
// Nothing is logged: what a replay brings that has ended is not stored again.
//
// Quotas: each shard publishes what its partition has (SpaceEntry::PublishUse).
// 1. Refuse: the home compares the sum, and what it has under way itself, before it logs. Other
//    homes may have as much under way as their ledgers hold. An update counts as nothing, unless a
//    delete of the space is under way, which may be of the very content that it counts on.
// 2. Evict: whoever stores ends the oldest of its own as long as the sum is over the quota and its
//    partition has more than its share. With one partition that is right after the store, so the
//    same observations end again when the log is replayed. What was there when a checkpoint was
//    made, and what had been evicted by then, the checkpoint says; nothing is evicted again before
//    the replay is past it. A partition keeps its last content whatever its share is: that may be
//    what it has just acknowledged.

#include <algorithm>

#include "index/shard.h"

namespace engram {

namespace {

// Ended in one round, more than are stored in one; and before one recall: some tens of us.
constexpr int kEndedAtOnce = 256;
// By one store: the one that it is too much, and some of what a smaller quota has left.
constexpr int kEvictedByStore = 4;
// Spaces that are looked at in one round, and in one that had nothing else to do: then some tens of
// us.
constexpr size_t kAgingSpaces = 8;
constexpr size_t kIdleAgingSpaces = 256;

}  // namespace

// What has this stamp would have ended by now.
bool Shard::HasEnded(uint32_t space, CommitStamp stamp) const {
  const SpaceEntry& entry = *entries_[space];
  if (!entry.ends_by_age()) return false;
  return stamp <= spaces_[space]->evicted_up_to() ||
         (entry.ttl_ns() > 0 && EndOf(entry, stamp) <= static_cast<CommitStamp>(unix_ns_));
}

CommitStamp Shard::EndOf(const SpaceEntry& entry, CommitStamp stamp) {
  return stamp + static_cast<CommitStamp>(entry.ttl_ns());
}

int Shard::EndByAge(bool busy) {
  int ended = 0;
  const size_t looks = std::min(busy ? kAgingSpaces : kIdleAgingSpaces, aging_.size());
  for (size_t n = 0; n < looks && ended < kEndedAtOnce; ++n) {
    aging_turn_ = (aging_turn_ + 1) % aging_.size();
    ended += EndByAgeIn(aging_[aging_turn_], kEndedAtOnce - ended);
  }
  return ended;
}

void Shard::EndBeforeAnswer(uint32_t space) {
  if (entries_[space]->ends_by_age()) EndByAgeIn(space, kEndedAtOnce);
}

int Shard::EndByAgeIn(uint32_t index, int most) {
  Space& space = *spaces_[index];
  const SpaceEntry& entry = *entries_[index];
  const auto now = static_cast<CommitStamp>(unix_ns_);
  int ended = 0;
  for (; entry.ttl_ns() > 0 && ended < most; ++ended) {
    const CommitStamp oldest = space.oldest_content();
    if (oldest == kOpenStamp || EndOf(entry, oldest) > now) break;
    space.EndOldest(EndOf(entry, oldest));
  }
  if (ended > 0) {
    counters_[ShardCounter::kObservationsExpired].Add(static_cast<uint64_t>(ended));
    PublishUse(index);
  }
  if (!is_recovering()) ended += Evict(index, now, most - ended);
  if (ended > 0) QueueForUpkeep(index);
  return ended;
}

// The space has stored something with this stamp.
void Shard::KeepToQuota(uint32_t space, CommitStamp stamp) {
  if (!entries_[space]->has_quota()) return;
  PublishUse(space);
  if (is_recovering() && stamp <= spaces_[space]->loaded_up_to()) return;
  if (Evict(space, stamp, kEvictedByStore) > 0) QueueForUpkeep(space);
}

int Shard::Evict(uint32_t space, CommitStamp end, int most) {
  if (!entries_[space]->evicts()) return 0;
  int evicted = 0;
  for (; evicted < most && IsOverShare(space); ++evicted) {
    spaces_[space]->EvictOldest(end);
    PublishUse(space);
  }
  if (evicted > 0) {
    counters_[ShardCounter::kObservationsEvicted].Add(static_cast<uint64_t>(evicted));
  }
  return evicted;
}

// All partitions have more than the quota, and this one has part in it; but what is alone in its
// partition may be what was just stored.
bool Shard::IsOverShare(uint32_t space) const {
  const SpaceEntry& entry = *entries_[space];
  const Space& part = *spaces_[space];
  const uint16_t partitions = entry.partitions();
  const SpaceEntry::Use total = entry.TotalUse();
  const uint64_t contents = part.live() + part.hidden();
  const auto is_over = [partitions](uint64_t all, uint64_t own, uint64_t quota) {
    return quota > 0 && all > quota && own > quota / partitions;
  };
  return contents > 1 && (is_over(total.observations, contents, entry.quota_observations()) ||
                          is_over(total.bytes, part.content_bytes(), entry.quota_bytes()));
}

void Shard::PublishUse(uint32_t space) {
  SpaceEntry& entry = *entries_[space];
  if (!entry.has_quota() || partition_of_[space] == SpaceEntry::kNoPartition) return;
  const Space& part = *spaces_[space];
  entry.PublishUse(partition_of_[space],
                   {.observations = part.live() + part.hidden(), .bytes = part.content_bytes()});
}

// Whether the quota has room for what this home is about to take; *grows: it needs some.
RefusalReason Shard::JudgeQuota(uint32_t space, const ObserveRequest& request, bool* grows) {
  const SpaceEntry& entry = *entries_[space];
  *grows = false;
  if (!entry.has_quota() || entry.evicts() || request.op != ObservationOp::kUpsert) {
    return RefusalReason::kNone;
  }
  // Only here is it known what an update is.
  if (entry.partitions() == 1 && partition_of_[space] == 0 &&
      spaces_[space]->HasContent(ObservationIn(request).id)) {
    *grows = deleting_[space] > 0;
    return RefusalReason::kNone;
  }
  *grows = true;
  const RefusalReason reason = JudgeGrowth(space, request);
  // What has expired is in nobody's way, though its turn may not have come.
  if (reason == RefusalReason::kNone || EndByAgeIn(space, kEndedAtOnce) == 0) return reason;
  return JudgeGrowth(space, request);
}

RefusalReason Shard::JudgeGrowth(uint32_t space, const ObserveRequest& request) const {
  const SpaceEntry& entry = *entries_[space];
  const SpaceEntry::Use total = entry.TotalUse();
  const uint64_t growth = growing_[space] + uint64_t{1};
  if (entry.quota_observations() > 0 && total.observations + growth > entry.quota_observations()) {
    return RefusalReason::kQuotaObservations;
  }
  if (entry.quota_bytes() > 0 &&
      total.bytes + growth * PendingBytes(request) > entry.quota_bytes()) {
    return RefusalReason::kQuotaMemory;
  }
  return RefusalReason::kNone;
}

}  // namespace engram
