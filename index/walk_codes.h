#pragma once

#include <cmath>
#include <cstddef>

#include "index/hnsw_search.h"
#include "index/rabitq_format.h"
#include "index/sign_blocks.h"
#include "index/vector_store.h"
#include "src/core/arena_heap.h"
#include "src/core/check.h"

namespace engram {

// The RaBitQ codes that a graph is walked with, of one learning of centroid and rotation.
//
// Thread safety: as VectorStore. The format is constant.
class WalkCodes {
 public:
  // A vector is far where its squared residual is more than so many times the mean that was
  // learned. Vectors that were learned from are at a few tenths of it.
  static constexpr double kFar = 3;

  // Takes `format`, which is of RabitqFormat::Create with this heap. `mean_squared_residual`: of
  // what it was learned from; 0: not known, so nothing is far.
  WalkCodes(ArenaHeap* heap, RabitqFormat* format, double mean_squared_residual = 0)
      : heap_(heap),
        format_(format),
        far_(mean_squared_residual > 0 ? static_cast<float>(kFar * mean_squared_residual)
                                       : HUGE_VALF),
        signs_(*format),
        rows_(heap, format->row_bytes()) {}
  WalkCodes(const WalkCodes&) = delete;
  WalkCodes& operator=(const WalkCodes&) = delete;
  ~WalkCodes() { RabitqFormat::Destroy(format_, heap_); }

  const RabitqFormat& format() const { return *format_; }
  // For comparing rows with each other.
  const SignBlocks& signs() const { return signs_; }
  // So far from the centroid that codes do not tell what is about it apart. `v`: as
  // RabitqFormat::Encode takes it.
  bool IsFar(const float* v) const { return format_->SquaredResidual(v) > far_; }
  // By node.
  VectorStore& rows() { return rows_; }
  const VectorStore& rows() const { return rows_; }
  // What they take of the heap, this object of it included.
  size_t bytes() const {
    return ArenaHeap::BlockBytes(sizeof(WalkCodes)) + format_->heap_bytes() + rows_.bytes();
  }
  // `query`: as RabitqFormat::EncodeQuery writes it.
  SearchTarget TargetFor(const HnswGraph* graph, const std::byte* query) const {
    return {graph, &rows_, format_->distance(), format_->bits(), query, format_->distances()};
  }

 private:
  ArenaHeap* heap_;
  RabitqFormat* format_;
  float far_;
  SignBlocks signs_;
  VectorStore rows_;
};

}  // namespace engram
