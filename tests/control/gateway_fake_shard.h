#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "src/core/check.h"
#include "src/core/clock.h"
#include "src/core/commit_stamp.h"
#include "src/core/shard_port.h"
#include "tests/dataplane/fake_log_disk.h"

namespace engram {

// A shard for the gateway core's tests: a map of observations, exact recall by squared distance,
// one request after the other. It can be told to hold back what it took or to refuse it.
class GatewayFakeShard {
 public:
  struct Kept {
    std::vector<float> vector;
    std::string attributes;
    std::string payload;
    PayloadKind payload_kind = PayloadKind::kOpaque;
    float confidence = 0;
    int64_t when_ns = 0;
    CommitStamp stamp = kNoStamp;
  };
  using Space = std::map<std::string, Kept>;

  GatewayFakeShard(ShardPort port, Clock* clock)
      : port_(std::move(port)), clock_(clock), stamps_(port_.shard) {}

  bool takes = true;                             // else rings fill up
  bool answers = true;                           // else requests stay here
  RefusalReason refuses = RefusalReason::kNone;  // every request
  uint32_t retry_after_ms = 0;                   // with that
  std::map<std::string, Space> spaces;           // by name
  std::vector<RequestHeader> seen;               // as they were when answered
  std::optional<CommitStamp> last_snapshot;      // of a recall
  std::string last_filter;                       // likewise
  FakeLogs* logs = nullptr;                      // where payloads and vectors lie; nullptr: here
  void Publish(CommitStamp complete) { port_.stamps->Publish(port_.shard, complete); }
  size_t held() const { return waiting_.size(); }
  uint32_t free_result_slots() const { return port_.result_slab->free_slots(); }
  uint32_t total_result_slots() const { return port_.result_slab->total_slots(); }
  const RequestHeader& held_header(size_t index) const {
    return *As<RequestHeader>(waiting_[index]);
  }

  int Poll() {
    int work = 0;
    ShardLink& link = port_.producers.at(0);
    while (const auto slot = link.result_returns.TryPop()) {
      port_.result_slab->Release(*slot);
      ++work;
    }
    for (auto& lane : link.lanes) {
      while (takes) {
        const auto slot = lane.TryPop();
        if (!slot) break;
        waiting_.push_back(*slot);
        ++work;
      }
    }
    while (answers && !waiting_.empty()) {
      const SlotId slot = waiting_.front();
      waiting_.pop_front();
      AnswerOne(slot);
      ++work;
    }
    return work;
  }

 private:
  template <typename T>
  T* As(SlotId slot) const {
    return reinterpret_cast<T*>(port_.producers[0].producer_slab->At(slot));
  }

  void Complete(const Completion& completion) {
    CHECK(port_.producers[0].completions.TryPush(completion), "a completion ring is never full");
  }

  RefusalReason Judge(const RequestHeader& header) {
    seen.push_back(header);
    if (IsCancelled(header)) return RefusalReason::kCancelled;
    if (header.deadline_ns != 0 && header.deadline_ns <= clock_->MonotonicNs()) {
      return RefusalReason::kDeadlinePassed;
    }
    return refuses;
  }

  void AnswerOne(SlotId slot) {
    Completion done{
        .reason = Judge(*As<RequestHeader>(slot)), .retry_after_ms = retry_after_ms, .slot = slot};
    switch (As<RequestHeader>(slot)->kind) {
      case RequestKind::kObserve:
        done.kind = CompletionKind::kObserve;
        done.origin = As<ObserveRequest>(slot)->origin;
        if (done.reason == RefusalReason::kNone) done.reason = Observe(As<ObserveRequest>(slot));
        break;
      case RequestKind::kRecall:
        done.kind = CompletionKind::kRecallDone;
        done.origin = As<RecallRequest>(slot)->origin;
        if (done.reason == RefusalReason::kNone) done.reason = Recall(*As<RecallRequest>(slot));
        break;
      case RequestKind::kGet:
        done.kind = CompletionKind::kRecallDone;
        done.origin = As<GetRequest>(slot)->origin;
        if (done.reason == RefusalReason::kNone) done.reason = Get(*As<GetRequest>(slot));
        break;
      case RequestKind::kScroll:
        done.kind = CompletionKind::kRecallDone;
        done.origin = As<ScrollRequest>(slot)->origin;
        if (done.reason == RefusalReason::kNone) done.reason = Scroll(As<ScrollRequest>(slot));
        break;
      case RequestKind::kIntrospect:
        done.kind = CompletionKind::kIntrospectDone;
        done.origin = As<IntrospectRequest>(slot)->origin;
        if (done.reason == RefusalReason::kNone) Introspect(done.origin);
        break;
      default:
        CHECK(false, "a gateway sends no other requests");
    }
    Complete(done);
  }

