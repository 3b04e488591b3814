#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "index/space.h"
#include "perf/compared_index.h"

namespace engram {

// A space of this project, driven as a shard drives it: each row is stored with the next stamp,
// then linked in the shard's slices; recalls are recall jobs whose hits are written as batches.
//
// `capacity`: rows that its arena is made present for beforehand.
std::unique_ptr<ComparedIndex> MakeEngramIndex(const SpaceOptions& options, size_t capacity);

}  // namespace engram
