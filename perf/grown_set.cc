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

  // The `count` rows that are near to `row`, the nearest first.
  void FindNear(uint32_t row, size_t count, std::vector<Near>* near) const {
    near->clear();
    for (size_t i = 0; i < kProbes; ++i) {
      if (i > 0 && probes_[row][i] == probes_[row][i - 1]) break;
      for (const uint32_t other : cells_[probes_[row][i]]) Consider(row, other, near);
    }
    if (near->size() < count) {  // where rows are equal cells may be small, or empty
      near->clear();
      for (uint32_t other = 0; other < rows_.size(); ++other) Consider(row, other, near);
    }
    std::ranges::partial_sort(*near, near->begin() + static_cast<ptrdiff_t>(count));
    near->resize(count);
  }

 private:
  void Consider(uint32_t row, uint32_t other, std::vector<Near>* near) const {
    if (other != row) near->emplace_back(Distance(row, other), other);
  }
  // Squared.
  float Distance(uint32_t a, uint32_t b) const {
    return distance_(rows_.Bytes(a), rows_.Bytes(b), rows_.padded_dimension());
  }

  const VectorSet& rows_;
  const DistanceFn distance_ = DistanceFunction(Precision::kF32, Metric::kL2);
  std::vector<std::array<uint32_t, kProbes>> probes_;  // of each row, the nearest first
  std::vector<std::vector<uint32_t>> cells_;
};

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

  // The children of `row`, which is the `turn`th parent.
  void MakeChildren(uint32_t row, size_t turn, std::span<const Cells::Near> near) {
    for (size_t at = real_.size() + turn; at < grown_->size(); at += real_.size()) {
      SplitMix64 random(MixBits(options_.seed) ^ MixBits(at));
      MakeChild(real_[row], near, &random, grown_->Row(at));
    }
  }

 private:
  void MakeChild(std::span<const float> parent, std::span<const Cells::Near> near,
                 SplitMix64* random, std::span<float> child) {
    const size_t partner = random->Below(options_.partners);
    size_t from = partner;
    while (from == partner) from = random->Below(options_.group);
    size_t to = partner;
    while (to == partner || to == from) to = random->Below(options_.group);
    const std::span<const float> other = real_[near[partner].second];
    const std::span<const float> a = real_[near[from].second];
    const std::span<const float> b = real_[near[to].second];
    float across = 0;
    for (size_t at = 0; at < child.size(); ++at) across += (b[at] - a[at]) * (b[at] - a[at]);
    const float reach = Uniform(random);
    const float t = reach * reach;
    const float noise = across > 0 ? std::sqrt(t * (1 - t) * near[partner].first / across) : 0;
    for (size_t at = 0; at < child.size(); ++at) {
      child[at] = (1 - t) * parent[at] + t * other[at] + noise * (b[at] - a[at]);
    }
    for (float& value : child) value = std::clamp(value, least_, most_);
    if (options_.metric == Metric::kL2) return;
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
};

}  // namespace

VectorSet GrowSet(const VectorSet& real, size_t size, const GrowthOptions& options) {
  const size_t near = std::max(options.partners, options.group);
  CHECK(options.partners >= 1 && options.group >= 3 && real.size() > near && size > real.size(),
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
  std::vector<Cells::Near> near_rows;
  for (const std::vector<uint32_t>& cell : cells.cells()) {
    for (const uint32_t row : cell) {
      if (real.size() + turns[row] >= size) continue;
      cells.FindNear(row, near, &near_rows);
      grower.MakeChildren(row, turns[row], near_rows);
    }
  }
  return grown;
}

}  // namespace engram
