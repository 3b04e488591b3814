#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "src/core/huge_page_arena.h"
#include "src/core/result.h"

namespace engram {

inline constexpr size_t kSendBlockBytes = size_t{16} * 1024;
inline constexpr uint32_t kNoSendBlock = UINT32_MAX;

// The unsent bytes of one connection: a chain of blocks of a SendPool. Plain data; SendPool's
// functions work on it.
struct SendQueue {
  uint32_t head = kNoSendBlock;
  uint32_t tail = kNoSendBlock;
  uint32_t head_offset = 0;  // bytes of the head block that are sent
  uint32_t tail_used = 0;    // bytes of the tail block that are filled
  uint32_t pinned = 0;       // blocks from the head on that an operation of the kernel reads
  size_t bytes = 0;          // unsent, pinned ones included
};

// The blocks that hold the unsent bytes of one core's connections.
//
// Thread safety: the owner core's alone.
// Invariants: a block is free or in exactly one queue; free + queued = all; a pinned block is never
// freed nor written below its filled part. The free list is last in, first out, so a core that
// sends little touches few blocks.
class SendPool {
 public:
  // Room for `pool_bytes`, rounded up to blocks. Memory is taken as it is touched.
  // Errors: kResourceExhausted.
  static Result<SendPool> Create(size_t pool_bytes);

  // Blocks that Append would take for `bytes` more.
  size_t BlocksNeeded(const SendQueue& queue, size_t bytes) const;
  // Copies `parts` behind the queue's end. The caller has made sure of the blocks.
  void Append(SendQueue& queue, std::span<const std::span<const std::byte>> parts);

  // Fills `out` with the first unsent bytes, one entry a block. Returns how many entries.
  size_t Gather(const SendQueue& queue, std::span<iovec> out) const;
  // The first `blocks` blocks must stay until Unpin.
  void Pin(SendQueue& queue, size_t blocks) { queue.pinned = static_cast<uint32_t>(blocks); }
  // Undoes Pin; frees the blocks if the queue was dropped meanwhile.
  void Unpin(SendQueue& queue);
  // The first `bytes` are sent. Nothing is pinned.
  void Consume(SendQueue& queue, size_t bytes);
  // Gives everything up: frees the blocks that are not pinned; Unpin frees the others.
  void Drop(SendQueue& queue);

  size_t free_blocks() const { return free_blocks_; }
  // Blocks of dropped queues that become free with their Unpin.
  size_t returning_blocks() const { return returning_blocks_; }
  size_t total_blocks() const { return next_.size(); }

 private:
  SendPool(HugePageArena arena, std::byte* base, size_t blocks);
  std::byte* At(uint32_t block) const { return base_ + size_t{block} * kSendBlockBytes; }
  uint32_t Take();
  void FreeHead(SendQueue& queue);

  // Constant after construction.
  HugePageArena arena_;
  std::byte* base_;
  // Owner core only.
  std::vector<uint32_t> next_;  // of each block: the next in its queue or in the free list
  uint32_t free_head_ = kNoSendBlock;
  size_t free_blocks_ = 0;
  size_t returning_blocks_ = 0;
};

}  // namespace engram
