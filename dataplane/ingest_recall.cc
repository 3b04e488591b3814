// Recalls of an ingress core (see ingest_core.h): to the partitions of a space, and back as one
// answer.
//
// 1. PushRecall gives every partition, or every shard where all spaces are recalled, a slot with
// the
//    recall, or none.
// 2. The one partition of a space that has no more answers with the connection's origin, and its
//    batches are forwarded as they come (ForwardHits), where ids are asked for.
// 3. Several answer with the origin of a merge (TakePartition), which copies their batches; so does
//    one where the answer names a snapshot, where payload or vector lie in a log, or where the
//    client may hold it back.
// 4. When all have answered, SendMerged sends the merge as fast as the client reads, and as records
//    are read; of a long recall, what comes first, once all have said which of it they have.

#include "dataplane/ingest_core.h"

#include <algorithm>
#include <cstring>

#include "src/core/check.h"

namespace engram {

bool IngestCore::TakeRecall(Connection& connection, const FrameHeader& header,
                            std::span<const std::byte> body) {
  RecallView view;
  RefusalReason reason = DecodeRecall(body, header.flags, &view);
  if (reason == RefusalReason::kBadFrame) {
    return RefuseAndClose(connection, reason, header.type, header.sequence);
  }
  counters_[IngestCounter::kRecallsReceived].Add(1);
  if (reason == RefusalReason::kNone) reason = PushRecall(connection, view, header);
  if (reason == RefusalReason::kWrongDimension) {
    CountNak(reason);
    SendNak(network_, connection.id, reason,
            {.refused_type = header.type,
             .session = connection.session.value(),
             .sequence = header.sequence,
             .has_numbers = connection.rules.dimension != 0,
             .got = view.body.dimension,
             .wanted = connection.rules.dimension});
  } else if (reason != RefusalReason::kNone) {
    RefuseRequest(connection, reason, header.type, header.sequence);
  }
  if (WaitsForAnswers(connection)) PauseReceiving(connection);
  return true;
}

RefusalReason IngestCore::PushRecall(Connection& connection, const RecallView& view,
                                     const FrameHeader& header) {
  const bool with_vector = (header.flags & kFrameFlagWithVector) != 0;
  const uint32_t dimension =
      std::max<uint32_t>({view.body.dimension, connection.rules.dimension, 1});
  if (with_vector && view.body.k > kMaxRecallNumbers / dimension) {
    return RefusalReason::kBadRecall;
  }
  // Reading pauses at the limit, but what has been received goes on to come.
  if (connection.recalls_in_flight >= options_.max_recalls) return RefusalReason::kMergesFull;
  const SpaceEntry* entry = EntryOf(connection);
  const bool across = (header.flags & kFrameFlagAcross) != 0;
  // Its metric is the one that is recalled by.
  if (across && entry == nullptr) return RefusalReason::kUnknownSpace;
  ChooseShards(connection, across);
  const size_t partitions = request_shards_.size();
  const size_t slot_bytes = SlotBytesFor(view);
  RefusalReason reason = AcquireForEach(request_shards_, slot_bytes);
  if (reason != RefusalReason::kNone) return reason;
  std::byte* first = port_.slab->At(request_slots_[0]);
  reason = AdmitRecall(view, connection.rules, first);
  auto* request = reinterpret_cast<RecallRequest*>(first);
  request->first = options_.recall_batch;
  request->across = across;
  RecallMerger::MergeId merge = RecallMerger::kNone;
  const bool at_snapshot = (header.flags & kFrameFlagSnapshot) != 0;
  const bool reads =
      records_ != nullptr && (header.flags & (kFrameFlagWithPayload | kFrameFlagWithVector)) != 0;
  const bool merges = partitions > 1 || at_snapshot || reads || Has(connection, kFeatureFlow);
  if (reason == RefusalReason::kNone && merges) {
    merge = BeginMerge(connection, partitions, view.body.k,
                       {.first = request->IsLong() ? request->first : 0,
                        .latest_first = view.body.dimension == 0});
    if (merge == RecallMerger::kNone) reason = RefusalReason::kMergesFull;
  }
  if (reason != RefusalReason::kNone) {
    ReleaseForEach(partitions);
    return reason;
  }
  request->with_payload = (header.flags & kFrameFlagWithPayload) != 0;
  request->with_vector = with_vector;
  request->max_payload_bytes = kMaxRecallPayloadBytes;
  request->space = connection.space;
  request->origin = OriginOf(connection);
  request->request_id = header.sequence;
  request->received_ns = now_ns_;
  if (at_snapshot) request->snapshot = LatestSnapshot();
  if (view.at_unix_ns != 0) {
    request->snapshot = std::min(request->snapshot, StampAt(view.at_unix_ns));
  }
  if (merge != RecallMerger::kNone) {
    merged_[merge] = {.origin = request->origin,
                      .request_id = request->request_id,
                      .snapshot = request->snapshot,
                      .pins = reads ? records_->EnterPins() : 0};
    request->origin = kMergeOrigin | merge;
  }
  // The first goes last: from then on its slot is the shard's.
  for (size_t i = partitions; i-- > 0;) {
    if (i > 0) std::memcpy(port_.slab->At(request_slots_[i]), first, slot_bytes);
    const bool pushed = LaneOf(request_shards_[i], Lane::kRecall).TryPush(request_slots_[i]);
    CHECK(pushed, "the ring had room");
  }
  ++connection.recalls_in_flight;
  return RefusalReason::kNone;
}

// Who is asked: request_shards_.
void IngestCore::ChooseShards(const Connection& connection, bool across) {
  const SpaceEntry* entry = connection.entry;
  request_shards_.clear();
  if (across) {
    for (uint16_t s = 0; s < shards(); ++s) request_shards_.push_back(ShardId(s));
  } else if (entry == nullptr) {
    request_shards_.push_back(port_.catalogue->FirstShard(connection.space.view()));
  } else {
    const uint16_t partitions = entry->partitions();
    for (uint16_t p = 0; p < partitions; ++p) request_shards_.push_back(entry->ShardOf(p));
  }
}

RecallMerger::MergeId IngestCore::BeginMerge(const Connection& connection, size_t partitions,
                                             uint32_t k, const RecallMerger::Order& order) {
  if (merger_->free_merges() == 0) GiveWayTo(connection);
  return merger_->Begin(static_cast<uint16_t>(partitions), k, order);
}

// The latest stamp up to which all shards are complete: also one without a partition of a space may
// be the home of a session there, and have observations of it under way.
CommitStamp IngestCore::LatestSnapshot() const {
  const int64_t unix_ns = clock_->WallNs();
  CommitStamp snapshot = kOpenStamp;
  for (uint16_t s = 0; s < shards(); ++s) {
    snapshot = std::min(snapshot, port_.stamps->CompleteUpTo(ShardId(s), unix_ns));
  }
  return std::max(snapshot, kNoStamp + 1);
}

void IngestCore::FinishRecall(Connection& connection, RefusalReason reason, uint64_t request_id) {
  --connection.recalls_in_flight;
  counters_[IngestCounter::kRecallsAnswered].Add(1);
  if (reason != RefusalReason::kNone) {
    RefuseRequest(connection, reason, FrameType::kRecall, request_id);
  }
}

void IngestCore::ForwardHits(Connection& connection, ShardId shard, const Completion& completion) {
  const std::byte* slot = port_.shards[shard.value()].result_slab->At(completion.result_slot);
  const auto batch = LoadAs<ResultBatch>(slot);
  std::span<const std::byte> hits(slot + sizeof(ResultBatch), batch.body_bytes);
  NoteTaken(connection);
  while (!hits.empty() || batch.is_last()) {
    size_t bytes = 0;
    uint16_t count = 0;
    for (; bytes < hits.size() && count < options_.recall_batch; ++count) {
      bytes += LoadAs<HitHeader>(hits.data() + bytes).hit_bytes;
    }
    const bool ends = batch.is_last() && bytes == hits.size();
    SendResult(network_, connection.id, connection.session.value(), completion.sequence,
               {.count = count, .metric = batch.metric}, !ends, hits.first(bytes));
    hits = hits.subspan(bytes);
    if (ends) break;
  }
  NoteTaken(connection);
  PauseIfUnread(connection);
}

// What one partition answers. Where the connection has gone, its answers are only counted.
void IngestCore::TakePartition(ShardId shard, const Completion& completion) {
  const auto merge = static_cast<RecallMerger::MergeId>(completion.origin);
  if (completion.kind == CompletionKind::kResults) {
    if (FindOrigin(merged_[merge].origin) == nullptr) return;
    const SlotSlab& slab = *port_.shards[shard.value()].result_slab;
    merger_->Add(merge, {slab.At(completion.result_slot), slab.SlotBytes(completion.result_slot)});
    MakeSendable(merge);
    return;
  }
  CHECK(completion.kind == CompletionKind::kRecallDone, "a merge is of recalls");
  if (merged_[merge].is_scroll && completion.reason == RefusalReason::kNone) {
    merged_[merge].cursor =
        reinterpret_cast<const ScrollRequest*>(port_.slab->At(completion.slot))->cursor;
  }
  merger_->FinishPartition(merge, completion.reason);
  MakeSendable(merge);
}

// From when on some of it can be sent.
void IngestCore::MakeSendable(RecallMerger::MergeId merge) {
  if (merged_[merge].is_sendable || !merger_->can_emit(merge)) return;
  merged_[merge].is_sendable = true;
  merged_[merge].sendable_ns = now_ns_;
  sendable_.push_back(merge);
}

// Returns the merges that came to their end; what shards still add to stays. Of a connection that
// reads slowly the first one alone goes on: else each would read its records again and again for a
// part of the room.
int IngestCore::SendMerged() {
  ++send_round_;
  return static_cast<int>(std::erase_if(sendable_, [this](RecallMerger::MergeId merge) {
    const MergedRecall& recall = merged_[merge];
    Connection* connection = FindOrigin(recall.origin);
    if (connection != nullptr) {
      const bool is_first = connection->send_round != send_round_;
      if (connection->state != State::kClosing && !SendMerge(*connection, merge, is_first)) {
        connection->send_round = send_round_;
        if (!IsOverdue(*connection, merge)) return false;
        RefuseHeld(*connection, merge, RefusalReason::kDeadlinePassed);
        return true;
      }
      if (!merger_->is_whole(merge)) return false;
      if (recall.is_scroll) {
        FinishScroll(*connection, merger_->reason(merge), recall);
      } else {
        FinishRecall(*connection, merger_->reason(merge), recall.request_id);
      }
      if (connection->state == State::kSettling) FinishSettling(*connection);
    } else if (!merger_->is_whole(merge)) {
      return false;
    }
    EndMerge(merge);
    return true;
  }));
}

void IngestCore::EndMerge(RecallMerger::MergeId merge) {
  merger_->Release(merge);
  if (merged_[merge].pins != 0) records_->LeavePins(merged_[merge].pins);
}

// False while the client has to read first, as an answer may be larger than the backlog at which
// the network gives a connection up, while it holds answers back, or while records are read.
bool IngestCore::SendMerge(Connection& connection, RecallMerger::MergeId merge, bool is_first) {
  const size_t most_backlog = is_first ? options_.send_pause_bytes : options_.send_pause_bytes / 4;
  NoteTaken(connection);
  // Between two frames nothing is in the scratch buffer.
  const std::span<std::byte> buffer = std::span(scratch_).first(kResultSlotBytes);
  const uint32_t max_hits = merged_[merge].is_scroll ? kMaxRecallResults : options_.recall_batch;
  bool done = merger_->is_whole(merge) && merger_->reason(merge) != RefusalReason::kNone;
  while (!done && network_->SendBacklog(connection.id) <= most_backlog) {
    if (!MaySendResult(connection)) {
      // Others have use for the room of what was read ahead.
      if (connection.flow.HoldsLong(now_ns_)) merger_->DropReads(merge);
      return false;
    }
    const size_t bytes = merger_->Emit(merge, buffer, max_hits);
    if (bytes == 0) return false;
    connection.flow.NoteSent(now_ns_);
    const auto batch = LoadAs<ResultBatch>(buffer.data());
    SendResult(network_, connection.id, connection.session.value(), merged_[merge].request_id,
               {.count = batch.count, .metric = batch.metric, .snapshot = merged_[merge].snapshot},
               !batch.is_last() || merged_[merge].is_scroll,
               buffer.subspan(sizeof(ResultBatch), batch.body_bytes));
    done = batch.is_last();
  }
  NoteTaken(connection);
  PauseIfUnread(connection);
  if (network_->SendBacklog(connection.id) <= most_backlog) return done;
  // Others have use for the room.
  merger_->DropReads(merge);
  const bool is_overdue =
      merged_[merge].pins != 0 && now_ns_ - merged_[merge].sendable_ns > options_.answer_timeout_ns;
  if (!done && is_first && is_overdue && !Has(connection, kFeatureFlow)) {
    RefuseAndClose(connection, RefusalReason::kSlowReader, FrameType::kRecall,
                   merged_[merge].request_id);
    return true;
  }
  return done;
}

}  // namespace engram
