// What a shard answers in batches (see shard.h): recalls, gets, scrolls, introspection. One is
// under way at a time, and goes on in the next round where it has used up its slice or there are no
// result slots.

#include <algorithm>
#include <cstring>

#include "index/shard.h"

namespace engram {

int Shard::ContinueAnswer() {
  if (answering_ == Answering::kSearching) {
    if (const RefusalReason reason = JudgeAnswer(); reason != RefusalReason::kNone) {
      FinishAnswer(CompletionKind::kRecallDone, reason);
      return 1;
    }
    const uint64_t before = recall_.distances();
    bool ready = false;
    do {
      ready = recall_.Search(kRecallSliceDistances);
    } while (!ready && recall_.distances() - before < kRecallSliceDistances);
    counters_[ShardCounter::kRecallDistances].Add(recall_.distances() - before);
    if (!ready) return 1;
    answering_ = Answering::kEmitting;
  }
  if (answering_ == Answering::kEmitting) return EmitHits();
  if (answering_ == Answering::kIntrospecting) return EmitSpaceRecords();
  return 0;
}

template <typename Request>
const Request* Shard::BeginAnswer(size_t producer, SlotId slot) {
  const auto* request =
      reinterpret_cast<const Request*>(port_.producers[producer].producer_slab->At(slot));
  answer_producer_ = producer;
  answer_slot_ = slot;
  answer_origin_ = request->origin;
  answer_id_ = request->request_id;
  return request;
}

// Whether whoever asked still wants the answer.
RefusalReason Shard::JudgeAnswer() const {
  const auto* header = reinterpret_cast<const RequestHeader*>(
      port_.producers[answer_producer_].producer_slab->At(answer_slot_));
  if (IsCancelled(*header)) return RefusalReason::kCancelled;
  if (header->deadline_ns != 0 && now_ns_ > header->deadline_ns) {
    return RefusalReason::kDeadlinePassed;
  }
  return RefusalReason::kNone;
}

// False when it was answered with the reason why not.
bool Shard::MayAnswer(uint32_t space) {
  if (space != kNoNode) EndBeforeAnswer(space);
  RefusalReason reason = JudgeAnswer();
  if (reason == RefusalReason::kNone && space == kNoNode) reason = RefusalReason::kUnknownSpace;
  if (reason == RefusalReason::kNone) return true;
  FinishAnswer(CompletionKind::kRecallDone, reason);
  return false;
}

void Shard::BeginRecall(size_t producer, SlotId slot) {
  const auto* request = BeginAnswer<RecallRequest>(producer, slot);
  counters_[ShardCounter::kRecalls].Add(1);
  const uint32_t space = FindSpaceIndex(request->space.view());
  // Before its dimension is known nothing was stored.
  if (!MayAnswer(space != kNoNode && spaces_[space]->dimension() != 0 ? space : kNoNode)) return;
  const auto* vector = reinterpret_cast<const std::byte*>(request) + kRequestBodyOffset;
  const RefusalReason reason =
      recall_.Begin(*spaces_[space], *request, vector, options_.default_ef);
  if (reason == RefusalReason::kNone) {
    answering_ = Answering::kSearching;
  } else {
    FinishAnswer(CompletionKind::kRecallDone, reason);
  }
}

void Shard::BeginGet(size_t producer, SlotId slot) {
  const auto* request = BeginAnswer<GetRequest>(producer, slot);
  const uint32_t space = FindSpaceIndex(request->space.view());
  if (!MayAnswer(space)) return;
  const auto* id = reinterpret_cast<const char*>(request) + kRequestBodyOffset;
  const NodeId node = spaces_[space]->FindLive({id, request->id_bytes});
  listed_.clear();
  if (node != kNoNode) listed_.push_back(node);
  recall_.BeginListing(*spaces_[space], listed_, request->with_payload, request->with_vector);
  answering_ = Answering::kEmitting;
}

void Shard::BeginScroll(size_t producer, SlotId slot) {
  const auto* asked = BeginAnswer<ScrollRequest>(producer, slot);
  // The answer's part of the request.
  auto* request = const_cast<ScrollRequest*>(asked);
  const uint32_t space = FindSpaceIndex(request->space.view());
  if (!MayAnswer(space)) return;
  listed_.clear();
  const size_t limit = std::clamp<size_t>(request->limit, 1, kMaxPageResults);
  spaces_[space]->Scroll(&request->cursor, limit, &listed_);
  recall_.BeginListing(*spaces_[space], listed_, request->with_payload, request->with_vector);
  answering_ = Answering::kEmitting;
}

void Shard::BeginIntrospection(size_t producer, SlotId slot) {
  BeginAnswer<IntrospectRequest>(producer, slot);
  introspected_ = 0;
  answering_ = Answering::kIntrospecting;
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
int Shard::EmitHits() {
  int work = 0;
  const size_t end = recall_.emitted() + kEmitSliceHits;
  for (bool last = false; !last;) {
    if (recall_.emitted() >= end) return work;
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
      const uint32_t space = introspected_++;
      if (entries_[space]->is_vacant()) continue;
      used += WriteSpaceRecord(*spaces_[space], bytes + used);
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

}  // namespace engram
