#include "index/recall_job.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "src/core/check.h"
#include "src/core/spsc_ring.h"

namespace engram {

namespace {

// Rows of the scan that are asked for ahead of the one that is compared.
constexpr size_t kScanAhead = 4;

}  // namespace

RecallJob::RecallJob(ArenaHeap* heap)
    : scratch_(heap),
      query_storage_(kMaxDimension + kCacheLineBytes / sizeof(float)),
      nearest_storage_(kMaxRecallResults),
      found_(kMaxRecallResults) {
  const auto address = std::bit_cast<uintptr_t>(query_storage_.data());
  const size_t skip = (kCacheLineBytes - address % kCacheLineBytes) % kCacheLineBytes;
  query_ = query_storage_.data() + skip / sizeof(float);
  nearest_.Attach(nearest_storage_.data());
  hits_.reserve(2 * size_t{kMaxRecallResults});
}

RefusalReason RecallJob::Begin(const Space& space, const RecallRequest& request,
                               const std::byte* vector, uint32_t default_ef) {
  const RefusalReason reason =
      space.PrepareQuery(request.dtype, request.dimension, request.scale, vector, query_);
  if (reason != RefusalReason::kNone) return reason;
  if (!scratch_.Reserve(space.node_count())) return RefusalReason::kMemoryFull;
  space_ = &space;
  k_ = request.k;
  ef_ = request.ef == 0 ? default_ef : request.ef;
  with_payload_ = request.with_payload;
  scanned_ = 0;
  emitted_ = 0;
  payload_sent_ = 0;
  nearest_.Clear();
  hits_.clear();
  phase_ = Phase::kScan;
  return RefusalReason::kNone;
}

bool RecallJob::Search(uint32_t max_distances) {
  CHECK(phase_ != Phase::kIdle, "a recall was begun");
  if (phase_ == Phase::kScan) {
    ScanSlice(max_distances);
    if (scanned_ < space_->unlinked_count()) return false;
    search_ = GraphSearch<IsLinked>(IsLinked{space_});
    search_.Begin(space_->TargetFor(query_), k_, std::max(ef_, k_), &scratch_);
    phase_ = Phase::kSearch;
    return false;
  }
  if (phase_ == Phase::kSearch && search_.Step(max_distances)) {
    Merge();
    phase_ = Phase::kReady;
  }
  return phase_ == Phase::kReady;
}

void RecallJob::ScanSlice(uint32_t max_distances) {
  const SearchTarget target = space_->TargetFor(query_);
  const size_t padded = space_->padded_dimension();
  const size_t count = space_->unlinked_count();
  const size_t end = std::min(count, scanned_ + max_distances);
  scratch_.distances += end - scanned_;
  for (; scanned_ < end; ++scanned_) {
    if (scanned_ + kScanAhead < count) {
      PrefetchRow(target.vectors->Row(space_->UnlinkedAt(scanned_ + kScanAhead)), padded);
    }
    const NodeId node = space_->UnlinkedAt(scanned_);
    const float distance = target.distance(query_, target.vectors->Row(node), padded);
    const NeighbourKey key = KeyOf(distance, node);
    if (nearest_.size() < k_) {
      nearest_.Push(key);
    } else if (key < nearest_.top()) {
      nearest_.ReplaceTop(key);
    }
  }
}

// The graph finds only linked nodes and the scan only others, so none comes twice.
void RecallJob::Merge() {
  const size_t found = search_.TakeResults(std::span(found_).first(k_));
  for (const NeighbourKey key : nearest_.keys()) hits_.push_back(key);
  for (size_t i = 0; i < found; ++i) hits_.push_back(KeyOf(found_[i].distance, found_[i].node));
  const size_t kept = std::min<size_t>(k_, hits_.size());
  std::partial_sort(hits_.begin(), hits_.begin() + static_cast<ptrdiff_t>(kept), hits_.end());
  hits_.resize(kept);
}

size_t RecallJob::PayloadBytesOf(const StoredObservation& stored, size_t sent) const {
  if (!with_payload_ || sent + stored.payload.size() > kMaxResultPayloadBytes) return 0;
  return stored.payload.size();
}

size_t RecallJob::HitBytesOf(size_t index, size_t sent, size_t* payload_bytes) const {
  const StoredObservation stored = space_->Get(NodeOf(hits_[index]));
  *payload_bytes = PayloadBytesOf(stored, sent);
  return PadTo8(sizeof(HitHeader) + stored.id.size() + *payload_bytes);
}

size_t RecallJob::NextBatchBytes(size_t max_bytes) const {
  size_t bytes = sizeof(ResultBatch);
  size_t sent = payload_sent_;
  for (size_t index = emitted_; index < hits_.size(); ++index) {
    size_t payload_bytes = 0;
    const size_t hit_bytes = HitBytesOf(index, sent, &payload_bytes);
    if (bytes + hit_bytes > max_bytes) break;
    bytes += hit_bytes;
    sent += payload_bytes;
  }
  return bytes;
}

bool RecallJob::EmitBatch(std::span<std::byte> slot) {
  ResultBatch batch;
  batch.metric = space_->metric();
  size_t bytes = sizeof(ResultBatch);
  while (emitted_ < hits_.size()) {
    size_t payload_bytes = 0;
    if (bytes + HitBytesOf(emitted_, payload_sent_, &payload_bytes) > slot.size()) break;
    bytes += WriteHit(emitted_, slot.data() + bytes);
    payload_sent_ += payload_bytes;
    ++emitted_;
    ++batch.count;
  }
  batch.body_bytes = static_cast<uint32_t>(bytes - sizeof(ResultBatch));
  batch.last = emitted_ == hits_.size();
  std::memcpy(slot.data(), &batch, sizeof(batch));
  if (batch.last) phase_ = Phase::kIdle;
  return batch.last;
}

size_t RecallJob::WriteHit(size_t index, std::byte* to) {
  const NodeId node = NodeOf(hits_[index]);
  const StoredObservation stored = space_->Get(node);
  const size_t payload_bytes = PayloadBytesOf(stored, payload_sent_);
  const bool omitted = with_payload_ && payload_bytes < stored.payload.size();
  const size_t used = sizeof(HitHeader) + stored.id.size() + payload_bytes;
  const HitHeader header{.hit_bytes = static_cast<uint32_t>(PadTo8(used)),
                         .score = space_->ScoreOf(DistanceOf(hits_[index])),
                         .when_ns = stored.when_ns,
                         .confidence = stored.confidence,
                         .payload_bytes = static_cast<uint32_t>(payload_bytes),
                         .id_bytes = static_cast<uint16_t>(stored.id.size()),
                         .flags = omitted ? kHitPayloadOmitted : uint16_t{0},
                         .reserved = 0};
  std::memcpy(to, &header, sizeof(header));
  std::memcpy(to + sizeof(header), stored.id.data(), stored.id.size());
  if (payload_bytes > 0) {
    std::memcpy(to + sizeof(header) + stored.id.size(), stored.payload.data(), payload_bytes);
  }
  std::memset(to + used, 0, header.hit_bytes - used);
  return header.hit_bytes;
}

}  // namespace engram
