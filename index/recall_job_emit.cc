// Recalls of all spaces, and what goes out of a recall (see recall_job.h, 6).

#include <algorithm>
#include <cstring>

#include "index/recall_job.h"
#include "src/core/check.h"
#include "src/core/log_record.h"
#include "src/core/vector_dtype.h"

namespace engram {

namespace {

// Of a batch: each is likely to be read from memory.
constexpr size_t kMostHitsOfBatch = 512;

}  // namespace

void RecallJob::BeginAcross(const RecallRequest& request) {
  CHECK(found_across_ != nullptr, "recalls of all spaces are the shard core's");
  found_across_count_ = 0;
  across_ = true;
  metric_ = request.metric;
  wanted_ = request.k;
  first_ = 0;
  scored_ = true;
  phase_ = Phase::kIdle;
  BeginEmit(request.with_payload, request.with_vector, request.max_payload_bytes);
}

void RecallJob::TakeFound() {
  CHECK(phase_ == Phase::kReady, "the space was recalled");
  for (const NeighbourKey hit : hits_) found_across_[found_across_count_++] = {hit, space_};
  if (found_across_count_ + kMaxRecallResults > kMaxFoundAcross) KeepNearestAcross();
  phase_ = Phase::kIdle;
}

void RecallJob::KeepNearestAcross() {
  if (found_across_count_ <= wanted_) return;
  FoundAcross* const first = found_across_.get();
  std::nth_element(first, first + wanted_, first + found_across_count_);
  found_across_count_ = wanted_;
}

void RecallJob::EndAcross() {
  KeepNearestAcross();
  std::sort(found_across_.get(), found_across_.get() + found_across_count_);
  hits_.clear();
  for (size_t i = 0; i < found_across_count_; ++i) hits_.push_back(found_across_[i].key);
  emitted_ = 0;
  is_first_stage_ = true;
  is_last_stage_ = true;
  phase_ = Phase::kReady;
}

void RecallJob::BeginListing(const Space& space, std::span<const NodeId> nodes, bool with_payload,
                             bool with_vector) {
  space_ = &space;
  metric_ = space.metric();
  across_ = false;
  hits_.clear();
  for (const NodeId node : nodes) hits_.push_back(KeyOf(0, node));
  scored_ = false;
  first_ = 0;
  is_first_stage_ = true;
  is_last_stage_ = true;
  BeginEmit(with_payload, with_vector, kMaxAnswerPayloadBytes);
  phase_ = Phase::kReady;
}

// 6.
void RecallJob::BeginEmit(bool with_payload, bool with_vector, size_t max_payload_bytes) {
  with_payload_ = with_payload;
  with_vector_ = with_vector;
  emitted_ = 0;
  payload_sent_ = 0;
  max_payload_bytes_ = max_payload_bytes;
}

// What a log holds is bounded by who reads it, once it is known which hits are among the best.
RecallJob::HitForm RecallJob::FormOf(size_t hit, const StoredObservation& stored,
                                     size_t sent) const {
  HitForm form;
  const size_t vector_bytes = with_vector_ ? SpaceOfHit(hit).dimension() * sizeof(float) : 0;
  const size_t wanted = with_payload_ ? stored.payload_bytes : 0;
  const bool fits = sent + wanted <= max_payload_bytes_;
  if (stored.record_bytes != 0 && wanted + vector_bytes > 0) {
    // Also where the payload is left out: the vector cannot be read from the disk yet.
    if (log_ != nullptr) form.record = log_->NotDurable(stored.origin);
    form.at_address = form.record.empty();
  }
  form.payload_bytes = fits || form.at_address ? wanted : 0;
  form.hit_bytes =
      PadTo8(sizeof(HitHeader) + stored.id.size() + NameIn(hit).size() +
             (form.at_address ? sizeof(HitReference) : vector_bytes + form.payload_bytes));
  return form;
}

size_t RecallJob::NextBatchBytes(size_t max_bytes) const {
  size_t bytes = sizeof(ResultBatch);
  size_t sent = payload_sent_;
  const size_t end = std::min(hits_.size(), emitted_ + kMostHitsOfBatch);
  for (size_t index = emitted_; index < end; ++index) {
    const StoredObservation stored = SpaceOfHit(index).Get(NodeOf(hits_[index]));
    __builtin_prefetch(stored.id.data());  // for EmitBatch
    const HitForm form = FormOf(index, stored, sent);
    if (bytes + form.hit_bytes > max_bytes) break;
    bytes += form.hit_bytes;
    if (!form.at_address) sent += form.payload_bytes;
  }
  return bytes;
}

bool RecallJob::EmitBatch(std::span<std::byte> slot) {
  ResultBatch batch;
  batch.metric = metric_;
  size_t bytes = sizeof(ResultBatch);
  while (emitted_ < hits_.size() && batch.count < kMostHitsOfBatch) {
    const StoredObservation stored = SpaceOfHit(emitted_).Get(NodeOf(hits_[emitted_]));
    const HitForm form = FormOf(emitted_, stored, payload_sent_);
    if (bytes + form.hit_bytes > slot.size()) break;
    WriteHit(emitted_, stored, form, slot.data() + bytes);
    bytes += form.hit_bytes;
    if (!form.at_address) payload_sent_ += form.payload_bytes;
    ++emitted_;
    ++batch.count;
  }
  batch.body_bytes = static_cast<uint32_t>(bytes - sizeof(ResultBatch));
  if (emitted_ == hits_.size()) batch.end = EndStage();
  std::memcpy(slot.data(), &batch, sizeof(batch));
  return batch.is_last();
}

// What comes first ends by itself, also where there is nothing else.
BatchEnd RecallJob::EndStage() {
  const bool ends_first = first_ > 0 && is_first_stage_;
  is_first_stage_ = false;
  if (!is_last_stage_) {
    for (const NeighbourKey hit : hits_) sent_.push_back(NodeOf(hit));
    std::ranges::sort(sent_);
    BeginStage(NextStage());
  } else if (ends_first) {
    hits_.clear();
    emitted_ = 0;
  } else {
    phase_ = Phase::kIdle;
    return BatchEnd::kLast;
  }
  return ends_first ? BatchEnd::kFirst : BatchEnd::kNothing;
}

void RecallJob::WriteHit(size_t hit, const StoredObservation& stored, const HitForm& form,
                         std::byte* to) const {
  const Space& space = SpaceOfHit(hit);
  const bool omitted = with_payload_ && form.payload_bytes < stored.payload_bytes;
  const uint8_t flags = static_cast<uint8_t>((omitted ? kHitPayloadOmitted : 0) |
                                             (form.at_address ? kHitAtAddress : 0));
  const HitHeader header{
      .hit_bytes = static_cast<uint32_t>(form.hit_bytes),
      .score = scored_ ? space.ScoreOf(DistanceOf(hits_[hit])) : 0,
      .when_ns = stored.when_ns,
      .stamp = stored.stamp,
      .confidence = stored.confidence,
      .payload_bytes = static_cast<uint32_t>(form.payload_bytes),
      .id_bytes = static_cast<uint16_t>(stored.id.size()),
      .flags = flags,
      .payload_kind = stored.payload_kind,
      .vector_dimension = with_vector_ ? static_cast<uint16_t>(space.dimension()) : uint16_t{0},
      .space_bytes = static_cast<uint8_t>(NameIn(hit).size()),
      .reserved = 0};
  std::byte* const end = to + form.hit_bytes;
  std::memcpy(to, &header, sizeof(header));
  to = WriteContent(hit, stored, form, to + sizeof(header));
  std::fill(to, end, std::byte{0});
}

// What follows the header, without padding. Returns where it ends.
std::byte* RecallJob::WriteContent(size_t hit, const StoredObservation& stored, const HitForm& form,
                                   std::byte* to) const {
  const Space& space = SpaceOfHit(hit);
  const std::string_view name = NameIn(hit);
  const auto put = [&to](const void* from, size_t bytes) {
    if (bytes > 0) std::memcpy(to, from, bytes);
    to += bytes;
  };
  const std::byte* payload = stored.payload.data();
  if (form.at_address) {
    const HitReference reference{.address = stored.origin,
                                 .record_bytes = stored.record_bytes,
                                 .has_older_stamp = stored.was_hidden ? 1U : 0U};
    put(&reference, sizeof(reference));
    put(stored.id.data(), stored.id.size());
    put(name.data(), name.size());
    return to;
  }
  LogRecord record;
  if (!form.record.empty()) {
    ReadLogRecord(form.record, &record);
    payload = record.payload.data();
  }
  if (with_vector_) {
    if (form.record.empty()) {
      space.GetVector(NodeOf(hits_[hit]), reinterpret_cast<float*>(to));
    } else {
      DecodeVector(record.dtype, record.dimension, record.scale, record.vector.data(),
                   reinterpret_cast<float*>(to));
    }
    to += space.dimension() * sizeof(float);
  }
  put(stored.id.data(), stored.id.size());
  put(name.data(), name.size());
  put(payload, form.payload_bytes);
  return to;
}

}  // namespace engram
