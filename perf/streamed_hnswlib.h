#pragma once

#include <memory>

#include "perf/hnswlib_index.h"
#include "perf/streamed_index.h"

namespace engram {

// hnswlib in the mode that it calls replace-deleted: what is deleted is marked, an insert takes the
// place of something marked where there is such, and a tag that lives is updated in its place.
// Everything is done where it is sent. `options.capacity`: observations that live at most.
//
// Debian 12 has hnswlib 0.6.2, whose addPoint has no such mode yet: the place of a marked one is
// taken as release 0.7 does it, with the same calls.
std::unique_ptr<StreamedIndex> MakeStreamedHnswlib(const HnswlibOptions& options);

}  // namespace engram
