#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "dataplane/record_reader.h"
#include "src/core/observation.h"

namespace engram {

// The next hits of one answer, in their order, while the records that they refer to are read.
//
// Add begins the reading of each, so as many as fit are read side by side; they are written out one
// after the other, each once it and those before it are there. Payloads beyond the answer's bound
// are left out, and not read.
//
// Thread safety: one core's alone.
// Invariants: what a hit will hold is settled when it is added, but for records that turn out to be
// unreadable.
class HitWindow {
 public:
  static constexpr uint32_t kHits = 32;

  // `max_payload_bytes`: of the whole answer.
  explicit HitWindow(size_t max_payload_bytes) : max_payload_bytes_(max_payload_bytes) {}

  uint32_t size() const { return added_ - written_; }
  bool full() const { return size() == kHits; }
  // The next hit, which stays where it is until it is written. False when the reader has no room
  // now. Not when full. Without a reader a hit that refers to a record counts as unreadable.
  bool Add(const std::byte* hit, RecordReader* reader);
  // The bytes of the hit at `place` from the front, as it will be written; 0 while it is being
  // read.
  size_t BytesAt(uint32_t place, const RecordReader* reader) const;
  // Writes the first one, whose bytes are there, and forgets it.
  void WriteFirst(std::byte* to, RecordReader* reader);
  // Forgets all that is not written: it may be added again.
  void Clear(RecordReader* reader);

 private:
  struct Entry {
    const std::byte* hit = nullptr;
    RecordReader::Ticket ticket = RecordReader::kNone;
    bool omitted = false;  // its payload goes beyond the bound
  };
  Entry& At(uint32_t number) { return entries_[number % kHits]; }
  const Entry& At(uint32_t number) const { return entries_[number % kHits]; }
  static HitHeader FinalHeader(const Entry& entry, const RecordReader* reader);

  std::array<Entry, kHits> entries_{};
  uint32_t added_ = 0;  // ever
  uint32_t written_ = 0;
  size_t max_payload_bytes_;
  size_t payload_added_ = 0;
  size_t payload_written_ = 0;
};

}  // namespace engram
