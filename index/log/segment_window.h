#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>

#include "src/core/disk.h"

namespace engram {

// A part of one file, read from front to back, ahead of who looks at it.
//
// Two buffers take turns. Each holds a chunk, and before it room for what was left over of the
// chunk before: that is copied there, so that any kMaxBlockBytes lie in one piece. While one chunk
// is looked at the next one is being read.
//
// Thread safety: one thread.
// Invariants: no read goes to the bytes that At has shown since the last call of At.
class SegmentWindow {
 public:
  // The disk's tags are `tag` + 0 to kTags - 1.
  static constexpr uint64_t kTags = 16;

  SegmentWindow(Disk* disk, uint64_t tag) : disk_(disk), tag_(tag) {}

  // Memory for files of up to `most_bytes`.
  void Allocate(uint32_t most_bytes);

  // Begins to read [begin, end) of `file`. Nothing is under way.
  void Begin(FileId file, uint32_t begin, uint32_t end);
  // Reads nothing more; what is under way still ends.
  void Stop();
  bool idle() const { return in_flight_ == 0; }
  bool wants_reads() const { return next_chunk_ < chunks_ && next_chunk_ < current_ + 2; }
  // All that there is was asked for.
  bool asked_for_all() const { return next_chunk_ >= chunks_; }

  // Asks the disk for what there is room for.
  void Pump();
  // One of its tags.
  void TakeEnd(const DiskCompletion& end);

  // `bytes` bytes at `offset`, or as many as there are before the end; nothing while they are being
  // read. Offsets do not fall.
  std::optional<std::span<std::byte>> At(uint32_t offset, uint32_t bytes);

  // errno of a read that failed, or kCutOff where the file is shorter than it was; 0: none.
  static constexpr int kCutOff = -1;
  int error() const { return error_; }
  uint32_t error_offset() const { return error_offset_; }

 private:
  struct Buffer {
    std::unique_ptr<std::byte[]> memory;
    uint32_t waits_for = 0;  // reads under way
  };
  // Where the file's byte `offset`, of chunk `chunk`, lies.
  std::byte* Place(uint32_t chunk, uint32_t offset) const;
  uint32_t BeginOf(uint32_t chunk) const { return begin_ + chunk * chunk_bytes_; }
  uint32_t EndOf(uint32_t chunk) const;

  Disk* const disk_;
  const uint64_t tag_;
  uint32_t room_bytes_ = 0;  // before each chunk
  uint32_t chunk_bytes_ = 0;
  uint32_t piece_bytes_ = 0;  // of one read
  std::array<Buffer, 2> buffers_;
  FileId file_;
  uint32_t begin_ = 0;
  uint32_t end_ = 0;
  uint32_t chunks_ = 0;
  uint32_t shown_from_ = 0;  // before that nothing is kept
  uint32_t current_ = 0;     // the chunk that is looked at
  uint32_t next_chunk_ = 0;  // of which the next read is,
  uint32_t next_piece_ = 0;  // and which part
  uint32_t in_flight_ = 0;
  int error_ = 0;
  uint32_t error_offset_ = 0;
};

}  // namespace engram
