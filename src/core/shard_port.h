#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "src/core/ids.h"
#include "src/core/observation.h"
#include "src/core/refusal_reason.h"
#include "src/core/slot_slab.h"
#include "src/core/spsc_ring.h"

// What travels between a producer core (ingress, later the gateway) and a shard core.
//
// Forward: the producer copies a request into a slot of its slab and pushes the slot's number on
// one of three lanes. Back: the shard pushes a Completion for each slot exactly once, which also
// gives the slot back; answers that need bytes lie in slots of the shard's own slab, which the
// producer gives back by a ring of its own.

namespace engram {

// The lanes from a producer to a shard, served in this order.
enum class Lane : uint8_t {
  kRecall = 0,  // hellos, recalls, introspection: ahead of every observation
  kHigh = 1,    // observations of sessions with Priority::kHigh
  kNormal = 2,
};
inline constexpr size_t kLanes = 3;

enum class RequestKind : uint8_t { kHello = 1, kObserve, kRecall, kDetach, kIntrospect };

// Names a connection of a producer to the shards, which only hand it back. 0: none.
using Origin = uint64_t;

// Every slot begins with a request of one of the kinds below.
struct RequestHeader {
  RequestKind kind;
};

// Opens or resumes a session, or, without a session, asks what the space is.
// The shard writes its answer into the same slot before it gives it back.
struct HelloRequest {
  RequestHeader header{RequestKind::kHello};
  bool wants_session = true;
  Metric metric = Metric::kUnspecified;
  uint8_t space_bytes = 0;
  uint16_t dimension = 0;  // 0: whatever the space has, or its first observation brings
  Origin origin = 0;
  SessionId session;  // 0: a new one
  // Answer.
  uint32_t session_slot = 0;  // names the session to its shard; only with wants_session
  Sequence last_sequence = 0;
  uint64_t credit = 0;  // sequences that may be sent beyond last_sequence
  std::array<char, kMaxSpaceNameBytes> space{};
};

// One observation. The vector (as received) lies at kRequestBodyOffset, then id, then payload.
struct ObserveRequest {
  RequestHeader header{RequestKind::kObserve};
  ObservationOp op = ObservationOp::kUpsert;
  VectorDtype dtype = VectorDtype::kNone;
  RefusalReason skip_reason = RefusalReason::kNone;  // kSkip: why the number was used up
  uint16_t dimension = 0;
  uint16_t space_dimension = 0;  // answer: what the space has, when reason is kWrongDimension
  uint16_t id_bytes = 0;
  uint32_t payload_bytes = 0;
  uint32_t session_slot = 0;
  SessionId session;
  Sequence sequence = 0;
  Origin origin = 0;
  int64_t when_ns = 0;
  int64_t received_ns = 0;  // producer's monotonic clock
  float confidence = 0;
  float scale = 1;  // of an int8 vector
};

// One recall. The query vector (as received) lies at kRequestBodyOffset.
struct RecallRequest {
  RequestHeader header{RequestKind::kRecall};
  VectorDtype dtype = VectorDtype::kNone;
  bool with_payload = false;
  uint8_t space_bytes = 0;
  uint16_t dimension = 0;
  uint32_t k = 0;
  uint32_t ef = 0;  // 0: the shard's default
  float scale = 1;
  Origin origin = 0;
  uint64_t request_id = 0;
  int64_t received_ns = 0;
  std::array<char, kMaxSpaceNameBytes> space{};
};

// The connection that held a session is gone; the session stays for a resume.
struct DetachRequest {
  RequestHeader header{RequestKind::kDetach};
  uint32_t session_slot = 0;
  SessionId session;
  Origin origin = 0;
};

// Asks for the shard's spaces, answered with SpaceRecords.
struct IntrospectRequest {
  RequestHeader header{RequestKind::kIntrospect};
  Origin origin = 0;
  uint64_t request_id = 0;
};

inline constexpr size_t kRequestBodyOffset = 192;  // A multiple of a cache line.
static_assert(sizeof(HelloRequest) <= kRequestBodyOffset);
static_assert(sizeof(ObserveRequest) <= kRequestBodyOffset);
static_assert(sizeof(RecallRequest) <= kRequestBodyOffset);

enum class CompletionKind : uint8_t {
  kHello = 1,       // slot: the HelloRequest with its answer
  kObserve,         // slot given back; accepted when reason is kNone
  kRecallDone,      // slot given back; the results came before, or reason says why there are none
  kDetach,          // slot given back
  kResults,         // result_slot: a batch of hits; more of them may follow
  kRecords,         // result_slot: a batch of space records; more of them may follow
  kIntrospectDone,  // slot given back
  kFenced,          // no slot: the session of this origin was taken over
  kCredit,          // no slot: more may be sent
};

struct Completion {
  CompletionKind kind = CompletionKind::kObserve;
  bool repeated = false;  // kObserve: the sequence had been taken before; nothing was stored
  RefusalReason reason = RefusalReason::kNone;
  uint32_t retry_after_ms = 0;
  SlotId slot = kNoSlot;         // of the producer's slab
  SlotId result_slot = kNoSlot;  // of the shard's result slab
  Origin origin = 0;
  uint64_t sequence = 0;         // of the observation, or the recall's request id
  uint64_t credit_sequence = 0;  // kObserve, kCredit: the highest sequence that may be sent
};

// Completions of kind kFenced and kCredit carry no slot, so the rings have this much room for them
// beyond one entry a slot. A shard leaves one out while the ring holds as many entries already: for
// credit another one follows, and a fenced session's observations are refused by themselves.
inline constexpr size_t kNoticeRoom = 4'096;

// Begins each slot of the shard's result slab; the records follow at sizeof(ResultBatch).
struct ResultBatch {
  uint32_t body_bytes = 0;  // of the records
  uint16_t count = 0;       // of the records
  Metric metric = Metric::kUnspecified;
  bool last = false;  // nothing follows for this request from this shard
};
static_assert(sizeof(ResultBatch) == 8);
// Holds any one hit: 32 + 256 + 65,536 bytes and padding.
inline constexpr size_t kResultSlotBytes = size_t{66} * 1024;

// The producer's end of the rings to and from one shard.
// alignas: the handles inside are written with every operation and must not share a line with those
// of another core.
struct alignas(kFalseSharingBytes) ProducerLink {
  std::array<SpscRing<SlotId>::Producer, kLanes> lanes;
  SpscRing<Completion>::Consumer completions;
  SpscRing<SlotId>::Producer result_returns;
  const SlotSlab* result_slab = nullptr;
};

// The shard's end of the rings to and from one producer.
// alignas: as above.
struct alignas(kFalseSharingBytes) ShardLink {
  std::array<SpscRing<SlotId>::Consumer, kLanes> lanes;
  SpscRing<Completion>::Producer completions;
  SpscRing<SlotId>::Consumer result_returns;
  const SlotSlab* producer_slab = nullptr;
};

// All that a shard has of the mesh: one link a producer, and the slab for its answers.
struct ShardPort {
  ShardId shard;
  std::vector<ShardLink> producers;
  SlotSlab* result_slab = nullptr;
};

}  // namespace engram
