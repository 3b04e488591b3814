#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "index/hnsw_search.h"
#include "index/space.h"
#include "index/space_linker.h"
#include "src/core/arena_heap.h"
#include "src/core/huge_page_arena.h"
#include "src/core/reader_epochs.h"

namespace engram {

// A space by itself, with memory of its own and without a shard, whose rows are numbered as they
// are stored. For programs that time recalls alone. What goes wrong ends the program.
class BenchSpace {
 public:
  // A recall's slice on a shard, in distances.
  static constexpr uint32_t kSliceDistances = 1'024;

  // Room for `rows` rows.
  BenchSpace(const SpaceOptions& options, size_t rows);

  // A row's `vector`, of the space's dimension, f32; its number is that of the rows before.
  void Store(const std::byte* vector, int64_t when_ns = 0, const std::string& attributes = "");
  // All that was stored, in batches.
  void LinkAll();

  Space& space() { return space_; }
  const Space& space() const { return space_; }
  ArenaHeap* heap() { return &heap_; }

  // What compares rows with an f32 query, by int8 and as they are kept. Good until the next call.
  struct Compared {
    SearchTarget by_int8;
    SearchTarget exact;  // only where the space has_exact()
  };
  Compared CompareWith(const std::byte* query);

 private:
  struct Forms {
    alignas(64) std::byte code[Space::kMaxRowBytes];
    alignas(64) std::byte exact[Space::kMaxRowBytes];
  };

  const SpaceOptions options_;
  HugePageArena arena_;
  ArenaHeap heap_;
  ReaderEpochs epochs_{1};
  Space space_;
  SpaceLinker linker_;
  Forms forms_;
};

}  // namespace engram
