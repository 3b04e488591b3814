#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "src/core/log_address.h"
#include "src/core/vector_dtype.h"

namespace engram {

static_assert(std::endian::native == std::endian::little,
              "frames are little-endian and are read in place");

inline constexpr size_t kMaxIdBytes = 256;
inline constexpr size_t kMaxPayloadBytes = 65'536;
inline constexpr size_t kMaxSpaceNameBytes = 64;
inline constexpr uint32_t kMaxRecallResults = 10'000;
// Recalls of more results than this may come in stages: all of fewer are there in less than a
// millisecond.
inline constexpr uint32_t kLongRecallFrom = 256;
// k times the dimension, of a recall with vectors: 10,000 results of 1,024 dimensions.
inline constexpr uint32_t kMaxRecallNumbers = kMaxRecallResults * 1'024;
// Of a page of a listing.
inline constexpr uint32_t kMaxPageResults = 1'000;
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

// How a space keeps its vectors. The values are stored: unchangeable.
enum class Precision : uint8_t { kUnspecified = 0, kF32 = 1, kBf16 = 2, kInt8 = 3 };
std::string_view PrecisionName(Precision precision);
// kUnspecified for a name that is not one of f32, bf16, int8.
Precision PrecisionOfName(std::string_view name);

// When an observation of a space is acknowledged. The values are stored: unchangeable.
enum class Durability : uint8_t {
  kUnspecified = 0,
  kFsync = 1,     // it is on stable storage
  kInterval = 2,  // it is written, and flushed from time to time
  kMemory = 3,    // it can be found; it is written when there is time
};

// What a space's graph is walked with.
enum class Traversal : uint8_t {
  kInt8,    // int8 codes; what is found is compared again with the vectors as they are kept
  kExact,   // the vectors as they are kept
  kRabitq,  // codes of one bit a number, where the data are fit for it; what is found is compared
            // again by int8 codes, as with kInt8
};

// The lane on which a session's observations travel. The values are sent: unchangeable.
enum class Priority : uint8_t { kNormal = 0, kHigh = 1 };

// What an observation record asks for. The values are stored and sent: unchangeable.
enum class ObservationOp : uint8_t {
  kUpsert = 1,  // store, replacing what has the same id in the space
  kDelete = 2,  // remove by id; deleting what is not there is no error
  kSkip = 3,    // uses up the sequence number of an observation that was refused
  // Of requests without a session alone; no frame carries them.
  kSuppress = 4,  // hide by id, until it is restored, replaced or deleted
  kRestore = 5,   // bring back what is hidden
};

// 1 to 64 of [a-z0-9_-].
bool IsValidSpaceName(std::string_view name);

// Who wrote an observation's payload, so that who reads it knows its form. The values are stored:
// unchangeable.
enum class PayloadKind : uint8_t {
  kOpaque = 0,   // the client's own bytes
  kEpisode = 1,  // an engram.v1.Episode without its embedding, id and time
  kMemory = 2,   // an engram.v1.Memory without its embedding and id
};

// One neighbour in a recall's answer. Behind it: its vector where that was asked for
// (vector_dimension float32 numbers), id, the name of its space where all were recalled, payload,
// then zeros up to a multiple of 8. The same bytes
// travel from shard to producer and from there to the client, but for hits whose record has to be
// read (kHitAtAddress): these hold a HitReference in place of vector and payload.
struct HitHeader {
  uint32_t hit_bytes;      // this header, vector, id, name, payload and padding
  float score;             // see Metric; 0 where nothing was compared
  int64_t when_ns;         // as the client gave it, nanoseconds since 1970
  uint64_t stamp;          // its commit stamp (commit_stamp.h)
  float confidence;        // as the client gave it
  uint32_t payload_bytes;  // 0 when there is none or it was not asked for
  uint16_t id_bytes;
  uint8_t flags;  // kHitPayloadOmitted, kHitAtAddress
  PayloadKind payload_kind;
  uint16_t vector_dimension;  // 0 when it was not asked for
  uint8_t space_bytes;        // 0 where one space was recalled
  uint8_t reserved;
};
static_assert(sizeof(HitHeader) == 40);
// The payload did not fit in the answer's bound (kMaxRecallPayloadBytes in all of a recall over
// frames, else kMaxAnswerPayloadBytes), or its record cannot be read (then the vector is missing as
// well).
inline constexpr uint8_t kHitPayloadOmitted = 1;
// Inside the appliance only: payload and vector lie in a log. Header, HitReference, id, name,
// padding.
// payload_bytes and vector_dimension are those that the hit will have, 0 where not asked for.
inline constexpr uint8_t kHitAtAddress = 2;
inline constexpr size_t kMaxRecallPayloadBytes = size_t{16} << 20;
inline constexpr size_t kMaxAnswerPayloadBytes = size_t{1} << 20;

// Where a hit's record lies.
struct HitReference {
  LogAddress address;
  uint32_t record_bytes;
  uint32_t has_older_stamp;  // 1: it was restored since, so its record's stamp is an earlier one
};
static_assert(sizeof(HitReference) == 16);

// A check of a space's invariants, slice by slice: what whoever asks carries from one slice to the
// next without looking into it, and what a slice has come to.
inline constexpr size_t kCheckStateBytes = 128;
inline constexpr size_t kMaxCheckTextBytes = 240;
enum class CheckOutcome : uint8_t {
  kMore = 0,     // sound so far
  kSound = 1,    // to the end, counts included
  kChanged = 2,  // to the end, but for the counts: something changed between the slices
  kUnsound = 3,  // the text says what
};

// One space as its shard sees it; the name follows, then zeros up to a multiple of 8, then its
// memory by kind (memory_kinds.h).
struct SpaceRecord {
  uint32_t record_bytes;  // this header and all that follows
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
  uint64_t resident_bytes;  // of memory, rounding included
};
static_assert(sizeof(SpaceRecord) == 56);

constexpr size_t PadTo8(size_t bytes) { return (bytes + 7) & ~size_t{7}; }

// Of a hit's header and what lies before its id.
constexpr size_t HitIdOffset(const HitHeader& header) {
  return sizeof(HitHeader) + ((header.flags & kHitAtAddress) != 0
                                  ? sizeof(HitReference)
                                  : header.vector_dimension * sizeof(float));
}
// The hit's bytes with its vector and payload, without padding.
constexpr size_t UsedHitBytes(const HitHeader& header) {
  return sizeof(HitHeader) + header.vector_dimension * sizeof(float) + header.id_bytes +
         header.space_bytes + header.payload_bytes;
}
constexpr size_t FullHitBytes(const HitHeader& header) { return PadTo8(UsedHitBytes(header)); }

}  // namespace engram
