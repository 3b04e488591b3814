#include "index/sliced_sort.h"

#include <algorithm>
#include <cmath>

#include "src/core/check.h"

namespace engram {

namespace {

// Work, in distances of some 30 ns.
constexpr size_t kPassedPerDistance = 16;
constexpr size_t kSortedPerDistance = 1;

}  // namespace

void SlicedSort::Begin(std::span<NeighbourKey> keys) {
  CHECK(keys.size() <= most_, "room for the keys");
  keys_ = keys;
  pass_ = keys.empty() ? Pass::kDone : Pass::kRange;
  next_ = 0;
  least_ = HUGE_VALF;
  greatest_ = -HUGE_VALF;
}

size_t SlicedSort::BucketOf(NeighbourKey key) const {
  if (buckets_per_distance_ == 0) return 0;
  const float place = (DistanceOf(key) - least_) * buckets_per_distance_;
  if (place < static_cast<float>(kBuckets)) return static_cast<size_t>(place);
  // As keys are ordered: what is no number lies before or behind all numbers, by its sign.
  return std::isnan(place) && std::signbit(DistanceOf(key)) ? 0 : kBuckets - 1;
}

bool SlicedSort::Step(uint64_t* distances) {
  if (pass_ == Pass::kDone) return true;
  if (pass_ == Pass::kSort) {
    *distances += SortSome() / kSortedPerDistance + 1;
    return pass_ == Pass::kDone;
  }
  const size_t end = std::min(keys_.size(), next_ + kPassedAtOnce);
  *distances += (end - next_) / kPassedPerDistance + 1;
  for (; next_ < end; ++next_) {
    const NeighbourKey key = keys_[next_];
    if (pass_ == Pass::kRange) {
      least_ = std::min(least_, DistanceOf(key));
      greatest_ = std::max(greatest_, DistanceOf(key));
    } else if (pass_ == Pass::kCount) {
      ++ends_[BucketOf(key)];
    } else {
      dealt_[ends_[BucketOf(key)]++] = key;
    }
  }
  if (next_ == keys_.size()) EndPass();
  return false;
}

void SlicedSort::EndPass() {
  next_ = 0;
  switch (pass_) {
    case Pass::kRange: {
      const float range = greatest_ - least_;
      // Of distances without end all are in one bucket.
      buckets_per_distance_ = range > 0 && std::isfinite(range) && kBuckets / range < HUGE_VALF
                                  ? static_cast<float>(kBuckets) / range
                                  : 0;
      ends_.fill(0);
      pass_ = Pass::kCount;
      break;
    }
    case Pass::kCount: {
      size_t begin = 0;
      for (size_t& end : ends_) {
        const size_t count = end;
        end = begin;
        begin += count;
      }
      pass_ = Pass::kDeal;
      break;
    }
    case Pass::kDeal:
      pass_ = Pass::kSort;
      break;
    case Pass::kSort:
    case Pass::kDone:
      break;
  }
}

// Some buckets, back to where the keys were. Returns how many keys they had.
size_t SlicedSort::SortSome() {
  size_t sorted = 0;
  while (next_ < kBuckets && sorted < kSortedAtOnce) {
    const size_t begin = next_ == 0 ? 0 : ends_[next_ - 1];
    const size_t end = ends_[next_++];
    std::sort(&dealt_[begin], &dealt_[end]);
    std::copy(&dealt_[begin], &dealt_[end], &keys_[begin]);
    sorted += end - begin;
  }
  if (next_ == kBuckets) pass_ = Pass::kDone;
  return sorted;
}

}  // namespace engram
