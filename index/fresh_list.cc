#include "index/fresh_list.h"

#include <algorithm>
#include <bit>
#include <utility>

#include "src/core/check.h"

namespace engram {

namespace {

constexpr size_t kLeastCapacity = 64;
// Places of the longest short run, and of a chunk of a long one. A list of so many belongs to a
// space with a graph, which takes from the front.
constexpr size_t kMostShort = 16'384;
constexpr size_t kChunkLog2 = 14;
static_assert(kMostShort == size_t{1} << kChunkLog2);
// Of a table.
constexpr size_t kLeastChunks = 64;

}  // namespace

FreshList::~FreshList() {
  while (oldest_retired_ != nullptr) {
    Free(std::exchange(oldest_retired_, oldest_retired_->next_retired));
  }
  if (Run* run = run_.load(std::memory_order_relaxed); run != nullptr) FreeWhole(run);
  if (spare_ != nullptr) Free(spare_);
}

size_t FreshList::ShortRunBytes(size_t capacity) {
  return sizeof(Run) + sizeof(NodeId*) + capacity * sizeof(NodeId);
}

template <typename T>
T* FreshList::AllocateBlock(size_t bytes, size_t most_chunks) {
  std::byte* block = heap_->Allocate(bytes);
  if (block == nullptr) return nullptr;
  bytes_ += ArenaHeap::BlockBytes(bytes);
  T* made = new (block) T{};
  made->bytes = static_cast<uint32_t>(bytes);
  made->most_chunks = static_cast<uint32_t>(most_chunks);
  return made;
}

// Without chunks.
FreshList::Run* FreshList::AllocateRun(size_t bytes, size_t most_chunks, size_t chunk_log2) {
  Run* run = AllocateBlock<Run>(bytes, most_chunks);
  if (run != nullptr) run->chunk_log2 = static_cast<uint32_t>(chunk_log2);
  return run;
}

// `capacity`: a power of two.
FreshList::Run* FreshList::AllocateShortRun(size_t capacity) {
  Run* run =
      AllocateRun(ShortRunBytes(capacity), 1, static_cast<size_t>(std::countr_zero(capacity)));
  if (run == nullptr) return nullptr;
  run->chunks()[0] = reinterpret_cast<NodeId*>(run->chunks() + 1);
  run->capacity = static_cast<uint32_t>(capacity);
  return run;
}

// For one more than `nodes`, at least.
FreshList::Run* FreshList::AllocateLongRun(size_t nodes) {
  const size_t chunks = (nodes >> kChunkLog2) + 1;
  const size_t most = std::max(kLeastChunks, 2 * chunks);
  Run* run = AllocateRun(sizeof(Run) + most * sizeof(NodeId*), most, kChunkLog2);
  if (run == nullptr) return nullptr;
  for (size_t i = 0; i < chunks; ++i) {
    if (AddChunk(run)) continue;
    FreeWhole(run);
    return nullptr;
  }
  return run;
}

// For twice what it begins with, so that each node is copied about once; where memory is short the
// spare one has to do.
FreshList::Run* FreshList::NewRun(size_t nodes) {
  const size_t capacity = std::bit_ceil(std::max(kLeastCapacity, nodes * 2));
  Run* run = capacity <= kMostShort ? AllocateShortRun(capacity) : AllocateLongRun(nodes);
  if (run != nullptr || spare_ == nullptr || spare_->capacity <= nodes) return run;
  run = std::exchange(spare_, nullptr);
  run->head.store(0, std::memory_order_relaxed);
  run->tail.store(0, std::memory_order_relaxed);
  return run;
}

// So that what has ended can leave the list also when the memory is full, which may be why it
// ended.
void FreshList::MakeSpare(const Run* run) {
  if (run->is_long() || (spare_ != nullptr && spare_->capacity >= run->capacity)) return;
  Run* spare = AllocateShortRun(run->capacity);
  if (spare == nullptr) return;
  if (spare_ != nullptr) Free(spare_);
  spare_ = spare;
}

void FreshList::Free(Block* block) {
  bytes_ -= ArenaHeap::BlockBytes(block->bytes);
  heap_->Free(reinterpret_cast<std::byte*>(block), block->bytes);
}

// With the chunks that are still its own.
void FreshList::FreeWhole(Run* run) {
  const size_t head = run->head.load(std::memory_order_relaxed);
  for (size_t place = head >> kChunkLog2 << kChunkLog2; run->is_long() && place < run->capacity;
       place += size_t{1} << kChunkLog2) {
    Free(reinterpret_cast<Block*>(run->At(place)) - 1);
  }
  Free(run);
}

// Nothing new comes upon it.
void FreshList::Retire(Block* block) {
  block->next_retired = nullptr;
  block->retired_in = epochs_->Close();
  (newest_retired_ == nullptr ? oldest_retired_ : newest_retired_->next_retired) = block;
  newest_retired_ = block;
}

void FreshList::RetireWhole(Run* run) {
  const size_t head = run->head.load(std::memory_order_relaxed);
  for (size_t place = head >> kChunkLog2 << kChunkLog2; run->is_long() && place < run->capacity;
       place += size_t{1} << kChunkLog2) {
    Retire(reinterpret_cast<Block*>(run->At(place)) - 1);
  }
  Retire(run);
  Reclaim();
}

void FreshList::Reclaim() {
  while (oldest_retired_ != nullptr && epochs_->Passed(oldest_retired_->retired_in)) {
    Block* block = std::exchange(oldest_retired_, oldest_retired_->next_retired);
    if (spare_ == nullptr && block->most_chunks == 1) {
      spare_ = static_cast<Run*>(block);
    } else {
      Free(block);
    }
  }
  if (oldest_retired_ == nullptr) newest_retired_ = nullptr;
}

// False when the heap is spent.
bool FreshList::AddChunk(Run* run) {
  Block* chunk = AllocateBlock<Block>(sizeof(Block) + sizeof(NodeId) * kMostShort, 0);
  if (chunk == nullptr) return false;
  // Nobody reads this entry until they have learned of a node in it, which is after now.
  run->chunks()[run->capacity >> kChunkLog2] = reinterpret_cast<NodeId*>(chunk + 1);
  run->capacity += static_cast<uint32_t>(kMostShort);
  return true;
}

// A chunk more; where the table is full, in a new one that the chunks which are left begin. False
// when the heap is spent; nothing has changed then.
bool FreshList::Lengthen() {
  Run* old = run_.load(std::memory_order_relaxed);
  if (old->capacity >> kChunkLog2 < old->most_chunks) return AddChunk(old);
  const size_t gone = old->head.load(std::memory_order_relaxed) >> kChunkLog2;
  const size_t left = old->most_chunks - gone;
  const size_t most = std::max(kLeastChunks, 2 * left);
  Run* run = AllocateRun(sizeof(Run) + most * sizeof(NodeId*), most, kChunkLog2);
  if (run == nullptr) return false;
  std::copy_n(old->chunks() + gone, left, run->chunks());
  run->capacity = static_cast<uint32_t>(left << kChunkLog2);
  if (!AddChunk(run)) {
    Free(run);
    return false;
  }
  run->head.store(old->head.load(std::memory_order_relaxed) - (gone << kChunkLog2),
                  std::memory_order_relaxed);
  run->tail.store(old->tail.load(std::memory_order_relaxed) - (gone << kChunkLog2),
                  std::memory_order_relaxed);
  run_.store(run, std::memory_order_release);
  Retire(old);
  Reclaim();
  return true;
}

void FreshList::Append(NodeId node) {
  Run* run = run_.load(std::memory_order_relaxed);
  const size_t tail = run == nullptr ? 0 : run->tail.load(std::memory_order_relaxed);
  CHECK(run != nullptr && tail < run->capacity, "Reserve comes before Append");
  *run->At(tail) = node;
  run->tail.store(tail + 1, std::memory_order_release);
}

NodeId FreshList::first() const {
  const Snapshot all = TakeSnapshot();
  return all.size() == 0 ? kNoNode : all[0];
}

void FreshList::PopFirst() {
  CHECK(size() > 0, "the list has a first node");
  Run* run = run_.load(std::memory_order_relaxed);
  const size_t head = run->head.load(std::memory_order_relaxed) + 1;
  run->head.store(head, std::memory_order_release);
  if (!run->is_long() || head % kMostShort != 0) return;
  Retire(reinterpret_cast<Block*>(run->At(head - kMostShort)) - 1);
  Reclaim();
}

// At no moment is it in neither place.
void FreshList::MoveFirstToEnd() {
  Append(first());
  PopFirst();
}

}  // namespace engram
