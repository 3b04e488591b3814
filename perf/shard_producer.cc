#include "perf/shard_producer.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>

namespace engram {

void ShardProducer::Open(std::string_view space, Shard* shard) {
  space_ = SpaceName(space);
  const SlotId slot = port_.slab->Acquire(sizeof(HelloRequest));
  auto* hello = new (port_.slab->At(slot)) HelloRequest;
  hello->origin = kOrigin;
  hello->space = space_;
  Push(Lane::kRecall, slot);
  while (session_.value() == 0) {
    shard->Poll();
    TakeAnswers();
  }
}

bool ShardProducer::Observe(uint64_t number, std::span<const float> vector, size_t payload_bytes,
                            int64_t now_ns) {
  const size_t vector_bytes = vector.size_bytes();
  const SlotId slot =
      port_.slab->Acquire(kRequestBodyOffset + vector_bytes + kIdBytes + payload_bytes);
  if (slot == kNoSlot) return false;
  ObserveRequest* const request = NextObservation(slot, now_ns);
  request->dtype = VectorDtype::kF32;
  request->dimension = static_cast<uint16_t>(vector.size());
  request->payload_bytes = static_cast<uint32_t>(payload_bytes);
  std::byte* body = port_.slab->At(slot) + kRequestBodyOffset;
  std::memcpy(body, vector.data(), vector_bytes);
  WriteId(number, body + vector_bytes);
  std::memset(body + vector_bytes + kIdBytes, 'p', payload_bytes);
  Push(Lane::kNormal, slot);
  return true;
}

bool ShardProducer::Delete(uint64_t number, int64_t now_ns) {
  const SlotId slot = port_.slab->Acquire(kRequestBodyOffset + kIdBytes);
  if (slot == kNoSlot) return false;
  NextObservation(slot, now_ns)->op = ObservationOp::kDelete;
  WriteId(number, port_.slab->At(slot) + kRequestBodyOffset);
  Push(Lane::kNormal, slot);
  return true;
}

// The session's next one, but for what it brings.
ObserveRequest* ShardProducer::NextObservation(SlotId slot, int64_t now_ns) {
  auto* request = new (port_.slab->At(slot)) ObserveRequest;
  request->id_bytes = kIdBytes;
  request->session_slot = session_slot_;
  request->session = session_;
  request->sequence = ++sent_;
  request->origin = kOrigin;
  request->received_ns = now_ns;
  return request;
}

void ShardProducer::WriteId(uint64_t number, std::byte* to) {
  std::array<char, 24> id;
  std::snprintf(id.data(), id.size(), "%016llu", static_cast<unsigned long long>(number));
  std::memcpy(to, id.data(), kIdBytes);
}

bool ShardProducer::Recall(std::span<const float> query, uint32_t k, int64_t now_ns,
                           const RecallOptions& options) {
  const SlotId slot = port_.slab->Acquire(kRequestBodyOffset + query.size_bytes());
  if (slot == kNoSlot) return false;
  auto* request = new (port_.slab->At(slot)) RecallRequest;
  request->dtype = VectorDtype::kF32;
  request->dimension = static_cast<uint16_t>(query.size());
  request->k = k;
  request->ef = options.ef;
  request->origin = kOrigin;
  request->received_ns = now_ns;
  request->request_id = options.request_id;
  request->space = space_;
  std::memcpy(port_.slab->At(slot) + kRequestBodyOffset, query.data(), query.size_bytes());
  Push(Lane::kRecall, slot);
  return true;
}

void ShardProducer::Push(Lane lane, SlotId slot) {
  CHECK(link().lanes[static_cast<size_t>(lane)].TryPush(slot), "there is room");
}

void ShardProducer::TakeSettled(const Completion& done) {
  credit_ = std::max(credit_, done.credit_sequence);
  if (done.kind == CompletionKind::kHello) {
    const auto* hello = reinterpret_cast<const HelloRequest*>(port_.slab->At(done.slot));
    CHECK(done.reason == RefusalReason::kNone, "a session is granted");
    session_ = hello->session;
    session_slot_ = hello->session_slot;
    credit_ = hello->credit;
  } else if (done.kind == CompletionKind::kObserve) {
    if (done.reason != RefusalReason::kNone) {
      std::fprintf(stderr, "refused: %s\n", std::string(DescribeRefusal(done.reason).text).c_str());
      std::exit(1);
    }
    ++acked_;
  }
}

}  // namespace engram