  RefusalReason Observe(ObserveRequest* request) {
    CHECK(request->session.value() == 0, "a unary call has no session");
    const std::byte* body = reinterpret_cast<const std::byte*>(request) + kRequestBodyOffset;
    const size_t vector_bytes = VectorBytes(request->dtype, request->dimension);
    const char* text = reinterpret_cast<const char*>(body) + vector_bytes;
    const std::string id(text, request->id_bytes);
    Space& space = spaces[std::string(request->space.view())];
    request->existed = space.erase(id) > 0;
    request->stamp = stamps_.Next(clock_->WallNs());
    if (request->op == ObservationOp::kDelete) return RefusalReason::kNone;
    SpaceEntry* entry = port_.catalogue->Find(request->space.view());
    if (!entry->FixDimension(request->dimension)) {
      request->space_dimension = entry->dimension();
      return RefusalReason::kWrongDimension;
    }
    Kept& kept = space[id];
    kept.vector.resize(request->dimension);
    std::memcpy(kept.vector.data(), body, vector_bytes);
    text += request->id_bytes;
    kept.attributes.assign(text, request->attribute_bytes);
    kept.payload.assign(text + request->attribute_bytes, request->payload_bytes);
    kept.payload_kind = request->payload_kind;
    kept.confidence = request->confidence;
    kept.when_ns = request->when_ns;
    kept.stamp = request->stamp;
    return RefusalReason::kNone;
  }

  RefusalReason Recall(const RecallRequest& request) {
    last_snapshot = request.snapshot;
    const auto found = spaces.find(std::string(request.space.view()));
    if (found == spaces.end()) return RefusalReason::kUnknownSpace;
    const std::byte* body = reinterpret_cast<const std::byte*>(&request) + kRequestBodyOffset;
    std::vector<float> query(request.dimension);
    std::memcpy(query.data(), body, query.size() * sizeof(float));
    last_filter.assign(reinterpret_cast<const char*>(body) + query.size() * sizeof(float),
                       request.filter_bytes);
    const Metric metric = port_.catalogue->Find(request.space.view())->metric();
    std::vector<std::pair<float, const Space::value_type*>> near;
    for (const auto& entry : found->second) {
      near.emplace_back(Score(metric, query, entry.second.vector), &entry);
    }
    const float sign = metric == Metric::kL2 ? 1 : -1;
    std::ranges::sort(near, {}, [sign](const auto& hit) { return sign * hit.first; });
    near.resize(std::min<size_t>(near.size(), request.k));
    std::vector<std::string> hits;
    for (const auto& [distance, entry] : near) {
      hits.push_back(HitOf(*entry, distance, request.with_payload, request.with_vector));
    }
    SendHits(request.origin, hits, metric);
    return RefusalReason::kNone;
  }

  static float Score(Metric metric, const std::vector<float>& a, const std::vector<float>& b) {
    float distance = 0;
    float product = 0;
    float aa = 0;
    float bb = 0;
    for (size_t i = 0; i < a.size(); ++i) {
      distance += (a[i] - b[i]) * (a[i] - b[i]);
      product += a[i] * b[i];
      aa += a[i] * a[i];
      bb += b[i] * b[i];
    }
    return metric == Metric::kL2 ? distance : product / std::sqrt(aa * bb);
  }

  RefusalReason Get(const GetRequest& request) {
    const auto space = spaces.find(std::string(request.space.view()));
    if (space == spaces.end()) return RefusalReason::kUnknownSpace;
    const char* text = reinterpret_cast<const char*>(&request) + kRequestBodyOffset;
    const auto found = space->second.find(std::string(text, request.id_bytes));
    if (found == space->second.end()) return RefusalReason::kNone;
    SendHits(request.origin, {HitOf(*found, 0, request.with_payload, request.with_vector)});
    return RefusalReason::kNone;
  }

