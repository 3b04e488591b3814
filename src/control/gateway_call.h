#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "src/core/commit_stamp.h"
#include "src/core/observation.h"
#include "src/core/refusal_reason.h"
#include "src/core/shard_port.h"
#include "src/core/vector_dtype.h"

namespace engram {

enum class CallKind : uint8_t {
  kObserve,     // store, remove, hide or restore one observation
  kRecall,      // the nearest to a vector
  kGet,         // observations by id
  kScroll,      // a page of a space
  kIntrospect,  // every shard's spaces
};

// A vector as a client sent it.
struct VectorRef {
  VectorRef() = default;
  explicit VectorRef(std::span<const float> numbers)
      : dtype(numbers.empty() ? VectorDtype::kNone : VectorDtype::kF32),
        dimension(static_cast<uint32_t>(numbers.size())),
        bytes(std::as_bytes(numbers).data()) {}

  bool empty() const { return dimension == 0; }

  VectorDtype dtype = VectorDtype::kNone;
  uint32_t dimension = 0;
  float scale = 1;                   // of int8
  const std::byte* bytes = nullptr;  // VectorBytes(dtype, dimension) of them, not aligned
};

// What the calling thread asks. The views point into what the call owns.
struct GatewayQuestion {
  CallKind kind = CallKind::kObserve;
  bool with_payload = true;
  bool with_vector = false;
  bool snapshot_isolation = false;
  int64_t snapshot_unix_ns = 0;  // with snapshot_isolation: the moment; 0: now
  SpaceName space;
  int64_t deadline_ns = 0;  // on the monotonic clock; 0: none
  // kObserve (upsert), kRecall: 1 to kMaxDimension numbers. Of a recall with a filter also none:
  // the latest of what matches.
  VectorRef vector;
  std::string_view id;          // kObserve: 1 to kMaxIdBytes
  std::string_view attributes;  // kObserve: as in attributes.h; none: empty
  std::string_view payload;     // kObserve: up to kMaxPayloadBytes
  PayloadKind payload_kind = PayloadKind::kOpaque;
  ObservationOp op = ObservationOp::kUpsert;
  int64_t when_ns = 0;
  float confidence = 1;
  uint32_t k = 0;                     // kRecall: 1 to kMaxPageResults
  uint32_t ef = 0;                    // kRecall: up to kMaxEf; 0: the shard's default
  std::string_view filter;            // kRecall: as in attributes.h; none: empty
  bool across = false;                // kRecall: of all spaces that are of the kind of `space`
  std::vector<std::string_view> ids;  // kGet
  uint16_t partition = 0;             // kScroll: where the page begins
  uint64_t cursor = 0;                // kScroll: and there in that partition
  uint16_t limit = 0;                 // kScroll: 1 to kMaxPageResults
};

// What the gateway core found.
struct GatewayAnswer {
  RefusalReason reason = RefusalReason::kNone;
  uint32_t retry_after_ms = 0;
  uint16_t space_dimension = 0;  // with kWrongDimension
  Metric metric = Metric::kUnspecified;
  bool existed = false;             // kObserve
  CommitStamp stamp = kNoStamp;     // kObserve
  CommitStamp snapshot = kNoStamp;  // kRecall with snapshot_isolation
  // kRecall: best first. kGet, kScroll: in any order; an id that moved may be there twice, and the
  // later stamp counts. Hits as in HitHeader.
  std::vector<std::byte> hits;
  uint32_t hit_count = 0;
  bool scroll_ended = true;  // kScroll: else the next page begins at:
  uint16_t next_partition = 0;
  uint64_t next_cursor = 0;
  std::vector<std::byte> records;  // kIntrospect: SpaceRecords of all shards
};

// One call of a client on its way through the gateway core: the question goes in with the inbox,
// the answer comes back by Answered. A transport derives from it.
//
// Thread safety: question is the transport's until Submit and read-only afterwards; answer is the
// gateway core's until Answered. A count of references keeps a call for commands that are still in
// the inbox: the transport holds one from the beginning and gives it back when it is through.
class GatewayCall {
 public:
  GatewayCall() = default;
  // DropReference's to call.
  virtual ~GatewayCall() = default;
  GatewayCall(const GatewayCall&) = delete;
  GatewayCall& operator=(const GatewayCall&) = delete;

  // From the gateway core's thread, once for a call that was submitted. The call may be gone when
  // it returns.
  virtual void Answered() = 0;

  void AddReference() { references_.fetch_add(1, std::memory_order_relaxed); }
  void DropReference() {
    if (references_.fetch_sub(1, std::memory_order_acq_rel) == 1) delete this;
  }

  GatewayQuestion question;
  GatewayAnswer answer;

 private:
  friend class GatewayCore;
  static constexpr uint32_t kNotUnderWay = UINT32_MAX;

  std::atomic<uint32_t> references_{1};
  uint32_t place_ = kNotUnderWay;  // in the gateway core's table; its own
};

}  // namespace engram
