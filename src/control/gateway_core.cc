#include "src/control/gateway_core.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <new>
#include <span>
#include <string>
#include <utility>

#include "dataplane/admission_gate.h"
#include "src/core/check.h"

namespace engram {

namespace {

constexpr size_t kCompletionsPerBatch = 64;
constexpr int64_t kSweepPeriodNs = 5 * kNanosPerMilli;
constexpr int64_t kRateWindowNs = 50 * kNanosPerMilli;
// Requests that one call may have at the shards: gets go out several at a time. At least one for
// each shard, and all the places where one id may be.
constexpr uint16_t kLeastRequestsPerCall = 16;
// Of the slots of a size, kept for observations of high priority (DESIGN: 10 % of room).
constexpr uint32_t kKeepFreePercent = 10;
// A scroll asks a shard for so many observations at a time that all their payloads fit its answer,
// and ends a page that has grown to so many bytes: one more answer and the page is still below the
// 4 MiB that gRPC's clients take unless told otherwise.
constexpr uint32_t kScrollStep = kMaxAnswerPayloadBytes / kMaxPayloadBytes;
constexpr size_t kScrollPageBytes = size_t{2} << 20;
static_assert(kScrollPageBytes + kScrollStep * (kMaxPayloadBytes + kMaxDimension * sizeof(float) +
                                                kMaxIdBytes + sizeof(HitHeader) + 8) <
              size_t{4} << 20);
static_assert(std::has_single_bit(kMaxShards));

HitHeader HeaderOf(const std::byte* hit) {
  HitHeader header;
  std::memcpy(&header, hit, sizeof(header));
  return header;
}

// Of hits, once what they refer to is with them.
size_t FullBytesOf(std::span<const std::byte> hits) {
  size_t bytes = 0;
  while (!hits.empty()) {
    const HitHeader header = HeaderOf(hits.data());
    bytes += FullHitBytes(header);
    hits = hits.subspan(header.hit_bytes);
  }
  return bytes;
}
static_assert(kLeastRequestsPerCall > std::bit_width(kMaxShards),
              "one id may be in as many partitions as a space has doubled");

}  // namespace

Result<std::unique_ptr<GatewayCore>> GatewayCore::Create(const GatewayOptions& options,
                                                         Clock* clock, ProducerPort port,
                                                         const RecordAccess& access) {
  CHECK(!port.shards.empty(), "a gateway has shards to ask");
  std::unique_ptr<RecordReader> records;
  if (access.make_disk != nullptr) {
    auto reader = RecordReader::Create(
        {.retry_for_ns = access.unwritten_ns, .huge_pages = options.huge_pages}, clock, access);
    if (!reader) return std::unexpected(reader.error());
    records = *std::move(reader);
  }
  auto merger = RecallMerger::Create(options.max_merges, static_cast<uint16_t>(port.shards.size()),
                                     kMaxAnswerPayloadBytes, options.huge_pages, records.get());
  if (!merger) return std::unexpected(merger.error());
  return std::unique_ptr<GatewayCore>(
      new GatewayCore(options, clock, std::move(port), std::move(records), *std::move(merger)));
}

GatewayCore::GatewayCore(const GatewayOptions& options, Clock* clock, ProducerPort port,
                         std::unique_ptr<RecordReader> records,
                         std::unique_ptr<RecallMerger> merger)
    : options_(options),
      clock_(clock),
      requests_per_call_(
          std::max(kLeastRequestsPerCall, static_cast<uint16_t>(port.shards.size()))),
      inbox_(options.inbox_capacity),
      port_(std::move(port)),
      records_(std::move(records)),
      merger_(std::move(merger)),
      places_(options.max_calls),
      sent_(size_t{options.max_calls} * requests_per_call_),
      completions_(kCompletionsPerBatch),
      slots_(port_.shards.size()),
      scratch_(kResultSlotBytes) {
  reading_.reserve(options.max_calls);
  free_places_.reserve(options.max_calls);
  for (uint32_t i = options.max_calls; i > 0; --i) free_places_.push_back(i - 1);
}

// Only references of commands that came too late can be left: transports end first.
GatewayCore::~GatewayCore() {
  while (const auto command = inbox_.TryPop()) {
    if (command->kind == GatewayCommand::Kind::kCancel) command->call->DropReference();
  }
}

int GatewayCore::Poll() {
  now_ns_ = clock_->MonotonicNs();
  int work = TakeCompletions();
  if (records_ != nullptr) work += records_->Poll();
  work += ContinueReading();
  work += TakeCommands();
  work += SweepDeadlines();
  MeasureRate();
  return work;
}

// ---- Calls in ----

int GatewayCore::TakeCommands() {
  int work = 0;
  for (; work < options_.commands_per_poll; ++work) {
    const auto command = inbox_.TryPop();
    if (!command) break;
    GatewayCall* call = command->call;
    if (command->kind == GatewayCommand::Kind::kStart) {
      Start(call);
      continue;
    }
    if (call->place_ != GatewayCall::kNotUnderWay) {
      Abandon(&places_[call->place_], RefusalReason::kCancelled);
    }
    call->DropReference();
  }
  return work;
}

void GatewayCore::Start(GatewayCall* call) {
  counters_[GatewayCounter::kCallsStarted].Add(1);
  const GatewayQuestion& question = call->question;
  if (question.deadline_ns != 0 && question.deadline_ns <= now_ns_) {
    Refuse(call, RefusalReason::kDeadlinePassed);
    return;
  }
  if (free_places_.empty()) {
    Refuse(call, RefusalReason::kQueueFull);
    return;
  }
  Place* place = &places_[free_places_.back()];
  free_places_.pop_back();
  *place = {.in_use = true,
            .kind = question.kind,
            .generation = place->generation + 1,
            .deadline_ns = question.deadline_ns,
            .call = call};
  call->place_ = IndexOf(*place);
  places_used_ = std::max(places_used_, call->place_ + 1);
  counters_[GatewayCounter::kCallsUnderWay].Set(calls_under_way());
  NoteReason(place, StartKind(place), 0);
  if (place->requests == 0) Answer(place);
}

// kNone without a request at the shards: the answer is empty.
RefusalReason GatewayCore::StartKind(Place* place) {
  const GatewayQuestion& question = place->call->question;
  if (question.kind == CallKind::kIntrospect) return StartIntrospect(place);
  place->space = port_.catalogue->Find(question.space.view());
  if (question.kind == CallKind::kObserve) return StartObserve(place);
  // A space that nobody has written to holds nothing.
  if (place->space == nullptr) return RefusalReason::kNone;
  place->call->answer.metric = place->space->metric();
  if (records_ != nullptr && (question.with_payload || question.with_vector)) {
    place->pins = records_->EnterPins();
  }
  switch (question.kind) {
    case CallKind::kRecall:
      return StartRecall(place);
    case CallKind::kGet:
      return PushGets(place);
    case CallKind::kScroll:
      if (question.partition >= place->space->partitions()) return RefusalReason::kNone;
      return PushScroll(place, question.partition, question.cursor);
    case CallKind::kObserve:
    case CallKind::kIntrospect:
      break;
  }
  CHECK(false, "the two were answered above");
  return RefusalReason::kNone;
}

RefusalReason GatewayCore::StartObserve(Place* place) {
  const GatewayQuestion& question = place->call->question;
  const bool upsert = question.op == ObservationOp::kUpsert;
  if (place->space == nullptr) {
    if (!upsert) return RefusalReason::kNone;
    place->space = port_.catalogue->FindOrAdd(question.space.view(), Metric::kUnspecified);
    if (place->space == nullptr) return RefusalReason::kSpaceLimit;
  }
  const SpaceEntry& space = *place->space;
  const uint16_t partition = PartitionOf(SpaceCatalogue::HashOfId(question.id), space.partitions());
  const ShardId shard = space.ShardOf(partition);
  const ObservationView view{.op = question.op,
                             .dtype = upsert ? question.vector.dtype : VectorDtype::kNone,
                             .dimension = static_cast<uint16_t>(question.vector.dimension),
                             .scale = question.vector.scale,
                             .confidence = question.confidence,
                             .when_ns = question.when_ns,
                             .vector = question.vector.bytes,
                             .id = question.id,
                             .attributes = std::as_bytes(std::span(question.attributes)),
                             .payload = std::as_bytes(std::span(question.payload))};
  if (!HasRoom(shard, Lane::kNormal)) return RefusalReason::kQueueFull;
  const SlotId slot = port_.slab->Acquire(SlotBytesFor(view), kKeepFreePercent);
  if (slot == kNoSlot) return RefusalReason::kSlotsExhausted;
  const SpaceRules rules{.metric = space.metric(), .dimension = space.dimension()};
  const RefusalReason reason = AdmitObservation(view, rules, port_.slab->At(slot));
  if (reason != RefusalReason::kNone) {
    place->call->answer.space_dimension = rules.dimension;
    port_.slab->Release(slot);
    return reason;
  }
  auto* request = reinterpret_cast<ObserveRequest*>(port_.slab->At(slot));
  Address(*place, request);
  request->payload_kind = question.payload_kind;
  request->received_ns = now_ns_;
  Send(place, shard, Lane::kNormal, slot);
  return RefusalReason::kNone;
}

RefusalReason GatewayCore::StartRecall(Place* place) {
  const GatewayQuestion& question = place->call->question;
  const SpaceEntry& space = *place->space;
  // Of all spaces: the shards.
  const uint16_t partitions = question.across ? shards() : space.partitions();
  const auto shard_of = [&](uint16_t p) { return question.across ? ShardId(p) : space.ShardOf(p); };
  const RecallView view{.body = {.k = question.k,
                                 .ef = question.ef,
                                 .dimension = static_cast<uint16_t>(question.vector.dimension),
                                 .dtype = question.vector.dtype,
                                 .scale = question.vector.scale},
                        .vector = question.vector.bytes,
                        .filter = std::as_bytes(std::span(question.filter))};
  const size_t bytes = SlotBytesFor(view);
  const SpaceRules rules{.metric = space.metric(), .dimension = space.dimension()};
  // All slots or none, and the rings' room looked at beforehand: nobody else fills them.
  RefusalReason reason = RefusalReason::kNone;
  uint16_t taken = 0;
  for (; taken < partitions; ++taken) {
    if (!HasRoom(shard_of(taken), Lane::kRecall)) reason = RefusalReason::kQueueFull;
    const SlotId slot = reason == RefusalReason::kNone ? port_.slab->Acquire(bytes) : kNoSlot;
    if (slot == kNoSlot) break;
    slots_[taken] = slot;
  }
  if (taken < partitions && reason == RefusalReason::kNone) reason = RefusalReason::kSlotsExhausted;
  if (reason == RefusalReason::kNone) {
    reason = AdmitRecall(view, rules, port_.slab->At(slots_[0]));
    place->call->answer.space_dimension = rules.dimension;
  }
  if (reason == RefusalReason::kNone && (partitions > 1 || place->pins != 0)) {
    place->merge =
        merger_->Begin(partitions, question.k, {.latest_first = question.vector.empty()});
    if (place->merge == RecallMerger::kNone) reason = RefusalReason::kMergesFull;
  }
  if (reason != RefusalReason::kNone) {
    for (uint16_t p = 0; p < taken; ++p) port_.slab->Release(slots_[p]);
    return reason;
  }
  auto* request = reinterpret_cast<RecallRequest*>(port_.slab->At(slots_[0]));
  Address(*place, request);
  request->with_payload = question.with_payload;
  request->with_vector = question.with_vector;
  request->received_ns = now_ns_;
  request->across = question.across;
  if (question.snapshot_isolation) {
    request->snapshot = LatestSnapshot();
    place->call->answer.snapshot = request->snapshot;
  }
  for (uint16_t p = 1; p < partitions; ++p) {
    std::memcpy(port_.slab->At(slots_[p]), port_.slab->At(slots_[0]), bytes);
  }
  for (uint16_t p = 0; p < partitions; ++p) {
    Send(place, shard_of(p), Lane::kRecall, slots_[p]);
  }
  return RefusalReason::kNone;
}

// The latest stamp up to which all shards are complete: also one without a partition of a space may
// be the home of a session there, and have observations of it under way.
CommitStamp GatewayCore::LatestSnapshot() const {
  const int64_t unix_ns = clock_->WallNs();
  CommitStamp snapshot = kOpenStamp;
  for (uint16_t s = 0; s < shards(); ++s) {
    snapshot = std::min(snapshot, port_.stamps->CompleteUpTo(ShardId(s), unix_ns));
  }
  return std::max(snapshot, kNoStamp + 1);
}

RefusalReason GatewayCore::StartIntrospect(Place* place) {
  for (uint16_t s = 0; s < shards(); ++s) {
    if (!HasRoom(ShardId(s), Lane::kRecall)) return RefusalReason::kQueueFull;
  }
  for (uint16_t s = 0; s < shards(); ++s) {
    const SlotId slot = port_.slab->Acquire(kRequestBodyOffset);
    if (slot == kNoSlot) return RefusalReason::kSlotsExhausted;
    auto* request = new (port_.slab->At(slot)) IntrospectRequest;
    request->header.deadline_ns = place->deadline_ns;
    request->origin = OriginOf(*place);
    Send(place, ShardId(s), Lane::kRecall, slot);
  }
  return RefusalReason::kNone;
}

// As many ids as there is room for; Continue sends the others.
RefusalReason GatewayCore::PushGets(Place* place) {
  const auto& ids = place->call->question.ids;
  while (place->next_id < ids.size() &&
         place->requests + std::bit_width(kMaxShards) <= requests_per_call_) {
    const RefusalReason reason = PushGet(place, ids[place->next_id]);
    // What waits for the call's own requests is sent when these are done.
    if (reason != RefusalReason::kNone) {
      return place->requests > 0 ? RefusalReason::kNone : reason;
    }
    ++place->next_id;
  }
  return RefusalReason::kNone;
}

// To every partition that may hold the id: it stays where it was stored when its space grew.
RefusalReason GatewayCore::PushGet(Place* place, std::string_view id) {
  const SpaceEntry& space = *place->space;
  const uint64_t hash = SpaceCatalogue::HashOfId(id);
  std::array<uint16_t, std::bit_width(kMaxShards)> owners;
  size_t count = 0;
  for (uint32_t p = space.first_partitions(); p <= space.partitions(); p *= 2) {
    const uint16_t owner = PartitionOf(hash, static_cast<uint16_t>(p));
    if (count == 0 || owners[count - 1] != owner) owners[count++] = owner;
  }
  const size_t bytes = kRequestBodyOffset + id.size();
  size_t taken = 0;
  RefusalReason reason = RefusalReason::kNone;
  for (; taken < count; ++taken) {
    if (!HasRoom(space.ShardOf(owners[taken]), Lane::kRecall)) reason = RefusalReason::kQueueFull;
    const SlotId slot = reason == RefusalReason::kNone ? port_.slab->Acquire(bytes) : kNoSlot;
    if (slot == kNoSlot) break;
    slots_[taken] = slot;
  }
  if (taken < count) {
    for (size_t i = 0; i < taken; ++i) port_.slab->Release(slots_[i]);
    return reason == RefusalReason::kNone ? RefusalReason::kSlotsExhausted : reason;
  }
  for (size_t i = 0; i < count; ++i) {
    auto* request = new (port_.slab->At(slots_[i])) GetRequest;
    Address(*place, request);
    request->with_payload = place->call->question.with_payload;
    request->with_vector = place->call->question.with_vector;
    request->id_bytes = static_cast<uint16_t>(id.size());
    std::memcpy(port_.slab->At(slots_[i]) + kRequestBodyOffset, id.data(), id.size());
    Send(place, space.ShardOf(owners[i]), Lane::kRecall, slots_[i]);
  }
  return RefusalReason::kNone;
}

RefusalReason GatewayCore::PushScroll(Place* place, uint16_t partition, uint64_t cursor) {
  const GatewayQuestion& question = place->call->question;
  const ShardId shard = place->space->ShardOf(partition);
  if (!HasRoom(shard, Lane::kRecall)) return RefusalReason::kQueueFull;
  const SlotId slot = port_.slab->Acquire(kRequestBodyOffset);
  if (slot == kNoSlot) return RefusalReason::kSlotsExhausted;
  auto* request = new (port_.slab->At(slot)) ScrollRequest;
  Address(*place, request);
  request->with_payload = question.with_payload;
  request->with_vector = question.with_vector;
  request->limit =
      static_cast<uint16_t>(std::min(question.limit - place->call->answer.hit_count, kScrollStep));
  request->cursor = cursor;
  place->partition = partition;
  Send(place, shard, Lane::kRecall, slot);
  return RefusalReason::kNone;
}

// ---- Requests to shards ----

bool GatewayCore::HasRoom(ShardId shard, Lane lane) {
  return !port_.shards[shard.value()].lanes[static_cast<size_t>(lane)].Full();
}

template <typename Request>
void GatewayCore::Address(const Place& place, Request* request) {
  request->header.deadline_ns = place.deadline_ns;
  request->origin = OriginOf(place);
  request->space = SpaceName(place.space->name());
}

void GatewayCore::Send(Place* place, ShardId shard, Lane lane, SlotId slot) {
  CHECK(place->requests < requests_per_call_, "a call has room for its requests");
  SentOf(*place)[place->requests] = slot;
  ++place->requests;
  counters_[GatewayCounter::kRequestsSent].Add(1);
  const bool pushed = port_.shards[shard.value()].lanes[static_cast<size_t>(lane)].TryPush(slot);
  CHECK(pushed, "room was there a moment ago and nobody else pushes");
}

// ---- Answers of the shards ----

int GatewayCore::TakeCompletions() {
  int work = 0;
  for (uint16_t s = 0; s < shards(); ++s) {
    const size_t count = port_.shards[s].completions.PopBatch(completions_);
    for (size_t i = 0; i < count; ++i) TakeCompletion(ShardId(s), completions_[i]);
    work += static_cast<int>(count);
  }
  return work;
}

void GatewayCore::TakeCompletion(ShardId shard, const Completion& completion) {
  const size_t index = completion.origin >> 32;
  CHECK(index < places_.size(), "a shard hands back the origin that it was given");
  Place* place = &places_[index];
  CHECK(place->in_use && OriginOf(*place) == completion.origin,
        "a call keeps its place until its requests came back");
  if (completion.result_slot != kNoSlot) {
    TakeBatch(place, shard, completion);
    const bool returned =
        port_.shards[shard.value()].result_returns.TryPush(completion.result_slot);
    CHECK(returned, "the return ring holds every result slot");
  }
  if (completion.slot != kNoSlot) FinishRequest(place, completion);
}

void GatewayCore::TakeBatch(Place* place, ShardId shard, const Completion& completion) {
  if (place->call == nullptr) return;
  const std::byte* batch = port_.shards[shard.value()].result_slab->At(completion.result_slot);
  ResultBatch head;
  std::memcpy(&head, batch, sizeof(head));
  if (place->merge != RecallMerger::kNone) {
    merger_->Add(place->merge, {batch, sizeof(head) + head.body_bytes});
    return;
  }
  // Refused already, and its last requests come back.
  if (place->reason != RefusalReason::kNone) return;
  const std::byte* body = batch + sizeof(head);
  const size_t full_bytes = completion.kind == CompletionKind::kRecords
                                ? head.body_bytes
                                : FullBytesOf({body, head.body_bytes});
  if (answer_bytes_ + full_bytes > options_.answer_memory_bytes) {
    NoteReason(place, RefusalReason::kSlotsExhausted, 0);
    return;
  }
  CountAnswer(place, full_bytes);
  GatewayAnswer& answer = place->call->answer;
  if (completion.kind == CompletionKind::kRecords) {
    answer.records.insert(answer.records.end(), body, body + head.body_bytes);
    return;
  }
  answer.hits.insert(answer.hits.end(), body, body + head.body_bytes);
  answer.hit_count += head.count;
}

void GatewayCore::CountAnswer(Place* place, size_t bytes) {
  place->answer_bytes += bytes;
  answer_bytes_ += bytes;
}

// Reads what the shard wrote into the request, then takes the slot back.
void GatewayCore::FinishRequest(Place* place, const Completion& completion) {
  NoteReason(place, completion.reason, completion.retry_after_ms);
  const std::byte* slot = port_.slab->At(completion.slot);
  if (place->merge != RecallMerger::kNone) {
    merger_->FinishPartition(place->merge, completion.reason);
  } else if (place->call != nullptr) {
    GatewayAnswer& answer = place->call->answer;
    if (completion.kind == CompletionKind::kObserve) {
      const auto* request = reinterpret_cast<const ObserveRequest*>(slot);
      answer.existed = request->existed;
      answer.stamp = request->stamp;
      answer.space_dimension = request->space_dimension;
    } else if (place->kind == CallKind::kScroll) {
      answer.next_cursor = reinterpret_cast<const ScrollRequest*>(slot)->cursor;
      // It does not know the space, so the partition is empty.
      if (completion.reason != RefusalReason::kNone) answer.next_cursor = 0;
    }
  }
  Sent* sent = SentOf(*place);
  Sent* const end = sent + place->requests;
  Sent* const found = std::find(sent, end, completion.slot);
  CHECK(found != end, "a slot comes back once");
  *found = *(end - 1);
  --place->requests;
  port_.slab->Release(completion.slot);
  Continue(place);
}

void GatewayCore::Continue(Place* place) {
  if (place->call != nullptr && place->reason == RefusalReason::kNone) {
    if (place->kind == CallKind::kGet) NoteReason(place, PushGets(place), 0);
    if (place->kind == CallKind::kScroll) ContinueScroll(place);
  }
  if (place->requests == 0) Answer(place);
}

// Partition by partition until the page is full.
void GatewayCore::ContinueScroll(Place* place) {
  GatewayAnswer& answer = place->call->answer;
  if (answer.next_cursor == 0) {
    ++place->partition;
  }
  answer.scroll_ended = place->partition >= place->space->partitions();
  answer.next_partition = place->partition;
  if (answer.scroll_ended || answer.hit_count >= place->call->question.limit ||
      place->answer_bytes >= kScrollPageBytes) {
    return;
  }
  NoteReason(place, PushScroll(place, place->partition, answer.next_cursor), 0);
}

// Nothing of the call is with the shards any more.
void GatewayCore::Answer(Place* place) {
  GatewayCall* call = place->call;
  if (call == nullptr) {
    Free(place);
    return;
  }
  if (place->merge != RecallMerger::kNone) place->reason = merger_->reason(place->merge);
  if (place->reason == RefusalReason::kNone && !Deliver(place)) {
    reading_.push_back(IndexOf(*place));
    return;
  }
  Finish(place);
}

// Nor is anything left to be read.
void GatewayCore::Finish(Place* place) {
  GatewayCall* call = place->call;
  if (place->reason == RefusalReason::kUnknownSpace && place->kind != CallKind::kObserve) {
    place->reason = RefusalReason::kNone;
  }
  call->answer.reason = place->reason;
  call->answer.retry_after_ms = place->retry_after_ms != 0 ? place->retry_after_ms : RetryAfterMs();
  call->place_ = GatewayCall::kNotUnderWay;
  counters_[place->reason == RefusalReason::kNone ? GatewayCounter::kCallsAnswered
                                                  : GatewayCounter::kCallsRefused]
      .Add(1);
  Free(place);
  call->Answered();
}

int GatewayCore::ContinueReading() {
  return static_cast<int>(std::erase_if(reading_, [this](uint32_t index) {
    Place* place = &places_[index];
    if (!Deliver(place)) return false;
    Finish(place);
    return true;
  }));
}

// The hits with all that was asked for. False while records are read.
bool GatewayCore::Deliver(Place* place) {
  if (place->merge != RecallMerger::kNone) return DeliverMerged(place);
  return place->pins == 0 || DeliverRead(place);
}

bool GatewayCore::DeliverMerged(Place* place) {
  GatewayAnswer& answer = place->call->answer;
  while (const size_t bytes = merger_->Emit(place->merge, scratch_)) {
    ResultBatch head;
    std::memcpy(&head, scratch_.data(), sizeof(head));
    if (answer_bytes_ + head.body_bytes > options_.answer_memory_bytes) {
      NoteReason(place, RefusalReason::kSlotsExhausted, 0);
      return true;
    }
    CountAnswer(place, head.body_bytes);
    answer.hits.insert(answer.hits.end(), scratch_.begin() + sizeof(head),
                       scratch_.begin() + static_cast<ptrdiff_t>(bytes));
    answer.hit_count += head.count;
  }
  return merger_->handed_out(place->merge);
}

bool GatewayCore::DeliverRead(Place* place) {
  GatewayAnswer& answer = place->call->answer;
  if (place->reading == nullptr) {
    place->reading = std::make_unique<Reading>();
    place->reading->done.reserve(place->answer_bytes);
  }
  Reading& reading = *place->reading;
  for (;;) {
    while (!reading.window.full() && reading.next < answer.hits.size() &&
           reading.window.Add(&answer.hits[reading.next], records_.get())) {
      reading.next += HeaderOf(&answer.hits[reading.next]).hit_bytes;
    }
    if (reading.window.size() == 0) break;
    const size_t bytes = reading.window.BytesAt(0, records_.get());
    if (bytes == 0) return false;
    const size_t at = reading.done.size();
    reading.done.resize(at + bytes);
    reading.window.WriteFirst(&reading.done[at], records_.get());
  }
  if (reading.next < answer.hits.size()) return false;
  answer.hits = std::move(reading.done);
  return true;
}

// The first thing that went wrong is what the caller is told. That one partition does not know the
// space is nothing wrong.
void GatewayCore::NoteReason(Place* place, RefusalReason reason, uint32_t retry_after_ms) {
  if (reason == RefusalReason::kNone) return;
  if (reason == RefusalReason::kUnknownSpace && place->kind != CallKind::kObserve) return;
  if (place->reason != RefusalReason::kNone) return;
  place->reason = reason;
  place->retry_after_ms = retry_after_ms;
}

// ---- Endings ----

// A call that has no place.
void GatewayCore::Refuse(GatewayCall* call, RefusalReason reason) {
  counters_[GatewayCounter::kCallsRefused].Add(1);
  call->answer.reason = reason;
  call->answer.retry_after_ms = RetryAfterMs();
  call->Answered();
}

// Answers now; the place stays until the slots are back.
void GatewayCore::Abandon(Place* place, RefusalReason reason) {
  GatewayCall* call = std::exchange(place->call, nullptr);
  for (uint16_t i = 0; i < place->requests; ++i) {
    CancelRequest(port_.slab->At(SentOf(*place)[i]));
  }
  counters_[GatewayCounter::kCallsAbandoned].Add(1);
  call->place_ = GatewayCall::kNotUnderWay;
  if (place->requests == 0) {
    std::erase(reading_, IndexOf(*place));
    Free(place);
  }
  Refuse(call, reason);
}

void GatewayCore::Free(Place* place) {
  if (place->merge != RecallMerger::kNone) merger_->Release(place->merge);
  if (place->reading != nullptr) place->reading->window.Clear(records_.get());
  place->reading.reset();
  if (place->pins != 0) records_->LeavePins(std::exchange(place->pins, 0));
  free_places_.push_back(IndexOf(*place));
  place->in_use = false;
  answer_bytes_ -= std::exchange(place->answer_bytes, 0);
  place->merge = RecallMerger::kNone;
  place->call = nullptr;
  counters_[GatewayCounter::kCallsUnderWay].Set(calls_under_way());
}

int GatewayCore::SweepDeadlines() {
  if (now_ns_ < next_sweep_ns_) return 0;
  next_sweep_ns_ = now_ns_ + kSweepPeriodNs;
  int work = 0;
  uint64_t requests = 0;
  for (uint32_t i = 0; i < places_used_; ++i) {
    Place* place = &places_[i];
    if (!place->in_use) continue;
    requests += place->requests;
    if (place->call == nullptr || place->deadline_ns == 0 || place->deadline_ns > now_ns_) continue;
    Abandon(place, RefusalReason::kDeadlinePassed);
    ++work;
  }
  counters_[GatewayCounter::kRequestsUnderWay].Set(requests);
  return work;
}

void GatewayCore::MeasureRate() {
  if (now_ns_ - rate_since_ns_ < kRateWindowNs) return;
  const uint64_t finished = counters_[GatewayCounter::kCallsAnswered].Read();
  const double seconds =
      static_cast<double>(now_ns_ - rate_since_ns_) / static_cast<double>(kNanosPerSecond);
  const double rate = static_cast<double>(finished - rate_finished_) / seconds;
  finished_per_second_ = 0.8 * finished_per_second_ + 0.2 * rate;
  rate_since_ns_ = now_ns_;
  rate_finished_ = finished;
  const double ms =
      500 * static_cast<double>(calls_under_way()) / std::max(finished_per_second_, 1.0);
  retry_after_ms_.store(static_cast<uint32_t>(std::clamp(ms, 1.0, 1000.0)),
                        std::memory_order_relaxed);
}

void GatewayCore::AddCounters(std::string_view core, CounterCatalogue* catalogue) const {
  if (records_ != nullptr) records_->AddCounters(core, catalogue);
  static constexpr std::array<std::string_view, static_cast<size_t>(GatewayCounter::kCount)>
      kNames = {"calls_started", "calls_answered",     "calls_refused",  "calls_abandoned",
                "requests_sent", "requests_under_way", "calls_under_way"};
  for (size_t i = 0; i < kNames.size(); ++i) {
    catalogue->push_back(
        {std::string(core), kNames[i], &counters_[static_cast<GatewayCounter>(i)]});
  }
}

}  // namespace engram
