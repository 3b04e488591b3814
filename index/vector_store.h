#pragma once

#include <cstddef>
#include <cstdint>

#include "index/chunked_array.h"
#include "src/core/ids.h"

namespace engram {

// The vectors of one space, as float32 rows addressed by NodeId. A row has padded_dimension()
// floats, starts at a cache line, and is zero beyond dimension(): whoever writes a row writes its
// first dimension() floats only.
//
// Thread safety: Reserve, Release and the writable Row are the owner core's alone. Other cores may
// read the row of a node that was published to them after the row was written.
// Invariants: rows never move; the padding of every row is zero.
class VectorStore {
 public:
  // `heap` must outlive the store. `dimension` is 1 to kMaxDimension.
  VectorStore(ArenaHeap* heap, uint32_t dimension);

  // Makes the rows of nodes 0 to `nodes` - 1 exist, new ones all zero. False when the heap is
  // spent.
  bool Reserve(size_t nodes) { return rows_.Reserve(nodes); }
  // Gives all rows back to the heap.
  void Release() { rows_.Release(); }

  float* Row(NodeId node) { return rows_.Row(node); }
  const float* Row(NodeId node) const { return rows_.Row(node); }

  // Rows that exist.
  size_t capacity() const { return rows_.capacity(); }
  uint32_t dimension() const { return dimension_; }
  size_t padded_dimension() const { return rows_.stride(); }

 private:
  uint32_t dimension_;
  ChunkedArray<float, kRunTimeStride> rows_;
};

}  // namespace engram
