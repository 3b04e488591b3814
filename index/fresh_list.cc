#include "index/fresh_list.h"

#include <algorithm>
#include <bit>
#include <utility>

#include "src/core/check.h"

namespace engram {

namespace {

constexpr size_t kLeastCapacity = 64;
// A list of that many places belongs to a space with a graph, which takes from the front.
constexpr size_t kMostSpare = 16'384;
// Places that are copied with each Append from when a long run is half full.
constexpr size_t kCopiedAtOnce = 4;

}  // namespace

FreshList::~FreshList() {
  while (oldest_retired_ != nullptr) {
    FreeRun(std::exchange(oldest_retired_, oldest_retired_->next_retired));
  }
  if (Run* run = run_.load(std::memory_order_relaxed); run != nullptr) FreeRun(run);
  if (spare_ != nullptr) FreeRun(spare_);
  DropSuccessor();
}

FreshList::Run* FreshList::AllocateRun(size_t capacity) {
  std::byte* block = heap_->Allocate(RunBytes(capacity));
  if (block == nullptr) return nullptr;
  bytes_ += ArenaHeap::BlockBytes(RunBytes(capacity));
  return new (block)
      Run{.capacity = capacity, .head = 0, .tail = 0, .next_retired = nullptr, .retired_in = 0};
}

// For twice what it begins with, so that each node is copied about once; where memory is short the
// spare one has to do.
FreshList::Run* FreshList::NewRun(size_t nodes) {
  Run* run = AllocateRun(std::bit_ceil(std::max(kLeastCapacity, nodes * 2)));
  if (run != nullptr || spare_ == nullptr || spare_->capacity <= nodes) return run;
  run = std::exchange(spare_, nullptr);
  run->head.store(0, std::memory_order_relaxed);
  run->tail.store(0, std::memory_order_relaxed);
  run->next_retired = nullptr;
  return run;
}

// So that what has ended can leave the list also when the memory is full, which may be why it
// ended.
void FreshList::MakeSpare(size_t capacity) {
  if (capacity > kMostSpare || (spare_ != nullptr && spare_->capacity >= capacity)) return;
  Run* spare = AllocateRun(capacity);
  if (spare == nullptr) return;
  if (spare_ != nullptr) FreeRun(spare_);
  spare_ = spare;
}

void FreshList::FreeRun(Run* run) {
  bytes_ -= ArenaHeap::BlockBytes(RunBytes(run->capacity));
  heap_->Free(reinterpret_cast<std::byte*>(run), RunBytes(run->capacity));
}

void FreshList::Retire(Run* run) {
  run->retired_in = epochs_->Close();
  (newest_retired_ == nullptr ? oldest_retired_ : newest_retired_->next_retired) = run;
  newest_retired_ = run;
  Reclaim();
}

void FreshList::Reclaim() {
  while (oldest_retired_ != nullptr && epochs_->Passed(oldest_retired_->retired_in)) {
    Run* run = std::exchange(oldest_retired_, oldest_retired_->next_retired);
    if (spare_ == nullptr && run->capacity <= kMostSpare) {
      spare_ = run;
    } else {
      FreeRun(run);
    }
  }
  if (oldest_retired_ == nullptr) newest_retired_ = nullptr;
}

void FreshList::Append(NodeId node) {
  Run* run = run_.load(std::memory_order_relaxed);
  const size_t tail = run == nullptr ? 0 : run->tail.load(std::memory_order_relaxed);
  CHECK(run != nullptr && tail < run->capacity, "Reserve comes before Append");
  run->places()[tail] = node;
  run->tail.store(tail + 1, std::memory_order_release);
  if (successor_ != nullptr) {
    CopySome(kCopiedAtOnce);
  } else if (run->capacity > kMostSpare && tail == run->capacity / 2) {
    BeginSuccessor();
  }
}

// Without memory for it all is copied at once when the run is full.
void FreshList::BeginSuccessor() {
  const Run* run = run_.load(std::memory_order_relaxed);
  copied_from_ = run->head.load(std::memory_order_relaxed);
  copied_ = 0;
  successor_ = AllocateRun(std::bit_ceil(2 * (run->capacity - copied_from_)));
}

// Also what has left the list meanwhile, so that places stay what they are.
void FreshList::CopySome(size_t most) {
  const Run* run = run_.load(std::memory_order_relaxed);
  const size_t left = run->tail.load(std::memory_order_relaxed) - copied_from_ - copied_;
  const size_t count = std::min(left, most);
  std::copy_n(run->places() + copied_from_ + copied_, count, successor_->places() + copied_);
  copied_ += count;
}

// False where there is none.
bool FreshList::TakeSuccessor() {
  if (successor_ == nullptr) return false;
  Run* old = run_.load(std::memory_order_relaxed);
  CopySome(old->capacity);
  successor_->head.store(old->head.load(std::memory_order_relaxed) - copied_from_,
                         std::memory_order_relaxed);
  successor_->tail.store(copied_, std::memory_order_relaxed);
  run_.store(std::exchange(successor_, nullptr), std::memory_order_release);
  Retire(old);
  return true;
}

void FreshList::DropSuccessor() {
  if (successor_ != nullptr) FreeRun(std::exchange(successor_, nullptr));
}

NodeId FreshList::first() const {
  const Snapshot all = TakeSnapshot();
  return all.size() == 0 ? kNoNode : all[0];
}

void FreshList::PopFirst() {
  CHECK(size() > 0, "the list has a first node");
  Run* run = run_.load(std::memory_order_relaxed);
  run->head.store(run->head.load(std::memory_order_relaxed) + 1, std::memory_order_release);
}

// At no moment is it in neither place.
void FreshList::MoveFirstToEnd() {
  Append(first());
  PopFirst();
}

}  // namespace engram
