#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "src/core/clock.h"
#include "src/core/hash.h"
#include "src/core/session_id.h"
#include "src/core/shard_port.h"

namespace engram {

// A shard without an index: keeps the rules of sessions and sequences, remembers what it was given,
// and answers as it is told to, late if so told. Written from shard_port.h and FORMAT.md.
class FakeShard {
 public:
  // What happened to a sequence number, in the order in which it happened.
  struct Settled {
    Sequence sequence = 0;
    RefusalReason reason = RefusalReason::kNone;  // kNone: stored
    ObservationOp op = ObservationOp::kUpsert;
    uint16_t dimension = 0;
    std::string id = {};
    std::string payload = {};
    std::string attributes = {};
    PayloadKind payload_kind = PayloadKind::kOpaque;
  };
  struct Session {
    std::string space = {};
    uint32_t slot = 0;
    Origin origin = 0;
    Sequence last_sequence = 0;
    std::vector<Settled> settled = {};
  };
  struct Space {
    Metric metric = Metric::kCosine;
    uint16_t dimension = 0;
  };
  struct Detached {
    SessionId session;
    Origin origin = 0;
  };
  // One batch of an answer: how many records its bytes are.
  struct Batch {
    std::string body = {};
    uint16_t count = 1;
    BatchEnd end = BatchEnd::kNothing;  // of the last: kLast
  };

  FakeShard(ShardPort port, SimulatedClock* clock, uint64_t seed)
      : port_(std::move(port)), clock_(clock), random_(seed) {}

  // Takes what came and answers what is due. Returns how much was done.
  int Poll() {
    int work = TakeReturns();
    for (size_t lane = 0; lane < kLanes; ++lane) work += TakeLane(lane);
    for (size_t lane = 0; lane < kLanes; ++lane) work += AnswerLane(lane);
    return work;
  }

  // What it does with what comes.
  std::array<bool, kLanes> stalled{};  // nothing is taken from that lane
  std::array<bool, 16> held{};         // by RequestKind: taken, not answered
  int64_t max_delay_ns = 0;            // an answer is late by up to this, in order within a lane
  uint64_t credit = 100'000;           // beyond the last sequence
  Sequence taken_before = 0;           // up to here it says "repeated", in every session
  std::function<RefusalReason(const ObserveRequest&, std::string_view id)> judge;
  RefusalReason hello_refusal = RefusalReason::kNone;
  RefusalReason recall_refusal = RefusalReason::kNone;
  RefusalReason command_refusal = RefusalReason::kNone;
  uint64_t next_cursor = 0;  // that a scroll's answer names
  std::vector<Batch> hits{Batch{.body = {}, .count = 0}};
  size_t batches_let_go = SIZE_MAX;  // those behind wait
  std::vector<Batch> records{Batch{.body = {}, .count = 0}};

  void SetHeld(RequestKind kind, bool value) { held[static_cast<size_t>(kind)] = value; }
  void SetStalled(bool value) { stalled.fill(value); }

  // Sends a notice without a slot.
  void Notify(size_t producer, CompletionKind kind, Origin origin, uint64_t credit_sequence = 0) {
    Complete(producer, {.kind = kind, .origin = origin, .credit_sequence = credit_sequence});
  }

  // Says up to which stamp it is complete.
  void PublishStamp(CommitStamp complete) { port_.stamps->Publish(port_.shard, complete); }

  // What it has seen.
  ShardId shard() const { return port_.shard; }
  const std::map<uint64_t, Session>& sessions() const { return sessions_; }
  const std::map<std::string, Space>& spaces() const { return spaces_; }
  const std::vector<Detached>& detached() const { return detached_; }
  const std::vector<RecallRequest>& recalls() const { return recalls_; }
  // Of the recalls, by the same index.
  const std::vector<std::string>& filters() const { return filters_; }
  const std::vector<ScrollRequest>& scrolls() const { return scrolls_; }
  size_t taken_of(RequestKind kind) const { return taken_[static_cast<size_t>(kind)]; }
  // Taken and not answered yet, of all lanes.
  size_t unanswered() const {
    size_t count = 0;
    for (const auto& lane : waiting_) count += lane.size();
    return count;
  }
  uint32_t free_result_slots() const { return port_.result_slab->free_slots(); }
  uint32_t total_result_slots() const { return port_.result_slab->total_slots(); }
  void ForgetSession(uint64_t id) { sessions_.erase(id); }

