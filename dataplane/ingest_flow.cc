// Flow of an ingress core (see ingest_core.h): how clients hold their answers back, and what they
// are told of the state of things.
//
// 1. What a client says goes into its FlowGate (TakeFlow), which SendMerge asks before each frame.
//    So recalls of a connection with flow are always merged: a merge waits, where batches of a
//    shard that were forwarded could not.
// 2. Such a connection is read from however many recalls it has under way, as only its own word may
//    let the answers go.
// 3. Answers that are held back keep merges, memory, and files of the logs. So each is refused by
//    itself once it has been there for answer_timeout_ns, or when all merges are in use.
// 4. Nothing is held back from a connection that ends: close comes after all answers.

#include <algorithm>

#include "dataplane/ingest_core.h"

namespace engram {

bool IngestCore::TakeFlow(Connection& connection, const FrameHeader& header,
                          std::span<const std::byte> body) {
  FlowRequestBody request;
  RefusalReason reason = DecodeFlow(body, &request);
  if (reason == RefusalReason::kBadFrame) {
    return RefuseAndClose(connection, reason, header.type, header.sequence);
  }
  if (!Has(connection, kFeatureFlow)) reason = RefusalReason::kBadFlow;
  if (reason != RefusalReason::kNone) {
    RefuseRequest(connection, reason, header.type, header.sequence);
    return true;
  }
  connection.flow.Take(request, now_ns_);
  // It is said often, and changes nothing that the client does not know.
  if (request.action == FlowAction::kBufferStatus) return true;
  SendFlow(network_, connection.id, connection.session.value(), connection.settled_sequence,
           FlowOf(connection));
  return true;
}

// What a connection is told. The one place where it is made up.
FlowBody IngestCore::FlowOf(const Connection& connection) const {
  FlowBody body;
  body.state = connection.flow.is_paused() ? FlowState::kPaused : FlowState::kActive;
  body.queue_depth = connection.observations_in_flight;
  const uint64_t settled = connection.settled_sequence;
  const uint64_t window = std::max(connection.credit_sequence, settled) - settled;
  body.queue_capacity = static_cast<uint32_t>(std::min<uint64_t>(window, UINT32_MAX));
  body.pressure =
      body.queue_depth >= body.queue_capacity
          ? static_cast<float>(body.queue_depth > 0)
          : static_cast<float>(body.queue_depth) / static_cast<float>(body.queue_capacity);
  body.preferred_rate = connection.flow.rate();
  return body;
}

bool IngestCore::MaySendResult(const Connection& connection) const {
  return connection.state != State::kOpen || connection.flow.MaySend(now_ns_);
}

// Reading waits for answers, but for who may have to say something for them to go.
bool IngestCore::WaitsForAnswers(const Connection& connection) const {
  return connection.recalls_in_flight >= options_.max_recalls && !Has(connection, kFeatureFlow);
}

// Whoever has not taken it in that time holds it back, or reads too slowly.
bool IngestCore::IsOverdue(const Connection& connection, RecallMerger::MergeId merge) const {
  return Has(connection, kFeatureFlow) && connection.state == State::kOpen &&
         merger_->is_whole(merge) &&
         now_ns_ - merged_[merge].sendable_ns > options_.answer_timeout_ns;
}

// Gives up one that is whole.
void IngestCore::RefuseHeld(Connection& connection, RecallMerger::MergeId merge,
                            RefusalReason reason) {
  const MergedRecall& recall = merged_[merge];
  const bool waits = HasEffect(reason, RefusalEffect::kWaits);
  --connection.recalls_in_flight;
  if (!recall.is_scroll) counters_[IngestCounter::kRecallsAnswered].Add(1);
  CountNak(reason);
  SendNak(network_, connection.id, reason,
          {.refused_type = recall.is_scroll ? FrameType::kScroll : FrameType::kRecall,
           .session = connection.session.value(),
           .sequence = recall.request_id,
           .retry_after_ms = waits ? RetryAfterMs(connection) : 0,
           .text = "the answer was held back, or not read, for too long; ask again"});
  EndMerge(merge);
}

// Of all answers that are held back, the one that was there first gives way to what is asked for by
// who will take it.
void IngestCore::GiveWayTo(const Connection& connection) {
  if (connection.flow.HoldsLong(now_ns_)) return;
  const auto held = std::ranges::find_if(sendable_, [this](RecallMerger::MergeId merge) {
    const Connection* holder = FindOrigin(merged_[merge].origin);
    return holder != nullptr && holder->state == State::kOpen && merger_->is_whole(merge) &&
           holder->flow.HoldsLong(now_ns_);
  });
  if (held == sendable_.end()) return;
  RefuseHeld(*FindOrigin(merged_[*held].origin), *held, RefusalReason::kMergesFull);
  sendable_.erase(held);
}

}  // namespace engram
