#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "index/space.h"
#include "perf/compared_index.h"
#include "src/core/latency_histogram.h"

namespace engram {

// A space of this project, driven as a shard drives it: each row is stored with the next stamp,
// `batch` rows at a time linked in the shard's slices; recalls are recall jobs, four of them
// searched in turns, whose hits are written as batches.
//
// `capacity`: rows that its arena is made present for beforehand. `slices`: is told the processor
// time of each slice of linking, and outlives the index; nullptr: nobody, which is faster.
std::unique_ptr<ComparedIndex> MakeEngramIndex(const SpaceOptions& options, uint32_t batch,
                                               size_t capacity, LatencyHistogram* slices = nullptr);

}  // namespace engram
