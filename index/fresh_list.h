#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <new>

#include "src/core/arena_heap.h"
#include "src/core/ids.h"
#include "src/core/reader_epochs.h"

namespace engram {

// The nodes of a space that the graph does not know yet, in the order in which they came: appended
// at the end, taken from the front, scanned by readers of other cores meanwhile.
//
// Nodes lie in a run of places that is written once from front to back. A short run is one piece.
// Where it is full, what is left is copied to a new run; the old one stays as it is until no reader
// can be in it. A spare run is kept for a memory that is full. A long run is a table of chunks: one
// comes at its end when it is full, and the first goes when all of it has been taken, so that
// nothing is copied but, rarely, the table, and so that no more is kept than is in the list.
//
// Thread safety: writing is the owner core's alone. A reader that is inside the epochs takes a
// Snapshot and scans it; its places never change.
// Invariants: a snapshot has every node that was in the list when it was taken, once.
class FreshList {
 private:
  // What a reader may be in: a run, or a chunk of a long one, which is this and places behind it.
  struct Block {
    Block* next_retired;
    ReaderEpochs::Epoch retired_in;
    uint32_t bytes;
    uint32_t most_chunks;  // of a run; 1: a short one, 0: no run but a chunk
  };
  struct Run : Block {
    uint32_t capacity;         // places; of a long run those up to the end of its last chunk
    uint32_t chunk_log2;       // places of a chunk; of a short run all
    std::atomic<size_t> head;  // first place that is in the list
    std::atomic<size_t> tail;  // one beyond the last

    bool is_long() const { return most_chunks > 1; }
    NodeId** chunks() { return reinterpret_cast<NodeId**>(this + 1); }
    NodeId* const* chunks() const { return reinterpret_cast<NodeId* const*>(this + 1); }
    NodeId* At(size_t place) {
      return chunks()[place >> chunk_log2] + (place & ((size_t{1} << chunk_log2) - 1));
    }
  };

 public:
  // `heap` and `epochs` outlive the list. Takes memory from the first Reserve on.
  FreshList(ArenaHeap* heap, ReaderEpochs* epochs) : heap_(heap), epochs_(epochs) {}
  FreshList(const FreshList&) = delete;
  FreshList& operator=(const FreshList&) = delete;
  ~FreshList();

  // ---- For readers ----

  class Snapshot {
   public:
    size_t size() const { return size_; }
    NodeId operator[](size_t place) const {
      const size_t at = first_ + place;
      return chunks_[at >> chunk_log2_][at & ((size_t{1} << chunk_log2_) - 1)];
    }
    // Without the first `count`, or as many as there are.
    Snapshot After(size_t count) const {
      Snapshot rest = *this;
      const size_t passed = count < size_ ? count : size_;
      rest.first_ += passed;
      rest.size_ -= passed;
      return rest;
    }

   private:
    friend class FreshList;
    NodeId* const* chunks_ = nullptr;
    size_t first_ = 0;
    size_t size_ = 0;
    uint32_t chunk_log2_ = 0;
  };
  Snapshot TakeSnapshot() const {
    Snapshot snapshot;
    const Run* run = run_.load(std::memory_order_acquire);
    if (run == nullptr) return snapshot;
    size_t head = run->head.load(std::memory_order_acquire);
    size_t tail = 0;
    // Head and tail of one moment, or a node on its way from the front to the end may be missed.
    for (;;) {
      tail = run->tail.load(std::memory_order_acquire);
      const size_t now = run->head.load(std::memory_order_acquire);
      if (now == head) break;
      head = now;
    }
    snapshot.chunks_ = run->chunks();
    snapshot.chunk_log2_ = run->chunk_log2;
    snapshot.first_ = head;
    snapshot.size_ = tail - head;
    // A node that is on its way just now is at both places.
    if (tail - head > 1 && snapshot[tail - head - 1] == snapshot[0]) --snapshot.size_;
    return snapshot;
  }

  // ---- For the owner core ----

  // Makes sure that the next Append finds room; where there is none, by Renew, or by another chunk
  // of a long run. False when the heap
  // is spent; nothing has changed then.
  template <typename Keep, typename Drop>
  bool Reserve(Keep&& keep, Drop&& drop) {
    const Run* run = run_.load(std::memory_order_relaxed);
    if (run != nullptr && run->tail.load(std::memory_order_relaxed) < run->capacity) return true;
    if (run != nullptr && run->is_long()) return Lengthen();
    return Renew(keep, drop);
  }
  // Begins a new run. Nodes for which `keep(node)` is false are left out of it, and `drop(node)` is
  // told. False when the heap is spent; nothing has changed then.
  template <typename Keep, typename Drop>
  bool Renew(Keep&& keep, Drop&& drop) {
    return Renew(keep, drop, [](NodeId) { return true; });
  }
  // The same; those for which `leads(node)` is true come before the others. Each node is asked in
  // their order, then each once more.
  template <typename Keep, typename Drop, typename Leads>
  bool Renew(Keep&& keep, Drop&& drop, Leads&& leads) {
    Run* old = run_.load(std::memory_order_relaxed);
    const Snapshot left = TakeSnapshot();
    size_t kept = 0;
    for (size_t i = 0; i < left.size(); ++i) kept += static_cast<size_t>(keep(left[i]));
    Run* run = NewRun(kept);
    if (run == nullptr) return false;
    size_t filled = 0;
    for (const bool in_front : {true, false}) {
      for (size_t i = 0; i < left.size(); ++i) {
        if (leads(left[i]) == in_front && keep(left[i])) *run->At(filled++) = left[i];
      }
    }
    for (size_t i = 0; i < left.size(); ++i) {
      if (!keep(left[i])) drop(left[i]);
    }
    run->tail.store(filled, std::memory_order_relaxed);
    run_.store(run, std::memory_order_release);
    if (old != nullptr) RetireWhole(old);
    MakeSpare(run);
    return true;
  }
  // There is room (Reserve).
  void Append(NodeId node);
  // kNoNode when the list is empty.
  NodeId first() const;
  // Takes the first one out.
  void PopFirst();
  // The first one becomes the last. There is room (Reserve).
  void MoveFirstToEnd();
  size_t size() const { return TakeSnapshot().size(); }
  // What it takes of the heap.
  size_t bytes() const { return bytes_; }
  // Gives back what no reader can be in.
  void Reclaim();

 private:
  static size_t ShortRunBytes(size_t capacity);
  template <typename T>
  T* AllocateBlock(size_t bytes, size_t most_chunks);
  Run* AllocateRun(size_t bytes, size_t most_chunks, size_t chunk_log2);
  Run* AllocateShortRun(size_t capacity);
  Run* AllocateLongRun(size_t nodes);
  Run* NewRun(size_t nodes);
  void MakeSpare(const Run* run);
  bool AddChunk(Run* run);
  bool Lengthen();
  void Retire(Block* block);
  void RetireWhole(Run* run);
  void Free(Block* block);
  void FreeWhole(Run* run);

  // Constant after construction.
  ArenaHeap* heap_;
  ReaderEpochs* epochs_;
  // Published to other cores.
  std::atomic<Run*> run_{nullptr};
  // Owner core only.
  size_t bytes_ = 0;
  Block* oldest_retired_ = nullptr;
  Block* newest_retired_ = nullptr;
  Run* spare_ = nullptr;  // as large as the list's own if that is short, and memory allowed
};

}  // namespace engram
