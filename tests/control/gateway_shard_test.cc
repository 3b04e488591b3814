// The gateway core over real shards, stepped in one thread: what a shard makes of what the gateway
// asks, above all of deadlines and cancels that reach it before it begins or while it works.

#include <algorithm>
#include <cstring>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "dataplane/ring_mesh.h"
#include "index/shard.h"
#include "src/control/gateway_core.h"
#include "src/core/clock.h"

namespace engram {
namespace {

class TestCall final : public GatewayCall {
 public:
  void Answered() override { answered = true; }
  bool answered = false;
  std::string id;
  std::vector<float> vector;
};

class Rig {
 public:
  explicit Rig(uint16_t shards = 1)
      : catalogue_(100, shards, shards,
                   {.metric = Metric::kL2, .precision = Precision::kF32, .partitions = shards}) {
    MeshOptions mesh;
    mesh.shards = shards;
    mesh.huge_pages = HugePagePolicy::kOff;
    mesh.catalogue = &catalogue_;
    mesh_ = std::make_unique<RingMesh>(RingMesh::Create(mesh).value());
    ProducerPort port = mesh_->TakeProducer(ProducerId(0));
    slab_ = port.slab;
    ShardOptions options;
    options.memory_limit_bytes = size_t{128} << 20;
    options.huge_pages = HugePagePolicy::kOff;
    for (uint16_t s = 0; s < shards; ++s) {
      shards_.push_back(Shard::Create(options, &clock, mesh_->TakeShard(ShardId(s))).value());
    }
    core = GatewayCore::Create({.max_calls = 64,
                                .inbox_capacity = 64,
                                .max_merges = 4,
                                .huge_pages = HugePagePolicy::kOff},
                               &clock, std::move(port))
               .value();
    door = std::make_unique<GatewayDoor>(core->OpenDoor([] {}));
    all_slots_ = slab_->free_slots();
  }
  ~Rig() {
    for (TestCall* call : calls_) call->DropReference();
  }

  TestCall* NewCall(CallKind kind) {
    calls_.push_back(new TestCall);
    calls_.back()->question.kind = kind;
    calls_.back()->question.space = SpaceName("s");
    return calls_.back();
  }
  TestCall* Remember(std::string id, std::vector<float> vector) {
    TestCall* call = NewCall(CallKind::kObserve);
    call->id = std::move(id);
    call->vector = std::move(vector);
    call->question.id = call->id;
    call->question.vector = VectorRef(call->vector);
    return call;
  }
  TestCall* Forget(std::string id, ObservationOp op = ObservationOp::kDelete) {
    TestCall* call = NewCall(CallKind::kObserve);
    call->id = std::move(id);
    call->question.id = call->id;
    call->question.op = op;
    return call;
  }
  TestCall* Recall(std::vector<float> vector, uint32_t k) {
    TestCall* call = NewCall(CallKind::kRecall);
    call->vector = std::move(vector);
    call->question.vector = VectorRef(call->vector);
    call->question.k = k;
    return call;
  }
  TestCall* Get(std::string id) {
    TestCall* call = NewCall(CallKind::kGet);
    call->id = std::move(id);
    call->question.ids = {call->id};
    return call;
  }

  void Submit(TestCall* call) { EXPECT_TRUE(door->Submit(call)); }
  int PollShards() {
    int work = 0;
    for (auto& shard : shards_) work += shard->Poll();
    return work;
  }
  // Until every call is answered and its slots are back. The shards may have other things to do.
  void Settle() {
    int work = 0;
    do {
      work = core->Poll();
      PollShards();
    } while (work > 0 || core->calls_under_way() > 0);
  }
  const GatewayAnswer& Do(TestCall* call) {
    Submit(call);
    Settle();
    EXPECT_TRUE(call->answered);
    return call->answer;
  }
  const GatewayAnswer& DoWell(TestCall* call) {
    EXPECT_EQ(Do(call).reason, RefusalReason::kNone) << DescribeRefusal(call->answer.reason).name;
    return call->answer;
  }
  void ExpectIdle() {
    Settle();
    EXPECT_EQ(core->calls_under_way(), 0u);
    EXPECT_EQ(slab_->free_slots(), all_slots_);
  }

  SimulatedClock clock;
  std::unique_ptr<GatewayCore> core;
  std::unique_ptr<GatewayDoor> door;

