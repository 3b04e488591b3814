#pragma once

#include <charconv>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>
#include <utility>

#include "dataplane/ring_mesh.h"
#include "index/shard.h"
#include "src/core/check.h"

namespace engram {

// An ingress core's end of the rings before one shard, with one session in one space: sends
// observations and recalls as long as its credit and the rings let it. For programs that are
// client, ingress core and shard in one thread. What is refused ends the program, but for recalls.
class ShardProducer {
 public:
  // Ids are numbers of so many digits.
  static constexpr size_t kIdBytes = 16;

  explicit ShardProducer(ProducerPort port) : port_(std::move(port)) {}

  // Polls the shard until it grants the session.
  void Open(std::string_view space, Shard* shard);

  bool MaySend() {
    return sent_ < credit_ && !link().lanes[static_cast<size_t>(Lane::kNormal)].Full();
  }
  // Observations that were sent, and of these acknowledged.
  uint64_t sent() const { return sent_; }
  uint64_t acked() const { return acked_; }

  // Both send nothing and return false where the slab is full. The observation's payload is
  // `payload_bytes` long and says nothing.
  bool Observe(uint64_t number, std::span<const float> vector, size_t payload_bytes,
               int64_t now_ns);
  struct RecallOptions {
    uint32_t ef = 0;  // 0: the shard's default
    uint64_t request_id = 0;
  };
  bool Recall(std::span<const float> query, uint32_t k, int64_t now_ns,
              const RecallOptions& options);
  bool Recall(std::span<const float> query, uint32_t k, int64_t now_ns) {
    return Recall(query, k, now_ns, RecallOptions());
  }
  // Likewise; counts as an observation.
  bool Delete(uint64_t number, int64_t now_ns);

  // The numbers of a slot of hits, nearest first.
  template <typename Visit>
  static void ForEachHit(const std::byte* slot, Visit&& visit) {
    ResultBatch batch;
    std::memcpy(&batch, slot, sizeof(batch));
    const std::byte* from = slot + sizeof(batch);
    for (uint16_t i = 0; i < batch.count; ++i) {
      HitHeader header;
      std::memcpy(&header, from, sizeof(header));
      const auto* id = reinterpret_cast<const char*>(from + HitIdOffset(header));
      uint64_t number = 0;
      std::from_chars(id, id + header.id_bytes, number);
      visit(number);
      from += header.hit_bytes;
    }
  }

  // Takes what was answered. `take_results` gets a recall's request id and a slot of hits, which
  // begins with its ResultBatch; `finish_recall` the id and why it was refused, or kNone.
  template <typename TakeResults, typename FinishRecall>
  void TakeAnswers(TakeResults&& take_results, FinishRecall&& finish_recall) {
    while (const auto done = link().completions.TryPop()) {
      if (done->kind == CompletionKind::kResults) {
        take_results(done->sequence, link().result_slab->At(done->result_slot));
        CHECK(link().result_returns.TryPush(done->result_slot), "there is room");
      } else if (done->kind == CompletionKind::kRecallDone) {
        finish_recall(done->sequence, done->reason);
      } else {
        TakeSettled(*done);
      }
      if (done->slot != kNoSlot) port_.slab->Release(done->slot);
    }
  }
  // Where nothing is recalled.
  void TakeAnswers() {
    TakeAnswers([](uint64_t, const std::byte*) {}, [](uint64_t, RefusalReason) {});
  }

 private:
  static constexpr Origin kOrigin = 1;

  ProducerLink& link() { return port_.shards[0]; }
  ObserveRequest* NextObservation(SlotId slot, int64_t now_ns);
  static void WriteId(uint64_t number, std::byte* to);
  void Push(Lane lane, SlotId slot);
  void TakeSettled(const Completion& done);

  ProducerPort port_;
  SpaceName space_;
  SessionId session_;
  uint32_t session_slot_ = 0;
  Sequence credit_ = 0;
  uint64_t sent_ = 0;
  uint64_t acked_ = 0;
};

}  // namespace engram
