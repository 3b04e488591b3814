#include "perf/grown_set.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numbers>
#include <numeric>
#include <span>
#include <utility>
#include <vector>

#include "index/distance.h"
#include "src/core/check.h"
#include "src/core/hash.h"

namespace engram {

namespace {

constexpr size_t kRowsPerCell = 512;
// Cells that a row looks for its group in.
constexpr size_t kProbes = 4;
constexpr float kMaxWeight = 0.75F;

float Uniform(SplitMix64* random) {  // above 0, up to 1
  return static_cast<float>((random->Next() >> 40) + 1) / static_cast<float>(1 << 24);
}
float Normal(SplitMix64* random) {
  const float radius = std::sqrt(-2 * std::log(Uniform(random)));
  return radius * std::cos(2 * std::numbers::pi_v<float> * Uniform(random));
}

// 0 to size - 1 in a random order.
std::vector<uint32_t> Shuffled(size_t size, SplitMix64* random) {
  std::vector<uint32_t> order(size);
  std::iota(order.begin(), order.end(), 0);
  for (size_t i = size; i > 1; --i) std::swap(order[i - 1], order[random->Below(i)]);
  return order;
}

// The rows that are near to a row (step 1).
class Cells {
 public:
  using Near = std::pair<float, uint32_t>;  // distance, row

  Cells(const VectorSet& rows, SplitMix64* random)
      : rows_(rows), probes_(rows.size()), cells_(std::max<size_t>(1, rows.size() / kRowsPerCell)) {
    std::vector<uint32_t> pivots = Shuffled(rows.size(), random);
    pivots.resize(cells_.size());
    std::vector<Near> near(pivots.size());
    for (uint32_t row = 0; row < rows.size(); ++row) {
      for (uint32_t cell = 0; cell < pivots.size(); ++cell) {
        near[cell] = {Distance(row, pivots[cell]), cell};
      }
      const size_t probes = std::min(kProbes, near.size());
      std::ranges::partial_sort(near, near.begin() + static_cast<ptrdiff_t>(probes));
      for (size_t i = 0; i < kProbes; ++i) probes_[row][i] = near[std::min(i, probes - 1)].second;
      cells_[near[0].second].push_back(row);
    }
  }

  // Cell by cell, as rows of one cell look at the same rows.
  std::span<const std::vector<uint32_t>> cells() const { return cells_; }

  // The group of `row`, itself first.
  void GroupOf(uint32_t row, size_t size, std::vector<Near>* group) const {
    group->clear();
    for (size_t i = 0; i < kProbes; ++i) {
      if (i > 0 && probes_[row][i] == probes_[row][i - 1]) break;
      for (const uint32_t other : cells_[probes_[row][i]]) {
        if (other != row) group->emplace_back(Distance(row, other), other);
      }
    }
    const size_t others = std::min(size - 1, group->size());
    std::ranges::partial_sort(*group, group->begin() + static_cast<ptrdiff_t>(others));
    group->resize(others);
    group->insert(group->begin(), Near(0, row));
  }

 private:
  float Distance(uint32_t a, uint32_t b) const {
    return distance_(rows_.Bytes(a), rows_.Bytes(b), rows_.padded_dimension());
  }

  const VectorSet& rows_;
  const DistanceFn distance_ = DistanceFunction(Precision::kF32, Metric::kL2);
  std::vector<std::array<uint32_t, kProbes>> probes_;  // of each row, the nearest first
  std::vector<std::vector<uint32_t>> cells_;
};

// Weights of sum 1 and sum of squares 1 (step 2): the mean, and a random direction across it.
void DrawWeights(SplitMix64* random, std::span<float> weights) {
  const auto count = static_cast<float>(weights.size());
  if (weights.size() < 3) {  // nobody is near
    std::ranges::fill(weights, 1 / count);
    return;
  }
  do {
    for (float& weight : weights) weight = Normal(random);
    const float mean = std::accumulate(weights.begin(), weights.end(), 0.0F) / count;
    float squares = 0;
    for (float& weight : weights) {
      weight -= mean;
      squares += weight * weight;
    }
    const float scale = std::sqrt((1 - 1 / count) / squares);
    for (float& weight : weights) weight = 1 / count + scale * weight;
  } while (std::ranges::max(weights) > kMaxWeight);
}

class Grower {
 public:
  Grower(const VectorSet& real, const GrowthOptions& options, VectorSet* grown)
      : real_(real), options_(options), grown_(grown) {
    for (size_t row = 0; row < real.size(); ++row) {
      const auto [least, most] = std::ranges::minmax(real[row]);
      least_ = std::min(least_, least);
      most_ = std::max(most_, most);
    }
  }

  // The children of the row that is the `turn`th parent.
  void MakeChildren(size_t turn, std::span<const Cells::Near> group) {
    weights_.resize(group.size());
    for (size_t row = real_.size() + turn; row < grown_->size(); row += real_.size()) {
      SplitMix64 random(MixBits(options_.seed) ^ MixBits(row));
      DrawWeights(&random, weights_);
      MakeChild(group, grown_->Row(row));
    }
  }

 private:
  void MakeChild(std::span<const Cells::Near> group, std::span<float> child) {
    for (size_t i = 0; i < group.size(); ++i) {
      const std::span<const float> member = real_[group[i].second];
      for (size_t at = 0; at < child.size(); ++at) child[at] += weights_[i] * member[at];
    }
    for (float& value : child) value = std::clamp(value, least_, most_);
    if (options_.metric == Metric::kL2) return;
    const std::span<const float> parent = real_[group[0].second];
    if (!NormaliseInPlace(child.data(), child.size())) std::ranges::copy(parent, child.begin());
    const float norm = std::sqrt(SquaredNorm(parent.data(), parent.size()));
    if (options_.metric == Metric::kCosine) return;
    for (float& value : child) value *= norm;
  }

  const VectorSet& real_;
  const GrowthOptions options_;
  VectorSet* grown_;
  float least_ = 0;
  float most_ = 0;
  std::vector<float> weights_;
};

}  // namespace

VectorSet GrowSet(const VectorSet& real, size_t size, const GrowthOptions& options) {
  CHECK(options.group >= 3 && real.size() >= options.group && size > real.size(),
        "there is something to grow from");
  VectorSet grown = VectorSet::Zeros(size, real.dimension());
  for (size_t row = 0; row < real.size(); ++row)
    std::ranges::copy(real[row], grown.Row(row).data());

  SplitMix64 random(options.seed);
  const Cells cells(real, &random);
  const std::vector<uint32_t> parents = Shuffled(real.size(), &random);
  std::vector<uint32_t> turns(parents.size());
  for (uint32_t turn = 0; turn < parents.size(); ++turn) turns[parents[turn]] = turn;
  Grower grower(real, options, &grown);
  std::vector<Cells::Near> group;
  for (const std::vector<uint32_t>& cell : cells.cells()) {
    for (const uint32_t row : cell) {
      if (real.size() + turns[row] >= size) continue;
      cells.GroupOf(row, options.group, &group);
      grower.MakeChildren(turns[row], group);
    }
  }
  return grown;
}

}  // namespace engram
