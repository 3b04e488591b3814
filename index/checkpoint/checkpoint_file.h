#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "index/checkpoint/space_extent.h"
#include "src/core/commit_stamp.h"
#include "src/core/disk.h"
#include "src/core/log_address.h"
#include "src/core/result.h"
#include "src/core/space_catalogue.h"

namespace engram {

// A shard's checkpoint file: FORMAT.md, "A shard's file", as code.

// "checkpoint-0000002a" for round 42.
std::string CheckpointName(uint32_t round);
// Nothing for other names.
std::optional<uint32_t> CheckpointRound(std::string_view name);

// The kinds of extents that are the shard's own. Stored: unchangeable.
inline constexpr auto kShardExtent = static_cast<ExtentKind>(16);
inline constexpr auto kSpaceListExtent = static_cast<ExtentKind>(17);
inline constexpr auto kSessionsExtent = static_cast<ExtentKind>(18);
inline constexpr auto kShardEndExtent = static_cast<ExtentKind>(19);

// The body of kShardExtent.
struct ShardExtent {
  uint32_t round;
  uint16_t shard;
  uint16_t shards;  // that there were
  uint64_t latest_stamp;
  uint32_t spaces;  // listed; those that follow as a whole are as many
  uint32_t zero;
};
static_assert(sizeof(ShardExtent) == 24);

// One space in the body of kSpaceListExtent; the name follows, padded to 8.
struct ListedSpace {
  SpaceDefinition definition;  // all zero: it was dropped, and no saved space follows
  uint8_t name_bytes;
  uint8_t birth[7];  // without its lowest 8 bits, which are all set; 0: never dropped, or forgotten
};
static_assert(sizeof(ListedSpace) == 16);

// What has a stamp up to that is of an earlier incarnation of the space, and gone.
CommitStamp BirthOf(const ListedSpace& listed);
void SetBirth(CommitStamp birth, ListedSpace* listed);

// One session in the body of kSessionsExtent.
struct SavedSession {
  uint64_t id;
  uint64_t last_sequence;  // that was answered
  int64_t last_active_unix_ns;
  uint32_t space;  // its place in the list
  uint32_t zero;
};
static_assert(sizeof(SavedSession) == 32);

// The body of kShardEndExtent: what came before it.
struct ShardEndExtent {
  uint64_t sessions;
  uint32_t spaces;
  uint32_t zero;
};
static_assert(sizeof(ShardEndExtent) == 16);

// Writes an extent of one of these kinds: header, body, CRC. `to` has the body already, behind
// sizeof(ExtentHeader), padded to 8. Returns the extent's bytes.
size_t SealShardExtent(ExtentKind kind, uint32_t count, size_t body_bytes, std::byte* to);
// The checked body of a whole extent of one of these kinds, or nothing.
std::optional<std::span<const std::byte>> OpenShardExtent(std::span<const std::byte> extent,
                                                          ExtentHeader* header);

// Reads a file's extents one after the other, ahead of the caller.
//
// Thread safety: one thread. While it is in use the disk's completions are its own. Allocates in
// Open.
class CheckpointReader {
 public:
  // `disk` outlives it.
  explicit CheckpointReader(Disk* disk) : disk_(disk) {}
  CheckpointReader(const CheckpointReader&) = delete;
  CheckpointReader& operator=(const CheckpointReader&) = delete;
  ~CheckpointReader();

  // `bytes`: as the manifest says.
  Result<void> Open(const std::string& name, uint64_t bytes);
  enum class Step : uint8_t { kExtent, kPending, kEnd };
  // kExtent: one whole extent, valid until the next call; not checked beyond its length. Errors:
  // kCorrupt naming file and offset; those of the disk.
  Result<Step> Next(std::span<const std::byte>* extent);
  // Of the extent that came last.
  uint64_t offset() const { return extent_offset_; }
  uint64_t bytes() const { return bytes_; }
  // "DIRECTORY/NAME at offset N".
  std::string Place() const;

 private:
  static constexpr size_t kReadBytes = size_t{4} << 20;

  // What is left of one part goes in front of the next one, so that extents lie whole.
  struct Part {
    std::vector<std::byte> memory;  // kMaxExtentBytes, then kReadBytes or the file
    uint64_t offset = 0;            // in the file, of the bytes that were read
    size_t bytes = 0;
    bool ready = false;
  };

  bool ReadPart(Part* part);
  Result<void> TakeCompletions();

  Disk* const disk_;
  std::string name_;
  std::optional<FileId> file_;
  uint64_t bytes_ = 0;
  uint64_t asked_ = 0;  // up to this offset reads were begun
  std::array<Part, 2> parts_;
  size_t current_ = 0;
  std::span<const std::byte> left_;  // of the current part
  uint64_t extent_offset_ = 0;
  uint64_t next_offset_ = 0;
  uint32_t under_way_ = 0;
  int error_ = 0;
};

}  // namespace engram