 private:
  struct Waiting {
    size_t producer = 0;
    SlotId slot = kNoSlot;
    int64_t due_ns = 0;
    size_t batches_sent = 0;
    bool has_joined = false;  // a drop
  };

  std::byte* At(const Waiting& w) { return port_.producers[w.producer].producer_slab->At(w.slot); }
  template <typename T>
  T* As(const Waiting& w) {
    return reinterpret_cast<T*>(At(w));
  }

  void Complete(size_t producer, const Completion& completion) {
    const bool pushed = port_.producers[producer].completions.TryPush(completion);
    CHECK(pushed, "a completion ring is never full");
  }

  int TakeReturns() {
    int work = 0;
    for (ShardLink& link : port_.producers) {
      while (const auto slot = link.result_returns.TryPop()) {
        port_.result_slab->Release(*slot);
        ++work;
      }
    }
    return work;
  }

  int TakeLane(size_t lane) {
    if (stalled[lane]) return 0;
    int work = 0;
    for (size_t p = 0; p < port_.producers.size(); ++p) {
      while (const auto slot = port_.producers[p].lanes[lane].TryPop()) {
        const int64_t delay =
            max_delay_ns == 0
                ? 0
                : static_cast<int64_t>(random_.Below(static_cast<uint64_t>(max_delay_ns)));
        due_[lane] = std::max(due_[lane], clock_->MonotonicNs() + delay);
        waiting_[lane].push_back({.producer = p, .slot = *slot, .due_ns = due_[lane]});
        ++taken_[static_cast<size_t>(As<RequestHeader>(waiting_[lane].back())->kind)];
        ++work;
      }
    }
    return work;
  }

  int AnswerLane(size_t lane) {
    int work = 0;
    std::deque<Waiting> left;
    for (Waiting& waiting : waiting_[lane]) {
      const size_t kind = static_cast<size_t>(As<RequestHeader>(waiting)->kind);
      const bool due = waiting.due_ns <= clock_->MonotonicNs() && !held[kind];
      if (due && Answer(&waiting)) {
        ++work;
      } else {
        left.push_back(waiting);
      }
    }
    waiting_[lane] = std::move(left);
    return work;
  }

  // False when a result slot is awaited.
  bool Answer(Waiting* waiting) {
    switch (As<RequestHeader>(*waiting)->kind) {
      case RequestKind::kHello:
        AnswerHello(*waiting);
        return true;
      case RequestKind::kObserve:
        AnswerObserve(*waiting);
        return true;
      case RequestKind::kRecall:
        return AnswerRecall(waiting);
      case RequestKind::kDetach:
        AnswerDetach(*waiting);
        return true;
      case RequestKind::kIntrospect:
        return AnswerIntrospect(waiting);
      case RequestKind::kScroll:
        return AnswerScroll(waiting);
      case RequestKind::kCheck:
        AnswerCheck(*waiting);
        return true;
      case RequestKind::kCommand:
        return AnswerCommand(waiting);
      case RequestKind::kGet:
        break;
    }
    CHECK(false, "a request that no ingress core makes");
    return true;
  }

  void AnswerHello(const Waiting& waiting) {
    auto* hello = As<HelloRequest>(waiting);
    const RefusalReason reason = OpenSession(waiting.producer, hello);
    Complete(waiting.producer, {.kind = CompletionKind::kHello,
                                .reason = reason,
                                .slot = waiting.slot,
                                .origin = hello->origin});
  }

  RefusalReason OpenSession(size_t producer, HelloRequest* hello) {
    if (hello_refusal != RefusalReason::kNone) return hello_refusal;
    const std::string name(hello->space.view());
    if (!hello->wants_session && !spaces_.contains(name)) return RefusalReason::kNone;
    const auto [place, made] = spaces_.try_emplace(name);
    Space& space = place->second;
    if (made && hello->metric != Metric::kUnspecified) space.metric = hello->metric;
    if (made) space.dimension = hello->dimension;
    CHECK(port_.catalogue->FindOrAdd(name, space.metric) != nullptr, "there is room for spaces");
    hello->metric = space.metric;
    hello->dimension = space.dimension;
    if (!hello->wants_session) return RefusalReason::kNone;
    if (hello->session.value() == 0) {
      hello->session = MakeSessionId(random_.Next(), port_.shard, next_slot_);
      sessions_[hello->session.value()] = {.space = name, .slot = next_slot_++};
    }
    const auto found = sessions_.find(hello->session.value());
    if (found == sessions_.end()) return RefusalReason::kSessionExpired;
    Session& session = found->second;
    if (session.space != name) return RefusalReason::kSessionSpaceMismatch;
    if (session.origin != 0) Notify(producer, CompletionKind::kFenced, session.origin);
    session.origin = hello->origin;
    hello->session_slot = session.slot;
    hello->last_sequence = session.last_sequence;
    hello->credit = credit;
    return RefusalReason::kNone;
  }

