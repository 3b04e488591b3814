#include "index/vector_store.h"

#include "index/distance.h"
#include "src/core/check.h"
#include "src/core/vector_dtype.h"

namespace engram {

VectorStore::VectorStore(ArenaHeap* heap, uint32_t dimension)
    : dimension_(dimension), rows_(heap, PaddedDimension(dimension)) {
  CHECK(dimension >= 1 && dimension <= kMaxDimension, "dimension is 1 to 4,096");
}

}  // namespace engram
