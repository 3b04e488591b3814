#pragma once

#include <cstddef>

#include "index/chunked_array.h"
#include "src/core/ids.h"

namespace engram {

// The vectors of one space, as rows of equal size addressed by NodeId. What the bytes of a row mean
// is the VectorFormat's matter. Where their size is a multiple
// of 64 rows start at a cache line, else at a quarter of a line.
//
// Thread safety: Reserve, Release and the writable Row are the owner core's alone. Other cores may
// read the row of a node that was published to them after the row was written.
// Invariants: rows never move; a row was all zero bytes when it was made.
class VectorStore {
 public:
  // `heap` must outlive the store. `row_bytes` is a multiple of kRowAlignment.
  VectorStore(ArenaHeap* heap, size_t row_bytes);

  // Makes the rows of nodes 0 to `nodes` - 1 exist, new ones all zero. False when the heap is
  // spent.
  bool Reserve(size_t nodes) { return rows_.Reserve(nodes); }
  // Gives all rows back to the heap.
  void Release() { rows_.Release(); }

  std::byte* Row(NodeId node) { return rows_.Row(node); }
  const std::byte* Row(NodeId node) const { return rows_.Row(node); }

  size_t row_bytes() const { return rows_.stride(); }
  // Rows that exist.
  size_t capacity() const { return rows_.capacity(); }
  // What they take of the heap.
  size_t bytes() const { return rows_.bytes(); }

 private:
  ChunkedArray<std::byte, kRunTimeStride> rows_;
};

}  // namespace engram
