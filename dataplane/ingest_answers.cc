// The second half of an ingress core (see ingest_core.h): what the shards answer, back to its
// connections.

#include "dataplane/ingest_core.h"

#include <algorithm>

#include "src/core/check.h"

namespace engram {

namespace {

// What credit makes room for beside the vector: id and payload of an observation.
constexpr size_t kUsualTextBytes = 512;
// A usual frame's observations, so that who sends whole frames only is never stuck. With very many
// sessions that is more than there are slots; then some are refused and sent again.
constexpr uint64_t kLeastShare = 16;

}  // namespace

int IngestCore::TakeCompletions() {
  int work = 0;
  for (uint16_t s = 0; s < shards(); ++s) {
    const size_t count = port_.shards[s].completions.PopBatch(completions_);
    for (size_t i = 0; i < count; ++i) TakeCompletion(ShardId(s), completions_[i]);
    work += static_cast<int>(count);
  }
  return work;
}

// Hands the completion to its connection if that is still there, and every slot back in any case.
void IngestCore::TakeCompletion(ShardId shard, const Completion& completion) {
  Connection* connection = FindOrigin(completion.origin);
  if ((completion.origin & kMergeOrigin) != 0) {
    TakePartition(shard, completion);
  } else if (connection != nullptr) {
    Deliver(*connection, shard, completion);
    if (connection->state == State::kSettling) FinishSettling(*connection);
  } else if (completion.kind == CompletionKind::kHello) {
    DetachOrphan(shard, completion);
  } else if (completion.kind == CompletionKind::kCommand) {
    FinishOrphanedCommand(completion);
  }
  if (completion.slot != kNoSlot) port_.slab->Release(completion.slot);
  if (completion.result_slot != kNoSlot) {
    const bool returned =
        port_.shards[shard.value()].result_returns.TryPush(completion.result_slot);
    CHECK(returned, "the return ring holds every result slot");
  }
}

void IngestCore::Deliver(Connection& connection, ShardId shard, const Completion& completion) {
  switch (completion.kind) {
    case CompletionKind::kHello:
      FinishHello(connection, completion);
      break;
    case CompletionKind::kObserve:
      SettleObservation(connection, completion);
      PassRefused(connection);
      break;
    case CompletionKind::kRecallDone:
      FinishRecall(connection, completion.reason, completion.sequence);
      break;
    case CompletionKind::kResults:
      ForwardHits(connection, shard, completion);
      break;
    case CompletionKind::kRecords:
      ForwardRecords(connection, shard, completion);
      break;
    case CompletionKind::kCommand:
      FinishCommand(connection, completion);
      break;
    case CompletionKind::kFenced:
      if (connection.state == State::kClosing) break;
      RefuseAndClose(connection, RefusalReason::kFenced, FrameType::kObserve,
                     connection.next_sequence);
      break;
    case CompletionKind::kCredit:
      GrantCredit(connection, completion.credit_sequence);
      MarkAckDirty(connection);
      break;
    case CompletionKind::kCheckDone:
      FinishCheck(connection, completion);
      break;
    case CompletionKind::kDetach:
    case CompletionKind::kIntrospectDone:
      break;
  }
}

// The connection went away before its hello was answered: the session that was made has nobody.
void IngestCore::DetachOrphan(ShardId shard, const Completion& completion) {
  const auto* answer = reinterpret_cast<const HelloRequest*>(port_.slab->At(completion.slot));
  if (completion.reason != RefusalReason::kNone || !answer->wants_session) return;
  DetachRequest detach;
  detach.session_slot = answer->session_slot;
  detach.session = answer->session;
  detach.origin = completion.origin;
  PushDetach(shard, detach);
}

void IngestCore::FinishHello(Connection& connection, const Completion& completion) {
  connection.hello_pending = false;
  if (completion.reason != RefusalReason::kNone) {
    if (connection.state != State::kClosing) {
      RefuseAndClose(connection, completion.reason, FrameType::kHello, 0);
    }
    return;
  }
  const auto* answer = reinterpret_cast<const HelloRequest*>(port_.slab->At(completion.slot));
  connection.rules = {.metric = answer->metric, .dimension = answer->dimension};
  HelloAckBody body;
  body.features = connection.features;
  body.dimension = answer->dimension;
  body.metric = answer->metric;
  body.priority = connection.priority;
  body.max_recalls = options_.max_recalls;
  if (answer->wants_session) {
    connection.has_session = true;
    ++open_sessions_;
    connection.session = answer->session;
    connection.session_slot = answer->session_slot;
    connection.settled_sequence = answer->last_sequence;
    connection.next_sequence = answer->last_sequence + 1;
    connection.credit_sequence = answer->last_sequence;
    GrantCredit(connection, answer->last_sequence + answer->credit);
    body.credit = connection.credit_sequence;
  }
  if (connection.state == State::kClosing) return;
  SendHelloAck(network_, connection.id, connection.session.value(), connection.settled_sequence,
               body);
  if (connection.state == State::kAwaitHello) connection.state = State::kOpen;
}

void IngestCore::SettleObservation(Connection& connection, const Completion& completion) {
  --connection.observations_in_flight;
  GrantCredit(connection, completion.credit_sequence);
  if (completion.reason == RefusalReason::kNone) {
    connection.settled_sequence = std::max(connection.settled_sequence, completion.sequence);
    MarkAckDirty(connection);
    if (completion.repeated) {
      counters_[IngestCounter::kObservationsRepeated].Add(1);
      return;
    }
    counters_[IngestCounter::kObservationsAccepted].Add(1);
    const auto* request = reinterpret_cast<const ObserveRequest*>(port_.slab->At(completion.slot));
    if (connection.rules.dimension == 0) connection.rules.dimension = request->dimension;
    return;
  }
  if (connection.state == State::kClosing) return;
  if (HasEffect(completion.reason, RefusalEffect::kCloses)) {
    RefuseAndClose(connection, completion.reason, FrameType::kObserve, completion.sequence);
  } else if (HasEffect(completion.reason, RefusalEffect::kConsumes)) {
    const auto* request = reinterpret_cast<const ObserveRequest*>(port_.slab->At(completion.slot));
    const uint16_t wanted =
        request->space_dimension != 0 ? request->space_dimension : connection.rules.dimension;
    connection.settled_sequence = std::max(connection.settled_sequence, completion.sequence);
    CountNak(completion.reason);
    SendNak(network_, connection.id, completion.reason,
            {.session = connection.session.value(),
             .sequence = completion.sequence,
             .flags = kNakFlagConsumed,
             .expected = completion.sequence + 1,
             .has_numbers = completion.reason == RefusalReason::kWrongDimension && wanted != 0,
             .got = request->dimension,
             .wanted = wanted});
    MarkAckDirty(connection);
  } else if (HasEffect(completion.reason, RefusalEffect::kWaits) &&
             completion.sequence < connection.next_sequence) {
    // What was pushed behind it comes back as gaps, which stay silent.
    RefuseForNow(connection, completion.reason, completion.sequence,
                 std::max(completion.retry_after_ms, uint32_t{1}));
  }
}

// The last record of the last shard ends the answer.
void IngestCore::ForwardRecords(Connection& connection, ShardId shard,
                                const Completion& completion) {
  const std::byte* slot = port_.shards[shard.value()].result_slab->At(completion.result_slot);
  const auto batch = LoadAs<ResultBatch>(slot);
  if (batch.is_last()) --connection.introspections_in_flight;
  SendIntrospection(network_, connection.id, connection.session.value(), completion.sequence,
                    {.count = batch.count}, connection.introspections_in_flight > 0,
                    {slot + sizeof(ResultBatch), batch.body_bytes});
}

// What the shard grants, but no more than the connection's share of the slots that its vectors
// take, which until the space's dimension is known may be the largest. A sixth is dealt out at a
// time: shares granted in turn to N sessions add up to 1 + ln N times that.
void IngestCore::GrantCredit(Connection& connection, uint64_t credit_sequence) {
  const size_t dimension =
      connection.rules.dimension != 0 ? connection.rules.dimension : kMaxDimension;
  const uint64_t slots =
      port_.slab->SlotsFor(kRequestBodyOffset + dimension * sizeof(float) + kUsualTextBytes);
  const uint64_t share = std::max<uint64_t>(kLeastShare, slots / 6 / std::max(open_sessions_, 1U));
  connection.credit_sequence = std::max(
      connection.credit_sequence, std::min(credit_sequence, connection.settled_sequence + share));
}

void IngestCore::MarkAckDirty(Connection& connection) {
  if (connection.ack_dirty) return;
  connection.ack_dirty = true;
  dirty_.push_back(connection.id.index);
}

// One cumulative ack for all that was settled since the last one.
void IngestCore::FlushAcks() {
  for (const uint32_t index : dirty_) {
    Connection& connection = connections_[index];
    connection.ack_dirty = false;
    if (connection.state == State::kFree || connection.state == State::kClosing) continue;
    SendAck(network_, connection.id, connection.session.value(), connection.settled_sequence,
            connection.credit_sequence);
    counters_[IngestCounter::kAcksSent].Add(1);
  }
  dirty_.clear();
}

}  // namespace engram