 private:
  SpaceCatalogue catalogue_;
  std::unique_ptr<RingMesh> mesh_;
  SlotSlab* slab_ = nullptr;
  uint32_t all_slots_ = 0;
  std::vector<std::unique_ptr<Shard>> shards_;
  std::vector<TestCall*> calls_;
};

std::vector<std::string> IdsIn(const GatewayAnswer& answer) {
  std::vector<std::string> ids;
  for (size_t at = 0; at < answer.hits.size();) {
    HitHeader header;
    std::memcpy(&header, answer.hits.data() + at, sizeof(header));
    ids.emplace_back(reinterpret_cast<const char*>(answer.hits.data()) + at + sizeof(header) +
                         header.vector_dimension * sizeof(float),
                     header.id_bytes);
    at += header.hit_bytes;
  }
  return ids;
}

using Ids = std::vector<std::string>;

TEST(GatewayShardTest, EveryKindOfCallIsAnsweredByOneShardAndByFour) {
  for (const uint16_t shards : {1, 4}) {
    SCOPED_TRACE(shards);
    Rig rig(shards);
    std::set<std::string> all;
    for (int i = 0; i < 200; ++i) {
      const std::string id = "id" + std::to_string(i);
      EXPECT_FALSE(rig.DoWell(rig.Remember(id, {static_cast<float>(i), 1})).existed);
      all.insert(id);
    }
    EXPECT_TRUE(rig.DoWell(rig.Remember("id7", {7, 1})).existed);
    EXPECT_EQ(IdsIn(rig.DoWell(rig.Recall({20.1F, 1}, 3))), (Ids{"id20", "id21", "id19"}));
    EXPECT_EQ(IdsIn(rig.DoWell(rig.Get("id150"))), Ids{"id150"});
    EXPECT_TRUE(rig.DoWell(rig.Forget("id20")).existed);
    EXPECT_FALSE(rig.DoWell(rig.Forget("id20")).existed);
    EXPECT_EQ(IdsIn(rig.DoWell(rig.Recall({20.1F, 1}, 2))), (Ids{"id21", "id19"}));
    EXPECT_EQ(IdsIn(rig.DoWell(rig.Get("id20"))), Ids{});
    all.erase("id20");

    std::multiset<std::string> seen;
    TestCall* page = rig.NewCall(CallKind::kScroll);
    page->question.limit = 30;
    for (rig.DoWell(page);; rig.DoWell(page)) {
      for (const std::string& id : IdsIn(page->answer)) seen.insert(id);
      if (page->answer.scroll_ended) break;
      TestCall* next = rig.NewCall(CallKind::kScroll);
      next->question.limit = 30;
      next->question.partition = page->answer.next_partition;
      next->question.cursor = page->answer.next_cursor;
      page = next;
    }
    EXPECT_EQ(std::set(seen.begin(), seen.end()), all);
    EXPECT_EQ(seen.size(), all.size());

    uint64_t observations = 0;
    const auto& records = rig.DoWell(rig.NewCall(CallKind::kIntrospect)).records;
    for (size_t at = 0; at < records.size();) {
      SpaceRecord record;
      std::memcpy(&record, records.data() + at, sizeof(record));
      observations += record.observations;
      at += record.record_bytes;
    }
    EXPECT_EQ(observations, all.size());
    rig.ExpectIdle();
  }
}

TEST(GatewayShardTest, WhatIsSuppressedIsFoundByNoCallUntilItIsRestored) {
  for (const uint16_t shards : {1, 4}) {
    SCOPED_TRACE(shards);
    Rig rig(shards);
    const auto suppress = [&](const std::string& id) {
      return rig.DoWell(rig.Forget(id, ObservationOp::kSuppress)).existed;
    };
    const auto restore = [&](const std::string& id) {
      return rig.DoWell(rig.Forget(id, ObservationOp::kRestore)).existed;
    };
    EXPECT_FALSE(suppress("a")) << "nobody has written to the space";
    EXPECT_FALSE(restore("a"));
    for (int i = 0; i < 20; ++i) {
      rig.DoWell(rig.Remember("id" + std::to_string(i), {static_cast<float>(i), 1}));
    }
    EXPECT_FALSE(suppress("a"));
    for (int times = 0; times < 3; ++times) {
      EXPECT_TRUE(suppress("id7"));
      EXPECT_FALSE(suppress("id7"));
      EXPECT_EQ(IdsIn(rig.DoWell(rig.Get("id7"))), Ids{});
      EXPECT_EQ(IdsIn(rig.DoWell(rig.Recall({7.1F, 1}, 2))), (Ids{"id8", "id6"}));
      TestCall* page = rig.NewCall(CallKind::kScroll);
      page->question.limit = 100;
      EXPECT_EQ(rig.DoWell(page).hit_count, 19u);
      EXPECT_TRUE(restore("id7"));
      EXPECT_FALSE(restore("id7"));
      EXPECT_EQ(IdsIn(rig.DoWell(rig.Get("id7"))), Ids{"id7"});
      EXPECT_EQ(IdsIn(rig.DoWell(rig.Recall({7.1F, 1}, 2))), (Ids{"id7", "id8"}));
    }
    EXPECT_TRUE(suppress("id7"));
    EXPECT_TRUE(rig.DoWell(rig.Remember("id7", {70, 1})).existed);
    EXPECT_EQ(IdsIn(rig.DoWell(rig.Recall({70, 1}, 1))), Ids{"id7"});
    EXPECT_TRUE(suppress("id7"));
    EXPECT_TRUE(rig.DoWell(rig.Forget("id7")).existed);
    EXPECT_FALSE(restore("id7"));
    rig.ExpectIdle();
  }
}

TEST(GatewayShardTest, ARememberIsNotDoneOnceItsAskerHasGone) {
  Rig rig;
  rig.DoWell(rig.Remember("a", {1}));
  TestCall* call = rig.Remember("gone", {2});
  rig.Submit(call);
  rig.core->Poll();  // It lies in the shard's ring.
  rig.door->Cancel(call);
  rig.core->Poll();
  EXPECT_TRUE(call->answered) << "at once";
  EXPECT_EQ(call->answer.reason, RefusalReason::kCancelled);
  rig.Settle();
  EXPECT_EQ(IdsIn(rig.DoWell(rig.Get("gone"))), Ids{});
  EXPECT_EQ(IdsIn(rig.DoWell(rig.Recall({2}, 5))), Ids{"a"});
  rig.ExpectIdle();
}

// The shard looks itself: between two rounds of the gateway core much time may pass.
TEST(GatewayShardTest, ARememberIsNotDonePastItsDeadline) {
  Rig rig;
  rig.DoWell(rig.Remember("a", {1}));
  TestCall* call = rig.Remember("late", {2});
  call->question.deadline_ns = rig.clock.MonotonicNs() + kNanosPerMilli;
  rig.Submit(call);
  rig.core->Poll();
  rig.clock.AdvanceNs(2 * kNanosPerMilli);
  rig.PollShards();
  rig.Settle();
  EXPECT_EQ(call->answer.reason, RefusalReason::kDeadlinePassed);
  EXPECT_EQ(IdsIn(rig.DoWell(rig.Get("late"))), Ids{});
  rig.ExpectIdle();
}

// Both before the shard has begun and at any moment while it searches.
TEST(GatewayShardTest, ARecallEndsOnceItsAskerHasGone) {
  Rig rig;
  const std::vector<float> vector(256, 1);
  for (int i = 0; i < 3'000; ++i) rig.DoWell(rig.Remember("id" + std::to_string(i), vector));
  int whole = 0;
  while (whole < 1'000) {
    // So many rounds the shard works on it before its asker goes.
    TestCall* call = rig.Recall(vector, 10);
    rig.Submit(call);
    rig.core->Poll();
    int rounds = 0;
    while (rounds < whole && !call->answered) {
      rig.PollShards();
      rig.core->Poll();
      ++rounds;
    }
    if (call->answered) break;
    rig.door->Cancel(call);
    rig.core->Poll();
    EXPECT_EQ(call->answer.reason, RefusalReason::kCancelled);
    // The next round ends it, however much of the search was left.
    rig.PollShards();
    rig.core->Poll();
    EXPECT_EQ(rig.core->calls_under_way(), 0u) << "after " << whole << " rounds";
    rig.ExpectIdle();
    ++whole;
  }
  EXPECT_GT(whole, 2) << "a search of several rounds, else this shows nothing";
  EXPECT_EQ(rig.DoWell(rig.Recall(vector, 10)).hit_count, 10u);
}

TEST(GatewayShardTest, ARecallEndsPastItsDeadline) {
  Rig rig;
  const std::vector<float> vector(256, 1);
  for (int i = 0; i < 3'000; ++i) rig.DoWell(rig.Remember("id" + std::to_string(i), vector));
  for (const int rounds : {0, 1}) {
    TestCall* call = rig.Recall(vector, 10);
    call->question.deadline_ns = rig.clock.MonotonicNs() + kNanosPerMilli;
    rig.Submit(call);
    rig.core->Poll();
    for (int i = 0; i < rounds; ++i) rig.PollShards();
    rig.clock.AdvanceNs(2 * kNanosPerMilli);
    rig.PollShards();
    rig.core->Poll();
    EXPECT_TRUE(call->answered);
    EXPECT_EQ(call->answer.reason, RefusalReason::kDeadlinePassed);
    EXPECT_EQ(rig.core->calls_under_way(), 0u) << "after " << rounds << " rounds";
    rig.ExpectIdle();
  }
}

// What was updated or deleted after the moment of a snapshot is still in it.
TEST(GatewayShardTest, ASnapshotIsOneMomentOfAllPartitions) {
  Rig rig(4);
  for (int i = 0; i < 40; ++i) {
    rig.DoWell(rig.Remember("id" + std::to_string(i), {static_cast<float>(i)}));
  }
  rig.clock.AdvanceNs(kNanosPerMilli);
  TestCall* call = rig.Recall({0}, 1'000);
  call->question.snapshot_isolation = true;
  rig.Submit(call);
  rig.core->Poll();
  // Behind it in the rings, on lanes of lower rank.
  std::vector<TestCall*> later;
  for (int i = 0; i < 20; ++i) later.push_back(rig.Forget("id" + std::to_string(i)));
  for (TestCall* forget : later) rig.Submit(forget);
  rig.Settle();
  EXPECT_EQ(call->answer.reason, RefusalReason::kNone) << DescribeRefusal(call->answer.reason).name;
  EXPECT_EQ(call->answer.hit_count, 40u);
  EXPECT_GT(call->answer.snapshot, kNoStamp);
  EXPECT_EQ(rig.DoWell(rig.Recall({0}, 1'000)).hit_count, 20u);
  rig.ExpectIdle();
}

}  // namespace
}  // namespace engram
