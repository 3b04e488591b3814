// What a shard answers in batches (see shard.h): recalls, gets, scrolls, introspection. An answer
// goes on in the next round where the round's share of distances is spent or there are no result
// slots.

#include <algorithm>
#include <array>
#include <cstring>

#include "index/shard.h"

namespace engram {

uint64_t Shard::RecallDistances() const {
  uint64_t distances = 0;
  for (const Reply& answer : answers_) distances += answer.recall.distances();
  return distances;
}

RecallJob::Work Shard::RecallWork() const {
  RecallJob::Work work;
  for (const Reply& answer : answers_) {
    work.vectors += answer.recall.work().vectors;
    work.bytes += answer.recall.work().bytes;
  }
  return work;
}

bool Shard::ReserveRecalls(size_t nodes) {
  return std::ranges::all_of(answers_,
                             [nodes](Reply& answer) { return answer.recall.Reserve(nodes); });
}

Shard::Reply* Shard::FreeAnswer() {
  const auto found = std::ranges::find(answers_, Reply::Phase::kNothing, &Reply::phase);
  return found == answers_.end() ? nullptr : &*found;
}

// Until one has come to its end or all have distances beyond `limit`.
int Shard::ContinueAnswers(uint64_t limit) {
  int work = 0;
  for (Reply& answer : answers_) {
    if (answer.phase == Reply::Phase::kEmitting) work += EmitHits(&answer);
    if (answer.phase == Reply::Phase::kIntrospecting) work += EmitSpaceRecords(&answer);
    if (answer.phase != Reply::Phase::kSearching) continue;
    const RefusalReason reason = JudgeAnswer(answer);
    if (reason == RefusalReason::kNone) continue;
    FinishAnswer(&answer, CompletionKind::kRecallDone, reason);
    ++work;
  }
  const uint64_t before = RecallDistances();
  work += SearchInTurns(limit);
  counters_[ShardCounter::kRecallDistances].Add(RecallDistances() - before);
  const RecallJob::Work work_done = RecallWork();
  counters_[ShardCounter::kRecallVectors].Set(work_done.vectors);
  counters_[ShardCounter::kRecallBytes].Set(work_done.bytes);
  return work;
}

int Shard::SearchInTurns(uint64_t limit) {
  std::array<Reply*, kAnswersAtOnce> searching;
  size_t count = 0;
  for (Reply& answer : answers_) {
    if (answer.phase == Reply::Phase::kSearching) searching[count++] = &answer;
  }
  if (count == 0) return 0;
  for (uint64_t distances = RecallDistances(); distances < limit; distances = RecallDistances()) {
    for (size_t i = 0; i < count; ++i) {
      Reply* const answer = searching[i];
      const auto left = static_cast<uint32_t>(limit - distances);
      if (!SearchSome(answer, count == 1, left)) continue;
      if (answer->refusal != RefusalReason::kNone) {
        FinishAnswer(answer, CompletionKind::kRecallDone, answer->refusal);
        return 1;
      }
      answer->phase = Reply::Phase::kEmitting;
      return 1 + EmitHits(answer);
    }
  }
  return 1;
}

// A turn, or, of one that is alone and asks for what it will need next, so many distances. True
// when the hits are ready, or it is refused.
bool Shard::SearchSome(Reply* answer, bool is_alone, uint32_t distances) {
  RecallJob& recall = answer->recall;
  if (answer->across && !recall.is_searching()) return GoOnAcross(answer);
  const bool ready = is_alone ? recall.Search(distances) : recall.Turn();
  if (!ready || !answer->across) return ready;
  recall.TakeFound();
  return GoOnAcross(answer);
}

// To the next space that is asked. True when that was all, or the recall is refused.
bool Shard::GoOnAcross(Reply* answer) {
  const std::byte* slot = port_.producers[answer->producer].producer_slab->At(answer->slot);
  const auto* request = reinterpret_cast<const RecallRequest*>(slot);
  for (uint32_t looked_at = 0; answer->next_space < spaces_.size(); ++looked_at) {
    if (looked_at == kSpacesAtOnce) {
      answer->recall.AddDistances(looked_at);
      return false;
    }
    const uint32_t space = answer->next_space++;
    if (!IsAskedAcross(space, *request)) continue;
    EndBeforeAnswer(space);
    answer->recall.AddDistances(kDistancesPerSpace);
    const RefusalReason reason = answer->recall.Begin(
        *spaces_[space], *request, slot + kRequestBodyOffset, options_.default_ef);
    if (reason == RefusalReason::kNone) return false;
    if (reason == RefusalReason::kUnknownFilterKey) continue;
    answer->refusal = reason;
    return true;
  }
  answer->recall.EndAcross();
  return true;
}

bool Shard::IsAskedAcross(uint32_t space, const RecallRequest& request) const {
  const SpaceEntry& entry = *entries_[space];
  return !entry.is_vacant() && !entry.is_dropping() && entry.metric() == request.metric &&
         spaces_[space]->dimension() == request.dimension;
}

template <typename Request>
const Request* Shard::BeginAnswer(Reply* answer, size_t producer, SlotId slot) {
  const auto* request =
      reinterpret_cast<const Request*>(port_.producers[producer].producer_slab->At(slot));
  answer->producer = producer;
  answer->slot = slot;
  answer->origin = request->origin;
  answer->id = request->request_id;
  answer->across = false;
  answer->refusal = RefusalReason::kNone;
  return request;
}

// Whether whoever asked still wants the answer.
RefusalReason Shard::JudgeAnswer(const Reply& answer) const {
  const auto* header = reinterpret_cast<const RequestHeader*>(
      port_.producers[answer.producer].producer_slab->At(answer.slot));
  if (IsCancelled(*header)) return RefusalReason::kCancelled;
  if (header->deadline_ns != 0 && now_ns_ > header->deadline_ns) {
    return RefusalReason::kDeadlinePassed;
  }
  return RefusalReason::kNone;
}

// False when it was answered with the reason why not.
bool Shard::MayAnswer(Reply* answer, uint32_t space) {
  if (space != kNoNode) EndBeforeAnswer(space);
  RefusalReason reason = JudgeAnswer(*answer);
  if (reason == RefusalReason::kNone && space == kNoNode) reason = RefusalReason::kUnknownSpace;
  if (reason == RefusalReason::kNone) return true;
  FinishAnswer(answer, CompletionKind::kRecallDone, reason);
  return false;
}

void Shard::BeginRecall(size_t producer, SlotId slot) {
  Reply* const answer = FreeAnswer();
  const auto* request = BeginAnswer<RecallRequest>(answer, producer, slot);
  counters_[ShardCounter::kRecalls].Add(1);
  if (request->across) {
    answer->across = true;
    answer->next_space = 0;
    answer->recall.BeginAcross(*request);
    SetUnderWay(answer, Reply::Phase::kSearching);
    return;
  }
  const uint32_t space = FindSpaceIndex(request->space.view());
  // Before its dimension is known nothing was stored.
  const bool has_any = space != kNoNode && spaces_[space]->dimension() != 0;
  if (!MayAnswer(answer, has_any ? space : kNoNode)) return;
  const auto* vector = reinterpret_cast<const std::byte*>(request) + kRequestBodyOffset;
  const RefusalReason reason =
      answer->recall.Begin(*spaces_[space], *request, vector, options_.default_ef);
  if (reason == RefusalReason::kNone) {
    SetUnderWay(answer, Reply::Phase::kSearching);
  } else {
    FinishAnswer(answer, CompletionKind::kRecallDone, reason);
  }
}

void Shard::BeginGet(size_t producer, SlotId slot) {
  Reply* const answer = FreeAnswer();
  const auto* request = BeginAnswer<GetRequest>(answer, producer, slot);
  const uint32_t space = FindSpaceIndex(request->space.view());
  if (!MayAnswer(answer, space)) return;
  const auto* id = reinterpret_cast<const char*>(request) + kRequestBodyOffset;
  const NodeId node = spaces_[space]->FindLive({id, request->id_bytes});
  listed_.clear();
  if (node != kNoNode) listed_.push_back(node);
  answer->recall.BeginListing(*spaces_[space], listed_, request->with_payload,
                              request->with_vector);
  SetUnderWay(answer, Reply::Phase::kEmitting);
}

void Shard::BeginScroll(size_t producer, SlotId slot) {
  Reply* const answer = FreeAnswer();
  const auto* asked = BeginAnswer<ScrollRequest>(answer, producer, slot);
  // The answer's part of the request.
  auto* request = const_cast<ScrollRequest*>(asked);
  const uint32_t space = FindSpaceIndex(request->space.view());
  if (!MayAnswer(answer, space)) return;
  listed_.clear();
  const size_t limit = std::clamp<size_t>(request->limit, 1, kMaxPageResults);
  spaces_[space]->Scroll(&request->cursor, limit, &listed_);
  answer->recall.BeginListing(*spaces_[space], listed_, request->with_payload,
                              request->with_vector);
  SetUnderWay(answer, Reply::Phase::kEmitting);
}

void Shard::BeginIntrospection(size_t producer, SlotId slot) {
  Reply* const answer = FreeAnswer();
  BeginAnswer<IntrospectRequest>(answer, producer, slot);
  introspected_ = 0;
  SetUnderWay(answer, Reply::Phase::kIntrospecting);
}

// Answered at once: a slice is short, and whoever asks comes back with the next one.
void Shard::CheckSpace(size_t producer, SlotId slot) {
  has_checked_ = true;
  std::byte* bytes = const_cast<std::byte*>(port_.producers[producer].producer_slab->At(slot));
  auto* request = reinterpret_cast<CheckRequest*>(bytes);
  RefusalReason reason = RefusalReason::kNone;
  const uint32_t space = FindSpaceIndex(request->space.view());
  if (space == kNoNode) {
    reason = RefusalReason::kUnknownSpace;
  } else {
    Space::CheckState state;
    std::memcpy(&state, bytes + kRequestBodyOffset, sizeof(state));
    const auto outcome = spaces_[space]->CheckSlice(kCheckSliceNodes, &state);
    std::memcpy(bytes + kRequestBodyOffset, &state, sizeof(state));
    request->outcome = outcome.value_or(CheckOutcome::kUnsound);
    const std::string_view text = outcome ? std::string_view() : outcome.error().message;
    request->text_bytes = static_cast<uint16_t>(
        text.copy(reinterpret_cast<char*>(bytes) + kRequestBodyOffset + kCheckStateBytes,
                  kMaxCheckTextBytes));
  }
  Complete(producer, {.kind = CompletionKind::kCheckDone,
                      .reason = reason,
                      .slot = slot,
                      .origin = request->origin,
                      .sequence = request->request_id});
}

// As many batches as there are result slots and as fit a slice; the rest in a later round.
int Shard::EmitHits(Reply* answer) {
  int work = 0;
  RecallJob& recall = answer->recall;
  const size_t end = recall.emitted() + kEmitSliceHits;
  for (bool last = false; !last;) {
    if (recall.emitted() >= end) return work;
    const SlotId slot = port_.result_slab->Acquire(recall.NextBatchBytes(kResultSlotBytes));
    if (slot == kNoSlot) return work;
    last = recall.EmitBatch({port_.result_slab->At(slot), port_.result_slab->SlotBytes(slot)});
    Complete(answer->producer, {.kind = CompletionKind::kResults,
                                .result_slot = slot,
                                .origin = answer->origin,
                                .sequence = answer->id});
    ++work;
    if (recall.is_searching()) {
      answer->phase = Reply::Phase::kSearching;
      return work;
    }
  }
  FinishAnswer(answer, CompletionKind::kRecallDone, RefusalReason::kNone);
  return work;
}

int Shard::EmitSpaceRecords(Reply* answer) {
  int work = 0;
  for (bool last = false; !last;) {
    const SlotId slot = port_.result_slab->Acquire(kResultSlotBytes);
    if (slot == kNoSlot) return work;
    std::byte* bytes = port_.result_slab->At(slot);
    ResultBatch batch;
    size_t used = sizeof(ResultBatch);
    constexpr size_t kRecordRoom = SpaceRecordBytes(kMaxSpaceNameBytes);
    while (introspected_ < spaces_.size() && used + kRecordRoom <= kResultSlotBytes) {
      const uint32_t space = introspected_++;
      if (entries_[space]->is_vacant()) continue;
      used += WriteSpaceRecord(*spaces_[space], bytes + used);
      ++batch.count;
    }
    batch.body_bytes = static_cast<uint32_t>(used - sizeof(ResultBatch));
    last = introspected_ == spaces_.size();
    if (last) batch.end = BatchEnd::kLast;
    std::memcpy(bytes, &batch, sizeof(batch));
    Complete(answer->producer, {.kind = CompletionKind::kRecords,
                                .result_slot = slot,
                                .origin = answer->origin,
                                .sequence = answer->id});
    ++work;
  }
  FinishAnswer(answer, CompletionKind::kIntrospectDone, RefusalReason::kNone);
  return work;
}

size_t Shard::WriteSpaceRecord(const Space& space, std::byte* to) const {
  const MemoryByKind memory = space.memory();
  const size_t used = sizeof(SpaceRecord) + space.name().size();
  const size_t bytes = SpaceRecordBytes(space.name().size());
  const SpaceRecord record{.record_bytes = static_cast<uint32_t>(bytes),
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
                           .resident_bytes = SumOf(memory)};
  std::memcpy(to, &record, sizeof(record));
  std::memcpy(to + sizeof(record), space.name().data(), space.name().size());
  std::memset(to + used, 0, bytes - sizeof(memory) - used);
  std::memcpy(to + bytes - sizeof(memory), &memory, sizeof(memory));
  return record.record_bytes;
}

void Shard::SetUnderWay(Reply* answer, Reply::Phase phase) {
  answer->phase = phase;
  ++answers_under_way_;
}

void Shard::FinishAnswer(Reply* answer, CompletionKind kind, RefusalReason reason) {
  if (answer->phase != Reply::Phase::kNothing) --answers_under_way_;
  answer->phase = Reply::Phase::kNothing;
  Complete(answer->producer, {.kind = kind,
                              .reason = reason,
                              .slot = answer->slot,
                              .origin = answer->origin,
                              .sequence = answer->id});
}

}  // namespace engram
