#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "index/space.h"
#include "perf/streamed_index.h"

namespace engram {

// A whole shard of this project without a log, with one space, and what sends to it: observations
// as its credit lets it, batches of them between two rounds of the shard. Linking, sweeping and
// giving back are the shard's own, in the slices that it takes for them beside observations and
// recalls. Its clock goes by the system's; where the shard would wait for something to become old
// enough, Rest lets the time pass at once.
//
// `capacity`: observations that live at most. `prefaults`: memory for these is made present
// beforehand. Of `space`, metric, precision, dimension, traversal and build count.
std::unique_ptr<StreamedIndex> MakeStreamedShard(const SpaceOptions& space, size_t capacity,
                                                 bool prefaults);

}  // namespace engram
