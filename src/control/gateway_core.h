#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string_view>
#include <utility>
#include <vector>

#include "dataplane/hit_window.h"
#include "dataplane/recall_merger.h"
#include "dataplane/record_reader.h"
#include "dataplane/ring_mesh.h"
#include "src/control/gateway_call.h"
#include "src/control/gateway_inbox.h"
#include "src/core/clock.h"
#include "src/core/counters.h"
#include "src/core/huge_page_arena.h"
#include "src/core/result.h"

namespace engram {

struct GatewayOptions {
  uint32_t max_calls = 4'096;       // under way
  uint32_t inbox_capacity = 4'096;  // commands that wait
  uint32_t max_merges = 256;        // recalls that are merged or read, under way
  // What the answers of calls under way may take; a call that would have more of it is refused.
  size_t answer_memory_bytes = size_t{256} << 20;
  int commands_per_poll = 64;
  HugePagePolicy huge_pages = HugePagePolicy::kAuto;
};

enum class GatewayCounter : uint8_t {
  kCallsStarted,
  kCallsAnswered,   // without a refusal
  kCallsRefused,    // with one, abandoned ones included
  kCallsAbandoned,  // deadline passed or cancelled while shards had their requests
  kRequestsSent,    // to shards
  kRequestsUnderWay,
  kCallsUnderWay,
  kCount,
};

// The gateway's core: calls of gRPC's and other libraries' threads to requests in the shards'
// rings, and the shards' answers back to the calls. One more producer beside the ingress cores.
//
// The way of a call: TakeCommands -> Start -> StartObserve | StartRecall | PushGets | PushScroll |
// StartIntrospect -> Send (ring mesh); back: TakeCompletions -> TakeBatch and FinishRequest ->
// Continue -> Answer -> Deliver, which reads the records that hits refer to, maybe over several
// rounds (ContinueReading).
//
// A call whose deadline passes or whose asker goes is answered at once; its place in the table is
// kept until the shards have given its slots back, which they are told to hurry with.
//
// Thread safety: one core's alone; the doors and the counters may be used by others.
// Invariants: a place of the table is free, or has a call or requests under way, or both; one that
// reads records has no requests, and is in reading_; every slot is free, in a ring, or with a
// shard; every call that left the inbox is answered exactly once; the pins are left with the place.
class GatewayCore {
 public:
  // `clock` outlives the core. `records`: the logs of the shards, where they have some. Errors:
  // kResourceExhausted.
  static Result<std::unique_ptr<GatewayCore>> Create(const GatewayOptions& options, Clock* clock,
                                                     ProducerPort port,
                                                     const RecordAccess& records = {});
  ~GatewayCore();

  // One bounded round; returns how much was done. Never blocks.
  int Poll();

  // For a transport; `wake` ends this core's sleep, if it sleeps. The core outlives the door.
  GatewayDoor OpenDoor(std::function<void()> wake) {
    return {&inbox_, &retry_after_ms_, std::move(wake)};
  }

  // nullptr where the shards have no logs.
  RecordReader* records() const { return records_.get(); }
  // Calls that have a place in the table, those that were answered early included.
  uint32_t calls_under_way() const { return options_.max_calls - FreePlaces(); }
  void AddCounters(std::string_view core, CounterCatalogue* catalogue) const;
  const Counter& counter(GatewayCounter which) const { return counters_[which]; }

 private:
  using Sent = SlotId;  // the slot of a request that a shard has
  // The hits of a get or a scroll on their way to the answer.
  struct Reading {
    HitWindow window{SIZE_MAX};
    size_t next = 0;  // offset of the next hit that is added to the window
    std::vector<std::byte> done{};
  };
  // A call under way.
  struct Place {
    bool in_use = false;
    CallKind kind = CallKind::kObserve;
    uint16_t requests = 0;   // with the shards: that many of its sent_
    uint16_t partition = 0;  // kScroll: the one that is read
    uint32_t generation = 0;
    uint32_t next_id = 0;  // kGet: the first that was not sent
    uint32_t retry_after_ms = 0;
    RefusalReason reason = RefusalReason::kNone;
    RecallMerger::MergeId merge = RecallMerger::kNone;
    int64_t deadline_ns = 0;
    size_t answer_bytes = 0;   // of the answer so far, with what is to be read
    ReadPins::Epoch pins = 0;  // inside these; 0: it reads no records
    std::unique_ptr<Reading> reading{};
    SpaceEntry* space = nullptr;
    GatewayCall* call = nullptr;  // nullptr: answered early
  };

