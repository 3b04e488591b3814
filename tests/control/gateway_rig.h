#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "src/control/gateway_core.h"
#include "tests/control/gateway_fake_shard.h"

// What the tests of the gateway core share: calls, a core over fake shards, and what its answers
// say.

namespace engram {

inline std::string IdOf(int number) { return "id" + std::to_string(number); }

struct GatewayRigOptions {
  uint16_t shards = 4;
  uint16_t partitions = 4;
  uint32_t lane_capacity = 256;
  uint32_t recall_lane_capacity = 64;
  GatewayOptions gateway = {.max_calls = 64, .inbox_capacity = 256, .max_merges = 16};
  FakeLogs* logs = nullptr;
};

// A call of a test. Owned by the test; the rig counts answers.
class TestCall final : public GatewayCall {
 public:
  explicit TestCall(int* alive) : alive_(alive) { ++*alive_; }
  void Answered() override { ++answered; }

  int answered = 0;
  std::vector<float> vector;
  std::string id;
  std::string payload;
  std::vector<std::string> ids;

 private:
  ~TestCall() override { --*alive_; }
  int* const alive_;
};

// A gateway core over fake shards, all stepped in this thread.
class GatewayRig {
 public:
  explicit GatewayRig(const GatewayRigOptions& options = {}) : catalogue_(CatalogueOf(options)) {
    MeshOptions mesh;
    mesh.shards = options.shards;
    mesh.lane_capacity = options.lane_capacity;
    mesh.recall_lane_capacity = options.recall_lane_capacity;
    mesh.huge_pages = HugePagePolicy::kOff;
    mesh.catalogue = &catalogue_;
    mesh_ = std::make_unique<RingMesh>(RingMesh::Create(mesh).value());
    ProducerPort port = mesh_->TakeProducer(ProducerId(0));
    slab_ = port.slab;
    for (uint16_t s = 0; s < options.shards; ++s) {
      shards.push_back(std::make_unique<GatewayFakeShard>(mesh_->TakeShard(ShardId(s)), &clock));
      shards.back()->logs = options.logs;
    }
    GatewayOptions gateway = options.gateway;
    gateway.huge_pages = HugePagePolicy::kOff;
    core = GatewayCore::Create(gateway, &clock, std::move(port),
                               options.logs != nullptr ? options.logs->Access() : RecordAccess())
               .value();
    door = std::make_unique<GatewayDoor>(core->OpenDoor([] {}));
    all_slots_ = slab_->free_slots();
  }
  ~GatewayRig() {
    for (TestCall* call : calls_) call->DropReference();
    core.reset();
    EXPECT_EQ(alive_, 0) << "every reference was given back";
  }

  TestCall* NewCall(CallKind kind, std::string_view space = "s") {
    auto* call = new TestCall(&alive_);
    calls_.push_back(call);
    call->question.kind = kind;
    call->question.space = SpaceName(space);
    return call;
  }
  TestCall* Remember(std::string id, std::vector<float> vector, std::string_view space = "s") {
    TestCall* call = NewCall(CallKind::kObserve, space);
    call->id = std::move(id);
    call->vector = std::move(vector);
    call->payload = "about " + call->id;
    call->question.id = call->id;
    call->question.vector = VectorRef(call->vector);
    call->question.payload = call->payload;
    call->question.confidence = 0.5F;
    call->question.when_ns = 12;
    return call;
  }
  TestCall* Forget(std::string id, std::string_view space = "s") {
    TestCall* call = NewCall(CallKind::kObserve, space);
    call->id = std::move(id);
    call->question.id = call->id;
    call->question.op = ObservationOp::kDelete;
    return call;
  }
  TestCall* Recall(std::vector<float> vector, uint32_t k, std::string_view space = "s") {
    TestCall* call = NewCall(CallKind::kRecall, space);
    call->vector = std::move(vector);
    call->question.vector = VectorRef(call->vector);
    call->question.k = k;
    return call;
  }
  TestCall* Get(std::vector<std::string> ids, std::string_view space = "s") {
    TestCall* call = NewCall(CallKind::kGet, space);
    call->ids = std::move(ids);
    for (const std::string& id : call->ids) call->question.ids.push_back(id);
    return call;
  }
  TestCall* Scroll(uint16_t limit, uint16_t partition = 0, uint64_t cursor = 0) {
    TestCall* call = NewCall(CallKind::kScroll);
    call->question.limit = limit;
    call->question.partition = partition;
    call->question.cursor = cursor;
    return call;
  }

