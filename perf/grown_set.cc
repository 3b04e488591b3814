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

}  // namespace

GrownRows::GrownRows(const VectorSet& real, const GrowthOptions& options)
    : real_(real), options_(options), near_count_(std::max(options.partners, options.group)) {
  CHECK(options.partners >= 1 && options.group >= 3 && real.size() > near_count_,
        "there is something to grow from");
  for (size_t row = 0; row < real.size(); ++row) {
    const auto [least, most] = std::ranges::minmax(real[row]);
    least_ = std::min(least_, least);
    most_ = std::max(most_, most);
  }
  SplitMix64 random(options.seed);
  const Cells cells(real, &random);
  parents_ = Shuffled(real.size(), &random);
  near_.resize(real.size() * near_count_);
  std::vector<Cells::Near> found;
  for (const std::vector<uint32_t>& cell : cells.cells()) {
    for (const uint32_t row : cell) {
      cells.FindNear(row, near_count_, &found);
      for (size_t i = 0; i < near_count_; ++i) {
        near_[row * near_count_ + i] = {found[i].first, found[i].second};
      }
    }
  }
}

void GrownRows::Make(size_t number, std::span<float> row) const {
  if (number < real_.size()) {
    std::ranges::copy(real_[number], row.begin());
    return;
  }
  SplitMix64 random(MixBits(options_.seed) ^ MixBits(number));
  const uint32_t parent_row = ParentOf(number);
  const std::span<const float> parent = real_[parent_row];
  const std::span<const Near> near = NearOf(parent_row);
  const size_t partner = random.Below(options_.partners);
  size_t from = partner;
  while (from == partner) from = random.Below(options_.group);
  size_t to = partner;
  while (to == partner || to == from) to = random.Below(options_.group);
  const std::span<const float> other = real_[near[partner].row];
  const std::span<const float> a = real_[near[from].row];
  const std::span<const float> b = real_[near[to].row];
  float across = 0;
  for (size_t at = 0; at < row.size(); ++at) across += (b[at] - a[at]) * (b[at] - a[at]);
  const float reach = Uniform(&random);
  const float t = reach * reach;
  const float noise = across > 0 ? std::sqrt(t * (1 - t) * near[partner].distance / across) : 0;
  for (size_t at = 0; at < row.size(); ++at) {
    row[at] =
        std::clamp((1 - t) * parent[at] + t * other[at] + noise * (b[at] - a[at]), least_, most_);
  }
  if (options_.metric == Metric::kL2) return;
  if (!NormaliseInPlace(row.data(), row.size())) std::ranges::copy(parent, row.begin());
  if (options_.metric == Metric::kCosine) return;
  const float norm = std::sqrt(SquaredNorm(parent.data(), parent.size()));
  for (float& value : row) value *= norm;
}

VectorSet GrowSet(const VectorSet& real, size_t size, const GrowthOptions& options) {
  CHECK(size > real.size(), "there is something to grow");
  const GrownRows rows(real, options);
  VectorSet grown = VectorSet::Zeros(size, real.dimension());
  for (size_t row = 0; row < size; ++row) rows.Make(row, grown.Row(row));
  return grown;
}

}  // namespace engram
