#include "dataplane/ingest_core.h"

#include <algorithm>
#include <new>
#include <utility>

#include "src/core/check.h"
#include "src/core/session_id.h"

namespace engram {

namespace {

constexpr size_t kCompletionBatch = 256;
constexpr uint32_t kKnownFeatures = kFeatureNoSession | kFeatureAttributes | kFeatureWideRecalls |
                                    kFeatureNeverGoesBack | kFeatureFlow | kFeatureSnapshotTime;
// Share of each slot size that is kept for those who go first.
constexpr uint32_t kNormalKeepFreePercent = 20;  // for high priority and recalls
constexpr uint32_t kHighKeepFreePercent = 10;    // for recalls

}  // namespace

Result<std::unique_ptr<IngestCore>> IngestCore::Create(const IngestOptions& options, Clock* clock,
                                                       Network* network, ProducerPort port,
                                                       const CounterCatalogue* catalogue,
                                                       const RecordAccess& access) {
  auto pool = PartialBlockPool::Create(options.partial_frame_bytes / PartialBlockPool::kBlockBytes,
                                       options.huge_pages);
  if (!pool) return std::unexpected(pool.error());
  std::unique_ptr<RecordReader> records;
  if (access.make_disk != nullptr) {
    auto reader = RecordReader::Create(
        {.retry_for_ns = access.unwritten_ns, .huge_pages = options.huge_pages}, clock, access);
    if (!reader) return std::unexpected(reader.error());
    records = *std::move(reader);
  }
  // Recalls of all spaces ask all shards.
  auto merger = RecallMerger::Create(options.max_merges, static_cast<uint16_t>(port.shards.size()),
                                     kMaxRecallPayloadBytes, options.huge_pages, records.get());
  if (!merger) return std::unexpected(merger.error());
  return std::unique_ptr<IngestCore>(new IngestCore(options, clock, network, std::move(port),
                                                    catalogue, *std::move(pool), std::move(records),
                                                    *std::move(merger)));
}

IngestCore::IngestCore(const IngestOptions& options, Clock* clock, Network* network,
                       ProducerPort port, const CounterCatalogue* catalogue,
                       PartialBlockPool partial_pool, std::unique_ptr<RecordReader> records,
                       std::unique_ptr<RecallMerger> merger)
    : options_(options),
      clock_(clock),
      network_(network),
      catalogue_(catalogue),
      port_(std::move(port)),
      partial_pool_(std::move(partial_pool)),
      scratch_(kFrameHeaderBytes + kMaxFrameBodyBytes),
      connections_(options.max_connections),
      completions_(kCompletionBatch),
      request_slots_(port_.shards.size()),
      records_(std::move(records)),
      merger_(std::move(merger)),
      merged_(options.max_merges) {
  request_shards_.reserve(port_.shards.size());
  sendable_.reserve(options.max_merges);
  dirty_.reserve(options.max_connections);
  paused_.reserve(options.max_connections);
  orphaned_commands_.reserve(options.max_connections);
}

int IngestCore::Poll() {
  now_ns_ = clock_->MonotonicNs();
  int work = TakeCompletions();
  work += SendMerged();
  // What was asked for just now may be there already.
  if (records_ != nullptr && records_->Poll() > 0) work += 1 + SendMerged();
  FlushAcks();
  work += network_->Poll(*this, options_.events_per_poll);
  FlushAcks();
  ReviewPaused();
  SweepTimeouts();
  MeasureDrainRate();
  return work;
}

void IngestCore::OnAccept(ConnectionId id) {
  now_ns_ = clock_->MonotonicNs();  // It may come from a RecoveryGreeter, before the first Poll.
  CHECK(id.index < connections_.size(), "the network has as many places as the ingress core");
  Connection& connection = connections_[id.index];
  CHECK(connection.state == State::kFree, "a place is used by one connection at a time");
  connection = Connection();
  connection.id = id;
  connection.state = State::kAwaitHello;
  connection.opened_ns = now_ns_;
  connection.last_received_ns = now_ns_;
  connections_used_ = std::max(connections_used_, id.index + 1);
  ++open_connections_;
  counters_[IngestCounter::kConnectionsOpened].Add(1);
  if (draining_) RefuseAndClose(connection, RefusalReason::kShuttingDown, FrameType::kHello, 0);
}

void IngestCore::OnReceive(ConnectionId id, std::span<const std::byte> bytes) {
  Connection* connection = Find(id);
  if (connection == nullptr || connection->state >= State::kSettling) return;
  counters_[IngestCounter::kBytesReceived].Add(bytes.size());
  now_ns_ = clock_->MonotonicNs();
  connection->last_received_ns = now_ns_;
  const auto on_frame = [&](const FrameHeader& header, std::span<const std::byte> frame) {
    if (frame.data() == scratch_.data()) counters_[IngestCounter::kFramesGathered].Add(1);
    connection->partial_since_ns = 0;
    return TakeFrame(*connection, header, frame);
  };
  FrameAssembler::Outcome outcome =
      connection->assembler.Feed(bytes, &partial_pool_, scratch_, on_frame);
  while (outcome.reason == RefusalReason::kPartialFrameLimit) {
    const size_t free_before = partial_pool_.free_blocks();
    EvictOldestPartial(*connection);
    if (partial_pool_.free_blocks() == free_before) break;
    outcome = connection->assembler.Feed(outcome.rest, &partial_pool_, scratch_, on_frame);
  }
  if (connection->state >= State::kSettling) return;
  if (outcome.reason != RefusalReason::kNone) {
    RefuseAndClose(*connection, outcome.reason, FrameType::kObserve, 0);
    return;
  }
  if (connection->assembler.pending_bytes() > 0 && connection->partial_since_ns == 0) {
    connection->partial_since_ns = now_ns_;
  }
}

void IngestCore::OnClosed(ConnectionId id, CloseCause cause) {
  Connection* connection = Find(id);
  if (connection == nullptr) return;
  if (cause == CloseCause::kSendBacklog) CountNak(RefusalReason::kSlowReader);
  connection->assembler.Clear(&partial_pool_);
  if (connection->has_session) {
    --open_sessions_;
    DetachRequest detach;
    detach.session_slot = connection->session_slot;
    detach.session = connection->session;
    detach.origin = OriginOf(*connection);
    PushDetach(connection->home, detach);
  }
  if (connection->lease_owner != FileLease::kNobody) options_.lease->End(connection->lease_owner);
  if (connection->commands_in_flight > 0) {
    orphaned_commands_.push_back({OriginOf(*connection), connection->commands_in_flight});
  }
  if (connection->paused) std::erase(paused_, connection->id.index);
  if (connection->ack_dirty) std::erase(dirty_, connection->id.index);
  connection->state = State::kFree;
  --open_connections_;
  counters_[IngestCounter::kConnectionsClosed].Add(1);
}

// False when the connection takes no more frames.
bool IngestCore::TakeFrame(Connection& connection, const FrameHeader& header,
                           std::span<const std::byte> frame) {
  counters_[IngestCounter::kFramesReceived].Add(1);
  const RefusalReason reason = CheckFrameCrc(header, frame);
  if (reason != RefusalReason::kNone) {
    return RefuseAndClose(connection, reason, header.type, header.sequence);
  }
  const std::span<const std::byte> body = frame.subspan(kFrameHeaderBytes);
  if ((header.type == FrameType::kPing || header.type == FrameType::kClose) && !body.empty()) {
    return RefuseAndClose(connection, RefusalReason::kBadFrame, header.type, header.sequence);
  }
  if (header.type == FrameType::kPing) {
    if ((header.flags & kFrameFlagPingAnswer) == 0) {
      SendPingAnswer(network_, connection.id, connection.session.value(), header.sequence);
    }
    return true;
  }
  if (header.type == FrameType::kHello) return TakeHello(connection, header, body);
  if (connection.state == State::kAwaitHello && header.type != FrameType::kClose) {
    return RefuseAndClose(connection, RefusalReason::kHelloRequired, header.type, header.sequence);
  }
  switch (header.type) {
    case FrameType::kObserve:
      return TakeObserve(connection, header, body);
    case FrameType::kRecall:
      return TakeRecall(connection, header, body);
    case FrameType::kFlow:
      return TakeFlow(connection, header, body);
    case FrameType::kCommand:
      return TakeCommand(connection, header, body);
    case FrameType::kScroll:
      return TakeScroll(connection, header, body);
    case FrameType::kCheck:
      return TakeCheck(connection, header, body);
    case FrameType::kIntrospect:
      return TakeIntrospect(connection, header, body);
    case FrameType::kClose:
      connection.state = State::kSettling;
      connection.opened_ns = now_ns_;
      FinishSettling(connection);
      return false;
    default:
      return RefuseAndClose(connection, RefusalReason::kBadType, header.type, header.sequence);
  }
}

bool IngestCore::TakeHello(Connection& connection, const FrameHeader& header,
                           std::span<const std::byte> body) {
  if (connection.state != State::kAwaitHello || connection.hello_pending) {
    return RefuseAndClose(connection, RefusalReason::kHelloRepeated, header.type, 0);
  }
  HelloView hello;
  RefusalReason reason = DecodeHello(body, &hello);
  if (reason != RefusalReason::kNone) {
    return RefuseAndClose(connection, reason, header.type, 0);
  }
  connection.priority = hello.body.priority;
  connection.features = hello.body.features & kKnownFeatures;
  connection.space = SpaceName(hello.space);

  const SlotId slot = port_.slab->Acquire(kRequestBodyOffset);
  if (slot == kNoSlot) {
    return RefuseAndClose(connection, RefusalReason::kSlotsExhausted, header.type, 0);
  }
  auto* request = new (port_.slab->At(slot)) HelloRequest;
  request->wants_session = (hello.body.features & kFeatureNoSession) == 0;
  request->metric = hello.body.metric;
  request->dimension = hello.body.dimension;
  request->origin = OriginOf(connection);
  request->session = SessionId(header.session);
  request->space = connection.space;
  connection.home = HomeFor(*request, EntryOf(connection));
  if (!LaneOf(connection.home, Lane::kRecall).TryPush(slot)) {
    port_.slab->Release(slot);
    return RefuseAndClose(connection, RefusalReason::kQueueFull, header.type, 0);
  }
  connection.hello_pending = true;
  return true;
}

bool IngestCore::TakeObserve(Connection& connection, const FrameHeader& header,
                             std::span<const std::byte> body) {
  if (!connection.has_session) {
    RefuseRequest(connection, RefusalReason::kNoSession, header.type, header.sequence);
    return true;
  }
  ObserveReader reader;
  const RefusalReason reason = ObserveReader::Open(body, &reader);
  if (reason != RefusalReason::kNone || header.sequence == 0 ||
      header.session != connection.session.value()) {
    return RefuseAndClose(connection, RefusalReason::kBadFrame, header.type, header.sequence);
  }
  counters_[IngestCounter::kObservationsReceived].Add(reader.remaining());
  if (header.sequence > connection.next_sequence) {
    RefuseGap(connection, header.sequence);
    return true;
  }
  uint64_t pushed = 0;
  for (Sequence sequence = header.sequence; reader.remaining() > 0; ++sequence) {
    const ObservationView view = reader.Next();
    if (sequence < connection.next_sequence) {
      counters_[IngestCounter::kObservationsRepeated].Add(1);
      MarkAckDirty(connection);
      continue;
    }
    const bool is_paused = connection.flow.is_paused();
    const RefusalReason refused =
        is_paused ? RefusalReason::kPaused : PushObservation(connection, view, sequence);
    if (refused != RefusalReason::kNone) {
      RefuseForNow(connection, refused, sequence, is_paused ? 0 : RetryAfterMs(connection));
      if (!Has(connection, kFeatureNeverGoesBack)) break;
      continue;
    }
    connection.next_sequence = sequence + 1;
    connection.refused_ahead = false;
    ++pushed;
  }
  PassRefused(connection);
  if (pushed > 0) {
    const int64_t took_ns = clock_->MonotonicNs() - now_ns_;
    for (uint64_t i = 0; i < pushed; ++i) receive_to_ring_.Record(took_ns);
  }
  return true;
}

// Said once: what is under way behind it is passed over in silence until the expected one is there.
// Who never goes back would wait for ever for an answer to that, so each is named.
void IngestCore::RefuseGap(Connection& connection, Sequence sequence) {
  if (connection.refused_ahead) return;
  connection.refused_ahead = !Has(connection, kFeatureNeverGoesBack);
  CountNak(RefusalReason::kSequenceGap);
  SendNak(network_, connection.id, RefusalReason::kSequenceGap,
          {.session = connection.session.value(),
           .sequence = sequence,
           .expected = connection.next_sequence,
           .has_numbers = true,
           .got = sequence,
           .wanted = connection.next_sequence});
  PauseIfUnread(connection);
}

// Validate, copy once, route. An observation that may not enter goes as a skip, so that its number
// is settled in order. Returns kNone or why there is no room.
RefusalReason IngestCore::PushObservation(Connection& connection, const ObservationView& view,
                                          Sequence sequence) {
  const Lane lane = LaneOfPriority(connection.priority);
  auto& ring = LaneOf(connection.home, lane);
  if (ring.Full()) return RefusalReason::kQueueFull;
  const SlotId slot = port_.slab->Acquire(
      SlotBytesFor(view), lane == Lane::kHigh ? kHighKeepFreePercent : kNormalKeepFreePercent);
  if (slot == kNoSlot) return RefusalReason::kSlotsExhausted;
  std::byte* bytes = port_.slab->At(slot);
  // A refusal is in the slot now; the shard settles it.
  (void)AdmitObservation(view, connection.rules, bytes);
  auto* request = reinterpret_cast<ObserveRequest*>(bytes);
  request->session_slot = connection.session_slot;
  request->session = connection.session;
  request->sequence = sequence;
  request->may_skip = Has(connection, kFeatureNeverGoesBack);
  request->origin = OriginOf(connection);
  request->received_ns = now_ns_;
  const bool pushed = ring.TryPush(slot);
  CHECK(pushed, "the ring had room");
  ++connection.observations_in_flight;
  return RefusalReason::kNone;
}

bool IngestCore::TakeIntrospect(Connection& connection, const FrameHeader& header,
                                std::span<const std::byte> body) {
  IntrospectWhat what{};
  RefusalReason reason = DecodeIntrospect(body, &what);
  if (reason != RefusalReason::kNone) {
    return RefuseAndClose(connection, reason, header.type, header.sequence);
  }
  if (what == IntrospectWhat::kStatus) {
    SendStatus(connection, header.sequence);
    return true;
  }
  if (what == IntrospectWhat::kCheckpoint) {
    if (options_.checkpoint_requests != nullptr) options_.checkpoint_requests->fetch_add(1);
    SendIntrospection(network_, connection.id, connection.session.value(), header.sequence,
                      {.what = what}, false, {});
    return true;
  }
  if (what == IntrospectWhat::kHold || what == IntrospectWhat::kRelease) {
    HoldFiles(connection, what, header.sequence);
    return true;
  }
  reason = PushIntrospect(connection, header.sequence);
  if (reason != RefusalReason::kNone) {
    RefuseRequest(connection, reason, header.type, header.sequence);
  }
  return true;
}

// A hold is the connection's alone and ends with it.
void IngestCore::HoldFiles(Connection& connection, IntrospectWhat what, uint64_t request_id) {
  if (options_.lease != nullptr && what == IntrospectWhat::kRelease) {
    options_.lease->End(connection.lease_owner);
  }
  if (options_.lease != nullptr && what == IntrospectWhat::kHold) {
    if (connection.lease_owner == FileLease::kNobody) {
      connection.lease_owner = options_.lease->NewOwner();
    }
    // From now on, and not from when this round began: whoever asked counts from before that.
    const int64_t others_ns =
        options_.lease->Extend(connection.lease_owner, clock_->MonotonicNs(), kHoldNs);
    if (others_ns > 0) {
      CountNak(RefusalReason::kBusy);
      SendNak(network_, connection.id, RefusalReason::kBusy,
              {.refused_type = FrameType::kIntrospect,
               .session = connection.session.value(),
               .sequence = request_id,
               .retry_after_ms = static_cast<uint32_t>(others_ns / kNanosPerMilli + 1),
               .text = "another connection holds the files: a backup is under way"});
      return;
    }
  }
  SendIntrospection(network_, connection.id, connection.session.value(), request_id, {.what = what},
                    false, {});
}

// Asks every shard, or none.
RefusalReason IngestCore::PushIntrospect(Connection& connection, uint64_t request_id) {
  if (connection.introspections_in_flight > 0) return RefusalReason::kBusy;
  request_shards_.clear();
  for (uint16_t s = 0; s < shards(); ++s) request_shards_.push_back(ShardId(s));
  const RefusalReason reason = AcquireForEach(request_shards_, kRequestBodyOffset);
  if (reason != RefusalReason::kNone) return reason;
  for (uint16_t s = 0; s < shards(); ++s) {
    auto* request = new (port_.slab->At(request_slots_[s])) IntrospectRequest;
    request->origin = OriginOf(connection);
    request->request_id = request_id;
    const bool pushed = LaneOf(ShardId(s), Lane::kRecall).TryPush(request_slots_[s]);
    CHECK(pushed, "the ring had room");
    ++connection.introspections_in_flight;
  }
  connection.introspect_id = request_id;
  return RefusalReason::kNone;
}

// A slot and room in the recall lane for every one of `shards`, or nothing. Slots: request_slots_.
RefusalReason IngestCore::AcquireForEach(std::span<const ShardId> shards, size_t slot_bytes) {
  for (const ShardId shard : shards) {
    if (LaneOf(shard, Lane::kRecall).Full()) return RefusalReason::kQueueFull;
  }
  for (size_t i = 0; i < shards.size(); ++i) {
    request_slots_[i] = port_.slab->Acquire(slot_bytes);
    if (request_slots_[i] != kNoSlot) continue;
    ReleaseForEach(i);
    return RefusalReason::kSlotsExhausted;
  }
  return RefusalReason::kNone;
}

void IngestCore::ReleaseForEach(size_t shards) {
  for (size_t i = 0; i < shards; ++i) port_.slab->Release(request_slots_[i]);
}

// The oldest unfinished frame gives way: a client that dribbles harms itself. When that is the
// frame of `growing`, which needs the room, nothing is evicted, and its caller refuses it.
void IngestCore::EvictOldestPartial(const Connection& growing) {
  Connection* oldest = nullptr;
  for (uint32_t i = 0; i < connections_used_; ++i) {
    Connection& candidate = connections_[i];
    if (candidate.state == State::kFree) continue;
    if (candidate.assembler.pending_bytes() == 0) continue;
    if (oldest == nullptr || candidate.partial_since_ns < oldest->partial_since_ns) {
      oldest = &candidate;
    }
  }
  if (oldest == nullptr || oldest == &growing) return;
  counters_[IngestCounter::kEvictedPartialFrames].Add(1);
  RefuseAndClose(*oldest, RefusalReason::kPartialFrameLimit, FrameType::kObserve, 0);
}

SpaceEntry* IngestCore::EntryOf(Connection& connection) {
  if (connection.entry != nullptr && connection.entry->generation() != connection.generation) {
    // It was dropped: what the space was then does not hold any more.
    connection.entry = nullptr;
    connection.rules = {};
  }
  if (connection.entry == nullptr) {
    connection.entry = port_.catalogue->Find(connection.space.view());
    if (connection.entry != nullptr) connection.generation = connection.entry->generation();
  }
  return connection.entry;
}

// Where a hello goes: a known session to its home; a new one to one of the space's partitions; who
// only recalls to the first.
ShardId IngestCore::HomeFor(const HelloRequest& request, SpaceEntry* entry) const {
  if (request.wants_session && request.session.value() != 0) {
    // One of a shard that is no longer there lives where its log is read.
    return ShardId(static_cast<uint16_t>(HomeOfSession(request.session).value() % shards()));
  }
  if (entry == nullptr) return port_.catalogue->FirstShard(request.space.view());
  return request.wants_session ? entry->NextHome() : entry->ShardOf(0);
}

IngestCore::Connection* IngestCore::Find(ConnectionId id) {
  if (id.index >= connections_.size()) return nullptr;
  Connection& connection = connections_[id.index];
  if (connection.state == State::kFree || !(connection.id == id)) return nullptr;
  return &connection;
}

}  // namespace engram
