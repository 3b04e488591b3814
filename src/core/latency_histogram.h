#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "src/core/counters.h"

namespace engram {

// Counts of durations by size: 16 steps a power of two, so a quantile is right within 6.25 %
// (the layout of HdrHistogram). One writer, any readers.
class LatencyHistogram {
 public:
  void Record(int64_t duration_ns) { buckets_[BucketOf(duration_ns)].Add(1); }
  // Adds the counts of `other`.
  void Merge(const LatencyHistogram& other);

  uint64_t Count() const;
  // The smallest bucket bound in nanoseconds that at least `quantile` (0 to 1) of the recorded
  // durations do not exceed; 0 when nothing was recorded.
  int64_t QuantileNs(double quantile) const;

 private:
  static constexpr int kStepBits = 4;
  static constexpr size_t kBuckets = (64 - kStepBits) << kStepBits;
  static size_t BucketOf(int64_t duration_ns);
  static int64_t UpperBoundNs(size_t bucket);

  std::array<Counter, kBuckets> buckets_{};
};

}  // namespace engram
