#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "dataplane/admission_gate.h"
#include "dataplane/decoder.h"
#include "dataplane/flow_gate.h"
#include "dataplane/frame_assembler.h"
#include "dataplane/frame_format.h"
#include "dataplane/frame_writer.h"
#include "dataplane/recall_merger.h"
#include "dataplane/record_reader.h"
#include "dataplane/ring_mesh.h"
#include "src/core/clock.h"
#include "src/core/counters.h"
#include "src/core/file_lease.h"
#include "src/core/latency_histogram.h"
#include "src/core/network.h"
#include "src/core/result.h"

namespace engram {

struct IngestOptions {
  uint32_t max_connections = 10'000;
  int64_t handshake_timeout_ns = 10 * kNanosPerSecond;  // from accept to hello
  int64_t frame_timeout_ns = 30 * kNanosPerSecond;      // from a frame's first byte to its last
  int64_t idle_timeout_ns = 300 * kNanosPerSecond;      // nothing received
  // In which a client that is waited for takes at least half of send_pause_bytes.
  int64_t slow_reader_timeout_ns = 30 * kNanosPerSecond;
  // In which it takes the whole of an answer that is there and keeps files of the logs from being
  // removed; of a client that may hold answers back, of any answer.
  int64_t answer_timeout_ns = 300 * kNanosPerSecond;
  int64_t drain_timeout_ns = 5 * kNanosPerSecond;  // to settle and say close
  uint32_t max_recalls = 16;                       // of a connection, under way
  uint32_t recall_batch = 10;                      // hits of a result frame at most; of a long
                                                   // recall, those that come first
  uint32_t max_merges = 1'024;                     // recalls of all that are merged or read
  size_t partial_frame_bytes = size_t{32} << 20;   // of all unfinished frames
  size_t send_pause_bytes = size_t{1} << 20;       // unread answers at which reading pauses
  int events_per_poll = 64;
  HugePagePolicy huge_pages = HugePagePolicy::kAuto;
  // Counts the checkpoints that clients asked for; outlives the core. nullptr: none are made.
  std::atomic<uint64_t>* checkpoint_requests = nullptr;
  // Likewise compactions.
  std::atomic<uint64_t>* compaction_requests = nullptr;
  // Clients hold the files of the data directory by it; likewise. nullptr: there are none.
  FileLease* lease = nullptr;
  // Told by `status`; empty: there is none.
  std::string data_directory = {};
  std::string instance_id = {};
};

enum class IngestCounter : uint8_t {
  kConnectionsOpened,
  kConnectionsClosed,
  kBytesReceived,
  kFramesReceived,
  kFramesGathered,  // cut between two reads, so copied once more
  kObservationsReceived,
  kObservationsAccepted,
  kObservationsRepeated,
  kRecallsReceived,
  kRecallsAnswered,
  kAcksSent,
  kNaksSent,
  kEvictedPartialFrames,
  kDetachesLost,
  kCount,
};
std::string_view IngestCounterName(IngestCounter counter);

constexpr Lane LaneOfPriority(Priority priority) {
  return priority == Priority::kHigh ? Lane::kHigh : Lane::kNormal;
}

// One ingress core: bytes of connections to slots in the shards' rings, and the shards' answers
// back to bytes.
//
// The way of an observation: OnReceive (receiver) -> TakeFrame (decoder) -> TakeObserve ->
// PushObservation (admission gate, ring mesh), in ingest_core.cc; back:
// TakeCompletions -> SettleObservation -> FlushAcks, in ingest_answers.cc. Recalls, which go to
// every partition of a space and come back as one answer, are in ingest_recall.cc; scrolls and
// checks, which go to one at a time, in ingest_scroll.cc; how clients hold answers back in
// ingest_flow.cc; refusals, closing and timeouts in ingest_upkeep.cc, what the core says of itself
// in ingest_status.cc.
//
// Thread safety: one core's alone; counters and histograms may be read by others.
// Invariants: a connection's observations are pushed in the order of their sequence numbers, on one
// lane to one shard, the session's home; settled_sequence <= next_sequence - 1; every slot is free,
// in a ring, or with a shard; a merge is released, and its pins left, when all its partitions have
// answered and it was sent, or its connection has gone.
class IngestCore final : public NetworkHandler {
 public:
  // `clock`, `network` and `catalogue` (counters for `status`; may be filled later) outlive the
  // core. `records`: the logs of the shards, where they have some. Errors: kResourceExhausted.
  static Result<std::unique_ptr<IngestCore>> Create(const IngestOptions& options, Clock* clock,
                                                    Network* network, ProducerPort port,
                                                    const CounterCatalogue* catalogue,
                                                    const RecordAccess& records = {});

