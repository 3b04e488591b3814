// Observations of spaces with several partitions (see shard.h; DESIGN, principles 5 and 6).
//
// 1. The home shard of a session takes its observations in their order, and logs them
//    (shard_taking.cc).
// 2. The home stores it where it owns the id itself; else it asks the owner (kStore), which answers
//    when it is visible. An owner that has no room lets the request wait: there are no refusals
//    between shards. The home's ledger fills, and it refuses its clients.
// 3. Where the space has grown the id may lie with a shard that owned it when there were fewer
//    partitions. Each of those is told to end what it has with an earlier stamp (kRetire), and
//    keeps a tombstone, in case an earlier one is under way to it. How many there are is read again
//    after each answer.
// 4. One of those may have a later stamp: then the owner is told to end what was just stored.
// 5. The client is answered, in the order of its session.
//
// A suppress or a restore goes the same way, but each shard in 2. and 3. does it itself (kStore) to
// what it has of the id, as what is stored stays where it lies and the owner may have nothing. It
// takes no part in the argument below, since the content keeps its stamp: of two contents the later
// one stands, whatever was hidden or restored meanwhile; what kRetire and step 4 end may be hidden.
// So once all is answered at most one version of an id is live or hidden, and the next suppress or
// restore reaches it: its home sees as many partitions as the home of any observation that was
// answered before. Where several versions are hidden or restored for a moment, no complete snapshot
// has come to the later one's stamp yet, and what ends the earlier ones ends them at that stamp
// (Space::EndEarlier).
//
// Why of two observations with one id the later stamp stands, wherever the two homes sent them: let
// s be the earlier stamp, stored in p, and t the later one, stored in q. If t's home tells p, it
// ends s, or its tombstone meets it. Else t's home knew fewer partitions than s's, and s's home
// tells q. If t is there, the answer says so, and step 4 ends s. If it is not there yet, then by
// the time that t's home has its answer from q it sees as many partitions as s's home did, and step
// 3 goes on to p. Tombstones are kept until no home has anything earlier under way (StampBoard).
//
// A restart may store an observation elsewhere than at first: the space has grown since, or there
// is another number of shards, and then tombstones are handed on, too, as deletes. So t may come to
// the very tombstone with the stamp t that ended s on its behalf: then t stands (Space::Upsert).
// And it may be replayed into q while p was loaded with it. It stays in p, and q yields (kYield):
// what ends there leaves a tombstone with the stamp t, never a later one, against which t would
// lose in p once both are handed on.

#include <algorithm>
#include <climits>
#include <utility>

#include "index/shard.h"
#include "src/core/check.h"

