#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "index/hnsw_search.h"

namespace engram {

// Puts many neighbours in order, nearest first, in slices: they are dealt to buckets by their
// distance, and then each bucket is sorted. A slice may be longer than others where very many
// distances are about equal.
//
// Thread safety: one core's alone. Takes memory at construction only.
class SlicedSort {
 public:
  // For up to `most` keys.
  explicit SlicedSort(size_t most)
      : most_(most), dealt_(std::make_unique_for_overwrite<NeighbourKey[]>(most)) {}

  // `keys` stay where they are until the end. Begins anew.
  void Begin(std::span<NeighbourKey> keys);
  // One slice, some tens of microseconds. What it took is added to *distances, as that many
  // distances. True when `keys` are in order.
  bool Step(uint64_t* distances);

 private:
  static constexpr size_t kBuckets = 256;
  // Keys that are looked at in a slice, and that are sorted.
  static constexpr size_t kPassedAtOnce = 4'096;
  static constexpr size_t kSortedAtOnce = 512;
  enum class Pass : uint8_t { kRange, kCount, kDeal, kSort, kDone };

  size_t BucketOf(NeighbourKey key) const;
  void EndPass();
  size_t SortSome();

  const size_t most_;
  std::span<NeighbourKey> keys_;
  Pass pass_ = Pass::kDone;
  size_t next_ = 0;  // key, or bucket
  float least_ = 0;
  float greatest_ = 0;
  float buckets_per_distance_ = 0;
  std::array<size_t, kBuckets> ends_{};  // of buckets, as far as they are filled
  const std::unique_ptr<NeighbourKey[]> dealt_;
};

}  // namespace engram
