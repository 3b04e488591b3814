#include "index/vector_store.h"

#include "index/distance.h"
#include "src/core/check.h"

namespace engram {

VectorStore::VectorStore(ArenaHeap* heap, size_t row_bytes) : rows_(heap, row_bytes) {
  CHECK(row_bytes >= kRowAlignment && row_bytes % kRowAlignment == 0,
        "rows are whole quarters of lines");
}

}  // namespace engram
