#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "src/core/commit_stamp.h"
#include "src/core/ids.h"
#include "src/core/log_address.h"
#include "src/core/observation.h"
#include "src/core/refusal_reason.h"
#include "src/core/slot_slab.h"
#include "src/core/space_catalogue.h"
#include "src/core/space_command.h"
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

enum class RequestKind : uint8_t {
  kHello = 1,
  kObserve,
  kRecall,
  kDetach,
  kIntrospect,
  kGet,     // observations by id
  kScroll,  // all observations, a page at a time
  kCheck,   // a slice of a check of a space's invariants
  kCommand,
};

// Names a connection of a producer to the shards, which only hand it back. 0: none.
using Origin = uint64_t;

// Every slot begins with a request of one of the kinds below.
struct RequestHeader {
  RequestKind kind;
  // The one byte that the producer may still write once the slot was pushed (CancelRequest):
  // whoever asked has gone. Recalls, gets and scrolls end with kCancelled; an observation that was
  // not taken yet is not taken.
  uint8_t cancelled = 0;
  // On the monotonic clock; past it the request is answered with kDeadlinePassed. 0: none.
  int64_t deadline_ns = 0;
};

inline void CancelRequest(std::byte* slot) {
  auto* header = reinterpret_cast<RequestHeader*>(slot);
  std::atomic_ref<uint8_t>(header->cancelled).store(1, std::memory_order_relaxed);
}
inline bool IsCancelled(const RequestHeader& header) {
  return std::atomic_ref<uint8_t>(const_cast<uint8_t&>(header.cancelled))
             .load(std::memory_order_relaxed) != 0;
}

// The space that a request names.
struct SpaceName {
  uint8_t bytes = 0;
  std::array<char, kMaxSpaceNameBytes> text{};

  SpaceName() = default;
  // At most kMaxSpaceNameBytes.
  explicit SpaceName(std::string_view name) : bytes(static_cast<uint8_t>(name.size())) {
    name.copy(text.data(), text.size());
  }
  std::string_view view() const { return {text.data(), bytes}; }
};

// Opens or resumes a session, or, without a session, asks what the space is.
// The shard writes its answer into the same slot before it gives it back.
struct HelloRequest {
  RequestHeader header{RequestKind::kHello};
  bool wants_session = true;
  Metric metric = Metric::kUnspecified;
  uint16_t dimension = 0;  // 0: whatever the space has, or its first observation brings
  Origin origin = 0;
  SessionId session;  // 0: a new one
  // Answer.
  uint32_t session_slot = 0;  // names the session to its shard; only with wants_session
  Sequence last_sequence = 0;
  uint64_t credit = 0;  // sequences that may be sent beyond last_sequence
  SpaceName space;
};

// One observation. The vector (as received) lies at kRequestBodyOffset, then id, then attributes
// (attributes.h), then payload (which may be missing where shards hand on what lies in a log).
// Without a session (0) it stands alone: no sequence, no credit, and the space is named. It then
// goes to the shard that owns the id (SpaceCatalogue).
struct ObserveRequest {
  RequestHeader header{RequestKind::kObserve};
  ObservationOp op = ObservationOp::kUpsert;
  VectorDtype dtype = VectorDtype::kNone;
  RefusalReason skip_reason = RefusalReason::kNone;  // kSkip: why the number was used up
  uint16_t dimension = 0;
  uint16_t space_dimension = 0;  // answer: what the space has, when reason is kWrongDimension
  uint16_t id_bytes = 0;
  PayloadKind payload_kind = PayloadKind::kOpaque;
  bool existed = false;  // answer, without a session: there was an observation with this id
  // The next number of the session or a later one: those between were refused and do not come any
  // more.
  bool may_skip = false;
  uint32_t payload_bytes = 0;
  uint16_t attribute_bytes = 0;
  uint32_t session_slot = 0;
  SessionId session;
  Sequence sequence = 0;  // without a session: the producer's own number, handed back
  CommitStamp stamp = 0;  // answer, without a session
  Origin origin = 0;
  int64_t when_ns = 0;
  int64_t received_ns = 0;  // producer's monotonic clock
  float confidence = 0;
  float scale = 1;                     // of an int8 vector
  SpaceName space;                     // without a session
  LogAddress address = kNoLogAddress;  // its home shard's: where it lies in the log
  uint32_t record_bytes = 0;           // there; 0 without a log
};