  GatewayCore(const GatewayOptions& options, Clock* clock, ProducerPort port,
              std::unique_ptr<RecordReader> records, std::unique_ptr<RecallMerger> merger);

  // Calls in.
  int TakeCommands();
  void Start(GatewayCall* call);
  RefusalReason StartKind(Place* place);
  RefusalReason StartObserve(Place* place);
  RefusalReason StartRecall(Place* place);
  RefusalReason StartIntrospect(Place* place);
  RefusalReason PushGets(Place* place);
  RefusalReason PushGet(Place* place, std::string_view id);
  RefusalReason PushScroll(Place* place, uint16_t partition, uint64_t cursor);
  CommitStamp LatestSnapshot() const;

  // Requests to shards.
  bool HasRoom(ShardId shard, Lane lane);
  void Send(Place* place, ShardId shard, Lane lane, SlotId slot);
  template <typename Request>
  void Address(const Place& place, Request* request);

  // Answers of the shards.
  int TakeCompletions();
  void TakeCompletion(ShardId shard, const Completion& completion);
  void TakeBatch(Place* place, ShardId shard, const Completion& completion);
  void CountAnswer(Place* place, size_t bytes);
  void FinishRequest(Place* place, const Completion& completion);
  void Continue(Place* place);
  void ContinueScroll(Place* place);
  void Answer(Place* place);
  bool Deliver(Place* place);
  bool DeliverMerged(Place* place);
  bool DeliverRead(Place* place);
  int ContinueReading();
  void Finish(Place* place);
  void NoteReason(Place* place, RefusalReason reason, uint32_t retry_after_ms);

  // Endings.
  void Refuse(GatewayCall* call, RefusalReason reason);
  void Abandon(Place* place, RefusalReason reason);
  void Free(Place* place);
  // When half of what is under way will be done, at the rate of the last moments.
  uint32_t RetryAfterMs() const { return retry_after_ms_.load(std::memory_order_relaxed); }
  int SweepDeadlines();
  void MeasureRate();

  uint32_t IndexOf(const Place& place) const {
    return static_cast<uint32_t>(&place - places_.data());
  }
  Origin OriginOf(const Place& place) const {
    return (uint64_t{IndexOf(place)} << 32) | place.generation;
  }
  Sent* SentOf(const Place& place) { return &sent_[size_t{IndexOf(place)} * requests_per_call_]; }
  uint32_t FreePlaces() const { return static_cast<uint32_t>(free_places_.size()); }
  uint16_t shards() const { return static_cast<uint16_t>(port_.shards.size()); }

  // Constant after construction.
  const GatewayOptions options_;
  Clock* const clock_;
  const uint16_t requests_per_call_;

  GatewayInbox inbox_;

  // Owner core only.
  ProducerPort port_;
  const std::unique_ptr<RecordReader> records_;  // nullptr: the shards have no logs
  const std::unique_ptr<RecallMerger> merger_;
  std::vector<Place> places_;
  std::vector<Sent> sent_;  // by place, requests_per_call_ each
  std::vector<uint32_t> free_places_;
  std::vector<uint32_t> reading_;        // places whose shards have answered
  std::vector<Completion> completions_;  // of one batch
  std::vector<SlotId> slots_;            // while one request is made for each shard
  std::vector<std::byte> scratch_;       // one batch of a merge
  uint32_t places_used_ = 0;             // highest place ever + 1
  size_t answer_bytes_ = 0;              // of all places
  int64_t now_ns_ = 0;
  int64_t next_sweep_ns_ = 0;
  int64_t rate_since_ns_ = 0;
  uint64_t rate_finished_ = 0;
  double finished_per_second_ = 0;

  // Written by the owner, read by others.
  std::atomic<uint32_t> retry_after_ms_{1};
  CounterSet<GatewayCounter, static_cast<size_t>(GatewayCounter::kCount)> counters_;
};

}  // namespace engram
