#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "perf/compared_index.h"
#include "src/core/observation.h"

namespace engram {

struct HnswlibOptions {
  Metric metric = Metric::kCosine;
  uint32_t dimension = 0;
  size_t capacity = 0;  // rows
  uint32_t M = 16;
  uint32_t ef_construction = 200;
  uint64_t seed = 0;
};

// hnswlib (Malkov & Yashunin's own implementation) with float32 vectors; under cosine by inner
// product, for rows and queries of norm 1. Its vectors and links of level 0 lie in one block, which
// is made present beforehand, in huge pages where the kernel gives them, as our arena is.
std::unique_ptr<ComparedIndex> MakeHnswlibIndex(const HnswlibOptions& options);

}  // namespace engram
