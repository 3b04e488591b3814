#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "perf/vector_set.h"
#include "src/core/observation.h"

namespace engram {

struct GrowthOptions {
  Metric metric = Metric::kCosine;
  uint64_t seed = 1;
  uint32_t partners = 4;  // near rows that a grown one may lie towards, at least 1
  uint32_t group = 8;     // near rows whose differences it may lie along, at least 3
};

// Rows like those of a real set, as many as are wanted. How they are made:
//
// 1. Each row goes to the cell of the nearest of some pivots, which are rows. A row's near rows are
//    the nearest ones in the few cells whose pivots are nearest to it: nearly its nearest.
// 2. Real rows are parents in a random order, each once before any is one again. A parent x, one of
//    its `partners` nearest rows y, and two others a and b of its `group` nearest rows give
//        (1 - t) x + t y + sqrt(t (1 - t)) |y - x| (b - a) / |b - a|
//    with t = u * u, u uniform in 0 to 1.
// 3. Each value is put back into the range of values that the real set has, and the row is scaled
//    to its parent's norm, but for L2.
//
// Why that is fair:
//   * For near rows drawn from one distribution the squares of the weights of x, y, a and b sum up
//     to 1, so the sum has their mean and their covariance. Points between neighbours alone have
//     less variance than data: they lie closer than data would. Noise in all dimensions has
//     variance where data has none: it would add dimensions. Here the noise has the scale of the
//     neighbour's distance and the direction of a difference of neighbours.
//   * The distance to the parent is u |y - x|: anything up to the neighbour's, so that there are
//     no copies but many near pairs: more than real sets have.
//   * Clusters and density are those of the real set, as each row has equally many children, which
//     lie no farther off than its near rows.
//
// How far that goes is measured, by growing a part of a real set to the size of the whole, whose
// figures are known (growth_curve --real N). Queries are real and in neither.
//
//                              debwn-text-768, 40,000 rows    fashion-mnist-784, 12,000 rows
//                              grown to 198,147 (all real)    grown to 60,000 (all real)
//   us an insert               42.1 (44.9)                    32.7 (32.1)
//   distance to the tenth      0.957 (0.953)                  1,023 (1,036)
//   grown: of rows, nearest    0.798, 0.803                   0.800, 0.853
//   local dimension            13.7 (8.9)                     20.6 (15.3)
//   row to its nearest other   0.296 (0.785)                  not measured
//   recall@10, ef 64           0.929 (0.963)                  0.983 (0.991)
//   recall@10, ef 128          0.962 (0.981)                  0.995 (0.998)
//
// So memory and the cost of inserts are as with real rows, and recall is a lower bound: with more
// real texts a query comes upon more near duplicates of itself, which nothing that is made from the
// rows alone can foresee. Grown rows lie nearer to their parents than real rows to each other.
// Tried: children no nearer than 0.7 of the neighbour's distance (0.410 instead of 0.296, local
// dimension 16.3, recall@10 0.915 and 0.954), so that it is not this that costs recall; weighted
// sums of 8 to 32 near rows (0.53 to 0.74 of the nearest grown, so farther off than real rows).
//
// Deterministic from the seed on one kind of processor, as distances are rounded alike.
//
// Thread safety: any thread may make rows.
class GrownRows {
 public:
  // Finds the near rows of each row of `real`, which stays and has more than `partners` and `group`
  // rows. Takes some 80 bytes a real row.
  GrownRows(const VectorSet& real, const GrowthOptions& options);

  // Row `number` into `row`: below real.size() the real one.
  void Make(size_t number, std::span<float> row) const;
  // The real row that row `number`, which is not one, is made from.
  uint32_t ParentOf(size_t number) const { return parents_[number % parents_.size()]; }

 private:
  struct Near {
    float distance;  // squared
    uint32_t row;
  };
  std::span<const Near> NearOf(uint32_t row) const {
    return std::span(near_).subspan(row * near_count_, near_count_);
  }

  const VectorSet& real_;
  const GrowthOptions options_;
  size_t near_count_;
  std::vector<uint32_t> parents_;  // in turn
  std::vector<Near> near_;         // of each row, the nearest first
  float least_ = 0;
  float most_ = 0;
};

// The rows of `real` in their order, then grown ones, up to `size`, which is more than real has.
VectorSet GrowSet(const VectorSet& real, size_t size, const GrowthOptions& options);

}  // namespace engram
