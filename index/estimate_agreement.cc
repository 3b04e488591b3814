#include "index/estimate_agreement.h"

#include <algorithm>

namespace engram {

namespace {

constexpr size_t kMostCompared = 128;

// How many are smaller; those that are equal count half.
float MiddleRank(float estimate, std::span<const float> estimates) {
  uint32_t smaller = 0;
  uint32_t equal = 0;
  for (const float other : estimates) {
    smaller += static_cast<uint32_t>(other < estimate);
    equal += static_cast<uint32_t>(other == estimate);
  }
  return static_cast<float>(smaller) + static_cast<float>(equal - 1) / 2;
}

}  // namespace

float EstimateAgreement::Displacement(std::span<const float> estimates,
                                      std::span<const NeighbourKey> keys) {
  const size_t count = std::min({estimates.size(), keys.size(), kMostCompared});
  if (count < kFewest) return 0;
  estimates = estimates.first(count);
  keys = keys.first(count);
  std::array<NeighbourKey, kMostCompared> sorted;
  std::copy(keys.begin(), keys.end(), sorted.begin());
  std::nth_element(sorted.begin(), sorted.begin() + kNearest - 1, sorted.begin() + count);
  const float tenth = DistanceOf(sorted[kNearest - 1]);
  float ranks = 0;
  size_t nearer = 0;
  std::array<float, kMostCompared> tied;
  size_t tied_count = 0;
  for (size_t i = 0; i < count; ++i) {
    const float distance = DistanceOf(keys[i]);
    if (distance > tenth) continue;
    const float rank = MiddleRank(estimates[i], estimates);
    if (distance == tenth) {
      tied[tied_count++] = rank;
    } else {
      ranks += rank;
      ++nearer;
    }
  }
  const size_t wanted = std::min(kNearest - nearer, tied_count);
  std::partial_sort(tied.begin(), tied.begin() + wanted, tied.begin() + tied_count);
  for (size_t i = 0; i < wanted; ++i) ranks += tied[i];
  constexpr float kBest = (kNearest - 1) / 2.0F;
  return std::max(ranks / kNearest - kBest, 0.0F) / static_cast<float>(count - kNearest);
}

bool EstimateAgreement::Add(NodeId node, std::span<const float> estimates,
                            std::span<const NeighbourKey> keys) {
  if (estimates.size() != keys.size() || keys.size() < kFewest) return true;
  const float displacement = Displacement(estimates, keys);
  count_ = std::min(count_ + 1, kWindow);
  mean_ += (displacement - mean_) / static_cast<float>(count_);
  if (displacement > kDoubtful) {
    disagreed_[next_] = node;
    next_ = (next_ + 1) % kRemembered;
    remembered_ = std::max(remembered_, next_ == 0 ? uint32_t{kRemembered} : next_);
  }
  return displacement <= kUseless;
}

}  // namespace engram
