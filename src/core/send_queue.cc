#include "src/core/send_queue.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "src/core/check.h"

namespace engram {

Result<SendPool> SendPool::Create(size_t pool_bytes) {
  const size_t blocks = (std::max<size_t>(pool_bytes, 1) + kSendBlockBytes - 1) / kSendBlockBytes;
  CHECK(blocks < kNoSendBlock, "a send pool has fewer than 2^32 blocks");
  ArenaOptions options;
  options.reserve_bytes = blocks * kSendBlockBytes;
  auto arena = HugePageArena::Create(options);
  if (!arena) {
    return Fail(arena.error().code, "send pool (send_pool_bytes): " + arena.error().message);
  }
  std::byte* base = arena->Allocate(blocks * kSendBlockBytes, kSendBlockBytes);
  CHECK(base != nullptr, "an arena holds what it was made for");
  return SendPool(std::move(*arena), base, blocks);
}

SendPool::SendPool(HugePageArena arena, std::byte* base, size_t blocks)
    : arena_(std::move(arena)), base_(base), next_(blocks), free_head_(0), free_blocks_(blocks) {
  for (size_t i = 0; i < blocks; ++i) next_[i] = static_cast<uint32_t>(i + 1);
  next_.back() = kNoSendBlock;
}

size_t SendPool::BlocksNeeded(const SendQueue& queue, size_t bytes) const {
  const size_t room = queue.tail == kNoSendBlock ? 0 : kSendBlockBytes - queue.tail_used;
  if (bytes <= room) return 0;
  return (bytes - room + kSendBlockBytes - 1) / kSendBlockBytes;
}

uint32_t SendPool::Take() {
  CHECK(free_head_ != kNoSendBlock, "the caller made sure of the blocks");
  const uint32_t block = free_head_;
  free_head_ = next_[block];
  next_[block] = kNoSendBlock;
  --free_blocks_;
  return block;
}

void SendPool::Append(SendQueue& queue, std::span<const std::span<const std::byte>> parts) {
  for (std::span<const std::byte> part : parts) {
    while (!part.empty()) {
      if (queue.tail == kNoSendBlock || queue.tail_used == kSendBlockBytes) {
        const uint32_t block = Take();
        if (queue.tail == kNoSendBlock) {
          queue.head = block;
          queue.head_offset = 0;
        } else {
          next_[queue.tail] = block;
        }
        queue.tail = block;
        queue.tail_used = 0;
      }
      const size_t step = std::min(part.size(), kSendBlockBytes - queue.tail_used);
      std::memcpy(At(queue.tail) + queue.tail_used, part.data(), step);
      queue.tail_used += static_cast<uint32_t>(step);
      queue.bytes += step;
      part = part.subspan(step);
    }
  }
}

size_t SendPool::Gather(const SendQueue& queue, std::span<iovec> out) const {
  size_t count = 0;
  size_t left = queue.bytes;
  size_t offset = queue.head_offset;
  for (uint32_t block = queue.head; left > 0 && count < out.size(); block = next_[block]) {
    const size_t step = std::min(left, kSendBlockBytes - offset);
    out[count++] = iovec{.iov_base = At(block) + offset, .iov_len = step};
    left -= step;
    offset = 0;
  }
  return count;
}

void SendPool::FreeHead(SendQueue& queue) {
  const uint32_t block = queue.head;
  queue.head = next_[block];
  queue.head_offset = 0;
  if (queue.head == kNoSendBlock) {
    queue.tail = kNoSendBlock;
    queue.tail_used = 0;
  }
  next_[block] = free_head_;
  free_head_ = block;
  ++free_blocks_;
}

void SendPool::Consume(SendQueue& queue, size_t bytes) {
  CHECK(queue.pinned == 0, "an operation of the kernel has ended before its bytes are consumed");
  CHECK(bytes <= queue.bytes, "no more is sent than was queued");
  queue.bytes -= bytes;
  while (bytes > 0) {
    const size_t filled = queue.head == queue.tail ? queue.tail_used : kSendBlockBytes;
    const size_t step = std::min(bytes, filled - queue.head_offset);
    queue.head_offset += static_cast<uint32_t>(step);
    bytes -= step;
    if (queue.head_offset == filled) FreeHead(queue);
  }
}

void SendPool::Drop(SendQueue& queue) {
  queue.bytes = 0;
  if (queue.pinned == 0) {
    while (queue.head != kNoSendBlock) FreeHead(queue);
    return;
  }
  // Cuts the chain behind the pinned blocks and frees the rest.
  uint32_t last = queue.head;
  for (uint32_t i = 1; i < queue.pinned; ++i) last = next_[last];
  SendQueue rest;
  rest.head = std::exchange(next_[last], kNoSendBlock);
  queue.tail = last;
  while (rest.head != kNoSendBlock) FreeHead(rest);
  returning_blocks_ += queue.pinned;
}

void SendPool::Unpin(SendQueue& queue) {
  const uint32_t pinned = std::exchange(queue.pinned, 0);
  if (queue.bytes > 0 || pinned == 0) return;
  // Pinned blocks hold unsent bytes, so a queue without any was dropped.
  returning_blocks_ -= pinned;
  while (queue.head != kNoSendBlock) FreeHead(queue);
}

}  // namespace engram
