#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace engram {

// What a refusal does to the session's sequence and to the connection.
enum class RefusalEffect : uint8_t {
  kConsumes,  // the observation can never be taken: its sequence number is used up
  kWaits,     // no room now: the client sends the same number again after retry_after
  kAnswers,   // the request is answered with the refusal; nothing else changes
  kCloses,    // the byte stream can no longer be trusted: the connection ends
};

// The one table of refusals: code on the wire (never changed, never reused), name, effect, and the
// operator's text. Lives in core because ingress cores and shards both refuse.
#define ENGRAM_REFUSAL_REASONS(X)                                                                 \
  X(1, kBadMagic, "bad_magic", kCloses, "the frame does not begin with the bytes ENG1")           \
  X(2, kBadVersion, "bad_version", kCloses, "the frame's version is not 1")                       \
  X(3, kBadType, "bad_type", kCloses, "the frame's type is not one that a client sends")          \
  X(4, kFrameTooLong, "frame_too_long", kCloses, "the frame's length is over max_frame_bytes")    \
  X(5, kBadCrc, "bad_crc", kCloses, "the frame's CRC32C does not match its bytes")                \
  X(6, kBadFrame, "bad_frame", kCloses, "the frame's body does not follow the grammar")           \
  X(7, kHelloRequired, "hello_required", kCloses, "send hello and await hello_ack first")         \
  X(8, kHelloRepeated, "hello_repeated", kCloses, "a connection says hello once")                 \
  X(9, kHandshakeTimeout, "handshake_timeout", kCloses, "no hello arrived in time")               \
  X(10, kIdleTimeout, "idle_timeout", kCloses, "nothing arrived for too long; send ping")         \
  X(11, kFrameTimeout, "frame_timeout", kCloses, "a frame was begun and not finished in time")    \
  X(12, kSlowReader, "slow_reader", kCloses, "answers were not read; read while sending")         \
  X(13, kConnectionLimit, "connection_limit", kCloses, "too many connections; try again later")   \
  X(14, kShuttingDown, "shutting_down", kCloses, "the daemon is stopping; connect again later")   \
  X(15, kPartialFrameLimit, "partial_frame_limit", kCloses,                                       \
    "memory for unfinished frames ran out and this one was the oldest")                           \
  X(16, kRecovering, "recovering", kCloses, "the daemon reads its log; connect again later")      \
  X(20, kWrongDimension, "wrong_dimension", kConsumes,                                            \
    "the vector's dimension is not the space's, or not 1 to 4096")                                \
  X(21, kNotFinite, "not_finite", kConsumes, "the vector has a NaN or an infinity")               \
  X(22, kZeroVector, "zero_vector", kConsumes, "a zero vector has no direction under cosine")     \
  X(23, kBadDtype, "bad_dtype", kConsumes, "the vector's dtype is not f32, f16, bf16 or int8")    \
  X(24, kBadId, "bad_id", kConsumes, "the id is empty or longer than 256 bytes")                  \
  X(25, kPayloadTooLarge, "payload_too_large", kConsumes, "the payload is over 65536 bytes")      \
  X(26, kBadScale, "bad_scale", kConsumes, "an int8 vector's scale must be finite and above 0")   \
  X(27, kBadConfidence, "bad_confidence", kConsumes, "confidence must be within 0 and 1")         \
  X(28, kBadOperation, "bad_operation", kConsumes, "the record's operation is not known")         \
  X(29, kBadAttributes, "bad_attributes", kConsumes,                                              \
    "attributes are at most 64 in 4096 bytes, a key at most 64 bytes and a value 255, a tag 1")   \
  X(30, kBadField, "bad_field", kConsumes,                                                        \
    "a field of the observation is not what its API expects")                                     \
  X(40, kQueueFull, "queue_full", kWaits, "the ring to the shard is full")                        \
  X(41, kSlotsExhausted, "slots_exhausted", kWaits, "no slot of that size is free")               \
  X(42, kBacklogFull, "backlog_full", kWaits, "the space has too many unlinked observations")     \
  X(43, kMemoryFull, "memory_full", kWaits, "the shard's memory limit is reached")                \
  X(44, kDiskFull, "disk_full", kWaits, "the log has no room on its disk; free some, or delete")  \
  X(45, kDiskFailing, "disk_failing", kWaits, "the disk of the log fails; see the daemon's log")  \
  X(46, kLogBusy, "log_busy", kWaits, "the disk is slower than what is sent")                     \
  X(47, kQuotaObservations, "quota_observations", kWaits,                                         \
    "the space has as many observations as quota_observations allows; delete some, raise it, or " \
    "set quota_when_full = \"evict_oldest\"")                                                     \
  X(48, kQuotaMemory, "quota_memory", kWaits,                                                     \
    "the space takes as much memory as quota_mib allows; delete some, raise it, or set "          \
    "quota_when_full = \"evict_oldest\"")                                                         \
  X(49, kSpaceDropping, "space_dropping", kWaits, "the space is being dropped; try again soon")   \
  X(50, kPaused, "paused", kWaits, "the session is paused; send resume, then this number again")  \
  X(60, kSequenceGap, "sequence_gap", kAnswers, "send the expected sequence number next")         \
  X(61, kSessionExpired, "session_expired", kCloses, "the session is not known; begin a new one") \
  X(62, kFenced, "fenced", kCloses, "another connection took over this session")                  \
  X(63, kSessionLimit, "session_limit", kCloses, "too many sessions on the shard")                \
  X(64, kSpaceLimit, "space_limit", kCloses, "too many spaces on the shard")                      \
  X(65, kBadSpaceId, "bad_space_id", kCloses, "a space id is 1 to 64 of [a-z0-9_-]")              \
  X(66, kMetricMismatch, "metric_mismatch", kCloses, "the space has another metric")              \
  X(67, kDimensionMismatch, "dimension_mismatch", kCloses, "the space has another dimension")     \
  X(68, kUnknownSpace, "unknown_space", kAnswers, "the space holds nothing yet")                  \
  X(69, kBadRecall, "bad_recall", kAnswers,                                                       \
    "a recall's k is 1 to 10000, with vectors k times the dimension at most 10240000, and its "   \
    "ef 0 to 10000; a scroll's limit is 1 to 512 and its partition one of the space's; a "        \
    "check's shard is one of the daemon's")                                                       \
  X(70, kNoSession, "no_session", kAnswers, "this connection's hello asked for no session")       \
  X(71, kSessionSpaceMismatch, "session_space_mismatch", kCloses,                                 \
    "the session belongs to another space")                                                       \
  X(72, kBusy, "busy", kAnswers,                                                                  \
    "one such request of this connection, or a rebuild of this space, is still under way")        \
  X(73, kMergesFull, "merges_full", kWaits,                                                       \
    "too many recalls, scrolls or checks are under way; ask again")                               \
  X(74, kDeadlinePassed, "deadline_passed", kAnswers, "the request's deadline passed")            \
  X(75, kCancelled, "cancelled", kAnswers, "whoever asked has gone")                              \
  X(76, kSnapshotTooOld, "snapshot_too_old", kAnswers,                                            \
    "what lived at that time is no longer kept; take a later snapshot")                           \
  X(77, kBadFilter, "bad_filter", kAnswers,                                                       \
    "a filter has at most 16 clauses and 64 values in 4096 bytes, and follows the grammar")       \
  X(78, kUnknownFilterKey, "unknown_filter_key", kAnswers,                                        \
    "the space keeps no such key; list it in filter_keys of the configuration")                   \
  X(79, kBadFlow, "bad_flow", kAnswers,                                                           \
    "a flow's action is 1 to 5 and its preferred_rate a number of 0 or more, and its hello asks " \
    "for flow")

