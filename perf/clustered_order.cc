#include "perf/clustered_order.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "index/distance.h"
#include "src/core/check.h"
#include "src/core/hash.h"

namespace engram {

namespace {

constexpr size_t kSampleRows = 10'000;
constexpr int kIterations = 10;

using Near = std::pair<float, uint32_t>;  // distance, centroid

class Centroids {
 public:
  Centroids(const VectorSet& rows, size_t count, uint64_t seed)
      : rows_(rows), centroids_(VectorSet::Zeros(count, rows.dimension())) {
    std::vector<uint32_t> sample(rows.size());
    std::iota(sample.begin(), sample.end(), 0);
    SplitMix64 random(seed);
    for (size_t i = sample.size(); i > 1; --i) std::swap(sample[i - 1], sample[random.Below(i)]);
    sample.resize(std::min(sample.size(), std::max(kSampleRows, count)));
    for (size_t c = 0; c < count; ++c) std::ranges::copy(rows[sample[c]], centroids_.Row(c).data());
    for (int i = 0; i < kIterations; ++i) Move(sample);
  }

  // All centroids, the nearest first.
  void Rank(uint32_t row, std::vector<Near>* near) const {
    Measure(row, near);
    std::ranges::sort(*near);
  }

 private:
  void Measure(uint32_t row, std::vector<Near>* near) const {
    near->resize(centroids_.size());
    for (uint32_t c = 0; c < near->size(); ++c) {
      (*near)[c] = {distance_(rows_.Bytes(row), centroids_.Bytes(c), rows_.padded_dimension()), c};
    }
  }
  // Each to the mean of the rows that are nearest to it.
  void Move(std::span<const uint32_t> sample) {
    VectorSet sums = VectorSet::Zeros(centroids_.size(), rows_.dimension());
    std::vector<float> counts(centroids_.size());
    std::vector<Near> near;
    for (const uint32_t row : sample) {
      Measure(row, &near);
      const uint32_t nearest = std::ranges::min(near).second;
      ++counts[nearest];
      const std::span<float> sum = sums.Row(nearest);
      for (size_t at = 0; at < sum.size(); ++at) sum[at] += rows_[row][at];
    }
    for (size_t c = 0; c < centroids_.size(); ++c) {
      if (counts[c] == 0) continue;
      const std::span<float> to = centroids_.Row(c);
      for (size_t at = 0; at < to.size(); ++at) to[at] = sums[c][at] / counts[c];
    }
  }

  const VectorSet& rows_;
  VectorSet centroids_;
  const DistanceFn distance_ = DistanceFunction(Precision::kF32, Metric::kL2);
};

}  // namespace

std::vector<uint32_t> ClusteredOrder(const VectorSet& rows, std::span<const size_t> starts,
                                     uint64_t seed) {
  const size_t count = starts.size();
  CHECK(count > 0 && starts.front() == 0 && starts.back() < rows.size(), "stretches of the rows");
  std::vector<size_t> lengths(count);
  for (size_t i = 0; i < count; ++i) {
    lengths[i] = (i + 1 < count ? starts[i + 1] : rows.size()) - starts[i];
  }

  const Centroids centroids(rows, count, seed);
  std::vector<std::vector<Near>> near(rows.size());
  std::vector<size_t> wanted(count);
  for (uint32_t row = 0; row < rows.size(); ++row) {
    centroids.Rank(row, &near[row]);
    ++wanted[near[row].front().second];
  }

  std::vector<uint32_t> by_length(count);
  std::iota(by_length.begin(), by_length.end(), 0);
  std::vector<uint32_t> by_size = by_length;
  std::ranges::stable_sort(by_length, std::ranges::greater(),
                           [&](uint32_t i) { return lengths[i]; });
  std::ranges::stable_sort(by_size, std::ranges::greater(), [&](uint32_t c) { return wanted[c]; });
  std::vector<uint32_t> stretch_of(count);
  for (size_t i = 0; i < count; ++i) stretch_of[by_size[i]] = by_length[i];

  std::vector<uint32_t> by_margin(rows.size());
  std::iota(by_margin.begin(), by_margin.end(), 0);
  std::ranges::stable_sort(by_margin, std::ranges::greater(), [&](uint32_t row) {
    return count == 1 ? 0 : near[row][1].first - near[row][0].first;
  });
  std::vector<std::vector<uint32_t>> stretches(count);
  for (const uint32_t row : by_margin) {
    for (const Near& choice : near[row]) {
      const uint32_t stretch = stretch_of[choice.second];
      if (stretches[stretch].size() == lengths[stretch]) continue;
      stretches[stretch].push_back(row);
      break;
    }
  }
  std::vector<uint32_t> order;
  for (std::vector<uint32_t>& stretch : stretches) {
    std::ranges::sort(stretch);
    order.insert(order.end(), stretch.begin(), stretch.end());
  }
  return order;
}

VectorSet InOrder(const VectorSet& rows, std::span<const uint32_t> order) {
  VectorSet ordered = VectorSet::Zeros(order.size(), rows.dimension());
  for (size_t at = 0; at < order.size(); ++at) {
    std::ranges::copy(rows[order[at]], ordered.Row(at).data());
  }
  return ordered;
}

}  // namespace engram