  // Submits it and steps until nothing moves.
  TestCall* Do(TestCall* call) {
    EXPECT_TRUE(door->Submit(call));
    Settle();
    return call;
  }
  // As Do, and it has to be answered without a refusal.
  TestCall* DoWell(TestCall* call) {
    Do(call);
    EXPECT_EQ(call->answered, 1);
    EXPECT_EQ(call->answer.reason, RefusalReason::kNone)
        << DescribeRefusal(call->answer.reason).name;
    return call;
  }
  // Observations id0, id1 and so on, all of the same vector.
  void RememberLarge(int count, size_t payload_bytes) {
    for (int i = 0; i < count; ++i) {
      TestCall* call = Remember(IdOf(i), {1});
      call->payload.assign(payload_bytes, 'x');
      call->question.payload = call->payload;
      DoWell(call);
    }
  }
  void Settle() {
    for (int work = 1; work > 0;) {
      work = core->Poll();
      for (auto& shard : shards) work += shard->Poll();
    }
  }
  void SetAnswers(bool answers) {
    for (auto& shard : shards) shard->answers = answers;
  }
  // Nothing is out: each slot is free, each call has its answer, each merge was given back.
  void ExpectIdle() {
    EXPECT_EQ(core->calls_under_way(), 0u);
    EXPECT_EQ(slab_->free_slots(), all_slots_);
    for (auto& shard : shards) {
      EXPECT_EQ(shard->free_result_slots(), shard->total_result_slots());
    }
    for (const TestCall* call : calls_) EXPECT_EQ(call->answered, 1);
  }
  SpaceEntry* space(std::string_view name = "s") { return catalogue_.Find(name); }
  GatewayFakeShard& OwnerOf(std::string_view id) {
    const uint16_t partition = PartitionOf(SpaceCatalogue::HashOfId(id), space()->partitions());
    return *shards[space()->ShardOf(partition).value()];
  }
  uint32_t free_slots() const { return slab_->free_slots(); }
  uint64_t sent() const { return core->counter(GatewayCounter::kRequestsSent).Read(); }

  SimulatedClock clock;
  std::vector<std::unique_ptr<GatewayFakeShard>> shards;
  std::unique_ptr<GatewayCore> core;
  std::unique_ptr<GatewayDoor> door;

 private:
  static SpaceCatalogue CatalogueOf(const GatewayRigOptions& options) {
    return SpaceCatalogue(
        100, options.shards, options.shards,
        {.metric = Metric::kL2, .precision = Precision::kF32, .partitions = options.partitions});
  }

  int alive_ = 0;
  SpaceCatalogue catalogue_;
  std::unique_ptr<RingMesh> mesh_;
  SlotSlab* slab_ = nullptr;
  uint32_t all_slots_ = 0;
  std::vector<TestCall*> calls_;
};

struct Found {
  std::string id;
  std::string payload;
  HitHeader header;
};
inline std::vector<Found> FoundIn(const GatewayAnswer& answer) {
  std::vector<Found> found;
  for (size_t at = 0; at < answer.hits.size();) {
    HitHeader header;
    std::memcpy(&header, answer.hits.data() + at, sizeof(header));
    const char* text = reinterpret_cast<const char*>(answer.hits.data()) + at + sizeof(header) +
                       header.vector_dimension * sizeof(float);
    found.push_back({.id = std::string(text, header.id_bytes),
                     .payload = std::string(text + header.id_bytes, header.payload_bytes),
                     .header = header});
    at += header.hit_bytes;
  }
  EXPECT_EQ(found.size(), answer.hit_count);
  return found;
}
inline std::vector<std::string> IdsIn(const GatewayAnswer& answer) {
  std::vector<std::string> ids;
  for (const Found& found : FoundIn(answer)) ids.push_back(found.id);
  return ids;
}

}  // namespace engram