// One recall. The query vector (as received) lies at kRequestBodyOffset, then a filter
// (attributes.h) of filter_bytes.
struct RecallRequest {
  RequestHeader header{RequestKind::kRecall};
  VectorDtype dtype = VectorDtype::kNone;
  bool with_payload = false;
  bool with_vector = false;
  uint16_t dimension = 0;
  uint16_t filter_bytes = 0;  // 0: none
  uint32_t k = 0;
  uint32_t ef = 0;  // 0: the shard's default
  // Of a long recall (IsLong): about so many of the nearest are looked for by themselves and come
  // ahead of the others. 0: none.
  uint32_t first = 0;
  // Of all spaces that have the metric and the dimension. `space` does not matter then, each hit
  // names its own, nothing comes ahead, and what a filter asks for a space may not keep.
  bool across = false;
  Metric metric = Metric::kUnspecified;
  // Only what is at least as near as this score.
  bool has_bound = false;
  float bound = 0;
  // Of all hits together; payloads beyond are left out.
  uint32_t max_payload_bytes = kMaxAnswerPayloadBytes;
  float scale = 1;
  Origin origin = 0;
  uint64_t request_id = 0;
  int64_t received_ns = 0;
  CommitStamp snapshot = kNoStamp;  // what lived at this stamp; kNoStamp: what lives now
  SpaceName space;

  // Comes in stages, the first of which ends a batch with BatchEnd::kFirst.
  bool IsLong() const { return !across && first > 0 && k > kLongRecallFrom && first < k; }
};

// One observation by its id, which lies at kRequestBodyOffset. Answered like a recall, with at most
// one hit. Goes to every shard that may hold the id.
struct GetRequest {
  RequestHeader header{RequestKind::kGet};
  bool with_payload = true;
  bool with_vector = false;
  uint16_t id_bytes = 0;
  Origin origin = 0;
  uint64_t request_id = 0;
  SpaceName space;
};

// A page of a partition's observations, in the order of a hash of their ids: each that lives from
// the first page to the last comes once, also if it is updated meanwhile. Answered like a recall,
// with about `limit` hits.
struct ScrollRequest {
  RequestHeader header{RequestKind::kScroll};
  bool with_payload = true;
  bool with_vector = false;
  uint16_t limit = 100;  // 1 to kMaxPageResults
  Origin origin = 0;
  uint64_t request_id = 0;
  uint64_t cursor = 0;  // 0: from the start. Answer: where the next page begins, 0: that was all
  SpaceName space;
};

// A slice of a check of a space's invariants. At kRequestBodyOffset: kCheckStateBytes of state,
// which the shard replaces by the next one, then room for kMaxCheckTextBytes of text.
struct CheckRequest {
  RequestHeader header{RequestKind::kCheck};
  Origin origin = 0;
  uint64_t request_id = 0;
  SpaceName space;
  // Answer.
  CheckOutcome outcome = CheckOutcome::kMore;
  uint16_t text_bytes = 0;
};

// The connection that held a session is gone; the session stays for a resume.
struct DetachRequest {
  RequestHeader header{RequestKind::kDetach};
  uint32_t session_slot = 0;
  SessionId session;
  Origin origin = 0;
};

