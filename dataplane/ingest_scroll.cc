// Scrolls and checks of an ingress core (see ingest_core.h): each request goes to one partition,
// and the client comes back for the next.
//
// 1. A page of a partition is answered like a recall of one partition, by way of a merge, so that
//    records are read and slow clients wait alike (ingest_recall.cc). FinishScroll then says where
//    the next page begins.
// 2. Partitions are gone through in order. As a space grows they become more, and what moves goes
// to
//    a later one. It is there before it leaves the earlier one, and it moves after the growth. So
//    who goes on until there is no later partition misses nothing that lives throughout.
// 3. A slice of a check is answered in the slot of its request.

#include <algorithm>
#include <cstring>
#include <new>

#include "dataplane/ingest_core.h"
#include "src/core/check.h"

namespace engram {

bool IngestCore::TakeScroll(Connection& connection, const FrameHeader& header,
                            std::span<const std::byte> body) {
  ScrollBody scroll;
  RefusalReason reason = DecodeScroll(body, &scroll);
  if (reason == RefusalReason::kBadFrame) {
    return RefuseAndClose(connection, reason, header.type, header.sequence);
  }
  if (reason == RefusalReason::kNone) reason = PushScroll(connection, scroll, header);
  if (reason != RefusalReason::kNone) {
    RefuseRequest(connection, reason, header.type, header.sequence);
  }
  if (WaitsForAnswers(connection)) PauseReceiving(connection);
  return true;
}

RefusalReason IngestCore::PushScroll(Connection& connection, const ScrollBody& scroll,
                                     const FrameHeader& header) {
  if (connection.recalls_in_flight >= options_.max_recalls) return RefusalReason::kMergesFull;
  const SpaceEntry* entry = EntryOf(connection);
  if (entry == nullptr) return RefusalReason::kUnknownSpace;
  if (scroll.partition >= entry->partitions()) return RefusalReason::kBadRecall;
  const ShardId shard = entry->ShardOf(scroll.partition);
  RefusalReason reason = AcquireForEach({&shard, 1}, kRequestBodyOffset);
  if (reason != RefusalReason::kNone) return reason;
  // The merge keeps what comes: a page may have some more hits than were asked for.
  const RecallMerger::MergeId merge = BeginMerge(connection, 1, kMaxRecallResults, {});
  if (merge == RecallMerger::kNone) {
    ReleaseForEach(1);
    return RefusalReason::kMergesFull;
  }
  auto* request = new (port_.slab->At(request_slots_[0])) ScrollRequest;
  request->with_payload = (header.flags & kFrameFlagWithPayload) != 0;
  request->with_vector = (header.flags & kFrameFlagWithVector) != 0;
  request->limit =
      request->with_payload ? std::min(scroll.limit, kMaxScrollHitsWithPayload) : scroll.limit;
  request->origin = kMergeOrigin | merge;
  request->request_id = header.sequence;
  request->cursor = scroll.cursor;
  request->space = connection.space;
  const bool reads = records_ != nullptr && (request->with_payload || request->with_vector);
  merged_[merge] = {.origin = OriginOf(connection),
                    .request_id = header.sequence,
                    .pins = reads ? records_->EnterPins() : 0,
                    .is_scroll = true,
                    .partition = scroll.partition};
  const bool pushed = LaneOf(shard, Lane::kRecall).TryPush(request_slots_[0]);
  CHECK(pushed, "the ring had room");
  ++connection.recalls_in_flight;
  return RefusalReason::kNone;
}

void IngestCore::FinishScroll(Connection& connection, RefusalReason reason,
                              const MergedRecall& scroll) {
  --connection.recalls_in_flight;
  // A partition that holds nothing of the space yet.
  if (reason == RefusalReason::kUnknownSpace) reason = RefusalReason::kNone;
  if (reason != RefusalReason::kNone) {
    RefuseRequest(connection, reason, FrameType::kScroll, scroll.request_id);
    return;
  }
  if (connection.state == State::kClosing) return;
  const SpaceEntry* entry = EntryOf(connection);
  ScrolledBody body{.cursor = scroll.cursor, .partition = scroll.partition};
  if (body.cursor == 0) ++body.partition;
  // Read after the last of the partition was listed.
  body.partitions = entry == nullptr ? 0 : entry->partitions();
  if (body.partition >= body.partitions) {
    body.partition = 0;
    body.ended = 1;
  }
  SendScrolled(network_, connection.id, connection.session.value(), scroll.request_id, body);
}

bool IngestCore::TakeCheck(Connection& connection, const FrameHeader& header,
                           std::span<const std::byte> body) {
  CheckBody check;
  RefusalReason reason = DecodeCheck(body, &check);
  if (reason != RefusalReason::kNone) {
    return RefuseAndClose(connection, reason, header.type, header.sequence);
  }
  reason = PushCheck(connection, check, header.sequence);
  if (reason != RefusalReason::kNone) {
    RefuseRequest(connection, reason, header.type, header.sequence);
  }
  if (WaitsForAnswers(connection)) PauseReceiving(connection);
  return true;
}

RefusalReason IngestCore::PushCheck(Connection& connection, const CheckBody& check,
                                    uint64_t request_id) {
  if (connection.recalls_in_flight >= options_.max_recalls) return RefusalReason::kMergesFull;
  if (check.shard >= shards()) return RefusalReason::kBadRecall;
  const ShardId shard(check.shard);
  const RefusalReason reason =
      AcquireForEach({&shard, 1}, kRequestBodyOffset + kCheckStateBytes + kMaxCheckTextBytes);
  if (reason != RefusalReason::kNone) return reason;
  std::byte* slot = port_.slab->At(request_slots_[0]);
  auto* request = new (slot) CheckRequest;
  request->origin = OriginOf(connection);
  request->request_id = request_id;
  request->space = connection.space;
  std::memcpy(slot + kRequestBodyOffset, check.state.data(), check.state.size());
  const bool pushed = LaneOf(shard, Lane::kRecall).TryPush(request_slots_[0]);
  CHECK(pushed, "the ring had room");
  ++connection.recalls_in_flight;
  return RefusalReason::kNone;
}

void IngestCore::FinishCheck(Connection& connection, const Completion& completion) {
  --connection.recalls_in_flight;
  if (completion.reason != RefusalReason::kNone) {
    RefuseRequest(connection, completion.reason, FrameType::kCheck, completion.sequence);
    return;
  }
  if (connection.state == State::kClosing) return;
  const std::byte* slot = port_.slab->At(completion.slot);
  const auto* request = reinterpret_cast<const CheckRequest*>(slot);
  CheckedBody body{.outcome = request->outcome, .text_bytes = request->text_bytes};
  std::memcpy(body.state.data(), slot + kRequestBodyOffset, body.state.size());
  const auto* text = reinterpret_cast<const char*>(slot) + kRequestBodyOffset + kCheckStateBytes;
  SendChecked(network_, connection.id, connection.session.value(), completion.sequence, body,
              {text, request->text_bytes});
}

}  // namespace engram