  // One bounded round; returns how much was done. Never blocks.
  int Poll();

  // Begins to end every connection: what was taken is settled, acked, and said good-bye to.
  void BeginDrain();
  // Every connection is gone.
  bool drained() const { return draining_ && open_connections_ == 0; }

  uint32_t open_connections() const { return open_connections_; }
  // Blocks that hold no unfinished frame.
  size_t free_partial_blocks() const { return partial_pool_.free_blocks(); }
  // Recalls whose partitions are being merged, or whose records are being read.
  uint32_t merges_in_flight() const { return options_.max_merges - merger_->free_merges(); }
  // nullptr where the shards have no logs.
  RecordReader* records() const { return records_.get(); }
  void AddCounters(std::string_view core, CounterCatalogue* catalogue) const;
  const LatencyHistogram& receive_to_ring() const { return receive_to_ring_; }
  const Counter& counter(IngestCounter which) const { return counters_[which]; }
  const Counter& refusals(RefusalReason reason) const {
    return refusals_[static_cast<size_t>(reason)];
  }

  // NetworkHandler.
  void OnAccept(ConnectionId id) override;
  void OnReceive(ConnectionId id, std::span<const std::byte> bytes) override;
  void OnClosed(ConnectionId id, CloseCause cause) override;

 private:
  enum class State : uint8_t {
    kFree,
    kAwaitHello,
    kOpen,      // hello done
    kSettling,  // takes nothing more; says close once everything taken is answered
    kClosing,   // the network was told to close
  };

  struct Connection {
    ConnectionId id;
    State state = State::kFree;
    bool hello_pending = false;
    bool has_session = false;
    bool ack_dirty = false;      // in dirty_
    bool refused_ahead = false;  // a gap or a lack of room was named; silent until next_sequence
    bool paused = false;         // in paused_
    Priority priority = Priority::kNormal;
    uint32_t features = 0;  // that hello asked for and are known here
    ShardId home;
    SpaceRules rules;
    SpaceName space;
    SpaceEntry* entry = nullptr;  // of `space`, once it exists
    SessionId session;
    uint32_t session_slot = 0;
    Sequence next_sequence = 1;
    Sequence settled_sequence = 0;
    uint64_t credit_sequence = 0;
    uint32_t observations_in_flight = 0;
    uint32_t recalls_in_flight = 0;
    uint16_t introspections_in_flight = 0;  // shards that have not answered yet
    uint64_t introspect_id = 0;
    uint32_t generation = 0;                              // of `entry`, that `rules` are of
    uint16_t commands_in_flight = 0;                      // shards that have not answered yet
    CommandDoneBody command;                              // what the others have answered
    RefusalReason command_reason = RefusalReason::kNone;  // that one of them has not done it
    int64_t opened_ns = 0;                                // of the close, once closing
    int64_t last_received_ns = 0;
    int64_t partial_since_ns = 0;  // of the unfinished frame, 0: none
    int64_t paused_since_ns = 0;
    size_t backlog_seen = 0;  // of what is to be sent, while paused
    size_t taken_bytes = 0;   // by the peer since paused_since_ns, as far as was seen
    FlowGate flow;            // of its result frames
    uint64_t send_round = 0;  // in which the first of its merges was not sent to its end
    FileLease::Owner lease_owner = FileLease::kNobody;  // drawn when it first holds files
    FrameAssembler assembler;
  };

  // What a recall that is merged is answered to.
  struct MergedRecall {
    Origin origin = 0;
    uint64_t request_id = 0;
    CommitStamp snapshot = kNoStamp;
    ReadPins::Epoch pins = 0;  // inside these; 0: it reads no records
    bool is_sendable = false;  // in sendable_
    int64_t sendable_ns = 0;   // since then
    bool is_scroll = false;
    uint16_t partition = 0;  // that is scrolled
    uint64_t cursor = 0;     // where it goes on there; 0: that was all of it
  };

