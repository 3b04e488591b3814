#include "index/estimate_agreement.h"

#include <algorithm>

namespace engram {

namespace {

constexpr size_t kMostCompared = 128;
constexpr size_t kAtOnce = 16;

// The place of each of `some` among `all` in ascending order: as many as are smaller; those that
// are equal, itself among them, share the middle of their places. Room for kAtOnce more behind
// `some` and `ranks`, which compilers fill registers with.
void RankAmong(std::span<const float> all, std::span<const float> some, float* ranks) {
  for (size_t first = 0; first < some.size(); first += kAtOnce) {
    const float* const these = some.data() + first;
    std::array<int32_t, kAtOnce> twice{};
    for (const float other : all) {
      for (size_t i = 0; i < kAtOnce; ++i) {
        twice[i] += (other < these[i] ? 1 : 0) + (other <= these[i] ? 1 : 0);
      }
    }
    for (size_t i = 0; i < kAtOnce; ++i) ranks[first + i] = static_cast<float>(twice[i] - 1) / 2;
  }
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
  // First those that are nearer than the tenth.
  std::array<float, kMostCompared + kAtOnce> nearest{};
  size_t nearer = 0;
  for (size_t i = 0; i < count; ++i) {
    if (DistanceOf(keys[i]) < tenth) nearest[nearer++] = estimates[i];
  }
  size_t taken = nearer;
  for (size_t i = 0; i < count; ++i) {
    if (DistanceOf(keys[i]) == tenth) nearest[taken++] = estimates[i];
  }
  std::array<float, kMostCompared + kAtOnce> ranks;
  RankAmong(estimates, std::span(nearest).first(taken), ranks.data());
  if (taken > kNearest) std::sort(ranks.begin() + nearer, ranks.begin() + taken);
  float sum = 0;
  for (size_t i = 0; i < kNearest; ++i) sum += ranks[i];
  constexpr float kBest = (kNearest - 1) / 2.0F;
  return std::max(sum / kNearest - kBest, 0.0F) / static_cast<float>(count - kNearest);
}

void EstimateAgreement::Add(NodeId node, std::span<const float> estimates,
                            std::span<const NeighbourKey> keys) {
  if (estimates.size() != keys.size() || keys.size() < kFewest) return;
  const float displacement = Displacement(estimates, keys);
  count_ = std::min(count_ + 1, kWindow);
  mean_ += (displacement - mean_) / static_cast<float>(count_);
  if (displacement > kDoubtful) {
    disagreed_[next_] = node;
    next_ = (next_ + 1) % kRemembered;
    remembered_ = std::max(remembered_, next_ == 0 ? uint32_t{kRemembered} : next_);
  }
}

}  // namespace engram
