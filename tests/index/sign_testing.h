#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "index/inverted_lists.h"
#include "index/sign_blocks.h"

namespace engram {

// Whether a member of a block of codes is `row`, its factors included.
inline bool HasCode(const SignBlocks& signs, const InvertedLists::Block& block, size_t member,
                    const std::byte* row) {
  std::vector<std::byte> found(signs.block_bytes());
  std::vector<std::byte> wanted(signs.block_bytes());
  signs.Copy(block.codes, static_cast<uint32_t>(member), found.data(), 0);
  signs.Set(wanted.data(), 0, row);
  return found == wanted;
}

}  // namespace engram
