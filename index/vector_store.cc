#include "index/vector_store.h"

#include "src/core/check.h"

namespace engram {

VectorStore::VectorStore(ArenaHeap* heap, size_t row_bytes) : rows_(heap, row_bytes) {
  CHECK(row_bytes >= 64 && row_bytes % 64 == 0, "rows are whole cache lines");
}

}  // namespace engram
