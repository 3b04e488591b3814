#pragma once

#include <cstddef>
#include <cstdint>

#include "perf/vector_set.h"
#include "src/core/observation.h"

namespace engram {

struct GrowthOptions {
  Metric metric = Metric::kCosine;
  uint64_t seed = 1;
  uint32_t group = 16;  // rows that a grown one is made of, at least 3
};

// A real set made larger: the rows of `real` in their order, then rows like them, up to `size`
// rows. How they are made:
//
// 1. Each row goes to the cell of the nearest of some pivots, which are rows. The group of a row is
//    itself and the nearest ones in the few cells whose pivots are nearest to it: near neighbours,
//    nearly the nearest.
// 2. Real rows are parents in a random order, each once before any is one again. A grown row is a
//    weighted sum of its parent's group, with random weights whose sum is 1 and whose squares' sum
//    is 1, none beyond 0.75.
// 3. Each value is put back into the range of values that the real set has, and the row is scaled
//    to its parent's norm, but for L2.
//
// Why that is fair. For rows drawn from one distribution such a sum has their mean and, exactly,
// their covariance: weights that only average (a point between neighbours) lose variance, so that
// what is made lies inside the data and closer than data would; noise in all dimensions adds
// variance where data has none, so that what is made lies off the data, in more dimensions. Nothing
// is near its parent alone: of `group` rows it is as near to each as their weights say, and no
// nearer than half of what these are from each other (squared: 1 - weight). In
// sets of norm 1 it has norm 1 nearly by itself. Large scale structure (clusters, density) is that
// of the real set, as each row has equally many children.
//
// What it does not give: structure below the scale of a group, like duplicates. Whether it matters
// is measured: growth_curve --real N grows a part of a real set to the size of the whole, whose
// figures are known.
//
// Deterministic from the seed on one kind of processor, as distances are rounded alike.
// Takes the memory of the result, `real` and 40 bytes a real row. size > real.size() >= group.
VectorSet GrowSet(const VectorSet& real, size_t size, const GrowthOptions& options);

}  // namespace engram
