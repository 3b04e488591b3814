#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "perf/vector_set.h"

namespace engram {

// An order of the rows in which each stretch of rows is a cluster: stretch i begins at starts[i],
// starts[0] being 0, and ends where the next one begins, the last with the rows. So a runbook for
// vectors in the order of their clusters finds clusters where it expects them, in the sizes that it
// expects.
//
// 1. As many centroids as stretches by k-means over some of the rows, from rows at random.
// 2. The larger the cluster, the longer the stretch that it gets.
// 3. Rows choose the nearest centroid whose stretch has room, those first that are the most nearer
//    to one than to another. Within a stretch rows stay in their order.
//
// By squared distance, so rows of norm 1 are grouped by angle. Deterministic from the seed on one
// kind of processor.
std::vector<uint32_t> ClusteredOrder(const VectorSet& rows, std::span<const size_t> starts,
                                     uint64_t seed);

// The rows in this order.
VectorSet InOrder(const VectorSet& rows, std::span<const uint32_t> order);

}  // namespace engram