// Something that is done to a whole space: every shard is asked, and writes its answer into the
// same slot before it gives it back. For kDrop and kRebuild the producer has begun it (SpaceEntry).
// A completion with a reason: it was not done.
struct CommandRequest {
  RequestHeader header{RequestKind::kCommand};
  SpaceCommand what = SpaceCommand::kCompact;
  Origin origin = 0;
  uint64_t request_id = 0;
  // Answer.
  uint64_t observations = 0;  // swept, dropped, or linked anew
  uint64_t bytes_before = 0;  // of memory that the shard's part took
  uint64_t bytes_after = 0;
  SpaceName space;
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
static_assert(sizeof(GetRequest) <= kRequestBodyOffset);
static_assert(sizeof(ScrollRequest) <= kRequestBodyOffset);
static_assert(sizeof(CommandRequest) <= kRequestBodyOffset);
static_assert(sizeof(CheckRequest) <= kRequestBodyOffset);

enum class CompletionKind : uint8_t {
  kHello = 1,       // slot: the HelloRequest with its answer
  kObserve,         // slot given back; accepted when reason is kNone
  kRecallDone,      // slot given back; the results came before, or reason says why there are none
                    // (recall, get, scroll)
  kDetach,          // slot given back
  kResults,         // result_slot: a batch of hits; more of them may follow
  kRecords,         // result_slot: a batch of space records; more of them may follow
  kIntrospectDone,  // slot given back
  kCommand,         // slot: the CommandRequest with its answer
  kFenced,          // no slot: the session of this origin was taken over
  kCredit,          // no slot: more may be sent
  kCheckDone,       // slot: the CheckRequest with its answer
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

enum class BatchEnd : uint8_t {
  kNothing = 0,
  kFirst = 1,  // of what comes first of a long recall: once from each shard that does not refuse
  kLast = 2,   // nothing follows for this request from this shard
};

// Begins each slot of the shard's result slab; the records follow at sizeof(ResultBatch).
struct ResultBatch {
  uint32_t body_bytes = 0;  // of the records
  uint16_t count = 0;       // of the records
  Metric metric = Metric::kUnspecified;
  BatchEnd end = BatchEnd::kNothing;

  bool is_last() const { return end == BatchEnd::kLast; }
};
static_assert(sizeof(ResultBatch) == 8);
// Holds any one hit: header, vector, id, payload and padding.
inline constexpr size_t kResultSlotBytes = size_t{81} * 1024;
static_assert(kResultSlotBytes >= sizeof(ResultBatch) + sizeof(HitHeader) +
                                      kMaxDimension * sizeof(float) + kMaxIdBytes +
                                      kMaxSpaceNameBytes + kMaxPayloadBytes + 7);

// What one shard says to another about an observation that it took as its session's home and that
// the other owns, or once owned. The request stays where it is, in the producer's slot, until kDone
// came back.
struct PeerMessage {
  enum class Kind : uint8_t {
    kStore,   // home to owner: do what the request says, with this stamp; a suppress or a restore
              // goes to earlier owners, too
    kRetire,  // home to an earlier owner: whatever it has of that id is superseded by this stamp
    kYield,   // home to the owner: likewise, and what has this very stamp is kept by another shard
    kDone,    // back: it is visible
  };
  Kind kind = Kind::kStore;
  bool existed = false;  // kDone: there was an observation with this id
  const ObserveRequest* request = nullptr;
  uint32_t space = 0;   // index in the SpaceCatalogue
  uint64_t ticket = 0;  // what the home shard finds its forward by
  // kDone: that of what the shard has of the id, where it is a later one; else kNoStamp.
  CommitStamp stamp = kNoStamp;
};

// A shard's rings to and from one other shard.
// alignas: the handles inside are written with every operation and must not share a line with those
// of another core.
struct alignas(kFalseSharingBytes) PeerLink {
  SpscRing<PeerMessage>::Producer requests_out;
  SpscRing<PeerMessage>::Consumer requests_in;
  SpscRing<PeerMessage>::Producer done_out;
  SpscRing<PeerMessage>::Consumer done_in;
};

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

// All that a shard has of the mesh: one link a producer, one a shard, and the slab for its answers.
struct ShardPort {
  ShardId shard;
  std::vector<ShardLink> producers;
  std::vector<PeerLink> peers;  // by shard; the shard's own place is empty
  SlotSlab* result_slab = nullptr;
  StampBoard* stamps = nullptr;         // where it publishes; of all shards
  SpaceCatalogue* catalogue = nullptr;  // of all cores
};

}  // namespace engram
