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
// How many of the nearest by code are compared again: those beyond rarely belong to the k nearest.
constexpr uint32_t kCompareFactor = 2;
constexpr uint32_t kCompareExtra = 32;
constexpr size_t kMaxKept = kMaxRecallResults * kCompareFactor + kCompareExtra;

}  // namespace

RecallJob::RecallJob(ArenaHeap* heap)
    : scratch_(heap),
      query_storage_(2 * Space::kMaxRowBytes + kCacheLineBytes),
      nearest_storage_(kMaxKept),
      found_(kMaxKept) {
  static_assert(Space::kMaxRowBytes % kCacheLineBytes == 0);
  const auto address = std::bit_cast<uintptr_t>(query_storage_.data());
  code_query_ = query_storage_.data() + (kCacheLineBytes - address % kCacheLineBytes);
  exact_query_ = code_query_ + Space::kMaxRowBytes;
  nearest_.Attach(nearest_storage_.data());
  hits_.reserve(2 * kMaxKept);
}

// 1.
RefusalReason RecallJob::Begin(const Space& space, const RecallRequest& request,
                               const std::byte* vector, uint32_t default_ef) {
  const RefusalReason reason = space.PrepareQuery(request.dtype, request.dimension, request.scale,
                                                  vector, code_query_, exact_query_);
  if (reason != RefusalReason::kNone) return reason;
  space_ = &space;
  TakeSnapshot(request.snapshot);
  // After the list of fresh nodes was taken: what left it before is past the horizon that is seen
  // here.
  if (request.snapshot != kNoStamp && request.snapshot < space.horizon()) {
    return RefusalReason::kSnapshotTooOld;
  }
  if (!scratch_.Reserve(space.node_count())) return RefusalReason::kMemoryFull;
  k_ = request.k;
  ef_ = std::max(request.ef == 0 ? default_ef : request.ef, k_);
  scan_exact_ = space.has_exact() && !space.has_linked();
  const bool compare_again = space.has_exact() && !scan_exact_;
  kept_ = compare_again ? std::min(ef_, k_ * kCompareFactor + kCompareExtra) : k_;
  scanned_ = 0;
  compared_ = 0;
  nearest_.Clear();
  hits_.clear();
  scored_ = true;
  BeginEmit(request.with_payload, request.with_vector);
  phase_ = Phase::kScan;
  return RefusalReason::kNone;
}

// The list of fresh nodes and the stamp must be of one moment: what was stored between the two
// would be missed in one form and hidden in the other.
void RecallJob::TakeSnapshot(CommitStamp wanted) {
  CommitStamp latest = space_->latest_stamp();
  for (;;) {
    fresh_ = space_->FreshNodes();
    const CommitStamp now = space_->latest_stamp();
    if (now == latest) break;
    latest = now;
  }
  snapshot_ = wanted == kNoStamp ? latest : wanted;
}

bool RecallJob::Search(uint32_t max_distances) {
  CHECK(phase_ != Phase::kIdle, "a recall was begun");
  switch (phase_) {
    case Phase::kScan:
      ScanSlice(max_distances);
      if (scanned_ == fresh_.size()) BeginSearch();
      break;
    case Phase::kSearch:
      if (search_.Step(max_distances)) Merge();
      break;
    case Phase::kCompare:
      CompareSlice(max_distances);
      break;
    case Phase::kIdle:
    case Phase::kReady:
      break;
  }
  return phase_ == Phase::kReady;
}

// 2.
void RecallJob::ScanSlice(uint32_t max_distances) {
  const SearchTarget target =
      scan_exact_ ? space_->ExactTargetFor(exact_query_) : space_->TargetFor(code_query_);
  const size_t end = std::min<size_t>(fresh_.size(), scanned_ + max_distances);
  scratch_.distances += end - scanned_;
  for (; scanned_ < end; ++scanned_) {
    if (scanned_ + kScanAhead < fresh_.size()) target.Prefetch(fresh_[scanned_ + kScanAhead]);
    const NodeId node = fresh_[scanned_];
    if (!space_->IsVisible(node, snapshot_)) continue;
    const NeighbourKey key = KeyOf(target.DistanceTo(node), node);
    if (nearest_.size() < kept_) {
      nearest_.Push(key);
    } else if (key < nearest_.top()) {
      nearest_.ReplaceTop(key);
    }
  }
}

// 3. What was linked since the scan began is in the scan, so a graph that has begun since is left
// alone.
void RecallJob::BeginSearch() {
  if (scan_exact_) {
    Merge();
    return;
  }
  search_ = GraphSearch<IsVisible>(IsVisible{space_, snapshot_});
  search_.Begin(space_->TargetFor(code_query_), kept_, ef_, &scratch_);
  phase_ = Phase::kSearch;
}

// 4. A node that was linked meanwhile may be in both.
void RecallJob::Merge() {
  const size_t found = scan_exact_ ? 0 : search_.TakeResults(std::span(found_).first(kept_));
  for (const NeighbourKey key : nearest_.keys()) hits_.push_back(key);
  for (size_t i = 0; i < found; ++i) hits_.push_back(KeyOf(found_[i].distance, found_[i].node));
  std::sort(hits_.begin(), hits_.end());
  hits_.erase(std::unique(hits_.begin(), hits_.end()), hits_.end());
  if (space_->has_exact() && !scan_exact_) {
    hits_.resize(std::min<size_t>(hits_.size(), kept_));
    phase_ = Phase::kCompare;
  } else {
    hits_.resize(std::min<size_t>(hits_.size(), k_));
    FinishSearch();
  }
}