  // The cursor counts what was handed out, so the map must stand still meanwhile.
  RefusalReason Scroll(ScrollRequest* request) {
    const auto space = spaces.find(std::string(request->space.view()));
    if (space == spaces.end()) return RefusalReason::kUnknownSpace;
    CHECK(request->limit >= 1 && request->limit <= kMaxPageResults, "a page has a size");
    std::vector<std::string> hits;
    size_t place = 0;
    for (const auto& entry : space->second) {
      if (place++ < request->cursor) continue;
      if (hits.size() == request->limit) break;
      hits.push_back(HitOf(entry, 0, request->with_payload, request->with_vector));
    }
    SendHits(request->origin, hits);
    const uint64_t next = request->cursor + hits.size();
    request->cursor = next == space->second.size() ? 0 : next;
    return RefusalReason::kNone;
  }

  void Introspect(Origin origin) {
    std::string body;
    for (const auto& [name, space] : spaces) {
      SpaceRecord record{};
      record.record_bytes = static_cast<uint32_t>(PadTo8(sizeof(record) + name.size()));
      record.shard = port_.shard.value();
      record.name_bytes = static_cast<uint8_t>(name.size());
      record.dimension = port_.catalogue->Find(name)->dimension();
      record.observations = space.size();
      std::string bytes(record.record_bytes, '\0');
      std::memcpy(bytes.data(), &record, sizeof(record));
      std::memcpy(bytes.data() + sizeof(record), name.data(), name.size());
      body += bytes;
    }
    SendBatch(origin, CompletionKind::kRecords, body, spaces.size());
  }

  std::string HitOf(const Space::value_type& entry, float score, bool with_payload,
                    bool with_vector) {
    const auto& [id, kept] = entry;
    HitHeader header{};
    header.score = score;
    header.when_ns = kept.when_ns;
    header.stamp = kept.stamp;
    header.confidence = kept.confidence;
    header.payload_bytes = with_payload ? static_cast<uint32_t>(kept.payload.size()) : 0;
    header.id_bytes = static_cast<uint16_t>(id.size());
    header.payload_kind = kept.payload_kind;
    header.vector_dimension = with_vector ? static_cast<uint16_t>(kept.vector.size()) : uint16_t{0};
    const size_t vector_bytes = header.vector_dimension * sizeof(float);
    header.hit_bytes = static_cast<uint32_t>(
        PadTo8(sizeof(header) + vector_bytes + id.size() + header.payload_bytes));
    if (logs != nullptr && header.payload_bytes + vector_bytes > 0) {
      std::vector<std::byte> hit = logs->Put(port_.shard.value(), 1, next_record_, id, kept.payload,
                                             kept.stamp, kept.vector);
      next_record_ += static_cast<uint32_t>(PadTo8(1'024 + vector_bytes + kept.payload.size()));
      header.flags = kHitAtAddress;
      header.hit_bytes = static_cast<uint32_t>(hit.size());
      std::memcpy(hit.data(), &header, sizeof(header));
      return {reinterpret_cast<const char*>(hit.data()), hit.size()};
    }
    std::string bytes(reinterpret_cast<const char*>(&header), sizeof(header));
    bytes.append(reinterpret_cast<const char*>(kept.vector.data()), vector_bytes);
    bytes += id;
    bytes.append(kept.payload, 0, header.payload_bytes);
    bytes.resize(header.hit_bytes);
    return bytes;
  }

  // Two hits a batch, so that an answer has several.
  void SendHits(Origin origin, const std::vector<std::string>& hits,
                Metric metric = Metric::kUnspecified) {
    for (size_t i = 0; i < hits.size(); i += 2) {
      const bool two = i + 1 < hits.size();
      SendBatch(origin, CompletionKind::kResults, two ? hits[i] + hits[i + 1] : hits[i],
                two ? 2 : 1, metric);
    }
  }

  void SendBatch(Origin origin, CompletionKind kind, const std::string& body, size_t count,
                 Metric metric = Metric::kUnspecified) {
    const SlotId slot = port_.result_slab->Acquire(sizeof(ResultBatch) + body.size());
    CHECK(slot != kNoSlot, "tests ask for less than there are slots");
    const ResultBatch head{.body_bytes = static_cast<uint32_t>(body.size()),
                           .count = static_cast<uint16_t>(count),
                           .metric = metric};
    std::memcpy(port_.result_slab->At(slot), &head, sizeof(head));
    std::memcpy(port_.result_slab->At(slot) + sizeof(head), body.data(), body.size());
    Complete({.kind = kind, .result_slot = slot, .origin = origin});
  }

  ShardPort port_;
  Clock* clock_;
  StampClock stamps_;
  std::deque<SlotId> waiting_;
  uint32_t next_record_ = 4'096;
};

}  // namespace engram