  // A command whose connection has gone: it is done all the same.
  struct OrphanedCommand {
    Origin origin = 0;
    uint16_t in_flight = 0;  // shards that have not answered yet
  };

  IngestCore(const IngestOptions& options, Clock* clock, Network* network, ProducerPort port,
             const CounterCatalogue* catalogue, PartialBlockPool partial_pool,
             std::unique_ptr<RecordReader> records, std::unique_ptr<RecallMerger> merger);

  // Receiving.
  bool TakeFrame(Connection& connection, const FrameHeader& header,
                 std::span<const std::byte> frame);
  bool TakeHello(Connection& connection, const FrameHeader& header,
                 std::span<const std::byte> body);
  bool TakeObserve(Connection& connection, const FrameHeader& header,
                   std::span<const std::byte> body);
  RefusalReason PushObservation(Connection& connection, const ObservationView& view,
                                Sequence sequence);
  void RefuseGap(Connection& connection, Sequence sequence);
  bool TakeRecall(Connection& connection, const FrameHeader& header,
                  std::span<const std::byte> body);
  RefusalReason PushRecall(Connection& connection, const RecallView& view,
                           const FrameHeader& header);
  bool TakeFlow(Connection& connection, const FrameHeader& header, std::span<const std::byte> body);
  bool TakeScroll(Connection& connection, const FrameHeader& header,
                  std::span<const std::byte> body);
  RefusalReason PushScroll(Connection& connection, const ScrollBody& scroll,
                           const FrameHeader& header);
  bool TakeCheck(Connection& connection, const FrameHeader& header,
                 std::span<const std::byte> body);
  RefusalReason PushCheck(Connection& connection, const CheckBody& check, uint64_t request_id);
  void ChooseShards(const Connection& connection, bool across);
  RecallMerger::MergeId BeginMerge(const Connection& connection, size_t partitions, uint32_t k,
                                   const RecallMerger::Order& order);
  RefusalReason AcquireForEach(std::span<const ShardId> shards, size_t slot_bytes);
  void ReleaseForEach(size_t shards);
  bool TakeIntrospect(Connection& connection, const FrameHeader& header,
                      std::span<const std::byte> body);
  bool TakeCommand(Connection& connection, const FrameHeader& header,
                   std::span<const std::byte> body);
  RefusalReason PushCommand(Connection& connection, const CommandView& command,
                            uint64_t request_id);
  void FinishCommand(Connection& connection, const Completion& completion);
  void HoldFiles(Connection& connection, IntrospectWhat what, uint64_t request_id);
  void FinishOrphanedCommand(const Completion& completion);
  void AskForWhatFollows(SpaceCommand what);
  RefusalReason PushIntrospect(Connection& connection, uint64_t request_id);
  void SendStatus(Connection& connection, uint64_t request_id);
  void EvictOldestPartial(const Connection& growing);

  // Answers of the shards.
  int TakeCompletions();
  void TakeCompletion(ShardId shard, const Completion& completion);
  void Deliver(Connection& connection, ShardId shard, const Completion& completion);
  void DetachOrphan(ShardId shard, const Completion& completion);
  void FinishHello(Connection& connection, const Completion& completion);
  void SettleObservation(Connection& connection, const Completion& completion);
  void FinishRecall(Connection& connection, RefusalReason reason, uint64_t request_id);
  void FinishScroll(Connection& connection, RefusalReason reason, const MergedRecall& scroll);
  void FinishCheck(Connection& connection, const Completion& completion);
  void TakePartition(ShardId shard, const Completion& completion);
  void MakeSendable(RecallMerger::MergeId merge);
  int SendMerged();
  void EndMerge(RecallMerger::MergeId merge);
  bool SendMerge(Connection& connection, RecallMerger::MergeId merge, bool is_first);
  bool MaySendResult(const Connection& connection) const;
  bool IsOverdue(const Connection& connection, RecallMerger::MergeId merge) const;
  void RefuseHeld(Connection& connection, RecallMerger::MergeId merge, RefusalReason reason);
  void GiveWayTo(const Connection& connection);
  FlowBody FlowOf(const Connection& connection) const;
  void ForwardHits(Connection& connection, ShardId shard, const Completion& completion);
  void ForwardRecords(Connection& connection, ShardId shard, const Completion& completion);
  void FlushAcks();
  void MarkAckDirty(Connection& connection);
  void GrantCredit(Connection& connection, uint64_t credit_sequence);

