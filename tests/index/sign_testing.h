#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "index/inverted_lists.h"
#include "index/rabitq_format.h"
#include "index/sign_blocks.h"
#include "src/core/arena_heap.h"
#include "src/core/check.h"

namespace engram {

// A format of codes about the origin.
inline RabitqFormat* MakeFormat(Metric metric, uint32_t dimension, ArenaHeap* heap,
                                uint64_t seed = 1) {
  const std::vector<float> centroid(dimension);
  RabitqFormat* format = RabitqFormat::Create(metric, dimension, centroid.data(), seed, heap);
  CHECK(format != nullptr, "room for a format");
  return format;
}

struct FormatDeleter {
  ArenaHeap* heap;
  void operator()(RabitqFormat* format) const { RabitqFormat::Destroy(format, heap); }
};
using OwnedFormat = std::unique_ptr<RabitqFormat, FormatDeleter>;
inline OwnedFormat OwnFormat(Metric metric, uint32_t dimension, ArenaHeap* heap,
                             uint64_t seed = 1) {
  return {MakeFormat(metric, dimension, heap, seed), {heap}};
}

// Whether a member of a block of codes is `row`, its factors included.
inline bool HasCode(const SignBlocks& signs, const InvertedLists::Block& block, size_t member,
                    const std::byte* row) {
  std::vector<std::byte> found(signs.block_bytes());
  std::vector<std::byte> wanted(signs.block_bytes());
  signs.Copy(block.codes.block, static_cast<uint32_t>(member), found.data(), 0, block.codes.places);
  signs.Set(wanted.data(), 0, row);
  return found == wanted;
}

}  // namespace engram