  void AnswerObserve(const Waiting& waiting) {
    auto* request = As<ObserveRequest>(waiting);
    Completion completion{.kind = CompletionKind::kObserve,
                          .slot = waiting.slot,
                          .origin = request->origin,
                          .sequence = request->sequence};
    const auto found = sessions_.find(request->session.value());
    if (found == sessions_.end()) {
      completion.reason = RefusalReason::kSessionExpired;
    } else {
      Session& session = found->second;
      CHECK(session.slot == request->session_slot, "the session's place is what hello said");
      if (session.origin != 0 && session.origin != request->origin) {
        completion.reason = RefusalReason::kFenced;
      } else if (request->sequence <= std::max(session.last_sequence, taken_before)) {
        session.last_sequence = std::max(session.last_sequence, request->sequence);
        completion.repeated = true;
      } else if (request->sequence != session.last_sequence + 1) {
        completion.reason = RefusalReason::kSequenceGap;
      } else {
        Settle(&session, request, &completion);
      }
      completion.credit_sequence = session.last_sequence + credit;
    }
    Complete(waiting.producer, completion);
  }

  void Settle(Session* session, ObserveRequest* request, Completion* completion) {
    const char* body = reinterpret_cast<const char*>(request) + kRequestBodyOffset +
                       VectorBytes(request->dtype, request->dimension);
    const bool skip = request->op == ObservationOp::kSkip;
    const std::string id = skip ? "" : std::string(body, request->id_bytes);
    RefusalReason reason = skip ? request->skip_reason : RefusalReason::kNone;
    if (!skip && judge) reason = judge(*request, id);
    Space& space = spaces_[session->space];
    if (reason == RefusalReason::kNone && request->op == ObservationOp::kUpsert) {
      if (space.dimension == 0) space.dimension = request->dimension;
      if (space.dimension != request->dimension) reason = RefusalReason::kWrongDimension;
    }
    completion->reason = reason;
    if (DescribeRefusal(reason).effect == RefusalEffect::kWaits) {
      completion->retry_after_ms = 5;
      return;
    }
    request->space_dimension = space.dimension;
    session->last_sequence = request->sequence;
    const char* attributes = body + request->id_bytes;
    const char* payload = attributes + request->attribute_bytes;
    session->settled.push_back(
        {.sequence = request->sequence,
         .reason = reason,
         .op = request->op,
         .dimension = request->dimension,
         .id = id,
         .payload = skip ? "" : std::string(payload, request->payload_bytes),
         .attributes = skip ? "" : std::string(attributes, request->attribute_bytes),
         .payload_kind = request->payload_kind});
  }

  bool AnswerRecall(Waiting* waiting) {
    const RecallRequest request = *As<RecallRequest>(*waiting);
    if (recall_refusal == RefusalReason::kNone &&
        !SendBatches(waiting, hits, CompletionKind::kResults, request.origin, request.request_id)) {
      return false;
    }
    recalls_.push_back(request);
    filters_.emplace_back(reinterpret_cast<const char*>(At(*waiting)) + kRequestBodyOffset +
                              VectorBytes(request.dtype, request.dimension),
                          request.filter_bytes);
    Complete(waiting->producer, {.kind = CompletionKind::kRecallDone,
                                 .reason = recall_refusal,
                                 .slot = waiting->slot,
                                 .origin = request.origin,
                                 .sequence = request.request_id});
    return true;
  }

  bool AnswerScroll(Waiting* waiting) {
    auto* request = As<ScrollRequest>(*waiting);
    if (recall_refusal == RefusalReason::kNone &&
        !SendBatches(waiting, hits, CompletionKind::kResults, request->origin,
                     request->request_id)) {
      return false;
    }
    scrolls_.push_back(*request);
    request->cursor = next_cursor;
    Complete(waiting->producer, {.kind = CompletionKind::kRecallDone,
                                 .reason = recall_refusal,
                                 .slot = waiting->slot,
                                 .origin = request->origin,
                                 .sequence = request->request_id});
    return true;
  }

