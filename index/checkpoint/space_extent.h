#pragma once

#include <cstddef>
#include <cstdint>

#include "src/core/ids.h"
#include "src/core/log_address.h"
#include "src/core/observation.h"
#include "src/core/result.h"

namespace engram {

// How a space lies in a checkpoint: index/checkpoint/FORMAT.md as code. Little-endian; each struct
// is copied in and out, so nothing need be aligned.

inline constexpr uint32_t kExtentMagic = 0x31584345;  // the bytes E C X 1
inline constexpr uint16_t kExtentVersion = 3;
inline constexpr uint16_t kOldestExtentVersion = 2;  // that is read
inline constexpr uint16_t kVersionWithAttributes = 3;
inline constexpr size_t kMaxExtentBytes = size_t{256} << 10;
// Places of nodes that one extent may pass over or fill.
inline constexpr uint32_t kMaxExtentSlots = 4'096;

// The values are stored: unchangeable.
enum class ExtentKind : uint8_t { kSpace = 1, kLinks = 2, kNodes = 3, kEnd = 4 };

struct ExtentHeader {
  uint32_t magic = kExtentMagic;
  uint16_t version = kExtentVersion;
  ExtentKind kind = ExtentKind::kSpace;
  uint8_t zero = 0;
  uint32_t bytes = 0;    // of the whole extent, a multiple of 8
  uint32_t crc = 0;      // CRC-32C of all others of these bytes
  uint64_t save = 0;     // the save's hold stamp: the same in all extents of one save
  uint32_t ordinal = 0;  // 0, 1, 2, ... in one save
  uint32_t first = 0;    // kLinks, kNodes: the nodes from first to before first + slots
  uint32_t slots = 0;
  uint32_t count = 0;  // of these, how many are in it
};
static_assert(sizeof(ExtentHeader) == 40);
inline constexpr size_t kExtentCrcOffset = 12;

// Of a row in memory, in a node: int8 rows are padded with zeros to whole lines.
constexpr size_t SavedRowBytes(size_t row_bytes) { return (row_bytes + 63) / 64 * 64; }

// What an int8 row has behind its numbers, in a node. In memory it is an Int8Trailer.
struct SavedTrailer {
  double scale;
  double squared_norm;  // scale * scale * the sum of the squares of the int8 numbers
  int32_t sum;
  uint8_t zero[12];
};
static_assert(sizeof(SavedTrailer) == 32);

// The body of kSpace; the name follows, padded.
struct SpaceExtent {
  uint64_t latest_stamp;
  uint32_t dimension;  // 0: no observation has settled it
  uint32_t node_count;
  uint32_t code_row_bytes;   // 0 without a dimension
  uint32_t exact_row_bytes;  // 0 where there is none beside the code
  uint16_t M;
  uint16_t M0;
  Metric metric;
  Precision precision;
  uint8_t traversal;  // kSavedInt8Traversal or kSavedExactTraversal
  uint8_t flags;      // kSavedPayload
  uint16_t name_bytes;
  uint8_t zero[6];
};
static_assert(sizeof(SpaceExtent) == 40);
// The values are stored: unchangeable.
inline constexpr uint8_t kSavedInt8Traversal = 1;
inline constexpr uint8_t kSavedExactTraversal = 2;
inline constexpr uint8_t kSavedPayload = 1;

// What a saved node was. The values are stored: unchangeable.
enum class SavedState : uint8_t {
  kLive = 1,
  kHidden = 2,
  kTombstone = 3,
  kRetired = 4,     // updated or deleted, but a part of the graph
  kSuppressed = 5,  // ended by a suppress during the save: live until that is replayed
};
inline constexpr uint8_t kSavedWasHidden = 1;
inline constexpr uint8_t kSavedAttributes = 2;

// The lists of one node of the graph, in the body of kLinks. Then, padded, link_words of 4 bytes:
// for each level from 0 up the number of places and these.
struct SavedLinks {
  uint32_t node;
  uint32_t parent;  // in the tree; kNoNode: the root
  uint32_t link_words;
  uint8_t level;
  uint8_t zero[3];
};
static_assert(sizeof(SavedLinks) == 16);

// One node in the body of kNodes. Then, each padded: code row, exact row, id and, where it lies in
// no log, payload; with kSavedAttributes the bytes of the attributes (u16), and these.
struct SavedNode {
  uint64_t begin;    // stamp
  uint64_t end;      // stamp; kOpenStamp while it lives
  uint64_t content;  // stamp; another than begin with kSavedWasHidden
  int64_t when_ns;
  LogAddress origin;
  uint32_t saved_bytes;  // this header and all that follows
  uint32_t node;
  uint32_t payload_bytes;
  float confidence;
  uint16_t id_bytes;
  SavedState state;
  uint8_t flags;
  PayloadKind payload_kind;
  uint8_t zero;
  uint16_t record_words;  // of 8 bytes, of the record at origin; 0: in no log

  // Of id and payload, as they lie in the extent.
  constexpr size_t text_bytes() const {
    return size_t{id_bytes} + (record_words == 0 ? payload_bytes : 0);
  }
};
static_assert(sizeof(SavedNode) == 64);

// The body of kEnd. Where something was evicted, the stamp of the latest such content follows
// (u64): nothing with that stamp or an earlier one is there, or stored again.
struct EndExtent {
  uint64_t nodes;
  uint64_t linked;  // nodes with links
  uint64_t latest_stamp;
  uint32_t entry_point;  // kNoNode without a graph
  uint8_t has_graph;
  uint8_t zero[3];
};
static_assert(sizeof(EndExtent) == 32);

}  // namespace engram
