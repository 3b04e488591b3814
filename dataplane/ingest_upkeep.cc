// The endings and upkeep of an ingress core (see ingest_core.h): refusals, closing, timeouts,
// pauses.

#include "dataplane/ingest_core.h"

#include <algorithm>
#include <new>

namespace engram {

namespace {

constexpr int64_t kSweepIntervalNs = kNanosPerMilli;
constexpr int64_t kRateWindowNs = 20 * kNanosPerMilli;

}  // namespace

// ---------------------------------------------------------------------------------------------
// Refusals and endings

void IngestCore::CountNak(RefusalReason reason) {
  counters_[IngestCounter::kNaksSent].Add(1);
  refusals_[static_cast<size_t>(reason)].Add(1);
}

// An observation that may be sent again: the client goes back to it. Who never goes back has used
// up its number, however near to an end what lacked was.
void IngestCore::RefuseForNow(Connection& connection, RefusalReason reason, Sequence sequence,
                              uint32_t retry_after_ms) {
  const bool uses_up = Has(connection, kFeatureNeverGoesBack);
  connection.next_sequence = uses_up ? std::max(connection.next_sequence, sequence + 1) : sequence;
  connection.refused_ahead = !uses_up;
  CountNak(reason);
  SendNak(network_, connection.id, reason,
          {.session = connection.session.value(),
           .sequence = sequence,
           .flags = uses_up ? kNakFlagConsumed : uint8_t{0},
           .retry_after_ms = retry_after_ms,
           .expected = uses_up ? sequence + 1 : sequence});
  PauseIfUnread(connection);
}

// What was refused and does not come any more is settled once nothing before it is under way; that
// is told by what is answered behind it, or else by there being nothing. Credit counts numbers, so
// it may have been used up by refusals alone: who keeps to it may try the next one.
void IngestCore::PassRefused(Connection& connection) {
  if (!Has(connection, kFeatureNeverGoesBack) || connection.observations_in_flight > 0) return;
  if (connection.settled_sequence + 1 == connection.next_sequence) return;
  connection.settled_sequence = connection.next_sequence - 1;
  connection.credit_sequence = std::max(connection.credit_sequence, connection.next_sequence);
  MarkAckDirty(connection);
}

void IngestCore::RefuseRequest(Connection& connection, RefusalReason reason, FrameType type,
                               uint64_t request_id) {
  CountNak(reason);
  const bool waits = HasEffect(reason, RefusalEffect::kWaits);
  SendNak(network_, connection.id, reason,
          {.refused_type = type,
           .session = connection.session.value(),
           .sequence = request_id,
           .retry_after_ms = waits ? RetryAfterMs(connection) : 0});
}

// Always false, for callers that say so upwards.
bool IngestCore::RefuseAndClose(Connection& connection, RefusalReason reason, FrameType type,
                                uint64_t sequence) {
  CountNak(reason);
  SendNak(
      network_, connection.id, reason,
      {.refused_type = type,
       .session = connection.session.value(),
       .sequence = sequence,
       .flags = kNakFlagClosing,
       .retry_after_ms = HasEffect(reason, RefusalEffect::kWaits) ? RetryAfterMs(connection) : 0,
       .expected = connection.next_sequence});
  BeginClose(connection, Network::CloseMode::kAfterSending);
  return false;
}

void IngestCore::BeginClose(Connection& connection, Network::CloseMode mode) {
  connection.state = State::kClosing;
  connection.opened_ns = now_ns_;
  connection.assembler.Clear(&partial_pool_);
  network_->Close(connection.id, mode);
}

// Says close once everything that was taken is answered. A rebuild may take long, and may as well
// end here.
void IngestCore::FinishSettling(Connection& connection) {
  const bool is_commanding =
      connection.commands_in_flight > 0 && connection.command.what != SpaceCommand::kRebuild;
  if (connection.hello_pending || connection.observations_in_flight > 0 ||
      connection.recalls_in_flight > 0 || connection.introspections_in_flight > 0 ||
      is_commanding) {
    return;
  }
  if (connection.has_session) {
    SendAck(network_, connection.id, connection.session.value(), connection.settled_sequence,
            connection.credit_sequence);
  }
  SendClose(network_, connection.id, connection.session.value(), connection.settled_sequence);
  BeginClose(connection, Network::CloseMode::kAfterSending);
}

// Tells the shard that a session has no connection now. Where there is no room for it the session
// merely looks attached until someone resumes it or its place is needed.
void IngestCore::PushDetach(ShardId shard, const DetachRequest& detach) {
  const SlotId slot = port_.slab->Acquire(kRequestBodyOffset);
  if (slot != kNoSlot) {
    new (port_.slab->At(slot)) DetachRequest(detach);
    if (LaneOf(shard, Lane::kRecall).TryPush(slot)) return;
    port_.slab->Release(slot);
  }
  counters_[IngestCounter::kDetachesLost].Add(1);
}

void IngestCore::BeginDrain() {
  if (draining_) return;
  draining_ = true;
  now_ns_ = clock_->MonotonicNs();
  drain_began_ns_ = now_ns_;
  network_->StopAccepting();
  for (uint32_t i = 0; i < connections_used_; ++i) {
    Connection& connection = connections_[i];
    if (connection.state != State::kAwaitHello && connection.state != State::kOpen) continue;
    connection.state = State::kSettling;
    connection.opened_ns = now_ns_;
    connection.assembler.Clear(&partial_pool_);
    FinishSettling(connection);
  }
}

// ---------------------------------------------------------------------------------------------
// Upkeep

// Looks at some connections each millisecond, at all of them within a second.
void IngestCore::SweepTimeouts() {
  if (now_ns_ < next_sweep_ns_ || connections_used_ == 0) return;
  next_sweep_ns_ = now_ns_ + kSweepIntervalNs;
  const uint32_t step = connections_used_ / 1000 + 16;
  for (uint32_t i = 0; i < std::min(step, connections_used_); ++i) {
    sweep_cursor_ = (sweep_cursor_ + 1) % connections_used_;
    SweepConnection(connections_[sweep_cursor_]);
  }
}

void IngestCore::SweepConnection(Connection& connection) {
  switch (connection.state) {
    case State::kFree:
      return;
    case State::kSettling:
    case State::kClosing:
      if (now_ns_ - connection.opened_ns > options_.drain_timeout_ns) {
        BeginClose(connection, Network::CloseMode::kNow);
      }
      return;
    case State::kAwaitHello:
      if (!connection.hello_pending &&
          now_ns_ - connection.opened_ns > options_.handshake_timeout_ns) {
        RefuseAndClose(connection, RefusalReason::kHandshakeTimeout, FrameType::kHello, 0);
      }
      return;
    case State::kOpen:
      break;
  }
  // Who holds answers back need not read on at once.
  const int64_t patience_ns = connection.flow.HoldsLong(now_ns_) ? options_.answer_timeout_ns
                                                                 : options_.slow_reader_timeout_ns;
  if (connection.partial_since_ns != 0 && !connection.paused &&
      now_ns_ - connection.partial_since_ns > options_.frame_timeout_ns) {
    RefuseAndClose(connection, RefusalReason::kFrameTimeout, FrameType::kObserve, 0);
  } else if (connection.paused && now_ns_ - connection.paused_since_ns > patience_ns &&
             network_->SendBacklog(connection.id) > options_.send_pause_bytes / 2) {
    RefuseAndClose(connection, RefusalReason::kSlowReader, FrameType::kObserve, 0);
  } else if (!connection.paused && !network_->tells_of_lost_peers() &&
             now_ns_ - connection.last_received_ns > options_.idle_timeout_ns) {
    RefuseAndClose(connection, RefusalReason::kIdleTimeout, FrameType::kPing, 0);
  }
}

void IngestCore::PauseReceiving(Connection& connection) {
  if (connection.paused || connection.state != State::kOpen) return;
  connection.paused = true;
  connection.paused_since_ns = now_ns_;
  connection.backlog_seen = network_->SendBacklog(connection.id);
  connection.taken_bytes = 0;
  paused_.push_back(connection.id.index);
  network_->SetReceivePaused(connection.id, true);
}

// Answers that are small, and many.
void IngestCore::PauseIfUnread(Connection& connection) {
  if (network_->SendBacklog(connection.id) > options_.send_pause_bytes) PauseReceiving(connection);
}

// What the peer takes is seen in a backlog that shrinks, so look before and after more is sent.
void IngestCore::NoteTaken(Connection& connection) {
  const size_t backlog = network_->SendBacklog(connection.id);
  if (backlog < connection.backlog_seen) {
    connection.taken_bytes += connection.backlog_seen - backlog;
  }
  connection.backlog_seen = backlog;
}

// Reads on where the answers were taken. Where the peer takes them, though there are always more,
// its time begins anew.
void IngestCore::ReviewPaused() {
  const size_t enough = options_.send_pause_bytes / 2;
  std::erase_if(paused_, [this, enough](uint32_t index) {
    Connection& connection = connections_[index];
    NoteTaken(connection);
    const bool waits_for_us = connection.backlog_seen <= enough;
    if (waits_for_us || connection.taken_bytes >= enough) {
      connection.paused_since_ns = now_ns_;
      connection.taken_bytes = 0;
    }
    if (WaitsForAnswers(connection) || !waits_for_us) return false;
    connection.paused = false;
    connection.last_received_ns = now_ns_;
    if (connection.partial_since_ns != 0) connection.partial_since_ns = now_ns_;
    network_->SetReceivePaused(connection.id, false);
    return true;
  });
}

void IngestCore::MeasureDrainRate() {
  if (now_ns_ - rate_since_ns_ < kRateWindowNs) return;
  const uint64_t settled = counters_[IngestCounter::kObservationsAccepted].Read();
  const double seconds = static_cast<double>(now_ns_ - rate_since_ns_) / kNanosPerSecond;
  const double rate = static_cast<double>(settled - rate_settled_) / seconds;
  settled_per_second_ = 0.8 * settled_per_second_ + 0.2 * rate;
  rate_since_ns_ = now_ns_;
  rate_settled_ = settled;
}

// When half of what waits in the connection's lane is gone, at the rate of the last moments.
uint32_t IngestCore::RetryAfterMs(const Connection& connection) const {
  const auto& lanes = port_.shards[connection.home.value()].lanes;
  const size_t lane = static_cast<size_t>(LaneOfPriority(connection.priority));
  const double waiting = static_cast<double>(lanes[lane].Depth());
  const double ms = 500 * waiting / std::max(settled_per_second_, 1.0);
  return static_cast<uint32_t>(std::clamp(ms, 1.0, 1000.0));
}

}  // namespace engram