// 5.
void RecallJob::CompareSlice(uint32_t max_distances) {
  const SearchTarget target = space_->ExactTargetFor(exact_query_);
  const size_t end = std::min<size_t>(hits_.size(), compared_ + max_distances);
  scratch_.distances += end - compared_;
  for (; compared_ < end; ++compared_) {
    if (compared_ + kScanAhead < hits_.size()) {
      target.Prefetch(NodeOf(hits_[compared_ + kScanAhead]));
    }
    const NodeId node = NodeOf(hits_[compared_]);
    hits_[compared_] = KeyOf(target.DistanceTo(node), node);
  }
  if (compared_ < hits_.size()) return;
  const size_t count = std::min<size_t>(hits_.size(), k_);
  std::partial_sort(hits_.begin(), hits_.begin() + static_cast<ptrdiff_t>(count), hits_.end());
  hits_.resize(count);
  FinishSearch();
}

void RecallJob::FinishSearch() {
  for (const NeighbourKey hit : hits_) space_->PrefetchObservation(NodeOf(hit));
  phase_ = Phase::kReady;
}

void RecallJob::BeginListing(const Space& space, std::span<const NodeId> nodes, bool with_payload,
                             bool with_vector) {
  space_ = &space;
  hits_.clear();
  for (const NodeId node : nodes) hits_.push_back(KeyOf(0, node));
  scored_ = false;
  BeginEmit(with_payload, with_vector);
  phase_ = Phase::kReady;
}

// 6.
void RecallJob::BeginEmit(bool with_payload, bool with_vector) {
  with_payload_ = with_payload;
  with_vector_ = with_vector;
  emitted_ = 0;
  payload_sent_ = 0;
}

RecallJob::HitSize RecallJob::SizeOf(const StoredObservation& stored, size_t sent) const {
  const bool fits = with_payload_ && sent + stored.payload.size() <= kMaxResultPayloadBytes;
  const size_t payload_bytes = fits ? stored.payload.size() : 0;
  const size_t vector_bytes = with_vector_ ? space_->dimension() * sizeof(float) : 0;
  return {.payload_bytes = payload_bytes,
          .hit_bytes = PadTo8(sizeof(HitHeader) + vector_bytes + stored.id.size() + payload_bytes)};
}

size_t RecallJob::NextBatchBytes(size_t max_bytes) const {
  size_t bytes = sizeof(ResultBatch);
  size_t sent = payload_sent_;
  for (size_t index = emitted_; index < hits_.size(); ++index) {
    const StoredObservation stored = space_->Get(NodeOf(hits_[index]));
    __builtin_prefetch(stored.id.data());  // for EmitBatch
    const HitSize size = SizeOf(stored, sent);
    if (bytes + size.hit_bytes > max_bytes) break;
    bytes += size.hit_bytes;
    sent += size.payload_bytes;
  }
  return bytes;
}

bool RecallJob::EmitBatch(std::span<std::byte> slot) {
  ResultBatch batch;
  batch.metric = space_->metric();
  size_t bytes = sizeof(ResultBatch);
  while (emitted_ < hits_.size()) {
    const StoredObservation stored = space_->Get(NodeOf(hits_[emitted_]));
    const HitSize size = SizeOf(stored, payload_sent_);
    if (bytes + size.hit_bytes > slot.size()) break;
    WriteHit(hits_[emitted_], stored, size, slot.data() + bytes);
    bytes += size.hit_bytes;
    payload_sent_ += size.payload_bytes;
    ++emitted_;
    ++batch.count;
  }
  batch.body_bytes = static_cast<uint32_t>(bytes - sizeof(ResultBatch));
  batch.last = emitted_ == hits_.size();
  std::memcpy(slot.data(), &batch, sizeof(batch));
  if (batch.last) phase_ = Phase::kIdle;
  return batch.last;
}

void RecallJob::WriteHit(NeighbourKey hit, const StoredObservation& stored, const HitSize& size,
                         std::byte* to) const {
  const uint32_t dimension = with_vector_ ? space_->dimension() : 0;
  const bool omitted = with_payload_ && size.payload_bytes < stored.payload.size();
  const HitHeader header{.hit_bytes = static_cast<uint32_t>(size.hit_bytes),
                         .score = scored_ ? space_->ScoreOf(DistanceOf(hit)) : 0,
                         .when_ns = stored.when_ns,
                         .stamp = stored.stamp,
                         .confidence = stored.confidence,
                         .payload_bytes = static_cast<uint32_t>(size.payload_bytes),
                         .id_bytes = static_cast<uint16_t>(stored.id.size()),
                         .flags = omitted ? kHitPayloadOmitted : uint8_t{0},
                         .payload_kind = stored.payload_kind,
                         .vector_dimension = static_cast<uint16_t>(dimension),
                         .reserved = 0};
  std::byte* const end = to + size.hit_bytes;
  std::memcpy(to, &header, sizeof(header));
  to += sizeof(header);
  if (dimension > 0) space_->GetVector(NodeOf(hit), reinterpret_cast<float*>(to));
  to += dimension * sizeof(float);
  std::memcpy(to, stored.id.data(), stored.id.size());
  to += stored.id.size();
  if (size.payload_bytes > 0) std::memcpy(to, stored.payload.data(), size.payload_bytes);
  to += size.payload_bytes;
  std::fill(to, end, std::byte{0});
}

}  // namespace engram