  // Turns each byte of the state and repeats what it was asked in the text.
  void AnswerCheck(const Waiting& waiting) {
    auto* request = As<CheckRequest>(waiting);
    std::byte* state = At(waiting) + kRequestBodyOffset;
    for (size_t i = 0; i < kCheckStateBytes; ++i) state[i] = ~state[i];
    const std::string text = "of " + std::string(request->space.view());
    std::memcpy(state + kCheckStateBytes, text.data(), text.size());
    request->outcome = CheckOutcome::kUnsound;
    request->text_bytes = static_cast<uint16_t>(text.size());
    Complete(waiting.producer, {.kind = CompletionKind::kCheckDone,
                                .reason = recall_refusal,
                                .slot = waiting.slot,
                                .origin = request->origin,
                                .sequence = request->request_id});
  }

  // Says how many commands it has seen. A drop ends the sessions, once all shards have joined in.
  bool AnswerCommand(Waiting* waiting) {
    auto* request = As<CommandRequest>(*waiting);
    const std::string name(request->space.view());
    if (request->what == SpaceCommand::kDrop) {
      SpaceEntry* entry = port_.catalogue->FindAny(name);
      const uint16_t shards = port_.catalogue->shards();
      if (!waiting->has_joined) entry->JoinDrop(static_cast<CommitStamp>(clock_->MonotonicNs()));
      waiting->has_joined = true;
      if (!entry->AllJoined(shards)) return false;
      port_.catalogue->EndIncarnation(entry, entry->drop_stamp());
      std::erase_if(sessions_, [&](const auto& session) { return session.second.space == name; });
      spaces_.erase(name);
      entry->FinishDrop(shards);
    }
    if (request->what == SpaceCommand::kRebuild) port_.catalogue->FindAny(name)->FinishRebuild();
    request->observations = ++commands_;
    Complete(waiting->producer, {.kind = CompletionKind::kCommand,
                                 .reason = command_refusal,
                                 .slot = waiting->slot,
                                 .origin = request->origin,
                                 .sequence = request->request_id});
    return true;
  }

  bool AnswerIntrospect(Waiting* waiting) {
    const IntrospectRequest request = *As<IntrospectRequest>(*waiting);
    if (!SendBatches(waiting, records, CompletionKind::kRecords, request.origin,
                     request.request_id)) {
      return false;
    }
    Complete(waiting->producer, {.kind = CompletionKind::kIntrospectDone,
                                 .slot = waiting->slot,
                                 .origin = request.origin,
                                 .sequence = request.request_id});
    return true;
  }

  bool SendBatches(Waiting* waiting, const std::vector<Batch>& batches, CompletionKind kind,
                   Origin origin, uint64_t request_id) {
    for (size_t& i = waiting->batches_sent; i < batches.size(); ++i) {
      if (i >= batches_let_go) return false;
      const Batch& batch = batches[i];
      const SlotId slot = port_.result_slab->Acquire(sizeof(ResultBatch) + batch.body.size());
      if (slot == kNoSlot) return false;
      const ResultBatch head{.body_bytes = static_cast<uint32_t>(batch.body.size()),
                             .count = batch.count,
                             .metric = Metric::kL2,
                             .end = i + 1 == batches.size() ? BatchEnd::kLast : batch.end};
      std::byte* to = port_.result_slab->At(slot);
      std::memcpy(to, &head, sizeof(head));
      std::memcpy(to + sizeof(head), batch.body.data(), batch.body.size());
      Complete(waiting->producer,
               {.kind = kind, .result_slot = slot, .origin = origin, .sequence = request_id});
    }
    return true;
  }

  void AnswerDetach(const Waiting& waiting) {
    const auto* request = As<DetachRequest>(waiting);
    detached_.push_back({.session = request->session, .origin = request->origin});
    const auto found = sessions_.find(request->session.value());
    if (found != sessions_.end() && found->second.origin == request->origin) {
      found->second.origin = 0;
    }
    Complete(waiting.producer,
             {.kind = CompletionKind::kDetach, .slot = waiting.slot, .origin = request->origin});
  }

  ShardPort port_;
  SimulatedClock* clock_;
  SplitMix64 random_;
  std::array<std::deque<Waiting>, kLanes> waiting_;
  std::array<int64_t, kLanes> due_{};
  std::array<size_t, 16> taken_{};
  std::map<uint64_t, Session> sessions_;
  std::map<std::string, Space> spaces_;
  std::vector<Detached> detached_;
  std::vector<RecallRequest> recalls_;
  std::vector<std::string> filters_;
  std::vector<ScrollRequest> scrolls_;
  uint32_t next_slot_ = 100;
  uint64_t commands_ = 0;
};

}  // namespace engram
