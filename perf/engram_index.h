#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "index/space.h"
#include "perf/compared_index.h"

namespace engram {

// A space of this project, driven as a shard drives it: each row is stored with the next stamp,
// `batch` rows at a time linked in the shard's slices; recalls are recall jobs, four of them
// searched in turns, whose hits are written as batches.
//
// `capacity`: rows that its arena is made present for beforehand.
std::unique_ptr<ComparedIndex> MakeEngramIndex(const SpaceOptions& options, uint32_t batch,
                                               size_t capacity);

}  // namespace engram
