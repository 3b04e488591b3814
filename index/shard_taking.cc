// How a home shard takes observations (see shard.h; DESIGN, principles 3 and 4).
//
// 1. The session's rules: the next number, a repeat, a gap, fenced. Who never goes back has gaps:
//    what was refused for lack of room, here or on the way here, is not remembered, and the next
//    one that is taken closes the gap behind it. So a session that is resumed goes on where it last
//    took something, as after a restart.
// 2. What the observation must not be refused for later: vector, dimension, room in the backlog, in
//    memory, in the log and in the ledger of forwards. What can never be taken uses up its number,
//    which is logged too.
// 3. The stamp, and the record in the log.
// 4. It waits in the ledger until the record is as durable as its space asks for.
// 5. It is stored, here or in the shard that owns it (shard_partitions.cc), and so visible.
// 6. It is answered, in the order of its session.
//
// Where nobody waits for the record (Durability::kMemory, or a shard without a log) what belongs
// here is stored at once, and logged afterwards.

#include <algorithm>
#include <array>
#include <cstring>

#include "index/shard.h"
#include "src/core/check.h"

namespace engram {

namespace {

// Memory that is left for what was logged and is not stored yet, and the share of all that is when
// there is more.
constexpr size_t kLeastMemoryMargin = size_t{4} << 20;
constexpr size_t kMemoryMarginShare = 64;
// Of the record that a space was made: what it is, and the end of the incarnation before.
constexpr size_t kSpacePayloadBytes = sizeof(SpaceDefinition) + sizeof(CommitStamp);

}  // namespace

int Shard::TakeObservations(Lane lane) {
  int work = 0;
  size_t left = lists_ ? kMostListedAtOnce : SIZE_MAX;
  for (size_t i = 0; i < port_.producers.size() && left > 0; ++i) {
    const size_t producer = (first_producer_ + i) % port_.producers.size();
    ShardLink& link = port_.producers[producer];
    const size_t count = link.lanes[static_cast<size_t>(lane)].PopBatch(
        std::span(batch_).first(std::min(left, batch_.size())));
    left -= count;
    // Later than all that was acknowledged when these were sent.
    if (count > 0) unix_ns_ = clock_->WallNs();
    for (size_t n = 0; n < count; ++n) {
      if (n + 1 < count) __builtin_prefetch(link.producer_slab->At(batch_[n + 1]));
      TakeObservation(producer, batch_[n]);
    }
    work += static_cast<int>(count);
  }
  return work;
}

void Shard::TakeObservation(size_t producer, SlotId slot) {
  auto* request =
      reinterpret_cast<ObserveRequest*>(port_.producers[producer].producer_slab->At(slot));
  Completion completion{.kind = CompletionKind::kObserve,
                        .slot = slot,
                        .origin = request->origin,
                        .sequence = request->sequence};
  if (request->session.value() == 0) {
    TakeAlone(producer, request, completion);
    return;
  }
  Session* session = sessions_.At(request->session_slot, request->session);
  completion.reason = JudgeSession(session, producer, *request);
  if (completion.reason != RefusalReason::kNone) {
    Refuse(producer, completion);
  } else if (request->sequence <= session->last_sequence) {
    completion.repeated = true;
    QueueAnswer(session, producer, completion);
  } else {
    TakeInSession(session, producer, request, completion);
  }
}

// Why the observation cannot be taken now, whatever it is; kNone for one that may be the next, and
// for repeats.
RefusalReason Shard::JudgeSession(const Session* session, size_t producer,
                                  const ObserveRequest& request) const {
  if (session == nullptr) return RefusalReason::kSessionExpired;
  if (session->origin != 0 &&
      (session->origin != request.origin || session->producer.value() != producer)) {
    return RefusalReason::kFenced;
  }
  if (request.sequence > session->last_sequence + 1 && !request.may_skip) {
    return RefusalReason::kSequenceGap;
  }
  // Its answer would have to wait for earlier ones.
  if (session->first_forward != 0 && ledger_.room() == 0) return RefusalReason::kQueueFull;
  return RefusalReason::kNone;
}

void Shard::Refuse(size_t producer, const Completion& completion) {
  counters_[ShardCounter::kObservationsRefused].Add(1);
  Complete(producer, completion);
}

// Without a session: the space is named, and the answer goes into the slot.
void Shard::TakeAlone(size_t producer, ObserveRequest* request, Completion completion) {
  Taken taken;
  SpaceEntry* entry = port_.catalogue->FindOrAdd(request->space.view(), Metric::kUnspecified);
  if (IsCancelled(request->header)) {
    taken.outcome.reason = RefusalReason::kCancelled;
  } else if (request->header.deadline_ns != 0 && now_ns_ > request->header.deadline_ns) {
    taken.outcome.reason = RefusalReason::kDeadlinePassed;
  } else if (entry == nullptr) {
    taken.outcome.reason = RefusalReason::kSpaceLimit;
  } else {
    const uint32_t space = FindOrMakeSpace(entry);
    taken = Take(space, nullptr, request, false);
    request->space_dimension = entry->dimension();
    completion.retry_after_ms = RetryAfterMs(*spaces_[space], taken.outcome.reason);
  }
  completion.reason = taken.outcome.reason;
  if (taken.ticket != 0) {
    BeginForward(taken.ticket, producer, *request, completion);
    return;
  }
  request->existed = taken.outcome.existed;
  request->stamp = taken.stamp;
  if (completion.reason != RefusalReason::kNone) {
    Refuse(producer, completion);
  } else {
    receive_to_visible_.Record(now_ns_ - request->received_ns);
    Complete(producer, completion);
  }
}

// The next observation of a session. Only what was taken, or refused for good, moves the session's
// last sequence.
void Shard::TakeInSession(Session* session, size_t producer, ObserveRequest* request,
                          Completion completion) {
  const bool in_credit = request->sequence <= session->granted_sequence;
  const Taken taken = Take(session->space, session, request, in_credit);
  completion.reason = taken.outcome.reason;
  const bool consumed = HasEffect(completion.reason, RefusalEffect::kConsumes);
  sessions_.Touch(session, now_ns_);
  if (completion.reason != RefusalReason::kNone && !consumed) {
    completion.retry_after_ms = RetryAfterMs(*spaces_[session->space], completion.reason);
    completion.credit_sequence = CreditOf(session);
    Refuse(producer, completion);
    return;
  }
  session->last_sequence = request->sequence;
  if (consumed) {
    request->space_dimension = entries_[session->space]->dimension();
    counters_[ShardCounter::kObservationsSkipped].Add(1);
  }
  completion.credit_sequence = CreditOf(session);
  if (taken.ticket != 0) {
    BeginForward(taken.ticket, producer, *request, completion);
    return;
  }
  if (!consumed) receive_to_visible_.Record(now_ns_ - request->received_ns);
  QueueAnswer(session, producer, completion);
}

// 2. to 4., and 5. where nobody waits for the record.
Shard::Taken Shard::Take(uint32_t space, Session* session, ObserveRequest* request,
                         bool in_credit) {
  Taken taken;
  // Its payload stays there.
  if (log_ != nullptr && request->op == ObservationOp::kUpsert) {
    request->record_bytes = static_cast<uint32_t>(RecordBytes(space, *request));
  }
  const bool waits = log_ != nullptr && entries_[space]->durability() != Durability::kMemory;
  const bool stores_now = !waits && OwnedHereAlone(space, *request);
  RefusalReason& reason = taken.outcome.reason;
  if (entries_[space]->is_dropping()) {
    reason = session != nullptr ? RefusalReason::kSessionExpired : RefusalReason::kSpaceDropping;
    return taken;
  }
  if (const RefusalReason no_room = JudgeLogRoom(space, *request);
      no_room != RefusalReason::kNone) {
    reason = no_room;
    return taken;
  }
  bool grows = false;
  if (const RefusalReason full = JudgeQuota(space, *request, &grows);
      full != RefusalReason::kNone) {
    reason = full;
    return taken;
  }
  if (request->op == ObservationOp::kSkip) {
    reason = request->skip_reason;
  } else if (stores_now) {
    taken.stamp = stamp_clock_.Next(unix_ns_);
    taken.outcome = Store(space, *request, taken.stamp, in_credit);
  } else if (ledger_.room() == 0) {
    reason = RefusalReason::kQueueFull;
  } else {
    reason = Judge(space, *request, in_credit);
  }
  const bool consumed = HasEffect(reason, RefusalEffect::kConsumes) && session != nullptr;
  if (reason != RefusalReason::kNone && !consumed) return taken;
  if (consumed && waits && ledger_.room() == 0) {
    reason = RefusalReason::kQueueFull;
    return taken;
  }
  if (taken.stamp == kNoStamp || consumed) taken.stamp = stamp_clock_.Next(unix_ns_);
  LogPosition log_end = 0;
  if (log_ != nullptr) {
    Append(space, consumed ? reason : RefusalReason::kNone, taken.stamp, request);
    log_end = log_->end();
    if (taken.outcome.node != kNoNode) {
      spaces_[space]->MoveOrigin(taken.outcome.node, kNoLogAddress, request->address);
    }
  }
  if (stores_now || (consumed && !waits)) return taken;
  taken.ticket = ledger_.Add(session);
  Forward& forward = ledger_.At(taken.ticket);
  forward.step = Forward::Step::kLog;
  forward.request = request;
  forward.space = entries_[space]->index();
  forward.stamp = taken.stamp;
  forward.log_end = waits ? log_end : 0;
  if (log_ != nullptr) forward.block = log_->last_block();
  if (!consumed) pending_bytes_ += PendingBytes(*request);
  if (!consumed && request->op == ObservationOp::kUpsert) ++pending_[space];
  forward.grows = grows && !consumed;
  if (forward.grows) ++growing_[space];
  forward.deletes = !consumed && request->op == ObservationOp::kDelete;
  if (forward.deletes) ++deleting_[space];
  return taken;
}

// Nobody else has, or had, to do with the id.
bool Shard::OwnedHereAlone(uint32_t space, const ObserveRequest& request) const {
  if (!MayForward(space) || request.op == ObservationOp::kSkip) return true;
  const SpaceEntry& entry = *entries_[space];
  const uint64_t hash = SpaceCatalogue::HashOfId(ObservationIn(request).id);
  const uint16_t partition = PartitionOf(hash, entry.partitions());
  return entry.ShardOf(partition) == port_.shard &&
         partition == PartitionOf(hash, entry.first_partitions());
}

// What the observation will need when its record is durable is there now.
RefusalReason Shard::Judge(uint32_t space, const ObserveRequest& request, bool in_credit) {
  const bool adds = request.op == ObservationOp::kUpsert || request.op == ObservationOp::kRestore;
  if (adds && !HasRoom(space, in_credit)) return RefusalReason::kBacklogFull;
  if (request.op == ObservationOp::kUpsert) {
    const ObservationRef observation = ObservationIn(request);
    RefusalReason reason = spaces_[space]->Judge(observation);
    if (reason == RefusalReason::kNone) reason = FixDimension(space, observation);
    if (reason != RefusalReason::kNone) return reason;
  }
  const bool frees = request.op == ObservationOp::kDelete;
  if (frees || HasMemoryFor(space, request)) return RefusalReason::kNone;
  spaces_[space]->NoteMemoryShort();
  QueueForUpkeep(space);
  return RefusalReason::kMemoryFull;
}

// What ended in the space left nodes with their rows, which never go back to the heap: an upsert
// for which there is one takes only what its text and attributes do, and of those as many have
// gone.
bool Shard::HasMemoryFor(uint32_t space, const ObserveRequest& request) const {
  const size_t margin =
      std::max(kLeastMemoryMargin, options_.memory_limit_bytes / kMemoryMarginShare);
  const size_t available = heap_.available_bytes();
  if (available >= margin + pending_bytes_ + PendingBytes(request)) return true;
  return request.op == ObservationOp::kUpsert && spaces_[space]->free_nodes() > pending_[space] &&
         available >= margin / 2 + pending_bytes_ + PendingBytes(request);
}

// A bound of what attributes take: their bytes, and what the index has for each.
size_t Shard::AttributeRoom(const ObserveRequest& request) {
  constexpr size_t kIndexedBytes = 192;
  constexpr size_t kLeastBytes = 3;
  const size_t count = (request.attribute_bytes + kLeastBytes - 1) / kLeastBytes;
  return request.attribute_bytes + std::min(count, kMaxAttributes) * kIndexedBytes;
}

// A bound of what it takes in memory.
size_t Shard::PendingBytes(const ObserveRequest& request) {
  if (request.op == ObservationOp::kSkip) return 0;
  constexpr size_t kLinksAndMore = 1'024;
  return kLinksAndMore + 5 * size_t{request.dimension} + request.id_bytes +
         (request.record_bytes == 0 ? request.payload_bytes : 0) + AttributeRoom(request);
}

RefusalReason Shard::JudgeLogRoom(uint32_t space, const ObserveRequest& request) const {
  if (log_ == nullptr) return RefusalReason::kNone;
  const size_t bytes = RecordBytes(space, request) +
                       LogRecordBytes(entries_[space]->name().size(), 0, 0, kSpacePayloadBytes);
  return log_->JudgeRoom(bytes, request.op == ObservationOp::kDelete);
}

size_t Shard::RecordBytes(uint32_t space, const ObserveRequest& request) const {
  return LogRecordBytes(entries_[space]->name().size(),
                        VectorBytes(request.dtype, request.dimension), request.id_bytes,
                        request.payload_bytes, request.attribute_bytes);
}

// 3. What the space is goes before its first observation in this log, and again when it has grown.
void Shard::Append(uint32_t space, RefusalReason skip_reason, CommitStamp stamp,
                   ObserveRequest* request) {
  const SpaceEntry& entry = *entries_[space];
  const bool urgent = entry.durability() == Durability::kFsync;
  const SpaceDefinition definition = entry.Definition();
  if (logged_partitions_[space] != definition.partitions) {
    logged_partitions_[space] = definition.partitions;
    LogRecord made;
    made.kind = LogRecordKind::kSpace;
    made.stamp = stamp;
    made.space = entry.name();
    const CommitStamp birth = entry.birth();
    std::array<std::byte, kSpacePayloadBytes> payload;
    std::memcpy(payload.data(), &definition, sizeof(definition));
    std::memcpy(payload.data() + sizeof(definition), &birth, sizeof(birth));
    made.payload =
        std::span(payload).first(birth == kNoStamp ? sizeof(definition) : kSpacePayloadBytes);
    log_->Append(made, false, RecordBytes(space, *request));
  }
  LogRecord record;
  record.stamp = stamp;
  record.session = request->session;
  record.sequence = request->session.value() != 0 ? request->sequence : 0;
  record.space = entry.name();
  record.when_ns = request->when_ns;
  if (skip_reason != RefusalReason::kNone) {
    record.kind = LogRecordKind::kSkip;
    record.skip_reason = skip_reason;
  } else {
    const ObservationRef observation = ObservationIn(*request);
    record.kind = static_cast<LogRecordKind>(request->op);
    record.dtype = observation.dtype;
    record.dimension = request->dimension;
    record.payload_kind = observation.payload_kind;
    record.scale = observation.scale;
    record.confidence = observation.confidence;
    record.vector = {observation.vector, VectorBytes(request->dtype, request->dimension)};
    record.id = observation.id;
    record.attributes = observation.attributes;
    record.payload = observation.payload;
  }
  request->address = log_->Append(record, urgent);
}

// 4. How far the records of a space must be before it is told of them.
bool Shard::IsLogged(const Forward& forward) const {
  if (forward.log_end == 0) return true;
  const Durability durability = port_.catalogue->At(forward.space)->durability();
  return forward.log_end <=
         (durability == Durability::kInterval ? log_->written() : log_->durable());
}

// 5. for those whose records are far enough, in the order in which they were taken.
int Shard::StoreLogged() {
  int work = 0;
  while (work < (lists_ ? static_cast<int>(kMostListedAtOnce) : kMostStoredAtOnce)) {
    // What was just answered may have ended others behind it.
    first_unlogged_ = std::max(first_unlogged_, ledger_.oldest_ticket());
    if (first_unlogged_ == ledger_.next_ticket()) break;
    const Forward& forward = ledger_.At(first_unlogged_);
    if (forward.step == Forward::Step::kLog) {
      if (!IsLogged(forward)) break;
      BeginStoring(first_unlogged_);
      ++work;
    }
    ++first_unlogged_;
  }
  return work;
}

void Shard::BeginForward(uint64_t ticket, size_t producer, const ObserveRequest& request,
                         const Completion& completion) {
  Forward& forward = ledger_.At(ticket);
  forward.producer = ProducerId(static_cast<uint16_t>(producer));
  forward.received_ns = request.received_ns;
  forward.completion = completion;
  if (IsLogged(forward)) BeginStoring(ticket);
}

// 5.
void Shard::BeginStoring(uint64_t ticket) {
  Forward& forward = ledger_.At(ticket);
  const ObserveRequest& request = *forward.request;
  const uint32_t space = space_of_entry_[forward.space];
  if (forward.completion.reason != RefusalReason::kNone) {
    FinishForward(ticket);
    return;
  }
  pending_bytes_ -= PendingBytes(request);
  if (request.op == ObservationOp::kUpsert) --pending_[space];
  const SpaceEntry& entry = *entries_[space];
  forward.step = Forward::Step::kStore;
  forward.is_upsert = request.op == ObservationOp::kUpsert;
  forward.is_same_everywhere =
      request.op == ObservationOp::kSuppress || request.op == ObservationOp::kRestore;
  forward.owner = port_.shard;
  forward.next_partitions = entry.first_partitions();
  if (MayForward(space)) {
    forward.id_hash = SpaceCatalogue::HashOfId(ObservationIn(request).id);
    forward.owner = entry.ShardOf(PartitionOf(forward.id_hash, entry.partitions()));
  }
  forward.target = forward.owner;
  if (forward.owner != port_.shard) counters_[ShardCounter::kObservationsForwarded].Add(1);
  if (Tell(ticket) && forward.target == port_.shard) StepForward(ticket);
}

ObservationRef Shard::ObservationIn(const ObserveRequest& request) {
  const auto* vector = reinterpret_cast<const std::byte*>(&request) + kRequestBodyOffset;
  const std::byte* id = vector + VectorBytes(request.dtype, request.dimension);
  const std::byte* attributes = id + request.id_bytes;
  return {.id = {reinterpret_cast<const char*>(id), request.id_bytes},
          .payload = {attributes + request.attribute_bytes, request.payload_bytes},
          .payload_kind = request.payload_kind,
          .dtype = request.dtype,
          .dimension = request.dimension,
          .scale = request.scale,
          .vector = vector,
          .when_ns = request.when_ns,
          .confidence = request.confidence,
          .origin = request.address,
          .record_bytes = request.record_bytes,
          .attributes = {attributes, request.attribute_bytes}};
}

// In this shard. A refusal changes nothing.
StoreOutcome Shard::Store(uint32_t space, const ObserveRequest& request, CommitStamp stamp,
                          bool in_credit) {
  if (IsDropped(space, stamp)) return {};
  Space& target = *spaces_[space];
  const ObservationRef observation = ObservationIn(request);
  // With one partition there is one home, and nothing earlier under way from another.
  bool several_homes = entries_[space]->partitions() > 1;
  StoreOutcome outcome;
  if (request.op == ObservationOp::kDelete) {
    // But what a checkpoint says was deleted had several, and what is earlier may be replayed yet.
    several_homes |= is_recovering() && request.address == kNoLogAddress;
    outcome = target.Delete(observation.id, stamp, several_homes);
    if (outcome.reason != RefusalReason::kNone) return outcome;
    if (outcome.existed) counters_[ShardCounter::kObservationsDeleted].Add(1);
    if (outcome.existed || several_homes) QueueForUpkeep(space);
    return outcome;
  }
  if (request.op == ObservationOp::kSuppress) return Hide(space, request, stamp);
  if (!HasRoom(space, in_credit)) return {.reason = RefusalReason::kBacklogFull};
  if (request.op == ObservationOp::kRestore) {
    outcome = target.Restore(observation.id, stamp);
    if (outcome.existed) QueueForUpkeep(space);
    return outcome;
  }
  outcome.reason = FixDimension(space, observation);
  if (outcome.reason != RefusalReason::kNone) return outcome;
  if (HasEnded(space, stamp)) return outcome;
  // What recalls need comes first, so that they go on when the memory is full.
  if (!ReserveRecalls(target.node_count() + 1)) return {.reason = RefusalReason::kMemoryFull};
  outcome = target.Upsert(observation, stamp, several_homes);
  if (outcome.reason != RefusalReason::kNone) {
    // What has ended is given back sooner where memory is short.
    if (outcome.reason == RefusalReason::kMemoryFull) QueueForUpkeep(space);
    return outcome;
  }
  counters_[ShardCounter::kObservationsStored].Add(1);
  if (outcome.existed || several_homes || target.has_graph()) QueueForUpkeep(space);
  // Each one that comes has another listed, so what is scanned stays bounded; and some more are,
  // so that what has gathered before there were lists becomes less.
  if (target.WantsListing()) {
    list_beside_ -= std::max<size_t>(target.ListSome(1 + list_beside_), 1) - 1;
  }
  listed_now_ |= target.waiting() > 0;
  KeepToQuota(space, stamp);
  GrowIfFull(space);
  return outcome;
}

StoreOutcome Shard::Hide(uint32_t space, const ObserveRequest& request, CommitStamp stamp) {
  Space& target = *spaces_[space];
  const bool several_homes = entries_[space]->partitions() > 1;
  if (!ReserveRecalls(target.node_count() + 1)) return {.reason = RefusalReason::kMemoryFull};
  const StoreOutcome outcome = target.Suppress(ObservationIn(request).id, stamp, several_homes);
  if (outcome.existed) QueueForUpkeep(space);
  return outcome;
}

// Whether the space may take one more vector before it is linked. Within credit always.
bool Shard::HasRoom(uint32_t space, bool in_credit) const {
  const Space& target = *spaces_[space];
  return in_credit || target.backlog() == 0 ||
         target.backlog() + pending_[space] < 2 * BacklogLimit(target);
}

// Nodes that upkeep may be behind by before recalls would suffer.
uint64_t Shard::BacklogLimit(const Space& space) const {
  const uint64_t scanned = space.NodesInBytes(options_.unlinked_limit_bytes);
  return space.HasWaitingLists() ? std::max(scanned, options_.waiting_limit) : scanned;
}

// The first vector that is none of the refused ones settles the dimension, for all shards.
RefusalReason Shard::FixDimension(uint32_t space, const ObservationRef& observation) {
  SpaceEntry& entry = *entries_[space];
  if (entry.dimension() == observation.dimension) return RefusalReason::kNone;
  if (entry.dimension() == 0) {
    const RefusalReason reason = spaces_[space]->Judge(observation);
    if (reason != RefusalReason::kNone) return reason;
  }
  return entry.FixDimension(static_cast<uint16_t>(observation.dimension), generation_of_[space])
             ? RefusalReason::kNone
             : RefusalReason::kWrongDimension;
}

}  // namespace engram
