#include "index/shard.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "src/core/check.h"
#include "src/core/hash.h"

namespace engram {

namespace {

constexpr size_t kObservationBatch = 64;
constexpr int kRequestsPerPoll = 64;
// A recall's slice: some 100 to 200 us of distances at 768-d.
constexpr uint32_t kRecallSliceDistances = 1024;
// A link's slice, with and without observations coming in.
constexpr uint32_t kBusyLinkDistances = 64;
constexpr uint32_t kIdleLinkDistances = 256;
// Nodes linked between two announcements of credit.
constexpr uint64_t kCreditEvery = 256;
constexpr int64_t kLinkRetryNs = 100 * kNanosPerMilli;

std::string_view NameOf(const HelloRequest& hello) {
  return {hello.space.data(), hello.space_bytes};
}
std::string_view NameOf(const RecallRequest& recall) {
  return {recall.space.data(), recall.space_bytes};
}

}  // namespace

Result<std::unique_ptr<Shard>> Shard::Create(const ShardOptions& options, Clock* clock,
                                             ShardPort port) {
  auto arena = HugePageArena::Create({.reserve_bytes = options.memory_limit_bytes,
                                      .huge_pages = options.huge_pages,
                                      .numa_node = options.numa_node});
  if (!arena) return std::unexpected(arena.error());
  return std::unique_ptr<Shard>(new Shard(options, clock, std::move(port), *std::move(arena)));
}

Shard::Shard(const ShardOptions& options, Clock* clock, ShardPort port, HugePageArena arena)
    : options_(options),
      clock_(clock),
      port_(std::move(port)),
      arena_(std::make_unique<HugePageArena>(std::move(arena))),
      heap_(arena_.get()),
      name_seed_(MixBits(options.seed)),
      space_names_(&heap_),
      sessions_(options.max_sessions, options.session_idle_timeout_ns,
                MixBits(options.seed + port_.shard.value() + 1)),
      linker_(&heap_, options.build),
      recall_(&heap_),
      batch_(kObservationBatch) {
  spaces_.reserve(options.max_spaces);
  attached_.reserve(options.max_spaces);
  announced_links_.reserve(options.max_spaces);
  link_queued_.reserve(options.max_spaces);
  link_queue_.reserve(options.max_spaces);
  counters_[ShardCounter::kMemoryLimitBytes].Set(arena_->reserve_bytes());
}

int Shard::Poll() {
  now_ns_ = clock_->MonotonicNs();
  first_producer_ = (first_producer_ + 1) % port_.producers.size();
  int work = TakeResultReturns();
  work += ServeRequests();
  if (answering_ != Answering::kNothing) return work;
  const int observations = TakeObservations(Lane::kHigh) + TakeObservations(Lane::kNormal);
  work += observations;
  work += LinkSlice(observations > 0);
  counters_[ShardCounter::kMemoryUsedBytes].Set(heap_.live_bytes());
  return work;
}

bool Shard::Idle() const {
  if (answering_ != Answering::kNothing) return false;
  return std::ranges::all_of(port_.producers, [](const ShardLink& link) {
    return std::ranges::all_of(link.lanes, [](const auto& lane) { return lane.Depth() == 0; });
  });
}

// ---------------------------------------------------------------------------------------------
// Requests: hellos, recalls, introspection

int Shard::TakeResultReturns() {
  int work = 0;
  for (ShardLink& link : port_.producers) {
    const size_t count = link.result_returns.PopBatch(batch_);
    for (size_t i = 0; i < count; ++i) port_.result_slab->Release(batch_[i]);
    work += static_cast<int>(count);
  }
  return work;
}

// One request after the other until the lanes are empty or the round's share of distances is spent.
int Shard::ServeRequests() {
  int work = 0;
  const uint64_t limit = recall_.distances() + kRecallSliceDistances;
  for (int requests = 0; requests < kRequestsPerPoll; ++requests) {
    work += ContinueAnswer();
    if (answering_ != Answering::kNothing || recall_.distances() >= limit) break;
    if (!TakeNextRequest()) break;
    ++work;
  }
  return work;
}

int Shard::ContinueAnswer() {
  if (answering_ == Answering::kSearching) {
    const uint64_t before = recall_.distances();
    const bool ready = recall_.Search(kRecallSliceDistances);
    counters_[ShardCounter::kRecallDistances].Add(recall_.distances() - before);
    if (!ready) return 1;
    answering_ = Answering::kEmitting;
  }
  if (answering_ == Answering::kEmitting) return EmitHits();
  if (answering_ == Answering::kIntrospecting) return EmitSpaceRecords();
  return 0;
}

bool Shard::TakeNextRequest() {
  for (size_t i = 0; i < port_.producers.size(); ++i) {
    const size_t producer = (first_producer_ + i) % port_.producers.size();
    auto& lane = port_.producers[producer].lanes[static_cast<size_t>(Lane::kRecall)];
    if (const auto slot = lane.TryPop()) {
      TakeRequest(producer, *slot);
      return true;
    }
  }
  return false;
}

void Shard::TakeRequest(size_t producer, SlotId slot) {
  const std::byte* bytes = port_.producers[producer].producer_slab->At(slot);
  switch (reinterpret_cast<const RequestHeader*>(bytes)->kind) {
    case RequestKind::kHello:
      OpenSession(producer, slot);
      return;
    case RequestKind::kRecall:
      BeginRecall(producer, slot);
      return;
    case RequestKind::kDetach:
      DetachSession(producer, slot);
      return;
    case RequestKind::kIntrospect:
      BeginIntrospection(producer, slot);
      return;
    case RequestKind::kObserve:
      break;
  }
  CHECK(false, "observations do not travel on the recall lane");
}

void Shard::OpenSession(size_t producer, SlotId slot) {
  auto* hello = reinterpret_cast<HelloRequest*>(port_.producers[producer].producer_slab->At(slot));
  const RefusalReason reason = AnswerHello(producer, hello);
  Complete(
      producer,
      {.kind = CompletionKind::kHello, .reason = reason, .slot = slot, .origin = hello->origin});
}

RefusalReason Shard::AnswerHello(size_t producer, HelloRequest* hello) {
  if (hello->wants_session && hello->session.value() != 0) {
    const Session* known = sessions_.Find(hello->session);
    if (known == nullptr) return RefusalReason::kSessionExpired;
    if (spaces_[known->space]->name() != NameOf(*hello)) {
      return RefusalReason::kSessionSpaceMismatch;
    }
  }
  uint32_t space = 0;
  const RefusalReason reason = FindOrMakeSpace(*hello, &space);
  // Who only recalls may come before the first observation.
  if (reason == RefusalReason::kUnknownSpace) return RefusalReason::kNone;
  if (reason != RefusalReason::kNone) return reason;
  hello->metric = spaces_[space]->metric();
  hello->dimension = static_cast<uint16_t>(spaces_[space]->dimension());
  return hello->wants_session ? AttachSession(producer, space, hello) : RefusalReason::kNone;
}

RefusalReason Shard::FindOrMakeSpace(const HelloRequest& hello, uint32_t* space) {
  *space = FindSpaceIndex(NameOf(hello));
  if (*space != kNoNode) {
    const Space& known = *spaces_[*space];
    if (hello.metric != Metric::kUnspecified && hello.metric != known.metric()) {
      return RefusalReason::kMetricMismatch;
    }
    if (hello.dimension != 0 && known.dimension() != 0 && hello.dimension != known.dimension()) {
      return RefusalReason::kDimensionMismatch;
    }
    return RefusalReason::kNone;
  }
  if (!hello.wants_session) return RefusalReason::kUnknownSpace;
  if (spaces_.size() >= options_.max_spaces) return RefusalReason::kSpaceLimit;
  *space = static_cast<uint32_t>(spaces_.size());
  if (!space_names_.Insert(HashString(NameOf(hello), name_seed_), *space)) {
    return RefusalReason::kMemoryFull;
  }
  const Metric metric = hello.metric == Metric::kUnspecified ? Metric::kCosine : hello.metric;
  spaces_.push_back(std::make_unique<Space>(std::string(NameOf(hello)), metric, hello.dimension,
                                            &heap_, options_.build, MixBits(name_seed_ + *space)));
  attached_.push_back(0);
  announced_links_.push_back(0);
  link_queued_.push_back(false);
  counters_[ShardCounter::kSpaces].Set(spaces_.size());
  return RefusalReason::kNone;
}

RefusalReason Shard::AttachSession(size_t producer, uint32_t space, HelloRequest* hello) {
  const ProducerId holder(static_cast<uint16_t>(producer));
  Session* session = nullptr;
  if (hello->session.value() == 0) {
    session = sessions_.Open(space, holder, hello->origin, now_ns_);
    if (session == nullptr) return RefusalReason::kSessionLimit;
    ++attached_[space];
  } else {
    session = sessions_.Find(hello->session);
    if (session->origin != 0) {
      Notify(session->producer, {.kind = CompletionKind::kFenced, .origin = session->origin});
    } else {
      ++attached_[space];
    }
    session->producer = holder;
    session->origin = hello->origin;
    // What the connection before was granted ends with it.
    session->granted_sequence = session->last_sequence;
    session->last_active_ns = now_ns_;
  }
  hello->session = session->id;
  hello->session_slot = sessions_.PlaceOf(*session);
  hello->last_sequence = session->last_sequence;
  hello->credit = CreditOf(session) - session->last_sequence;
  counters_[ShardCounter::kSessions].Set(sessions_.size());
  return RefusalReason::kNone;
}

void Shard::DetachSession(size_t producer, SlotId slot) {
  const auto* request =
      reinterpret_cast<const DetachRequest*>(port_.producers[producer].producer_slab->At(slot));
  Session* session = sessions_.At(request->session_slot, request->session);
  if (session != nullptr && session->origin == request->origin &&
      session->producer.value() == producer) {
    --attached_[session->space];
    sessions_.Detach(session, now_ns_);
    counters_[ShardCounter::kSessions].Set(sessions_.size());
  }
  Complete(producer, {.kind = CompletionKind::kDetach, .slot = slot, .origin = request->origin});
}

void Shard::BeginRecall(size_t producer, SlotId slot) {
  const std::byte* bytes = port_.producers[producer].producer_slab->At(slot);
  const auto* request = reinterpret_cast<const RecallRequest*>(bytes);
  answer_producer_ = producer;
  answer_slot_ = slot;
  answer_origin_ = request->origin;
  answer_id_ = request->request_id;
  counters_[ShardCounter::kRecalls].Add(1);
  const uint32_t space = FindSpaceIndex(NameOf(*request));
  RefusalReason reason = RefusalReason::kUnknownSpace;
  if (space != kNoNode && spaces_[space]->dimension() != 0) {
    reason =
        recall_.Begin(*spaces_[space], *request, bytes + kRequestBodyOffset, options_.default_ef);
  }
  if (reason == RefusalReason::kNone) {
    answering_ = Answering::kSearching;
  } else {
    FinishAnswer(CompletionKind::kRecallDone, reason);
  }
}

void Shard::BeginIntrospection(size_t producer, SlotId slot) {
  const auto* request =
      reinterpret_cast<const IntrospectRequest*>(port_.producers[producer].producer_slab->At(slot));
  answer_producer_ = producer;
  answer_slot_ = slot;
  answer_origin_ = request->origin;
  answer_id_ = request->request_id;
  introspected_ = 0;
  answering_ = Answering::kIntrospecting;
}

// As many batches as there are result slots; the rest in a later round.
int Shard::EmitHits() {
  int work = 0;
  for (bool last = false; !last;) {
    const SlotId slot = port_.result_slab->Acquire(recall_.NextBatchBytes(kResultSlotBytes));
    if (slot == kNoSlot) return work;
    last = recall_.EmitBatch({port_.result_slab->At(slot), port_.result_slab->SlotBytes(slot)});
    Complete(answer_producer_, {.kind = CompletionKind::kResults,
                                .result_slot = slot,
                                .origin = answer_origin_,
                                .sequence = answer_id_});
    ++work;
  }
  FinishAnswer(CompletionKind::kRecallDone, RefusalReason::kNone);
  return work;
}

int Shard::EmitSpaceRecords() {
  int work = 0;
  for (bool last = false; !last;) {
    const SlotId slot = port_.result_slab->Acquire(kResultSlotBytes);
    if (slot == kNoSlot) return work;
    std::byte* bytes = port_.result_slab->At(slot);
    ResultBatch batch;
    size_t used = sizeof(ResultBatch);
    constexpr size_t kRecordRoom = PadTo8(sizeof(SpaceRecord) + kMaxSpaceNameBytes);
    while (introspected_ < spaces_.size() && used + kRecordRoom <= kResultSlotBytes) {
      used += WriteSpaceRecord(*spaces_[introspected_], bytes + used);
      ++introspected_;
      ++batch.count;
    }
    batch.body_bytes = static_cast<uint32_t>(used - sizeof(ResultBatch));
    batch.last = last = introspected_ == spaces_.size();
    std::memcpy(bytes, &batch, sizeof(batch));
    Complete(answer_producer_, {.kind = CompletionKind::kRecords,
                                .result_slot = slot,
                                .origin = answer_origin_,
                                .sequence = answer_id_});
    ++work;
  }
  FinishAnswer(CompletionKind::kIntrospectDone, RefusalReason::kNone);
  return work;
}

size_t Shard::WriteSpaceRecord(const Space& space, std::byte* to) const {
  const size_t used = sizeof(SpaceRecord) + space.name().size();
  const SpaceRecord record{.record_bytes = static_cast<uint32_t>(PadTo8(used)),
                           .shard = port_.shard.value(),
                           .dimension = static_cast<uint16_t>(space.dimension()),
                           .metric = space.metric(),
                           .name_bytes = static_cast<uint8_t>(space.name().size()),
                           .reserved = 0,
                           .reserved2 = 0,
                           .observations = space.live(),
                           .linked = space.linked(),
                           .unlinked = space.unlinked_count(),
                           .retired = space.retired(),
                           .resident_bytes = space.resident_bytes()};
  std::memcpy(to, &record, sizeof(record));
  std::memcpy(to + sizeof(record), space.name().data(), space.name().size());
  std::memset(to + used, 0, record.record_bytes - used);
  return record.record_bytes;
}

void Shard::FinishAnswer(CompletionKind kind, RefusalReason reason) {
  answering_ = Answering::kNothing;
  Complete(answer_producer_, {.kind = kind,
                              .reason = reason,
                              .slot = answer_slot_,
                              .origin = answer_origin_,
                              .sequence = answer_id_});
}

// ---------------------------------------------------------------------------------------------
// Observations

int Shard::TakeObservations(Lane lane) {
  int work = 0;
  for (size_t i = 0; i < port_.producers.size(); ++i) {
    const size_t producer = (first_producer_ + i) % port_.producers.size();
    ShardLink& link = port_.producers[producer];
    const size_t count = link.lanes[static_cast<size_t>(lane)].PopBatch(batch_);
    for (size_t n = 0; n < count; ++n) {
      if (n + 1 < count) __builtin_prefetch(link.producer_slab->At(batch_[n + 1]));
      Complete(producer, TakeObservation(producer, batch_[n]));
    }
    work += static_cast<int>(count);
  }
  return work;
}

// The session's rules, then the space. Only what was stored, or refused for good, moves the
// session's last sequence.
Completion Shard::TakeObservation(size_t producer, SlotId slot) {
  std::byte* bytes = port_.producers[producer].producer_slab->At(slot);
  auto* request = reinterpret_cast<ObserveRequest*>(bytes);
  Completion completion{.kind = CompletionKind::kObserve,
                        .slot = slot,
                        .origin = request->origin,
                        .sequence = request->sequence};
  Session* session = sessions_.At(request->session_slot, request->session);
  if (session == nullptr) {
    completion.reason = RefusalReason::kSessionExpired;
  } else if (session->origin != 0 &&
             (session->origin != request->origin || session->producer.value() != producer)) {
    completion.reason = RefusalReason::kFenced;
  } else if (request->sequence <= session->last_sequence) {
    completion.repeated = true;
  } else if (request->sequence != session->last_sequence + 1) {
    completion.reason = RefusalReason::kSequenceGap;
  } else {
    Space* space = spaces_[session->space].get();
    const bool in_credit = request->sequence <= session->granted_sequence;
    completion.reason = Store(space, *request, bytes + kRequestBodyOffset, in_credit);
    if (completion.reason == RefusalReason::kNone) {
      session->last_sequence = request->sequence;
      receive_to_visible_.Record(now_ns_ - request->received_ns);
      if (space->NextToLink() != kNoNode) QueueForLinking(session->space);
    } else if (HasEffect(completion.reason, RefusalEffect::kConsumes)) {
      session->last_sequence = request->sequence;
      request->space_dimension = static_cast<uint16_t>(space->dimension());
      counters_[ShardCounter::kObservationsSkipped].Add(1);
    } else {
      completion.retry_after_ms = RetryAfterMs(*space);
    }
    session->last_active_ns = now_ns_;
    completion.credit_sequence = CreditOf(session);
  }
  if (completion.reason != RefusalReason::kNone &&
      DescribeRefusal(completion.reason).effect != RefusalEffect::kConsumes) {
    counters_[ShardCounter::kObservationsRefused].Add(1);
  }
  return completion;
}

RefusalReason Shard::Store(Space* space, const ObserveRequest& request, const std::byte* body,
                           bool in_credit) {
  if (request.op == ObservationOp::kSkip) return request.skip_reason;
  const std::byte* id = body + VectorBytes(request.dtype, request.dimension);
  const std::string_view id_text(reinterpret_cast<const char*>(id), request.id_bytes);
  if (request.op == ObservationOp::kDelete) {
    if (space->Delete(id_text)) counters_[ShardCounter::kObservationsDeleted].Add(1);
    return RefusalReason::kNone;
  }
  if (!in_credit && space->has_graph() &&
      space->unlinked_count() >= 2 * space->NodesInBytes(options_.unlinked_limit_bytes)) {
    return RefusalReason::kBacklogFull;
  }
  // What recalls need comes first, so that they go on when the memory is full.
  if (!recall_.Reserve(space->node_count() + 1)) return RefusalReason::kMemoryFull;
  const RefusalReason reason =
      space->Upsert({.id = id_text,
                     .payload = {id + request.id_bytes, request.payload_bytes},
                     .dtype = request.dtype,
                     .dimension = request.dimension,
                     .scale = request.scale,
                     .vector = body,
                     .when_ns = request.when_ns,
                     .confidence = request.confidence});
  if (reason == RefusalReason::kNone) counters_[ShardCounter::kObservationsStored].Add(1);
  return reason;
}

// ---------------------------------------------------------------------------------------------
// Linking

int Shard::LinkSlice(bool busy) {
  if (!linker_.active()) {
    if (link_queue_.empty() || now_ns_ < link_retry_ns_) return 0;
    link_turn_ = (link_turn_ + 1) % link_queue_.size();
    linking_space_ = link_queue_[link_turn_];
    Space& space = *spaces_[linking_space_];
    const NodeId node = space.NextToLink();
    if (node == kNoNode) {
      link_queued_[linking_space_] = false;
      link_queue_[link_turn_] = link_queue_.back();
      link_queue_.pop_back();
      announced_links_[linking_space_] = 0;
      AnnounceCredit(linking_space_);
      return 1;
    }
    link_began_ns_ = now_ns_;
    if (!space.BeginLinking(&linker_, node)) {
      // Memory is short. What is not linked stays visible by the exact scan.
      link_retry_ns_ = now_ns_ + kLinkRetryNs;
      return 0;
    }
  }
  const uint64_t before = linker_.distances();
  if (linker_.Step(busy ? kBusyLinkDistances : kIdleLinkDistances)) FinishLink();
  counters_[ShardCounter::kLinkDistances].Add(linker_.distances() - before);
  return 1;
}

void Shard::FinishLink() {
  spaces_[linking_space_]->FinishLinking(linker_.node());
  counters_[ShardCounter::kObservationsLinked].Add(1);
  link_ns_ = 0.99 * link_ns_ + 0.01 * static_cast<double>(now_ns_ - link_began_ns_);
  if (++announced_links_[linking_space_] >= kCreditEvery) {
    announced_links_[linking_space_] = 0;
    AnnounceCredit(linking_space_);
  }
}

void Shard::QueueForLinking(uint32_t space) {
  if (link_queued_[space]) return;
  link_queued_[space] = true;
  link_queue_.push_back(space);
}

// ---------------------------------------------------------------------------------------------
// Credit and completions

// The highest sequence that the session may send: its share of what the space may still take before
// recalls would suffer, and at least 1 of it. Never less than the connection was granted before.
uint64_t Shard::CreditOf(Session* session) {
  const Space& space = *spaces_[session->space];
  const uint64_t limit = space.NodesInBytes(options_.unlinked_limit_bytes);
  // Before there is a graph nothing waits for it, and no link would bring the credit back.
  const uint64_t waiting = space.has_graph() ? space.unlinked_count() : 0;
  const uint64_t room = limit - std::min(limit, waiting);
  const uint64_t sharers = std::max(attached_[session->space], uint32_t{1});
  const uint64_t share = std::min<uint64_t>(options_.max_credit, (room + sharers - 1) / sharers);
  session->granted_sequence = std::max(session->granted_sequence, session->last_sequence + share);
  return session->granted_sequence;
}

// Tells those who ran out of credit that there is room again.
void Shard::AnnounceCredit(uint32_t space) {
  sessions_.ForEachAttached(space, [&](Session& session) {
    const uint64_t before = session.granted_sequence;
    if (before > session.last_sequence + options_.max_credit / 2) return;
    if (CreditOf(&session) == before) return;
    if (Notify(session.producer, {.kind = CompletionKind::kCredit,
                                  .origin = session.origin,
                                  .credit_sequence = session.granted_sequence})) {
      return;
    }
    // Not said, so not granted. Again when the space's turn of linking comes round.
    session.granted_sequence = before;
    QueueForLinking(space);
  });
}

// When linking has made room for a batch.
uint32_t Shard::RetryAfterMs(const Space& space) const {
  constexpr double kMaxMs = 1000;
  if (!space.has_graph()) return static_cast<uint32_t>(kMaxMs);
  const double ms = link_ns_ * kCreditEvery / kNanosPerMilli;
  return static_cast<uint32_t>(std::clamp(ms, 1.0, kMaxMs));
}

void Shard::Complete(size_t producer, const Completion& completion) {
  const bool pushed = port_.producers[producer].completions.TryPush(completion);
  CHECK(pushed, "the completion ring has room for every slot");
}

// False when the ring holds too much already.
bool Shard::Notify(ProducerId producer, const Completion& completion) {
  if (port_.producers[producer.value()].completions.Depth() >= kNoticeRoom) return false;
  Complete(producer.value(), completion);
  return true;
}

uint32_t Shard::FindSpaceIndex(std::string_view name) const {
  return space_names_.Find(HashString(name, name_seed_),
                           [&](uint32_t index) { return spaces_[index]->name() == name; });
}

const Space* Shard::FindSpace(std::string_view name) const {
  const uint32_t index = FindSpaceIndex(name);
  return index == kNoNode ? nullptr : spaces_[index].get();
}

Result<void> Shard::CheckInvariants() const {
  for (const auto& space : spaces_) {
    if (auto sound = space->CheckInvariants(); !sound) return sound;
  }
  return {};
}

std::string_view ShardCounterName(ShardCounter counter) {
  static constexpr std::array<std::string_view, static_cast<size_t>(ShardCounter::kCount)> kNames =
      {"observations_stored",
       "observations_deleted",
       "observations_skipped",
       "observations_refused",
       "observations_linked",
       "recalls",
       "recall_distances",
       "link_distances",
       "spaces",
       "sessions",
       "memory_used_bytes",
       "memory_limit_bytes"};
  return kNames[static_cast<size_t>(counter)];
}

void Shard::AddCounters(std::string_view core, CounterCatalogue* catalogue) const {
  for (size_t i = 0; i < static_cast<size_t>(ShardCounter::kCount); ++i) {
    const auto which = static_cast<ShardCounter>(i);
    catalogue->push_back({std::string(core), ShardCounterName(which), &counters_[which]});
  }
}

}  // namespace engram
