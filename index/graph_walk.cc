#include "index/graph_walk.h"

#include <bit>
#include <cmath>
#include <cstring>

namespace engram {
namespace {

constexpr size_t kMinMarks = 4096;
// About as many cache lines as a core may have asked for at once.
constexpr size_t kLinesAhead = 32;
constexpr size_t kMinRowsAhead = 4;
// Of a row; the rest follows by the processor's own prefetcher once the distance runs.
constexpr size_t kMostBytesAhead = 8 * kCacheLineBytes;

}  // namespace

bool WalkScratch::Reserve(size_t nodes) {
  if (!beam_.Reserve(nodes)) return false;
  if (memory_ == nullptr) {
    memory_ = reinterpret_cast<Memory*>(heap_->Allocate(sizeof(Memory)));
    if (memory_ == nullptr) return false;
    list_.Attach(memory_->list.data());
    slots_ = 0;
  }
  if (marks_.words != nullptr && nodes <= capacity()) return true;
  const size_t grown_capacity = std::bit_ceil(std::max(nodes, kMinMarks));
  auto* const grown = heap_->AllocateArray<uint32_t>(grown_capacity / 32 + 1);
  if (grown == nullptr) return false;
  std::memset(grown, 0, grown_capacity / 8);
  grown[grown_capacity / 32] = UINT32_MAX;
  // A walk under way keeps its marks.
  if (marks_.words != nullptr) {
    std::memcpy(grown, marks_.words, marks_.count * sizeof(uint32_t));
    heap_->FreeArray(marks_.words, marks_.count + 1);
  }
  marks_ = {grown, grown_capacity / 32};
  return true;
}

void WalkScratch::Release() {
  if (marks_.words != nullptr) heap_->FreeArray(marks_.words, marks_.count + 1);
  if (memory_ != nullptr) heap_->Free(reinterpret_cast<std::byte*>(memory_), sizeof(Memory));
  marks_ = {};
  memory_ = nullptr;
  slots_ = 0;
  beam_.Release();
}

void WalkScratch::ForgetVisited() {
  // A line of marks is cleared in the time of one mark.
  constexpr size_t kNodesPerLine = kCacheLineBytes * 8;
  if (capacity() / kNodesPerLine < slots_) {
    std::memset(marks_.words, 0, marks_.count * sizeof(uint32_t));
  } else {
    for (uint32_t slot = 0; slot < slots_; ++slot) {
      const NodeId node = memory_->nodes[slot];
      if (node < capacity()) marks_.words[node / 32] = 0;
    }
  }
  slots_ = 0;
}

void GraphWalkSteps::Begin(const SearchTarget& target, uint32_t k, uint32_t ef,
                           WalkScratch* scratch) {
  target_ = target;
  k_ = k;
  ef_ = std::max({ef, k, 1U});
  CHECK(ef_ <= scratch->max_ef(), "ef is beyond the scratch");
  CHECK(scratch->memory_ != nullptr, "WalkScratch::Reserve was called");
  scratch_ = scratch;
  scratch_->ForgetVisited();
  scratch_->list_.Begin(1);
  const size_t lines = (target.vectors->row_bytes() + kCacheLineBytes - 1) / kCacheLineBytes;
  rows_ahead_ = std::max(kLinesAhead / lines, kMinRowsAhead);
  state_ = State::kComplete;
  const NodeId entry = target.graph->entry_point();
  if (entry == kNoNode) return;
  // Also where it was added since the room was made: the others are found through it.
  scratch_->marks_.Visit(entry);
  scratch_->memory_->nodes[0] = entry;
  scratch_->slots_ = 1;
  current_ = kNoNode;
  level_ = target.graph->Level(entry);
  descending_ = true;
  nearest_ = UINT64_MAX;
  first_slot_ = 0;
  asked_ = 0;
  AskForRows(rows_ahead_);
  state_ = State::kRows;
}

void GraphWalkSteps::Gather() {
  const NodeId* links = target_.graph->Links(current_, level_);
  const uint32_t places = target_.graph->MaxDegree(level_);
  // Copies, as the compiler takes each store for one that may change the original.
  const WalkScratch::Marks marks = scratch_->marks_;
  NodeId* const nodes = scratch_->memory_->nodes.data();
  uint32_t slots = scratch_->slots_;
  first_slot_ = slots;
  asked_ = 0;
  for (uint32_t place = 0; place < places; ++place) {
    const NodeId linked = HnswGraph::LoadLink(links + place);
    if (linked == kNoNode) break;
    nodes[slots] = linked;
    slots += static_cast<uint32_t>(marks.Visit(linked));
  }
  scratch_->slots_ = slots;
  state_ = State::kRows;
}

void GraphWalkSteps::AskForRows(size_t count) {
  const NodeId* const nodes = scratch_->memory_->nodes.data() + first_slot_;
  const size_t end = std::min<size_t>(asked_ + count, scratch_->slots_ - first_slot_);
  const VectorStore& vectors = *target_.vectors;
  const size_t row_bytes = std::min(vectors.row_bytes(), kMostBytesAhead);
  for (size_t i = asked_; i < end; ++i) {
    rows_[i] = vectors.Row(nodes[i]);
    AskForLines(rows_[i], row_bytes);
  }
  asked_ = std::max(asked_, end);
}

void GraphWalkSteps::Evaluate() {
  const size_t count = scratch_->slots_ - first_slot_;
  float* const distances = scratch_->memory_->distances.data() + first_slot_;
  const size_t at_once = target_.distances != nullptr ? kRowsAtOnce : 1;
  for (size_t i = 0; i < count; i += at_once) {
    const size_t some = std::min(at_once, count - i);
    const size_t wanted = i + some + rows_ahead_;
    if (asked_ < wanted) AskForRows(wanted - asked_);
    if (target_.distances != nullptr) {
      target_.distances(target_.query, rows_.data() + i, some, target_.padded_dimension,
                        distances + i);
    } else {
      distances[i] = target_.distance(target_.query, rows_[i], target_.padded_dimension);
    }
  }
  scratch_->AddDistances(count);
}

bool GraphWalkSteps::Descend() {
  const NeighbourKey before = nearest_;
  for (uint32_t slot = first_slot_; slot < scratch_->slots_; ++slot) {
    nearest_ = std::min(nearest_, FullKeyOf(slot));
  }
  if (nearest_ == before) --level_;
  // A descent without end has room for nothing else: step 3 takes over from where it is.
  if (!HasRoomForAnExpansion()) level_ = 0;
  if (level_ == 0) {
    const float distance = DistanceOf(nearest_);
    reference_ = std::isfinite(distance) ? distance : 0;
    return false;
  }
  current_ = NodeOf(nearest_);
  AskForLinks(current_);
  state_ = State::kLinks;
  return true;
}

std::span<const NeighbourKey> GraphWalkSteps::SortedResultsOfList() {
  NeighbourKey* const found = scratch_->memory_->found.data();
  size_t count = 0;
  for (const WalkKey key : scratch_->list_.keys()) {
    if (key == kNoKey) break;
    if (scratch_->list_.IsRetired(key) || NodeAt(SlotOf(key)) == kNoNode) continue;
    // Nearly in order: a key's distance is short of some bits.
    const NeighbourKey full = FullKeyOf(SlotOf(key));
    size_t place = count++;
    for (; place != 0 && found[place - 1] > full; --place) found[place] = found[place - 1];
    found[place] = full;
  }
  return {found, count};
}

}  // namespace engram
