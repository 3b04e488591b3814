#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "src/core/vector_dtype.h"

namespace engram {

static_assert(std::endian::native == std::endian::little,
              "frames are little-endian and are read in place");

inline constexpr size_t kMaxIdBytes = 256;
inline constexpr size_t kMaxPayloadBytes = 65'536;
inline constexpr size_t kMaxSpaceNameBytes = 64;
inline constexpr uint32_t kMaxRecallResults = 1'000;
inline constexpr uint32_t kMaxEf = 10'000;

// How near two vectors are. The values are stored and sent: unchangeable.
enum class Metric : uint8_t {
  kUnspecified = 0,
  kCosine = 1,        // score = cosine of the angle, -1 to 1, higher is nearer
  kInnerProduct = 2,  // score = inner product, higher is nearer
  kL2 = 3,            // score = squared Euclidean distance, lower is nearer
};
std::string_view MetricName(Metric metric);

// kUnspecified for a name that is not one of cosine, ip, l2.
Metric MetricOfName(std::string_view name);

// The lane on which a session's observations travel. The values are sent: unchangeable.
enum class Priority : uint8_t { kNormal = 0, kHigh = 1 };

// What an observation record asks for. The values are stored and sent: unchangeable.
enum class ObservationOp : uint8_t {
  kUpsert = 1,  // store, replacing what has the same id in the space
  kDelete = 2,  // remove by id; deleting what is not there is no error
  kSkip = 3,    // inside the appliance only: the sequence number of an observation that was refused
};

// 1 to 64 of [a-z0-9_-].
bool IsValidSpaceName(std::string_view name);

// One neighbour in a recall's answer; id and payload follow, then zeros up to a multiple of 8.
// The same bytes travel from shard to ingress core and from there to the client.
struct HitHeader {
  uint32_t hit_bytes;      // this header, id, payload and padding
  float score;             // see Metric
  int64_t when_ns;         // as the client gave it, nanoseconds since 1970
  float confidence;        // as the client gave it
  uint32_t payload_bytes;  // 0 when there is none or it was not asked for
  uint16_t id_bytes;
  uint16_t flags;  // kHitPayloadOmitted
  uint32_t reserved;
};
static_assert(sizeof(HitHeader) == 32);
// The payload did not fit in the answer's bound (kMaxResultPayloadBytes in all).
inline constexpr uint16_t kHitPayloadOmitted = 1;
inline constexpr size_t kMaxResultPayloadBytes = size_t{1} << 20;

// One space as its shard sees it; the name follows, then zeros up to a multiple of 8.
struct SpaceRecord {
  uint32_t record_bytes;  // this header, name and padding
  uint16_t shard;
  uint16_t dimension;  // 0 until the first observation
  Metric metric;
  uint8_t name_bytes;
  uint16_t reserved;
  uint32_t reserved2;
  uint64_t observations;    // live ones
  uint64_t linked;          // of these, in the graph
  uint64_t unlinked;        // of these, found by exact scan
  uint64_t retired;         // updated or deleted, still holding a place in the graph
  uint64_t resident_bytes;  // vectors, links, ids, payload, rounding included
};
static_assert(sizeof(SpaceRecord) == 56);

constexpr size_t PadTo8(size_t bytes) { return (bytes + 7) & ~size_t{7}; }

}  // namespace engram
