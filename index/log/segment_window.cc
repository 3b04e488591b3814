#include "index/log/segment_window.h"

#include <algorithm>
#include <cstring>

#include "index/log/log_format.h"
#include "src/core/check.h"

namespace engram {

namespace {

constexpr uint32_t kChunkBytes = 4u << 20;
constexpr uint32_t kPiecesInChunk = 8;

}  // namespace

void SegmentWindow::Allocate(uint32_t most_bytes) {
  CHECK(idle(), "the disk reads into this memory");
  room_bytes_ = std::min(kMaxBlockBytes, most_bytes);
  chunk_bytes_ = std::min(kChunkBytes, most_bytes);
  piece_bytes_ = std::max(kLogPageBytes, chunk_bytes_ / kPiecesInChunk);
  for (Buffer& buffer : buffers_) {
    buffer.memory = std::make_unique_for_overwrite<std::byte[]>(room_bytes_ + chunk_bytes_);
  }
}

void SegmentWindow::Begin(FileId file, uint32_t begin, uint32_t end) {
  CHECK(idle(), "the buffers are the disk's");
  file_ = file;
  begin_ = shown_from_ = begin;
  end_ = std::max(begin, end);
  chunks_ = (end_ - begin_ + chunk_bytes_ - 1) / chunk_bytes_;
  current_ = next_chunk_ = next_piece_ = 0;
  error_ = 0;
}

void SegmentWindow::Stop() { next_chunk_ = chunks_ = 0; }

uint32_t SegmentWindow::EndOf(uint32_t chunk) const {
  return std::min(end_ - BeginOf(chunk), chunk_bytes_) + BeginOf(chunk);
}

std::byte* SegmentWindow::Place(uint32_t chunk, uint32_t offset) const {
  const ptrdiff_t in_chunk = ptrdiff_t{offset} - ptrdiff_t{BeginOf(chunk)};
  return buffers_[chunk % 2].memory.get() + room_bytes_ + in_chunk;
}

void SegmentWindow::Pump() {
  while (wants_reads() && error_ == 0) {
    const uint32_t from = BeginOf(next_chunk_) + next_piece_ * piece_bytes_;
    const uint32_t bytes = std::min(piece_bytes_, EndOf(next_chunk_) - from);
    const uint64_t slot = next_chunk_ % 2 * (kTags / 2) + next_piece_;
    if (!disk_->Read(file_, from, {Place(next_chunk_, from), bytes}, tag_ + slot)) return;
    ++buffers_[next_chunk_ % 2].waits_for;
    ++in_flight_;
    ++next_piece_;
    if (from + bytes == EndOf(next_chunk_)) {
      ++next_chunk_;
      next_piece_ = 0;
    }
  }
}

void SegmentWindow::TakeEnd(const DiskCompletion& end) {
  const uint64_t slot = end.tag - tag_;
  --in_flight_;
  --buffers_[slot / (kTags / 2)].waits_for;
  if (chunks_ == 0 || error_ != 0) return;
  // The chunk of that buffer that is not looked at any more is not read any more either.
  const uint32_t chunk = current_ + (current_ % 2 == slot / (kTags / 2) ? 0 : 1);
  const uint32_t from = BeginOf(chunk) + static_cast<uint32_t>(slot % (kTags / 2)) * piece_bytes_;
  const uint32_t bytes = std::min(piece_bytes_, EndOf(chunk) - from);
  if (end.error == 0 && end.bytes == bytes) return;
  error_ = end.error != 0 ? end.error : kCutOff;
  error_offset_ = from + static_cast<uint32_t>(end.bytes);
}

std::optional<std::span<std::byte>> SegmentWindow::At(uint32_t offset, uint32_t bytes) {
  if (offset >= end_) return std::span<std::byte>();
  bytes = std::min(bytes, end_ - offset);
  CHECK(offset >= shown_from_ && bytes <= room_bytes_, "it looks forward, a block at a time");
  for (;;) {
    // A chunk is there when all of it was asked for and nothing of it is under way.
    if (next_chunk_ <= current_ || buffers_[current_ % 2].waits_for > 0 || error_ != 0) {
      return std::nullopt;
    }
    const uint32_t chunk_end = EndOf(current_);
    if (bytes <= chunk_end - std::min(offset, chunk_end) && offset < chunk_end) break;
    if (next_chunk_ <= current_ + 1 || buffers_[(current_ + 1) % 2].waits_for > 0) {
      return std::nullopt;
    }
    if (offset < chunk_end) {
      const uint32_t left = chunk_end - offset;
      CHECK(left <= room_bytes_, "less is left over than a block");
      std::memcpy(Place(current_ + 1, offset), Place(current_, offset), left);
    }
    ++current_;
    shown_from_ = std::max(shown_from_, std::min(offset, chunk_end));
  }
  return std::span<std::byte>(Place(current_, offset), bytes);
}

}  // namespace engram