  // Refusals and endings.
  void RefuseForNow(Connection& connection, RefusalReason reason, Sequence sequence,
                    uint32_t retry_after_ms);
  void PassRefused(Connection& connection);
  void RefuseRequest(Connection& connection, RefusalReason reason, FrameType type,
                     uint64_t request_id);
  bool RefuseAndClose(Connection& connection, RefusalReason reason, FrameType type,
                      uint64_t sequence);
  void BeginClose(Connection& connection, Network::CloseMode mode);
  void FinishSettling(Connection& connection);
  void PushDetach(ShardId shard, const DetachRequest& detach);
  void CountNak(RefusalReason reason);

  // Upkeep.
  void SweepTimeouts();
  void SweepConnection(Connection& connection);
  bool WaitsForAnswers(const Connection& connection) const;
  void PauseReceiving(Connection& connection);
  void PauseIfUnread(Connection& connection);
  void NoteTaken(Connection& connection);
  void ReviewPaused();
  void MeasureDrainRate();
  uint32_t RetryAfterMs(const Connection& connection) const;

  SpaceEntry* EntryOf(Connection& connection);
  ShardId HomeFor(const HelloRequest& request, SpaceEntry* entry) const;
  CommitStamp LatestSnapshot() const;
  uint16_t shards() const { return static_cast<uint16_t>(port_.shards.size()); }
  Connection* Find(ConnectionId id);
  Connection* FindOrigin(Origin origin) {
    return Find({.index = static_cast<uint32_t>(origin >> 32),
                 .generation = static_cast<uint32_t>(origin)});
  }
  static bool Has(const Connection& connection, uint32_t feature) {
    return (connection.features & feature) != 0;
  }
  static Origin OriginOf(const Connection& connection) {
    return (uint64_t{connection.id.index} << 32) | connection.id.generation;
  }
  // The shards' answers to a recall that is merged name its merge, not its connection,
  // since that may go while the merge may not. No connection has so high an index.
  static constexpr Origin kMergeOrigin = Origin{1} << 63;
  SpscRing<SlotId>::Producer& LaneOf(ShardId shard, Lane lane) {
    return port_.shards[shard.value()].lanes[static_cast<size_t>(lane)];
  }

  // Constant after construction.
  const IngestOptions options_;
  Clock* const clock_;
  Network* const network_;
  const CounterCatalogue* const catalogue_;

  // Owner core only.
  ProducerPort port_;
  PartialBlockPool partial_pool_;
  std::vector<std::byte> scratch_;       // one frame of the greatest size
  std::vector<Connection> connections_;  // by ConnectionId::index
  std::vector<uint32_t> dirty_;          // connections whose ack is due
  std::vector<uint32_t> paused_;         // connections that are not read from
  std::vector<Completion> completions_;  // of one batch
  std::vector<OrphanedCommand> orphaned_commands_;
  // While one request is made for several shards: which, and its slot for each.
  std::vector<ShardId> request_shards_;
  std::vector<SlotId> request_slots_;
  std::unique_ptr<RecordReader> records_;  // nullptr: the shards have no logs
  std::unique_ptr<RecallMerger> merger_;
  std::vector<MergedRecall> merged_;             // by merge
  std::vector<RecallMerger::MergeId> sendable_;  // merges of which some can be sent
  uint64_t send_round_ = 0;                      // of SendMerged
  uint32_t connections_used_ = 0;                // highest index ever + 1
  uint32_t open_connections_ = 0;
  uint32_t open_sessions_ = 0;
  uint32_t sweep_cursor_ = 0;
  int64_t now_ns_ = 0;
  int64_t next_sweep_ns_ = 0;
  int64_t drain_began_ns_ = 0;
  bool draining_ = false;
  // Observations settled a second, for retry_after.
  int64_t rate_since_ns_ = 0;
  uint64_t rate_settled_ = 0;
  double settled_per_second_ = 0;

  // Written by the owner, read by others.
  CounterSet<IngestCounter, static_cast<size_t>(IngestCounter::kCount)> counters_;
  std::array<Counter, kRefusalCodes> refusals_;
  LatencyHistogram receive_to_ring_;
};

}  // namespace engram