namespace engram {

namespace {

constexpr size_t kPeerBatch = 64;
// How much longer what ended is kept for snapshots that have to wait for a forward.
constexpr int64_t kLongestForwardNs = 30 * kNanosPerSecond;

}  // namespace

// The answer to what needs no other shard, after the session's earlier ones.
void Shard::QueueAnswer(Session* session, size_t producer, const Completion& completion) {
  if (session->first_forward == 0) {
    session->told_sequence = std::max(session->told_sequence, completion.sequence);
    Complete(producer, completion);
    return;
  }
  Forward& forward = ledger_.At(ledger_.Add(session));
  forward.producer = ProducerId(static_cast<uint16_t>(producer));
  forward.completion = completion;
}

// 3. to 5., as far as it goes without another answer.
void Shard::StepForward(uint64_t ticket) {
  Forward& forward = ledger_.At(ticket);
  while (NextTarget(&forward)) {
    if (!Tell(ticket) || forward.target != port_.shard) return;
  }
  FinishForward(ticket);
}

void Shard::FinishForward(uint64_t ticket) {
  Forward& forward = ledger_.At(ticket);
  if (std::exchange(forward.grows, false)) --growing_[space_of_entry_[forward.space]];
  if (std::exchange(forward.deletes, false)) --deleting_[space_of_entry_[forward.space]];
  ledger_.Finish(ticket, [this](const Forward& done) { AnswerForward(done); });
}

// Which shard is told next; false when all were. An id stays with its partition or moves to a later
// one as they double, so an owner that comes again follows itself.
bool Shard::NextTarget(Forward* forward) const {
  const SpaceEntry& entry = *port_.catalogue->At(forward->space);
  if (forward->step == Forward::Step::kStore) forward->step = Forward::Step::kRetire;
  if (forward->step == Forward::Step::kLose) return false;
  while (forward->next_partitions <= entry.partitions()) {
    const uint32_t partitions = forward->next_partitions;
    forward->next_partitions *= 2;
    const uint16_t partition = PartitionOf(forward->id_hash, static_cast<uint16_t>(partitions));
    if (partitions > entry.first_partitions() &&
        partition == PartitionOf(forward->id_hash, static_cast<uint16_t>(partitions / 2))) {
      continue;
    }
    forward->target = entry.ShardOf(partition);
    if (forward->target != forward->owner) return true;
  }
  if (!forward->is_upsert) return false;
  if (forward->later <= forward->stamp && !forward->is_elsewhere) return false;
  forward->step = Forward::Step::kLose;
  forward->target = forward->owner;
  return true;
}

// Tells the target, or does it where that is this shard. False when it has to wait in the line.
bool Shard::Tell(uint64_t ticket) {
  Forward& forward = ledger_.At(ticket);
  const ShardId target = forward.target;
  const bool is_first = !forward.waits_to_send && ledger_.FirstInLine(target) == 0;
  if (is_first || ledger_.FirstInLine(target) == ticket) {
    // No space changes while it is being recalled.
    const bool told = target != port_.shard ? Send(ticket) : !IsAnswering() && DoHere(&forward);
    if (told) {
      if (forward.waits_to_send) ledger_.LeaveLine(target);
      return true;
    }
  }
  if (!forward.waits_to_send) ledger_.Line(target, ticket);
  return false;
}

bool Shard::Send(uint64_t ticket) {
  const Forward& forward = ledger_.At(ticket);
  const size_t to = forward.target.value();
  PeerLink& link = port_.peers[to];
  // As many answers fit the ring back.
  if (asked_[to] >= link.requests_out.capacity()) return false;
  const bool pushed = link.requests_out.TryPush({.kind = MessageOf(forward),
                                                 .existed = false,
                                                 .request = forward.request,
                                                 .space = forward.space,
                                                 .ticket = ticket,
                                                 .stamp = StampOf(forward)});
  CHECK(pushed, "no more messages are under way than the ring has room for");
  ++asked_[to];
  return true;
}

// False where there is no memory for it, or no room for what is restored.
bool Shard::DoHere(Forward* forward) {
  const uint32_t space = FindOrMakeSpace(port_.catalogue->At(forward->space));
  // What was logged has been judged: its room is its own.
  const StoreOutcome outcome =
      DoAsAsked(MessageOf(*forward), space, *forward->request, StampOf(*forward), true);
  if (outcome.reason != RefusalReason::kNone) return false;
  NoteOutcome(forward, outcome.existed, outcome.later);
  return true;
}

PeerMessage::Kind Shard::MessageOf(const Forward& forward) {
  if (forward.step == Forward::Step::kStore || forward.is_same_everywhere) {
    return PeerMessage::Kind::kStore;
  }
  const bool yields = forward.step == Forward::Step::kLose && forward.later <= forward.stamp;
  return yields ? PeerMessage::Kind::kYield : PeerMessage::Kind::kRetire;
}

CommitStamp Shard::StampOf(const Forward& forward) {
  return forward.step == Forward::Step::kLose ? std::max(forward.stamp, forward.later)
                                              : forward.stamp;
}

// What an earlier owner has under the same stamp was loaded from a checkpoint, and is replayed
// since into a partition that came later. It stays there, where it may have been hidden, and the
// owner's ends.
void Shard::NoteOutcome(Forward* forward, bool existed, CommitStamp later) {
  forward->existed |= existed;
  forward->later = std::max(forward->later, later);
  if (forward->step == Forward::Step::kRetire && existed && later == forward->stamp) {
    forward->is_elsewhere = true;
  }
}

StoreOutcome Shard::DoAsAsked(PeerMessage::Kind kind, uint32_t space, const ObserveRequest& request,
                              CommitStamp stamp, bool in_credit) {
  const ReplayScope scope(request.address);  // Only while shards recover does anyone look at it.
  if (IsDropped(space, stamp)) return {};
  if (kind == PeerMessage::Kind::kStore) return Store(space, request, stamp, in_credit);
  const std::string_view id = ObservationIn(request).id;
  const StoreOutcome outcome = kind == PeerMessage::Kind::kYield
                                   ? spaces_[space]->Yield(id, stamp)
                                   : spaces_[space]->Delete(id, stamp, true);
  QueueForUpkeep(space);
  return outcome;
}

void Shard::AnswerForward(const Forward& forward) {
  if (forward.is_replayed) {
    FreeReplayed(forward);
    return;
  }
  if (forward.session != nullptr) {
    Sequence& told = forward.session->told_sequence;
    told = std::max(told, forward.completion.sequence);
  } else {
    auto* request = reinterpret_cast<ObserveRequest*>(
        port_.producers[forward.producer.value()].producer_slab->At(forward.completion.slot));
    request->existed = forward.existed;
    request->stamp = forward.stamp;
  }
  // What only waited for its turn was visible, or nothing, before.
  if (forward.stamp != kNoStamp && forward.completion.reason == RefusalReason::kNone) {
    receive_to_visible_.Record(now_ns_ - forward.received_ns);
  }
  Completion completion = forward.completion;
  // There is more room than when it was taken.
  if (forward.session != nullptr) completion.credit_sequence = CreditOf(forward.session);
  Complete(forward.producer.value(), completion);
}

int Shard::TakePeerAnswers() {
  int work = 0;
  for (size_t s = 0; s < port_.peers.size(); ++s) {
    if (s == port_.shard.value()) continue;
    for (size_t n = 0; n < kPeerBatch; ++n) {
      const auto answer = port_.peers[s].done_in.TryPop();
      if (!answer) break;
      --asked_[s];
      Forward& forward = ledger_.At(answer->ticket);
      NoteOutcome(&forward, answer->existed, answer->stamp);
      StepForward(answer->ticket);
      ++work;
    }
  }
  return work;
}

// What waits for a shard that had enough to do, or here for memory.
int Shard::SendWaiting() {
  int work = 0;
  for (size_t s = 0; s < asked_.size(); ++s) {
    const ShardId shard(static_cast<uint16_t>(s));
    for (uint64_t ticket = ledger_.FirstInLine(shard); ticket != 0 && Tell(ticket);
         ticket = ledger_.FirstInLine(shard)) {
      if (shard == port_.shard) StepForward(ticket);
      ++work;
    }
  }
  return work;
}

int Shard::TakePeerRequests() {
  int work = 0;
  const int most = lists_ ? static_cast<int>(kMostListedAtOnce) : INT_MAX;
  first_peer_ = (first_peer_ + 1) % port_.peers.size();
  for (size_t i = 0; i < port_.peers.size(); ++i) {
    const size_t s = (first_peer_ + i) % port_.peers.size();
    const ShardId home(static_cast<uint16_t>(s));
    if (home == port_.shard) continue;
    for (size_t n = 0; n < kPeerBatch && work < most; ++n) {
      if (!held_[s]) held_[s] = port_.peers[s].requests_in.TryPop();
      if (!held_[s] || !TakePeerRequest(home, *held_[s])) break;
      held_[s].reset();
      ++work;
    }
  }
  return work;
}

// False when it has to wait for room.
bool Shard::TakePeerRequest(ShardId home, const PeerMessage& message) {
  const ObserveRequest& request = *message.request;
  const uint32_t space = FindOrMakeSpace(port_.catalogue->At(message.space));
  if (request.op == ObservationOp::kSkip) {
    // A session that belongs here, from the log of another shard.
    if (!IsDropped(space, message.stamp)) {
      sessions_.Restore(request.session, space, request.sequence, request.when_ns);
    }
    return Answer(home, message, {});
  }
  const StoreOutcome outcome =
      DoAsAsked(message.kind, space, request, message.stamp, is_recovering());
  if (outcome.reason != RefusalReason::kNone) {
    CHECK(outcome.reason == RefusalReason::kMemoryFull ||
              outcome.reason == RefusalReason::kBacklogFull,
          "the home has judged it");
    return false;
  }
  return Answer(home, message, outcome);
}

bool Shard::Answer(ShardId home, const PeerMessage& message, const StoreOutcome& outcome) {
  PeerMessage answer = message;
  answer.kind = PeerMessage::Kind::kDone;
  answer.existed = outcome.existed;
  answer.stamp = outcome.later;
  const bool pushed = port_.peers[home.value()].done_out.TryPush(answer);
  CHECK(pushed, "the ring has room for every answer");
  return true;
}

// A partition of the newest half that is full, or busy (more waits for the graph than credit is
// given for), doubles them. The older half keeps what it had, so it would go on being full.
void Shard::GrowIfFull(uint32_t space) {
  SpaceEntry& entry = *entries_[space];
  const uint16_t partitions = entry.partitions();
  if (options_.grow_partition_at == 0 || partitions == entry.max_partitions() ||
      partition_of_[space] < partitions / 2) {
    return;
  }
  const Space& part = *spaces_[space];
  const bool is_full = part.live() >= options_.grow_partition_at;
  const bool is_busy =
      part.backlog() > 0 && part.backlog() >= part.NodesInBytes(options_.unlinked_limit_bytes);
  if (!is_full && !is_busy) return;
  if (entry.Grow(partitions, generation_of_[space])) counters_[ShardCounter::kSpacesGrown].Add(1);
}

// No home has anything earlier under way.
CommitStamp Shard::CompleteEverywhere() const {
  CommitStamp complete = kOpenStamp;
  for (uint16_t s = 0; s < port_.stamps->shards(); ++s) {
    complete = std::min(complete, port_.stamps->CompleteUpTo(ShardId(s), unix_ns_));
  }
  return complete;
}

// What ended before is kept no longer. A snapshot of now is as early as the earliest forward; but
// one that waits for memory must not keep what would free it.
CommitStamp Shard::Horizon(CommitStamp complete) const {
  const auto before = [this](int64_t age_ns) {
    return static_cast<CommitStamp>(std::max<int64_t>(unix_ns_ - age_ns, 0));
  };
  const int64_t longest_ns = options_.snapshot_keep_ns + kLongestForwardNs;
  return std::min(before(options_.snapshot_keep_ns), std::max(complete, before(longest_ns)));
}

}  // namespace engram
