#include "dataplane/recall_merger.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <string_view>
#include <utility>

#include "src/core/check.h"
#include "src/core/hash.h"
#include "src/core/vector_dtype.h"

namespace engram {

namespace {

// Hits that are worth a batch while others are still being read.
constexpr uint32_t kLeastBatchHits = 16;
static_assert(kLeastBatchHits <= HitWindow::kHits);
// One partition's largest answer but for its payloads. Twice all of it in blocks holds it however
// its batches fall, as any two neighbouring blocks are together at least half full.
constexpr size_t kMaxAnswerBytes = kMaxRecallResults * PadTo8(sizeof(HitHeader) + kMaxIdBytes + 7) +
                                   kMaxRecallNumbers * sizeof(float);

HitHeader HeaderOf(const std::byte* hit) {
  HitHeader header;
  std::memcpy(&header, hit, sizeof(header));
  return header;
}

// Its id and its space's name: who says how long the one is knows the other.
struct HitName {
  std::string_view text;
  uint16_t id_bytes = 0;
  bool operator==(const HitName&) const = default;
};
HitName NameOf(const std::byte* hit) {
  const HitHeader header = HeaderOf(hit);
  return {{reinterpret_cast<const char*>(hit + HitIdOffset(header)),
           size_t{header.id_bytes} + header.space_bytes},
          header.id_bytes};
}

// What a client can do about it decides: nothing, change the request, ask again.
int SeverityOf(RefusalReason reason) {
  switch (DescribeRefusal(reason).effect) {
    case RefusalEffect::kCloses:
      return 3;
    case RefusalEffect::kConsumes:
    case RefusalEffect::kAnswers:
      return 2;
    case RefusalEffect::kWaits:
      break;
  }
  return 1;
}

size_t TablePlaces(size_t hits) { return std::bit_ceil(2 * std::max<size_t>(hits, 1)); }

}  // namespace

Result<std::unique_ptr<RecallMerger>> RecallMerger::Create(uint32_t merges, uint16_t max_partitions,
                                                           size_t max_payload_bytes,
                                                           HugePagePolicy huge_pages,
                                                           RecordReader* records) {
  CHECK(merges > 0 && max_partitions > 0, "a merger merges");
  const size_t answer_bytes = 2 * max_partitions * (kMaxAnswerBytes + max_payload_bytes);
  const size_t pool_bytes =
      std::min(merges * answer_bytes, std::max(answer_bytes, kUsualPoolBytes));
  const size_t blocks = (pool_bytes + kBlockBytes - 1) / kBlockBytes;
  // Reserved huge pages would be set aside for the largest answers that nobody may ever ask for.
  auto arena = HugePageArena::Create({.reserve_bytes = blocks * kBlockBytes,
                                      .huge_pages = huge_pages == HugePagePolicy::kAuto
                                                        ? HugePagePolicy::kTransparent
                                                        : HugePagePolicy::kOff});
  if (!arena) return std::unexpected(arena.error());
  return std::unique_ptr<RecallMerger>(new RecallMerger(merges, max_partitions, max_payload_bytes,
                                                        static_cast<uint32_t>(blocks),
                                                        *std::move(arena), records));
}

RecallMerger::RecallMerger(uint32_t merges, uint16_t max_partitions, size_t max_payload_bytes,
                           uint32_t blocks, HugePageArena arena, RecordReader* records)
    : max_partitions_(max_partitions),
      max_payload_bytes_(max_payload_bytes),
      max_blocks_(blocks),
      records_(records),
      arena_(std::move(arena)),
      pool_(arena_.Allocate(blocks * kBlockBytes, kCacheLineBytes)),
      merges_(merges),
      blocks_(blocks),
      orders_(
          std::make_unique_for_overwrite<const std::byte*[]>(size_t{merges} * kMaxRecallResults)),
      found_(std::make_unique_for_overwrite<Found[]>(size_t{max_partitions} * kMaxRecallResults)),
      by_id_(std::make_unique_for_overwrite<uint32_t[]>(
          TablePlaces(size_t{max_partitions} * kMaxRecallResults))) {
  CHECK(pool_ != nullptr, "the arena was made for the pool");
  free_blocks_.reserve(blocks);
  in_order_.reserve(kMaxRecallResults);
  free_merges_.reserve(merges);
  for (uint32_t id = merges; id > 0; --id) free_merges_.push_back(id - 1);
}

RecallMerger::MergeId RecallMerger::Begin(uint16_t partitions, uint32_t k, const Order& order) {
  CHECK(partitions > 0 && partitions <= max_partitions_, "partitions out of range");
  CHECK(k > 0 && k <= kMaxRecallResults, "k out of range");
  if (free_merges_.empty()) return kNone;
  const MergeId id = free_merges_.back();
  free_merges_.pop_back();
  merges_[id] = Merge();
  merges_[id].in_use = true;
  merges_[id].partitions = partitions;
  merges_[id].waiting = partitions;
  merges_[id].k = k;
  merges_[id].order = order;
  merges_[id].window = HitWindow(max_payload_bytes_);
  return id;
}

void RecallMerger::Add(MergeId id, std::span<const std::byte> batch) {
  Merge& merge = merges_[id];
  CHECK(merge.in_use && merge.waiting > 0, "a batch comes before its partition is done");
  ResultBatch head;
  CHECK(batch.size() >= sizeof(head), "a batch begins with its header");
  std::memcpy(&head, batch.data(), sizeof(head));
  CHECK(head.body_bytes <= batch.size() - sizeof(head), "a batch lies within its slot");
  if (merge.metric == Metric::kUnspecified) merge.metric = head.metric;
  if (merge.reason != RefusalReason::kNone) return;
  if (head.body_bytes > 0) {
    std::byte* room = TakeRoom(&merge, head.body_bytes);
    if (room == nullptr) {
      NoteReason(&merge, RefusalReason::kMergesFull);
      return;
    }
    std::memcpy(room, batch.data() + sizeof(head), head.body_bytes);
    merge.hits += head.count;
    CHECK(merge.hits <= merge.partitions * kMaxRecallResults, "a partition answers with k hits");
  }
  if (head.end == BatchEnd::kFirst) {
    ++merge.ended_first;
    NoteFirst(id);
  }
}

// Partitions that know nothing of the space have nothing to come first.
void RecallMerger::NoteFirst(MergeId id) {
  Merge& merge = merges_[id];
  if (merge.order.first == 0 || merge.has_first || merge.reason != RefusalReason::kNone) return;
  if (merge.ended_first == 0 || merge.ended_first + merge.unknown < merge.partitions) return;
  merge.has_first = true;
  MakeOrder(id, std::min(merge.order.first, merge.k));
}

bool RecallMerger::FinishPartition(MergeId id, RefusalReason reason) {
  Merge& merge = merges_[id];
  CHECK(merge.in_use && merge.waiting > 0, "a partition is done once");
  if (reason == RefusalReason::kUnknownSpace) {
    ++merge.unknown;
    NoteFirst(id);
  } else {
    NoteReason(&merge, reason);
  }
  --merge.waiting;
  if (merge.waiting > 0) return false;
  if (merge.unknown == merge.partitions) merge.reason = RefusalReason::kUnknownSpace;
  if (merge.reason == RefusalReason::kNone) MakeOrder(id, merge.k);
  return true;
}

size_t RecallMerger::Emit(MergeId id, std::span<std::byte> out, uint32_t max_hits) {
  Merge& merge = merges_[id];
  CHECK(merge.in_use && can_emit(id), "what is handed out is in its order");
  if (merge.emitted_last || merge.reason != RefusalReason::kNone) return 0;
  if (!is_whole(id) && merge.emitted == merge.kept) return 0;
  ReadAhead(id);
  if (!IsWorthABatch(merge, out.size() - sizeof(ResultBatch), max_hits)) return 0;
  ResultBatch batch;
  batch.metric = merge.metric;
  size_t bytes = sizeof(batch);
  while (merge.window.size() > 0 && batch.count < max_hits) {
    const size_t hit_bytes = merge.window.BytesAt(0, records_);
    if (hit_bytes == 0 || bytes + hit_bytes > out.size()) break;
    merge.window.WriteFirst(&out[bytes], records_);
    bytes += hit_bytes;
    ++merge.emitted;
    ++batch.count;
    ReadAhead(id);
  }
  CHECK(batch.count > 0 || merge.emitted == merge.kept, "a batch has room for any one hit");
  batch.body_bytes = static_cast<uint32_t>(bytes - sizeof(batch));
  merge.emitted_last = is_whole(id) && merge.emitted == merge.kept;
  if (merge.emitted_last) batch.end = BatchEnd::kLast;
  std::memcpy(out.data(), &batch, sizeof(batch));
  return bytes;
}

// As far as there is room.
void RecallMerger::ReadAhead(MergeId id) {
  Merge& merge = merges_[id];
  while (!merge.window.full()) {
    const uint32_t next = merge.emitted + merge.window.size();
    if (next == merge.kept || !merge.window.Add(OrderOf(id)[next], records_)) return;
  }
}

// So many hits that are there follow each other, or all that are left, or as many as fit.
bool RecallMerger::IsWorthABatch(const Merge& merge, size_t room, uint32_t max_hits) const {
  const uint32_t wanted = std::min({kLeastBatchHits, max_hits, merge.kept - merge.emitted});
  for (uint32_t place = 0; place < wanted; ++place) {
    if (place == merge.window.size()) return false;
    const size_t bytes = merge.window.BytesAt(place, records_);
    if (bytes == 0) return false;
    if (bytes > room) return true;
    room -= bytes;
  }
  return true;
}

void RecallMerger::Release(MergeId id) {
  Merge& merge = merges_[id];
  CHECK(merge.in_use && merge.waiting == 0, "a merge ends when every partition is done");
  merge.window.Clear(records_);
  for (uint32_t block = merge.first_block; block != kNoBlock; block = blocks_[block].next) {
    free_blocks_.push_back(block);
  }
  merge.in_use = false;
  free_merges_.push_back(id);
}

// Room behind what the merge has, in its last block or a new one. nullptr when there is none.
std::byte* RecallMerger::TakeRoom(Merge* merge, size_t bytes) {
  CHECK(bytes <= kBlockBytes, "a batch fits a block");
  if (merge->last_block == kNoBlock ||
      blocks_[merge->last_block].used_bytes + bytes > kBlockBytes) {
    uint32_t block = kNoBlock;
    if (!free_blocks_.empty()) {
      block = free_blocks_.back();
      free_blocks_.pop_back();
    } else if (blocks_used_ < max_blocks_) {
      block = blocks_used_++;
    } else {
      return nullptr;
    }
    blocks_[block] = Block();
    (merge->last_block == kNoBlock ? merge->first_block : blocks_[merge->last_block].next) = block;
    merge->last_block = block;
  }
  Block& block = blocks_[merge->last_block];
  std::byte* room = BlockAt(merge->last_block) + block.used_bytes;
  block.used_bytes += static_cast<uint32_t>(bytes);
  return room;
}

// Behind what is in order already, so that there are `most` at most.
void RecallMerger::MakeOrder(MergeId id, uint32_t most) {
  Merge& merge = merges_[id];
  const std::span<Found> found = Gather(id);
  const size_t alive = Supersede(found);
  const auto added = static_cast<uint32_t>(std::min<size_t>(most - merge.kept, alive));
  const auto before = [](const Found& a, const Found& b) {
    if (a.when_ns != b.when_ns) return a.when_ns > b.when_ns;
    if (a.distance != b.distance) return a.distance < b.distance;
    if (a.stamp != b.stamp) return a.stamp < b.stamp;
    return NameOf(a.hit).text < NameOf(b.hit).text;
  };
  std::partial_sort(found.begin(), found.begin() + added,
                    found.begin() + static_cast<ptrdiff_t>(alive), before);
  for (uint32_t i = 0; i < added; ++i) OrderOf(id)[merge.kept + i] = found[i].hit;
  merge.kept += added;
}

std::span<RecallMerger::Found> RecallMerger::Gather(MergeId id) {
  const Merge& merge = merges_[id];
  in_order_.assign(OrderOf(id), OrderOf(id) + merge.kept);
  std::ranges::sort(in_order_);
  uint32_t count = 0;
  for (uint32_t block = merge.first_block; block != kNoBlock; block = blocks_[block].next) {
    const std::byte* hit = BlockAt(block);
    const std::byte* end = hit + blocks_[block].used_bytes;
    while (hit < end) {
      const HitHeader header = HeaderOf(hit);
      CHECK(header.hit_bytes >= sizeof(header) && count < merge.hits, "a batch is whole hits");
      found_[count++] = {.distance = merge.metric == Metric::kL2 ? header.score : -header.score,
                         .superseded = false,
                         .is_in_order = std::ranges::binary_search(in_order_, hit),
                         .when_ns = merge.order.latest_first ? header.when_ns : 0,
                         .stamp = header.stamp,
                         .hit = hit};
      hit += header.hit_bytes;
    }
  }
  CHECK(count == merge.hits, "a batch says how many hits it has");
  return {found_.get(), count};
}

// Of the hits with one id only the one of the latest stamp stays, and none where one is in order
// already, nor that one itself. Returns how many stay; they are moved to the front.
size_t RecallMerger::Supersede(std::span<Found> found) {
  const size_t places = TablePlaces(found.size());
  std::fill_n(by_id_.get(), places, 0U);
  for (uint32_t i = 0; i < found.size(); ++i) {
    const HitName name = NameOf(found[i].hit);
    size_t place = HashString(name.text, 0) & (places - 1);
    while (by_id_[place] != 0 && NameOf(found[by_id_[place] - 1].hit) != name) {
      place = (place + 1) & (places - 1);
    }
    if (by_id_[place] != 0) {
      Found& other = found[by_id_[place] - 1];
      const bool is_later = found[i].stamp > other.stamp;
      if (other.is_in_order || (!found[i].is_in_order && !is_later)) {
        found[i].superseded = true;
        continue;
      }
      other.superseded = true;
    }
    by_id_[place] = i + 1;
  }
  const auto end =
      std::ranges::partition(found, [](const Found& f) { return !f.superseded && !f.is_in_order; });
  return found.size() - end.size();
}

void RecallMerger::NoteReason(Merge* merge, RefusalReason reason) {
  if (reason == RefusalReason::kNone) return;
  const auto rank = [](RefusalReason r) {
    return std::pair(-SeverityOf(r), static_cast<uint16_t>(r));
  };
  if (merge->reason == RefusalReason::kNone || rank(reason) < rank(merge->reason)) {
    merge->reason = reason;
  }
}

}  // namespace engram
