#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "index/checkpoint/checkpoint_file.h"
#include "index/checkpoint/space_saver.h"
#include "index/session_table.h"
#include "index/space.h"
#include "src/core/arena_heap.h"
#include "src/core/disk.h"
#include "src/core/space_catalogue.h"

namespace engram {

// What is saved of a shard.
struct ShardContents {
  std::span<const std::unique_ptr<Space>> spaces;
  std::span<SpaceEntry* const> entries;     // of these spaces
  std::span<const LogPosition> dropped_at;  // of these, in the shard's log
  LogPosition replay_from = 0;              // of that log
  SessionTable* sessions = nullptr;
  uint16_t shard = 0;
  uint16_t shards = 0;
  LiveTable* live = nullptr;  // filled with what the spaces name in the logs
};

// Writes a shard's checkpoint file in slices while the shard goes on:
// 1. The file is made, and begins with what the shard is and the list of its spaces.
// 2. The sessions, with the last sequence that was answered. Before the spaces: what was answered
//    is in them then, or in the log.
// 3. The spaces, one after the other (SpaceSaver).
// 4. The end; the rest is flushed.
//
// Thread safety: the shard's alone, with its Disk. Making the file waits for the disk a little;
// otherwise it neither waits nor allocates.
class ShardSaver {
 public:
  // `disk` is over the shard's folder, for this alone; it and `heap` outlive the saver. A shard has
  // `max_spaces` at most.
  ShardSaver(Disk* disk, ArenaHeap* heap, uint32_t max_spaces);
  ~ShardSaver();
  ShardSaver(const ShardSaver&) = delete;
  ShardSaver& operator=(const ShardSaver&) = delete;

  // `contents` is what it is now, for as long as the save lasts: spaces that come later are left
  // out. False where the file cannot be made.
  bool Begin(uint32_t round, CommitStamp hold, CommitStamp latest, const ShardContents& contents);
  // One slice; returns how much was done.
  int Step();
  void Abort();

  bool active() const { return phase_ != Phase::kIdle; }
  // After the last Step: all is on stable storage, or why not.
  bool done() const { return done_; }
  int error() const { return error_; }
  uint64_t bytes() const { return offset_; }

 private:
  enum class Phase : uint8_t { kIdle, kHead, kSessions, kSpaces, kEnd, kWriting, kFlushing };
  static constexpr size_t kBufferBytes = size_t{1} << 20;
  static constexpr size_t kNodesPerStep = 32;
  static constexpr size_t kSessionsPerStep = 256;
  // Writes are of whole pages, at multiples of one.
  static constexpr size_t kPageBytes = 4096;

  struct Buffer {
    std::byte* memory = nullptr;  // aligned to a page
    size_t used = 0;
    bool writing = false;
  };

  std::span<std::byte> Room();
  bool Fill();
  bool FillHead();
  bool FillSessions();
  bool FillSpaces();
  bool FillEnd();
  bool WriteOut();
  int TakeCompletions();
  void Finish(int error);

  Disk* const disk_;
  std::unique_ptr<std::byte[]> memory_;
  std::array<Buffer, 2> buffers_;
  SpaceSaver space_saver_;

  ShardContents contents_;
  Phase phase_ = Phase::kIdle;
  bool done_ = false;
  int error_ = 0;
  uint32_t round_ = 0;
  CommitStamp hold_ = kNoStamp;
  CommitStamp latest_ = kNoStamp;
  uint32_t spaces_ = 0;
  std::vector<bool> vacant_;  // by space: it had been dropped when the save began
  uint32_t next_space_ = 0;
  uint64_t session_cursor_ = 0;
  uint64_t sessions_ = 0;
  std::optional<FileId> file_;
  size_t filling_ = 0;       // which buffer
  uint64_t offset_ = 0;      // bytes that were written out or are in a buffer
  uint64_t written_at_ = 0;  // where the next write goes
  uint32_t in_flight_ = 0;
};

}  // namespace engram
