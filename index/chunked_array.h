#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstring>
#include <type_traits>

#include "src/core/arena_heap.h"
#include "src/core/check.h"

namespace engram {

// The stride of a ChunkedArray that is given at run time.
inline constexpr size_t kRunTimeStride = 0;

// An array of items that grows without moving any. An item is `stride` elements of T side by side;
// the stride is a template argument, 1 unless said, or kRunTimeStride and given to the constructor.
//
// Items lie in chunks. With F items in the first chunk and S in a full one, both powers of two, the
// chunks hold F, F, 2F, 4F, ... S/2, S, S, ... items: a small array stays small, a large one has
// few chunks, and an item's chunk follows from the top bit of its index.
//
// Thread safety: Reserve and Release are the owner core's alone. Other cores may read an item whose
// index they learned through an acquire load that follows the Reserve that made it; they must be
// gone before Release.
// Invariants: an item never moves between Reserve and Release; it was all zero bytes when its chunk
// was made; a directory that was replaced stays readable until Release.
template <typename T, size_t kStride = 1>
class ChunkedArray {
  static_assert(std::is_trivially_copyable_v<T>, "items are made by zeroing memory");

 public:
  // About this much in the first chunk and in a full one. Full chunks are zeroed in one go by
  // Reserve, so they are kept short enough for a slice of a shard's time.
  static constexpr size_t kFirstChunkBytes = 256;
  static constexpr size_t kFullChunkBytes = size_t{512} << 10;

  // `heap` must outlive the array.
  explicit ChunkedArray(ArenaHeap* heap)
    requires(kStride != kRunTimeStride)
      : ChunkedArray(heap, kStride, 0) {}
  // `stride` in elements of T, at least 1.
  ChunkedArray(ArenaHeap* heap, size_t stride)
    requires(kStride == kRunTimeStride)
      : ChunkedArray(heap, stride, 0) {}
  ChunkedArray(const ChunkedArray&) = delete;
  ChunkedArray& operator=(const ChunkedArray&) = delete;
  ~ChunkedArray() { Release(); }

  // Makes items 0 to `count` - 1 exist. False when the heap is spent: what could be made stays.
  bool Reserve(size_t count) {
    while (capacity_ < count) {
      if (!AddChunk()) return false;
    }
    return true;
  }

  // Gives every block back to the heap; the array is empty then and may grow again.
  void Release() {
    T** chunks = chunks_.load(std::memory_order_relaxed);
    for (size_t chunk = 0; chunk < chunk_count_; ++chunk) {
      heap_->FreeArray(chunks[chunk], ChunkItems(chunk) * stride());
    }
    while (newest_ != nullptr) {
      Directory* older = newest_->older;
      heap_->Free(reinterpret_cast<std::byte*>(newest_), DirectoryBytes(newest_->capacity));
      newest_ = older;
    }
    chunks_.store(nullptr, std::memory_order_relaxed);
    chunk_count_ = 0;
    capacity_ = 0;
    bytes_ = 0;
  }

  // The first element of item `index`, which must be below capacity() on the owner core.
  T* Row(size_t index) { return Locate(index); }
  const T* Row(size_t index) const { return Locate(index); }

  T& operator[](size_t index)
    requires(kStride == 1)
  {
    return *Locate(index);
  }
  const T& operator[](size_t index) const
    requires(kStride == 1)
  {
    return *Locate(index);
  }

  // Items that exist; owner core only.
  size_t capacity() const { return capacity_; }
  // What it takes of the heap; owner core only.
  size_t bytes() const { return bytes_; }
  size_t stride() const {
    if constexpr (kStride != kRunTimeStride) return kStride;
    return stride_;
  }

 private:
  // A table of chunks; `capacity` pointers follow the header.
  struct Directory {
    Directory* older;
    size_t capacity;
    T** chunks() { return reinterpret_cast<T**>(this + 1); }
  };

  ChunkedArray(ArenaHeap* heap, size_t stride, int) : heap_(heap), stride_(stride) {
    CHECK(stride >= 1, "the stride is at least 1");
    const size_t item_bytes = stride * sizeof(T);
    const auto log2_of_items = [item_bytes](size_t chunk_bytes) {
      return std::bit_width(std::max<size_t>(chunk_bytes / item_bytes, 1)) - 1;
    };
    first_log2_ = static_cast<unsigned>(log2_of_items(kFirstChunkBytes));
    full_log2_ = static_cast<unsigned>(log2_of_items(kFullChunkBytes));
  }

  static constexpr size_t DirectoryBytes(size_t capacity) {
    return sizeof(Directory) + capacity * sizeof(T*);
  }

  // Chunk 0 holds F items, chunk c of the growing ones F << (c - 1), later ones S.
  size_t ChunkItems(size_t chunk) const {
    const size_t growth = chunk == 0 ? 0 : chunk - 1;
    return size_t{1} << std::min<size_t>(first_log2_ + growth, full_log2_);
  }

  T* Locate(size_t index) const {
    T* const* chunks = chunks_.load(std::memory_order_acquire);
    if (index >> full_log2_ != 0) [[likely]] {
      const size_t chunk = (index >> full_log2_) + (full_log2_ - first_log2_);
      return chunks[chunk] + (index & ((size_t{1} << full_log2_) - 1)) * stride();
    }
    const size_t chunk = static_cast<size_t>(std::bit_width(index >> first_log2_));
    const size_t start =
        (size_t{1} << (first_log2_ + chunk) >> 1) & ~((size_t{1} << first_log2_) - 1);
    return chunks[chunk] + (index - start) * stride();
  }

  bool AddChunk() {
    if (newest_ == nullptr || chunk_count_ == newest_->capacity) {
      if (!GrowDirectory()) return false;
    }
    const size_t items = ChunkItems(chunk_count_);
    T* chunk = heap_->AllocateArray<T>(items * stride());
    if (chunk == nullptr) return false;
    bytes_ += ArenaHeap::BlockBytes(items * stride() * sizeof(T));
    std::memset(static_cast<void*>(chunk), 0, items * stride() * sizeof(T));
    // Nobody reads this entry until they have learned of an item in it, which is after now.
    newest_->chunks()[chunk_count_] = chunk;
    ++chunk_count_;
    capacity_ += items;
    return true;
  }

  bool GrowDirectory() {
    const size_t capacity = newest_ == nullptr ? 6 : newest_->capacity * 2;
    std::byte* block = heap_->Allocate(DirectoryBytes(capacity));
    if (block == nullptr) return false;
    bytes_ += ArenaHeap::BlockBytes(DirectoryBytes(capacity));
    auto* grown = reinterpret_cast<Directory*>(block);
    grown->older = newest_;
    grown->capacity = capacity;
    if (newest_ != nullptr) {
      std::memcpy(grown->chunks(), newest_->chunks(), chunk_count_ * sizeof(T*));
    }
    newest_ = grown;
    chunks_.store(grown->chunks(), std::memory_order_release);
    return true;
  }

  // Constant after construction.
  ArenaHeap* heap_;
  size_t stride_;
  unsigned first_log2_;
  unsigned full_log2_;
  // Published to other cores.
  std::atomic<T**> chunks_{nullptr};
  // Owner core only.
  Directory* newest_ = nullptr;
  size_t chunk_count_ = 0;
  size_t capacity_ = 0;
  size_t bytes_ = 0;
};

}  // namespace engram
