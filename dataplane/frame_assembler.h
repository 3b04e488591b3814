#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "dataplane/frame_format.h"
#include "src/core/huge_page_arena.h"
#include "src/core/result.h"

namespace engram {

// Fixed blocks in which a core keeps the beginnings of frames that are cut between two reads.
//
// Thread safety: one core's alone.
class PartialBlockPool {
 public:
  static constexpr size_t kBlockBytes = 4096;
  static constexpr uint32_t kNoBlock = UINT32_MAX;

  static Result<PartialBlockPool> Create(size_t blocks, HugePagePolicy huge_pages);

  // kNoBlock when all are taken.
  uint32_t Acquire();
  void Release(uint32_t block);
  std::byte* At(uint32_t block) { return base_ + size_t{block} * kBlockBytes; }
  // The block behind `block` in a chain.
  uint32_t& NextOf(uint32_t block) { return next_[block]; }
  size_t free_blocks() const { return free_count_; }

 private:
  explicit PartialBlockPool(HugePageArena arena) : arena_(std::move(arena)) {}

  HugePageArena arena_;
  std::byte* base_ = nullptr;
  std::vector<uint32_t> next_;  // of a chain, or of the free list
  uint32_t free_head_ = kNoBlock;
  size_t free_count_ = 0;
};

// Cuts a connection's bytes into frames. A frame that lies whole in the receive buffer is handed
// over in place; only one that is cut between two reads is gathered (copied twice: to blocks as it
// comes, then to the core's scratch buffer when it is whole).
//
// Invariants: holds blocks only while a frame is unfinished, ceil(bytes / block) of them.
class FrameAssembler {
 public:
  struct Outcome {
    // kNone: all bytes were taken. Else the reason to close; kPartialFrameLimit: the pool is spent,
    // and the call may be repeated with `rest` once blocks are free.
    RefusalReason reason = RefusalReason::kNone;
    std::span<const std::byte> rest;
  };

  // Feeds `bytes`; calls on_frame(const FrameHeader&, std::span<const std::byte> frame) for each
  // whole frame, header checked, checksum not yet. It returns false to stop (the connection is
  // being closed); the rest is dropped then. `scratch` holds a frame of the greatest size.
  template <typename OnFrame>
  Outcome Feed(std::span<const std::byte> bytes, PartialBlockPool* pool,
               std::span<std::byte> scratch, OnFrame&& on_frame);

  // Gives the blocks back.
  void Clear(PartialBlockPool* pool);

  // Bytes of an unfinished frame.
  size_t pending_bytes() const { return pending_bytes_; }

 private:
  // Appends to the chain; false, with nothing appended, when the pool is spent.
  bool Append(std::span<const std::byte> bytes, PartialBlockPool* pool);
  void CopyOut(PartialBlockPool* pool, std::byte* to) const;

  uint32_t first_block_ = PartialBlockPool::kNoBlock;
  uint32_t last_block_ = PartialBlockPool::kNoBlock;
  uint32_t pending_bytes_ = 0;
  uint32_t frame_bytes_ = 0;  // of the unfinished frame once its header is whole, else 0
};

template <typename OnFrame>
FrameAssembler::Outcome FrameAssembler::Feed(std::span<const std::byte> bytes,
                                             PartialBlockPool* pool, std::span<std::byte> scratch,
                                             OnFrame&& on_frame) {
  FrameHeader header;
  while (!bytes.empty()) {
    if (pending_bytes_ == 0) {
      // Frames that lie whole in the buffer.
      if (bytes.size() >= kFrameHeaderBytes) {
        const RefusalReason reason = CheckFrameHeader(bytes.data(), &header);
        if (reason != RefusalReason::kNone) return {reason, {}};
        const size_t frame_bytes = kFrameHeaderBytes + header.length;
        if (bytes.size() >= frame_bytes) {
          if (!on_frame(header, bytes.first(frame_bytes))) return {};
          bytes = bytes.subspan(frame_bytes);
          continue;
        }
        frame_bytes_ = static_cast<uint32_t>(frame_bytes);
      }
      if (!Append(bytes, pool)) {
        frame_bytes_ = 0;
        return {RefusalReason::kPartialFrameLimit, bytes};
      }
      return {};
    }
    // A frame that was cut: first its header, then the rest.
    const size_t wanted = (frame_bytes_ == 0 ? kFrameHeaderBytes : frame_bytes_) - pending_bytes_;
    const std::span<const std::byte> piece = bytes.first(std::min(wanted, bytes.size()));
    if (!Append(piece, pool)) return {RefusalReason::kPartialFrameLimit, bytes};
    bytes = bytes.subspan(piece.size());
    if (frame_bytes_ == 0 && pending_bytes_ == kFrameHeaderBytes) {
      // The first block holds the whole header.
      const RefusalReason reason = CheckFrameHeader(pool->At(first_block_), &header);
      if (reason != RefusalReason::kNone) return {reason, {}};
      frame_bytes_ = static_cast<uint32_t>(kFrameHeaderBytes) + header.length;
    }
    if (frame_bytes_ != 0 && pending_bytes_ == frame_bytes_) {
      CopyOut(pool, scratch.data());
      const std::span<const std::byte> frame = scratch.first(frame_bytes_);
      Clear(pool);
      header = LoadAs<FrameHeader>(frame.data());
      if (!on_frame(header, frame)) return {};
    }
  }
  return {};
}

}  // namespace engram
