#include "src/core/latency_histogram.h"

#include <algorithm>
#include <bit>
#include <cmath>

namespace engram {

size_t LatencyHistogram::BucketOf(int64_t duration_ns) {
  const auto value = static_cast<uint64_t>(std::max<int64_t>(duration_ns, 0));
  constexpr uint64_t kSteps = uint64_t{1} << kStepBits;
  if (value < kSteps) return static_cast<size_t>(value);
  const int shift = std::bit_width(value) - 1 - kStepBits;
  // value >> shift lies in [kSteps, 2 * kSteps).
  return static_cast<size_t>((static_cast<uint64_t>(shift) << kStepBits) + (value >> shift));
}

int64_t LatencyHistogram::UpperBoundNs(size_t bucket) {
  constexpr size_t kSteps = size_t{1} << kStepBits;
  if (bucket < 2 * kSteps) return static_cast<int64_t>(bucket);
  const size_t shift = (bucket >> kStepBits) - 1;
  const size_t step = (bucket & (kSteps - 1)) + kSteps;
  return static_cast<int64_t>(((step + 1) << shift) - 1);
}

void LatencyHistogram::Merge(const LatencyHistogram& other) {
  for (size_t i = 0; i < kBuckets; ++i) buckets_[i].Add(other.buckets_[i].Read());
}

uint64_t LatencyHistogram::Count() const {
  uint64_t count = 0;
  for (const Counter& bucket : buckets_) count += bucket.Read();
  return count;
}

int64_t LatencyHistogram::QuantileNs(double quantile) const {
  const uint64_t count = Count();
  if (count == 0) return 0;
  const auto wanted = std::max<uint64_t>(
      1, static_cast<uint64_t>(std::ceil(quantile * static_cast<double>(count))));
  uint64_t seen = 0;
  for (size_t i = 0; i < kBuckets; ++i) {
    seen += buckets_[i].Read();
    if (seen >= wanted) return UpperBoundNs(i);
  }
  return UpperBoundNs(kBuckets - 1);
}

}  // namespace engram
