#include "dataplane/frame_assembler.h"

#include <algorithm>
#include <cstring>

#include "src/core/check.h"
#include "src/core/spsc_ring.h"

namespace engram {

Result<PartialBlockPool> PartialBlockPool::Create(size_t blocks, HugePagePolicy huge_pages) {
  CHECK(blocks > 0 && blocks < kNoBlock, "block count out of range");
  auto arena =
      HugePageArena::Create({.reserve_bytes = blocks * kBlockBytes, .huge_pages = huge_pages});
  if (!arena) return std::unexpected(arena.error());
  PartialBlockPool pool(*std::move(arena));
  pool.base_ = pool.arena_.Allocate(blocks * kBlockBytes, kCacheLineBytes);
  pool.next_.assign(blocks, kNoBlock);
  for (size_t i = blocks; i > 0; --i) pool.Release(static_cast<uint32_t>(i - 1));
  return pool;
}

uint32_t PartialBlockPool::Acquire() {
  const uint32_t block = free_head_;
  if (block == kNoBlock) return kNoBlock;
  free_head_ = next_[block];
  next_[block] = kNoBlock;
  --free_count_;
  return block;
}

void PartialBlockPool::Release(uint32_t block) {
  next_[block] = free_head_;
  free_head_ = block;
  ++free_count_;
}

bool FrameAssembler::Append(std::span<const std::byte> bytes, PartialBlockPool* pool) {
  constexpr size_t kBlock = PartialBlockPool::kBlockBytes;
  const size_t room = (kBlock - pending_bytes_ % kBlock) % kBlock;
  const size_t more_blocks = bytes.size() <= room ? 0 : (bytes.size() - room + kBlock - 1) / kBlock;
  if (pool->free_blocks() < more_blocks) return false;
  while (!bytes.empty()) {
    const size_t used = pending_bytes_ % kBlock;
    if (used == 0) {
      const uint32_t block = pool->Acquire();
      if (first_block_ == PartialBlockPool::kNoBlock) {
        first_block_ = block;
      } else {
        pool->NextOf(last_block_) = block;
      }
      last_block_ = block;
    }
    const size_t step = std::min(kBlock - used, bytes.size());
    std::memcpy(pool->At(last_block_) + used, bytes.data(), step);
    pending_bytes_ += static_cast<uint32_t>(step);
    bytes = bytes.subspan(step);
  }
  return true;
}

void FrameAssembler::CopyOut(PartialBlockPool* pool, std::byte* to) const {
  size_t left = pending_bytes_;
  for (uint32_t block = first_block_; left > 0; block = pool->NextOf(block)) {
    const size_t step = std::min(left, PartialBlockPool::kBlockBytes);
    std::memcpy(to, pool->At(block), step);
    to += step;
    left -= step;
  }
}

void FrameAssembler::Clear(PartialBlockPool* pool) {
  uint32_t block = first_block_;
  while (block != PartialBlockPool::kNoBlock) {
    const uint32_t next = pool->NextOf(block);
    pool->Release(block);
    block = next;
  }
  *this = FrameAssembler();
}

}  // namespace engram