enum class RefusalReason : uint16_t {
  kNone = 0,
#define ENGRAM_X(code, name, text_name, effect, text) name = code,
  ENGRAM_REFUSAL_REASONS(ENGRAM_X)
#undef ENGRAM_X
};

// Codes are below this; a counter per code is an array of this size.
inline constexpr size_t kRefusalCodes = 80;

struct RefusalInfo {
  RefusalReason reason = RefusalReason::kNone;
  std::string_view name;  // as in counters and in engramctl's output
  RefusalEffect effect = RefusalEffect::kAnswers;
  std::string_view text;  // what it means and what to do, for a person
};

inline constexpr auto kRefusals = std::to_array<RefusalInfo>({
#define ENGRAM_X(code, name, text_name, effect, text) \
  {RefusalReason::name, text_name, RefusalEffect::effect, text},
    ENGRAM_REFUSAL_REASONS(ENGRAM_X)
#undef ENGRAM_X
});

// The table's row, or one named "unknown" for a code that is not in it.
constexpr RefusalInfo DescribeRefusal(RefusalReason reason) {
  for (const RefusalInfo& info : kRefusals) {
    if (info.reason == reason) return info;
  }
  return {reason, "unknown", RefusalEffect::kAnswers, "a reason that this version does not know"};
}

constexpr bool HasEffect(RefusalReason reason, RefusalEffect effect) {
  return DescribeRefusal(reason).effect == effect;
}

}  // namespace engram
