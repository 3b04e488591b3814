#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>

#include "src/core/observation.h"
#include "src/core/refusal_reason.h"
#include "src/core/space_command.h"

// The grammar of FORMAT.md as code: layouts, their constants, sealing and checking of frames.
// Shared by the daemon and its clients.

namespace engram {

inline constexpr uint32_t kFrameMagic = 0x31474E45;  // "ENG1"
inline constexpr uint8_t kFrameVersion = 1;
inline constexpr uint32_t kMaxFrameBodyBytes = 1u << 20;

enum class FrameType : uint8_t {
  kHello = 1,
  kHelloAck = 2,
  kObserve = 3,
  kAck = 4,
  kNak = 5,
  kFlow = 6,
  kRecall = 7,
  kResult = 8,
  kPing = 9,
  kClose = 10,
  kIntrospect = 11,
  kIntrospection = 12,
  kCommand = 13,
  kCommandDone = 14,
  kScroll = 15,
  kScrolled = 16,
  kCheck = 17,
  kChecked = 18,
};

struct FrameHeader {
  uint32_t magic = kFrameMagic;
  uint8_t version = kFrameVersion;
  FrameType type = FrameType::kPing;
  uint16_t flags = 0;
  uint32_t length = 0;
  uint32_t crc = 0;
  uint64_t session = 0;
  uint64_t sequence = 0;
};
static_assert(sizeof(FrameHeader) == 32);
inline constexpr size_t kFrameHeaderBytes = sizeof(FrameHeader);

inline constexpr uint16_t kFrameFlagMore = 1;         // result, introspection
inline constexpr uint16_t kFrameFlagPingAnswer = 1;   // ping
inline constexpr uint16_t kFrameFlagWithPayload = 1;  // recall, scroll
inline constexpr uint16_t kFrameFlagWithVector = 2;   // recall, scroll
inline constexpr uint16_t kFrameFlagSnapshot = 4;     // recall
inline constexpr uint16_t kFrameFlagFiltered = 8;     // recall
inline constexpr uint16_t kFrameFlagBounded = 16;     // recall
inline constexpr uint16_t kFrameFlagAcross = 32;      // recall: of all spaces
inline constexpr uint16_t kFrameFlagAtTime = 64;      // recall: at the snapshot of a moment
inline constexpr uint32_t kFeatureNoSession = 1;      // hello
inline constexpr uint32_t kFeatureAttributes = 2;     // hello: attributes and filters
inline constexpr uint32_t kFeatureWideRecalls = 4;    // hello: bounds, all spaces, no vector
inline constexpr uint32_t kFeatureNeverGoesBack = 8;  // hello: what is refused uses up its number
inline constexpr uint32_t kFeatureFlow = 16;          // hello: flow frames
inline constexpr uint32_t kFeatureSnapshotTime = 32;  // hello: recalls at a moment
inline constexpr uint8_t kNakFlagConsumed = 1;
inline constexpr uint8_t kNakFlagClosing = 2;

struct HelloBody {
  uint32_t features = 0;
  uint16_t dimension = 0;
  Metric metric = Metric::kUnspecified;
  Priority priority = Priority::kNormal;
  uint8_t space_bytes = 0;
  uint8_t zero[3] = {};
};
static_assert(sizeof(HelloBody) == 12);

struct HelloAckBody {
  uint32_t features = 0;
  uint16_t dimension = 0;
  Metric metric = Metric::kUnspecified;
  Priority priority = Priority::kNormal;
  uint64_t credit = 0;
  uint32_t max_frame_bytes = kMaxFrameBodyBytes;
  uint32_t max_recalls = 0;
};
static_assert(sizeof(HelloAckBody) == 24);

struct ObserveBody {
  uint16_t count = 0;
  PayloadKind payload_kind = PayloadKind::kOpaque;  // of all records
  uint8_t zero = 0;
};
static_assert(sizeof(ObserveBody) == 4);

struct RecordHeader {
  uint32_t record_bytes = 0;
  ObservationOp op = ObservationOp::kUpsert;
  VectorDtype dtype = VectorDtype::kNone;
  uint16_t dimension = 0;
  uint16_t id_bytes = 0;
  uint16_t attribute_bytes = 0;
  uint32_t payload_bytes = 0;
  float scale = 1;
  float confidence = 1;
  int64_t when_ns = 0;
};
static_assert(sizeof(RecordHeader) == 32);

struct AckBody {
  uint64_t credit = 0;
};

struct NakBody {
  RefusalReason reason = RefusalReason::kNone;
  FrameType refused_type = FrameType::kObserve;
  uint8_t flags = 0;
  uint32_t retry_after_ms = 0;
  uint64_t expected = 0;
  uint16_t text_bytes = 0;
  uint16_t zero[3] = {};
};
static_assert(sizeof(NakBody) == 24);

enum class FlowAction : uint8_t {
  kPause = 1,
  kResume = 2,
  kSlowDown = 3,
  kSpeedUp = 4,
  kBufferStatus = 5,
};

// A client's flow frame: how it takes answers from now on.
struct FlowRequestBody {
  FlowAction action = FlowAction::kPause;
  uint8_t zero[3] = {};
  int32_t buffer_remaining = 0;  // kBufferStatus: result frames that it has room for
  float preferred_rate = 0;      // kSlowDown, kSpeedUp: result frames a second
  uint32_t zero2 = 0;
};
static_assert(sizeof(FlowRequestBody) == 16);

enum class FlowState : uint8_t {
  kActive = 1,
  kPaused = 2,
  kBackpressure = 3,
  kOverloaded = 4,
  kError = 5,
  kClosed = 6,
};

// The server's.
struct FlowBody {
  FlowState state = FlowState::kActive;
  uint8_t zero[3] = {};
  uint32_t retry_after_ms = 0;
  uint32_t queue_depth = 0;     // observations under way
  uint32_t queue_capacity = 0;  // that there may be
  float pressure = 0;           // 0 to 1
  float preferred_rate = 0;     // result frames a second at most; 0: no bound
};
static_assert(sizeof(FlowBody) == 24);

// The vector follows; where there is a bound then a float, at a moment then that in nanoseconds
// since 1970, and in a filtered recall the filter's length, of two bytes, and the filter.
struct RecallBody {
  uint32_t k = 0;
  uint32_t ef = 0;
  uint16_t dimension = 0;
  VectorDtype dtype = VectorDtype::kNone;
  uint8_t zero = 0;
  float scale = 1;
};
static_assert(sizeof(RecallBody) == 16);

struct ResultBody {
  uint16_t count = 0;
  Metric metric = Metric::kUnspecified;
  uint8_t zero = 0;
  uint32_t zero2 = 0;
  uint64_t snapshot = 0;  // the stamp at which the hits lived; 0: none was asked for
};
static_assert(sizeof(ResultBody) == 16);

enum class IntrospectWhat : uint8_t {
  kSpaces = 1,
  kStatus = 2,
  kCheckpoint = 3,  // asks for a checkpoint; the answer is an empty text
  kHold = 4,        // no checkpoint is made and no file of the logs goes for kHoldNs; likewise
  kRelease = 5,     // ends it; likewise
};

inline constexpr int64_t kHoldNs = 10'000'000'000;

struct IntrospectBody {
  IntrospectWhat what = IntrospectWhat::kSpaces;
};

struct IntrospectionBody {
  uint16_t count = 0;
  IntrospectWhat what = IntrospectWhat::kSpaces;
  uint8_t zero = 0;
  uint32_t zero2 = 0;
};
static_assert(sizeof(IntrospectionBody) == 8);

// A page of a space's live observations.
struct ScrollBody {
  uint64_t cursor = 0;     // as `scrolled` gave it; 0: from the start of the partition
  uint16_t partition = 0;  // likewise
  uint16_t limit = 0;      // 1 to kMaxScrollHits
  uint32_t zero = 0;
};
static_assert(sizeof(ScrollBody) == 16);
inline constexpr uint16_t kMaxScrollHits = 512;
// With payload at most so many come, however many are asked for: all their payloads fit one answer,
// and one more that has the same hash.
inline constexpr uint16_t kMaxScrollHitsWithPayload = kMaxAnswerPayloadBytes / kMaxPayloadBytes - 1;

// Ends the answer to a scroll.
struct ScrolledBody {
  uint64_t cursor = 0;      // where the next page begins,
  uint16_t partition = 0;   // in this partition
  uint16_t partitions = 0;  // that the space has now
  uint8_t ended = 0;        // 1: that was all
  uint8_t zero[3] = {};
};
static_assert(sizeof(ScrolledBody) == 16);

// A slice of a check of the space's invariants in one shard.
struct CheckBody {
  uint16_t shard = 0;
  uint8_t zero[6] = {};
  std::array<std::byte, kCheckStateBytes> state{};  // as `checked` gave it; zeros: from the start
};
static_assert(sizeof(CheckBody) == 8 + kCheckStateBytes);

// Its answer; a text of text_bytes follows, which says what is wrong.
struct CheckedBody {
  CheckOutcome outcome = CheckOutcome::kMore;
  uint8_t zero[3] = {};
  uint16_t text_bytes = 0;
  uint16_t zero2 = 0;
  std::array<std::byte, kCheckStateBytes> state{};
};
static_assert(sizeof(CheckedBody) == 8 + kCheckStateBytes);

// Something that is done to a whole space; its name of space_bytes follows.
struct CommandBody {
  SpaceCommand what = SpaceCommand::kCompact;
  uint8_t space_bytes = 0;
  uint8_t zero[6] = {};
};
static_assert(sizeof(CommandBody) == 8);

// Its answer, over all shards.
struct CommandDoneBody {
  SpaceCommand what = SpaceCommand::kCompact;
  uint8_t zero[7] = {};
  uint64_t observations = 0;  // swept, dropped, or linked anew
  uint64_t bytes_before = 0;  // of memory that the space took
  uint64_t bytes_after = 0;
};
static_assert(sizeof(CommandDoneBody) == 32);

// Copies a struct of the grammar out of unaligned bytes. The caller has checked the length.
template <typename T>
T LoadAs(const std::byte* bytes) {
  T value;
  std::memcpy(&value, bytes, sizeof(T));
  return value;
}

template <typename T>
std::span<const std::byte> BytesOf(const T& value) {
  return std::as_bytes(std::span<const T, 1>(&value, 1));
}
inline std::span<const std::byte> BytesOf(std::string_view text) {
  return std::as_bytes(std::span<const char>(text.data(), text.size()));
}

// The checksum of a frame: `header.crc` itself does not count. The body is the concatenation of
// `parts`.
uint32_t FrameCrc(const FrameHeader& header, std::span<const std::span<const std::byte>> parts);

// Sets length and crc of `header` for the body that `parts` make together.
void SealFrame(FrameHeader* header, std::span<const std::span<const std::byte>> parts);

// Size of an observation record with these parts, padding included.
constexpr size_t RecordBytes(size_t vector_bytes, size_t id_bytes, size_t payload_bytes,
                             size_t attribute_bytes = 0) {
  return PadTo8(sizeof(RecordHeader) + vector_bytes + id_bytes + attribute_bytes + payload_bytes);
}

// Looks at the fixed header at the start of a stream's next frame. kNone when it may be followed;
// else the reason to close. `bytes` holds at least kFrameHeaderBytes.
RefusalReason CheckFrameHeader(const std::byte* bytes, FrameHeader* header);

// Compares the checksum. `frame` is the whole frame, header first.
RefusalReason CheckFrameCrc(const FrameHeader& header, std::span<const std::byte> frame);

}  // namespace engram
