#include "src/control/gateway_core.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "src/core/hash.h"
#include "tests/control/gateway_fake_shard.h"

namespace engram {
namespace {

struct RigOptions {
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
class Rig {
 public:
  explicit Rig(const RigOptions& options = {}) : catalogue_(CatalogueOf(options)) {
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
  ~Rig() {
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
    call->question.vector = call->vector;
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
    call->question.vector = call->vector;
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
  static SpaceCatalogue CatalogueOf(const RigOptions& options) {
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

std::string IdOf(int number) { return "id" + std::to_string(number); }

struct Found {
  std::string id;
  std::string payload;
  HitHeader header;
};
std::vector<Found> FoundIn(const GatewayAnswer& answer) {
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
std::vector<std::string> IdsIn(const GatewayAnswer& answer) {
  std::vector<std::string> ids;
  for (const Found& found : FoundIn(answer)) ids.push_back(found.id);
  return ids;
}

TEST(GatewayCoreTest, AnObservationGoesToThePartitionThatOwnsItsId) {
  Rig rig;
  for (int i = 0; i < 40; ++i) {
    const TestCall* call = rig.DoWell(rig.Remember(IdOf(i), {static_cast<float>(i), 1}));
    EXPECT_FALSE(call->answer.existed);
    EXPECT_GT(call->answer.stamp, kNoStamp);
  }
  for (int i = 0; i < 40; ++i) {
    const auto& kept = rig.OwnerOf(IdOf(i)).spaces["s"];
    ASSERT_TRUE(kept.contains(IdOf(i)));
    EXPECT_EQ(kept.at(IdOf(i)).payload, "about " + IdOf(i));
    EXPECT_EQ(kept.at(IdOf(i)).vector, (std::vector<float>{static_cast<float>(i), 1}));
    EXPECT_EQ(kept.at(IdOf(i)).confidence, 0.5F);
    EXPECT_EQ(kept.at(IdOf(i)).when_ns, 12);
  }
  for (const auto& shard : rig.shards) EXPECT_FALSE(shard->spaces["s"].empty());
  EXPECT_TRUE(rig.DoWell(rig.Remember(IdOf(3), {0, 0}))->answer.existed);
  EXPECT_TRUE(rig.DoWell(rig.Forget(IdOf(3)))->answer.existed);
  EXPECT_FALSE(rig.DoWell(rig.Forget(IdOf(3)))->answer.existed);
  rig.ExpectIdle();
}

TEST(GatewayCoreTest, ARecallMergesThePartitions) {
  for (const uint16_t partitions : {1, 2, 4}) {
    Rig rig({.partitions = partitions});
    for (int i = 0; i < 60; ++i) rig.DoWell(rig.Remember(IdOf(i), {static_cast<float>(i)}));
    const TestCall* call = rig.DoWell(rig.Recall({20.1F}, 5));
    EXPECT_EQ(IdsIn(call->answer),
              (std::vector<std::string>{"id20", "id21", "id19", "id22", "id18"}));
    EXPECT_EQ(FoundIn(call->answer).front().payload, "about id20");
    EXPECT_EQ(call->answer.metric, Metric::kL2);
    EXPECT_EQ(rig.DoWell(rig.Recall({20.1F}, 1000))->answer.hit_count, 60u);
    rig.ExpectIdle();
  }
}

TEST(GatewayCoreTest, ASnapshotIsTheLeastOfThePartitions) {
  Rig rig;
  rig.DoWell(rig.Remember("a", {1}));
  // Those that sleep are complete up to now.
  rig.shards[1]->Publish(7'000);
  rig.shards[3]->Publish(5'000);
  TestCall* call = rig.Recall({1}, 1);
  call->question.snapshot_isolation = true;
  rig.DoWell(call);
  EXPECT_EQ(call->answer.snapshot, 5'000u);
  for (const auto& shard : rig.shards) EXPECT_EQ(shard->last_snapshot, 5'000u);
  rig.shards[1]->Publish(kOpenStamp);
  rig.shards[3]->Publish(kOpenStamp);
  call = rig.Recall({1}, 1);
  call->question.snapshot_isolation = true;
  rig.DoWell(call);
  EXPECT_GT(call->answer.snapshot, 7'000u);
  EXPECT_LE(UnixNsOf(call->answer.snapshot), rig.clock.WallNs());
  rig.DoWell(rig.Recall({1}, 1));
  for (const auto& shard : rig.shards) EXPECT_EQ(shard->last_snapshot, kNoStamp);
}

TEST(GatewayCoreTest, AGetFindsIdsAlsoWhereTheyWereBeforeTheSpaceGrew) {
  Rig rig({.partitions = 1});
  for (int i = 0; i < 20; ++i) rig.DoWell(rig.Remember(IdOf(i), {1}));
  ASSERT_TRUE(rig.space()->Grow(1));
  for (int i = 20; i < 40; ++i) rig.DoWell(rig.Remember(IdOf(i), {1}));
  ASSERT_TRUE(rig.space()->Grow(2));
  for (int i = 40; i < 60; ++i) rig.DoWell(rig.Remember(IdOf(i), {1}));
  std::vector<std::string> ids;
  for (int i = 0; i < 60; ++i) ids.push_back(IdOf(i));
  ids.push_back("not there");
  // More than the requests that one call may have under way.
  TestCall* call = rig.DoWell(rig.Get(ids));
  std::vector<std::string> found = IdsIn(call->answer);
  std::ranges::sort(found);
  ids.pop_back();
  std::ranges::sort(ids);
  EXPECT_EQ(found, ids);
  rig.ExpectIdle();
}

TEST(GatewayCoreTest, AScrollHandsOutEveryObservationOnce) {
  for (const uint16_t limit : {1, 7, 60, 1000}) {
    Rig rig;
    std::set<std::string> wanted;
    for (int i = 0; i < 60; ++i) {
      rig.DoWell(rig.Remember(IdOf(i), {1}));
      wanted.insert(IdOf(i));
    }
    std::multiset<std::string> seen;
    TestCall* page = rig.DoWell(rig.Scroll(limit));
    for (;;) {
      EXPECT_LE(page->answer.hit_count, limit);
      for (const std::string& id : IdsIn(page->answer)) seen.insert(id);
      if (page->answer.scroll_ended) break;
      EXPECT_GT(page->answer.hit_count, 0u);
      page = rig.DoWell(rig.Scroll(limit, page->answer.next_partition, page->answer.next_cursor));
    }
    EXPECT_EQ(seen.size(), 60u);
    EXPECT_EQ(std::set(seen.begin(), seen.end()), wanted);
    rig.ExpectIdle();
  }
}

TEST(GatewayCoreTest, AScrollsPageEndsBeforeItIsTooLargeForAnAnswer) {
  Rig rig;
  constexpr int kCount = 150;
  for (int i = 0; i < kCount; ++i) {
    TestCall* call = rig.Remember(IdOf(i), {1});
    call->payload.assign(30'000, 'x');
    call->question.payload = call->payload;
    rig.DoWell(call);
  }
  std::set<std::string> seen;
  int pages = 0;
  TestCall* page = rig.DoWell(rig.Scroll(1000));
  for (;; ++pages) {
    EXPECT_LT(page->answer.hits.size(), size_t{4} << 20);
    for (const Found& found : FoundIn(page->answer)) {
      EXPECT_EQ(found.payload.size(), 30'000u);
      seen.insert(found.id);
    }
    if (page->answer.scroll_ended) break;
    page = rig.DoWell(rig.Scroll(1000, page->answer.next_partition, page->answer.next_cursor));
  }
  EXPECT_EQ(seen.size(), size_t{kCount});
  EXPECT_EQ(pages, 2) << "4.5 MB, and 2 MiB a page";
  rig.ExpectIdle();
}

TEST(GatewayCoreTest, AScrollPassesPartitionsThatDoNotKnowTheSpace) {
  Rig rig;
  rig.DoWell(rig.Remember("only", {1}));
  EXPECT_EQ(IdsIn(rig.DoWell(rig.Scroll(10))->answer), std::vector<std::string>{"only"});
  const TestCall* beyond = rig.DoWell(rig.Scroll(10, 4, 0));
  EXPECT_EQ(beyond->answer.hit_count, 0u) << "a partition that there is not";
  EXPECT_TRUE(beyond->answer.scroll_ended);
}

TEST(GatewayCoreTest, ASpaceThatNobodyWroteToIsEmptyAndStaysUnknown) {
  Rig rig;
  EXPECT_EQ(rig.DoWell(rig.Recall({1}, 10))->answer.hit_count, 0u);
  EXPECT_EQ(rig.DoWell(rig.Get({"a"}))->answer.hit_count, 0u);
  EXPECT_TRUE(rig.DoWell(rig.Scroll(10))->answer.scroll_ended);
  EXPECT_FALSE(rig.DoWell(rig.Forget("a"))->answer.existed);
  EXPECT_EQ(rig.sent(), 0u);
  EXPECT_EQ(rig.space(), nullptr);
}

TEST(GatewayCoreTest, ARefusedVectorTakesNoSlotAndNamesTheDimension) {
  Rig rig;
  rig.DoWell(rig.Remember("a", {1, 2, 3}));
  const uint64_t sent = rig.sent();
  const TestCall* wrong = rig.Do(rig.Remember("b", {1, 2}));
  EXPECT_EQ(wrong->answer.reason, RefusalReason::kWrongDimension);
  EXPECT_EQ(wrong->answer.space_dimension, 3);
  const TestCall* recall = rig.Do(rig.Recall({1, 2, 3, 4}, 5));
  EXPECT_EQ(recall->answer.reason, RefusalReason::kWrongDimension);
  EXPECT_EQ(recall->answer.space_dimension, 3);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(rig.Do(rig.Remember("b", {1, nan, 3}))->answer.reason, RefusalReason::kNotFinite);
  EXPECT_EQ(rig.Do(rig.Recall({1, nan, 3}, 5))->answer.reason, RefusalReason::kNotFinite);
  EXPECT_EQ(rig.sent(), sent) << "no shard was bothered";
  rig.ExpectIdle();
}

// Two observations of different dimensions race for a new space: the shard decides.
TEST(GatewayCoreTest, TheShardsOwnRefusalComesBackWithTheDimension) {
  Rig rig({.shards = 1, .partitions = 1});
  rig.SetAnswers(false);
  TestCall* first = rig.Do(rig.Remember("a", {1, 2, 3}));
  TestCall* second = rig.Do(rig.Remember("b", {1, 2}));
  rig.SetAnswers(true);
  rig.Settle();
  EXPECT_EQ(first->answer.reason, RefusalReason::kNone);
  EXPECT_EQ(second->answer.reason, RefusalReason::kWrongDimension);
  EXPECT_EQ(second->answer.space_dimension, 3);
  rig.ExpectIdle();
}

TEST(GatewayCoreTest, ADeadlineAnswersAtOnceAndTheSlotsComeBackLater) {
  Rig rig;
  rig.DoWell(rig.Remember("a", {1}));
  rig.SetAnswers(false);
  const uint32_t free = rig.free_slots();
  TestCall* call = rig.Recall({1}, 5);
  call->question.deadline_ns = rig.clock.MonotonicNs() + 50 * kNanosPerMilli;
  rig.Do(call);
  for (const auto& shard : rig.shards) {
    ASSERT_EQ(shard->held(), 1u);
    EXPECT_EQ(shard->held_header(0).deadline_ns, call->question.deadline_ns);
  }
  rig.clock.AdvanceNs(49 * kNanosPerMilli);
  rig.Settle();
  EXPECT_EQ(call->answered, 0);
  rig.clock.AdvanceNs(10 * kNanosPerMilli);
  rig.Settle();
  EXPECT_EQ(call->answered, 1);
  EXPECT_EQ(call->answer.reason, RefusalReason::kDeadlinePassed);
  EXPECT_EQ(rig.free_slots(), free - 4) << "the shards have them still";
  EXPECT_EQ(rig.core->calls_under_way(), 1u);
  rig.SetAnswers(true);
  rig.Settle();
  rig.ExpectIdle();
}

TEST(GatewayCoreTest, ADeadlineThatPassedAlreadyAsksNobody) {
  Rig rig;
  rig.DoWell(rig.Remember("a", {1}));
  const uint64_t sent = rig.sent();
  TestCall* call = rig.Recall({1}, 5);
  call->question.deadline_ns = rig.clock.MonotonicNs();
  rig.Do(call);
  EXPECT_EQ(call->answer.reason, RefusalReason::kDeadlinePassed);
  EXPECT_EQ(rig.sent(), sent);
  rig.ExpectIdle();
}

TEST(GatewayCoreTest, ACancelledCallIsMarkedInItsSlotsAndNotDone) {
  Rig rig;
  rig.DoWell(rig.Remember("a", {1}));
  rig.SetAnswers(false);
  TestCall* recall = rig.Do(rig.Recall({1}, 5));
  TestCall* remember = rig.Do(rig.Remember("b", {2}));
  rig.door->Cancel(recall);
  rig.door->Cancel(remember);
  rig.Settle();
  EXPECT_EQ(recall->answer.reason, RefusalReason::kCancelled);
  EXPECT_EQ(remember->answer.reason, RefusalReason::kCancelled);
  for (const auto& shard : rig.shards) {
    for (size_t i = 0; i < shard->held(); ++i) EXPECT_TRUE(IsCancelled(shard->held_header(i)));
  }
  rig.SetAnswers(true);
  rig.Settle();
  EXPECT_FALSE(rig.OwnerOf("b").spaces["s"].contains("b"));
  EXPECT_EQ(rig.core->counter(GatewayCounter::kCallsAbandoned).Read(), 2u);
  rig.ExpectIdle();
}

TEST(GatewayCoreTest, ACancelThatComesTooLateDoesNothing) {
  Rig rig;
  TestCall* call = rig.DoWell(rig.Remember("a", {1}));
  rig.door->Cancel(call);
  rig.SetAnswers(false);
  TestCall* next = rig.Do(rig.Remember("b", {1}));
  EXPECT_EQ(next->answered, 0) << "whoever got the place of the first call goes on";
  rig.SetAnswers(true);
  rig.Settle();
  EXPECT_EQ(next->answer.reason, RefusalReason::kNone);
  rig.ExpectIdle();
}

// The results of a recall whose asker has gone are on their way already.
TEST(GatewayCoreTest, ResultsOfAnAbandonedCallAreGivenBack) {
  for (const uint16_t partitions : {1, 4}) {
    Rig rig({.partitions = partitions});
    for (int i = 0; i < 20; ++i) rig.DoWell(rig.Remember(IdOf(i), {1}));
    TestCall* call = rig.Recall({1}, 10);
    EXPECT_TRUE(rig.door->Submit(call));
    rig.core->Poll();
    for (auto& shard : rig.shards) shard->Poll();
    call->question.deadline_ns = 0;
    rig.door->Cancel(call);
    // The cancel is taken in the same round as some of the answers.
    rig.Settle();
    rig.ExpectIdle();
  }
}

TEST(GatewayCoreTest, AFullTableRefusesAndSaysWhenToRetry) {
  Rig rig({.gateway = {.max_calls = 2, .inbox_capacity = 16, .max_merges = 4}});
  rig.SetAnswers(false);
  TestCall* first = rig.Do(rig.Remember("a", {1}));
  rig.Do(rig.Remember("b", {1}));
  TestCall* third = rig.Do(rig.Remember("c", {1}));
  EXPECT_EQ(third->answered, 1);
  EXPECT_EQ(third->answer.reason, RefusalReason::kQueueFull);
  EXPECT_GE(third->answer.retry_after_ms, 1u);
  rig.SetAnswers(true);
  rig.Settle();
  EXPECT_EQ(first->answer.reason, RefusalReason::kNone);
  EXPECT_EQ(rig.DoWell(rig.Remember("c", {1}))->answered, 1);
  rig.ExpectIdle();
}

TEST(GatewayCoreTest, AFullInboxIsARefusal) {
  Rig rig({.gateway = {.max_calls = 2, .inbox_capacity = 4, .max_merges = 4}});
  for (int i = 0; i < 4; ++i) EXPECT_TRUE(rig.door->Submit(rig.Forget("a")));
  TestCall* refused = rig.Forget("a");
  EXPECT_FALSE(rig.door->Submit(refused));
  rig.Settle();
  EXPECT_EQ(refused->answered, 0) << "the transport answers what was not taken";
  EXPECT_GE(rig.door->RetryAfterMs(), 1u);
  EXPECT_TRUE(rig.door->Submit(refused));
  rig.Settle();
  rig.ExpectIdle();
}

TEST(GatewayCoreTest, AFullRingRefusesWithoutLosingASlot) {
  Rig rig({.recall_lane_capacity = 2, .gateway = {.max_calls = 64, .inbox_capacity = 64}});
  rig.DoWell(rig.Remember("a", {1}));
  rig.shards[2]->takes = false;
  int refused = 0;
  for (int i = 0; i < 5; ++i) {
    const TestCall* call = rig.Do(rig.Recall({1}, 1));
    if (call->answered == 0) continue;
    ++refused;
    EXPECT_EQ(call->answer.reason, RefusalReason::kQueueFull);
    EXPECT_GE(call->answer.retry_after_ms, 1u);
  }
  EXPECT_EQ(refused, 3) << "two wait in the ring of the shard that stands still";
  const TestCall* introspect = rig.Do(rig.NewCall(CallKind::kIntrospect));
  EXPECT_EQ(introspect->answer.reason, RefusalReason::kQueueFull);
  rig.shards[2]->takes = true;
  rig.Settle();
  rig.ExpectIdle();
}

TEST(GatewayCoreTest, SpentSlotsRefuseWithoutLosingAny) {
  // 8 slots of 1 KiB; one in ten of a size is kept for high priority.
  Rig rig({.lane_capacity = 8});
  rig.DoWell(rig.Remember("a", {1}));
  rig.SetAnswers(false);
  TestCall* first = rig.Do(rig.Recall({1}, 1));
  TestCall* second = rig.Do(rig.Recall({1}, 1));
  TestCall* third = rig.Do(rig.Recall({1}, 1));
  EXPECT_EQ(first->answered + second->answered, 0);
  EXPECT_EQ(third->answer.reason, RefusalReason::kSlotsExhausted);
  EXPECT_EQ(rig.Do(rig.Remember("b", {1}))->answer.reason, RefusalReason::kSlotsExhausted);
  EXPECT_EQ(rig.Do(rig.Get({"a"}))->answer.reason, RefusalReason::kSlotsExhausted);
  EXPECT_EQ(rig.Do(rig.NewCall(CallKind::kIntrospect))->answer.reason,
            RefusalReason::kSlotsExhausted);
  rig.SetAnswers(true);
  rig.Settle();
  EXPECT_EQ(first->answer.reason, RefusalReason::kNone);
  rig.ExpectIdle();
}

// Room is kept for observations of high priority; recalls may use it.
TEST(GatewayCoreTest, ObservationsLeaveATenthOfTheSlots) {
  Rig rig({.shards = 1, .partitions = 1, .lane_capacity = 20});
  rig.SetAnswers(false);
  int stored = 0;
  while (rig.Do(rig.Remember(IdOf(stored), {1}))->answered == 0) ++stored;
  EXPECT_EQ(stored, 18);
  EXPECT_EQ(rig.Do(rig.Recall({1}, 1))->answered, 0);
  rig.SetAnswers(true);
  rig.Settle();
  rig.ExpectIdle();
}

TEST(GatewayCoreTest, TooManyMergesAreARefusal) {
  Rig rig({.gateway = {.max_calls = 64, .inbox_capacity = 64, .max_merges = 1}});
  rig.DoWell(rig.Remember("a", {1}));
  rig.SetAnswers(false);
  TestCall* first = rig.Do(rig.Recall({1}, 1));
  TestCall* second = rig.Do(rig.Recall({1}, 1));
  EXPECT_EQ(second->answer.reason, RefusalReason::kMergesFull);
  rig.SetAnswers(true);
  rig.Settle();
  EXPECT_EQ(IdsIn(first->answer), std::vector<std::string>{"a"});
  rig.DoWell(rig.Recall({1}, 1));
  rig.ExpectIdle();
}

// Pages that grow at the same time, each within its bound, together beyond theirs.
TEST(GatewayCoreTest, AnswersTakeNoMoreMemoryThanTheyMay) {
  Rig rig({.gateway = {.max_calls = 64,
                       .inbox_capacity = 64,
                       .max_merges = 4,
                       .answer_memory_bytes = 500'000}});
  for (int i = 0; i < 40; ++i) {
    TestCall* call = rig.Remember(IdOf(i), {1});
    call->payload.assign(10'000, 'x');
    call->question.payload = call->payload;
    rig.DoWell(call);
  }
  std::vector<TestCall*> pages;
  for (int i = 0; i < 3; ++i) {
    pages.push_back(rig.Scroll(1000));
    ASSERT_TRUE(rig.door->Submit(pages.back()));
  }
  rig.Settle();
  int whole = 0;
  for (const TestCall* page : pages) {
    ASSERT_EQ(page->answered, 1);
    if (page->answer.reason == RefusalReason::kNone) {
      EXPECT_EQ(page->answer.hit_count, 40u);
      ++whole;
    } else {
      EXPECT_EQ(page->answer.reason, RefusalReason::kSlotsExhausted);
      EXPECT_GE(page->answer.retry_after_ms, 1u);
    }
  }
  EXPECT_LT(whole, 3) << "1.2 MB of answers at the same time";
  // What they took is given back, also by those that were refused or cancelled.
  for (int round = 0; round < 5; ++round) {
    TestCall* left = rig.Scroll(1000);
    ASSERT_TRUE(rig.door->Submit(left));
    rig.core->Poll();
    for (auto& shard : rig.shards) shard->Poll();
    rig.core->Poll();
    rig.door->Cancel(left);
    rig.Settle();
    EXPECT_EQ(rig.DoWell(rig.Scroll(1000))->answer.hit_count, 40u);
  }
  rig.ExpectIdle();
}

TEST(GatewayCoreTest, AMergedAnswerCountsToo) {
  Rig rig({.gateway = {.max_calls = 64,
                       .inbox_capacity = 64,
                       .max_merges = 4,
                       .answer_memory_bytes = 200'000}});
  for (int i = 0; i < 40; ++i) {
    TestCall* call = rig.Remember(IdOf(i), {1});
    call->payload.assign(10'000, 'x');
    call->question.payload = call->payload;
    rig.DoWell(call);
  }
  for (int round = 0; round < 3; ++round) {
    TestCall* large = rig.Recall({1}, 40);
    large->question.with_payload = true;
    rig.Do(large);
    EXPECT_EQ(large->answered, 1);
    EXPECT_EQ(large->answer.reason, RefusalReason::kSlotsExhausted);
    EXPECT_GE(large->answer.retry_after_ms, 1u);
    TestCall* small = rig.Recall({1}, 10);
    small->question.with_payload = true;
    EXPECT_EQ(rig.DoWell(small)->answer.hit_count, 10u) << "what was taken is given back";
  }
  rig.ExpectIdle();
}

TEST(GatewayCoreTest, AShardsRefusalEndsTheCallWithItsRetryTime) {
  Rig rig;
  rig.DoWell(rig.Remember("a", {1}));
  rig.shards[1]->refuses = RefusalReason::kBacklogFull;
  rig.shards[1]->retry_after_ms = 321;
  const TestCall* recall = rig.Do(rig.Recall({1}, 5));
  EXPECT_EQ(recall->answer.reason, RefusalReason::kBacklogFull);
  EXPECT_EQ(recall->answer.retry_after_ms, 321u);
  int refused = 0;
  for (int i = 0; i < 20; ++i) {
    const TestCall* call = rig.Do(rig.Remember(IdOf(i), {1}));
    const bool owner = &rig.OwnerOf(IdOf(i)) == rig.shards[1].get();
    EXPECT_EQ(call->answer.reason, owner ? RefusalReason::kBacklogFull : RefusalReason::kNone);
    EXPECT_TRUE(!owner || call->answer.retry_after_ms == 321u);
    refused += owner ? 1 : 0;
  }
  EXPECT_GT(refused, 0);
  rig.ExpectIdle();
}

TEST(GatewayCoreTest, IntrospectAsksEveryShard) {
  Rig rig;
  for (int i = 0; i < 30; ++i) rig.DoWell(rig.Remember(IdOf(i), {1}));
  rig.DoWell(rig.Remember("x", {1}, "other"));
  const TestCall* call = rig.DoWell(rig.NewCall(CallKind::kIntrospect));
  uint64_t observations = 0;
  for (size_t at = 0; at < call->answer.records.size();) {
    SpaceRecord record;
    std::memcpy(&record, call->answer.records.data() + at, sizeof(record));
    observations += record.observations;
    at += record.record_bytes;
  }
  EXPECT_EQ(observations, 31u);
  rig.ExpectIdle();
}

// Calls of all kinds, shards that stop and go on, cancels and deadlines, in an order drawn from a
// seed: every call is answered once, and nothing is lost.
TEST(GatewayCoreTest, RandomProgramsAnswerEveryCallOnce) {
  for (uint64_t seed = 1; seed <= 30; ++seed) {
    SCOPED_TRACE(seed);
    SplitMix64 random(seed);
    Rig rig({.partitions = static_cast<uint16_t>(1 << random.Below(3)),
             .lane_capacity = 32,
             .recall_lane_capacity = 8,
             .gateway = {.max_calls = 12, .inbox_capacity = 16, .max_merges = 3}});
    std::vector<TestCall*> open;
    for (int step = 0; step < 1'500; ++step) {
      switch (random.Below(12)) {
        case 0: {
          GatewayFakeShard& shard = *rig.shards[random.Below(4)];
          (random.Below(2) == 0 ? shard.takes : shard.answers) = random.Below(3) > 0;
          break;
        }
        case 1:
          if (!open.empty()) rig.door->Cancel(open[random.Below(open.size())]);
          break;
        case 2:
          rig.clock.AdvanceNs(static_cast<int64_t>(random.Below(10)) * kNanosPerMilli);
          break;
        case 3:
          rig.shards[random.Below(4)]->refuses =
              random.Below(4) == 0 ? RefusalReason::kMemoryFull : RefusalReason::kNone;
          break;
        case 4:
          if (rig.space() != nullptr && step % 16 == 0)
            rig.space()->Grow(rig.space()->partitions());
          break;
        case 5:
        case 6:
        case 7: {
          TestCall* call = nullptr;
          const std::string id = IdOf(static_cast<int>(random.Below(50)));
          switch (random.Below(6)) {
            case 0:
              call = rig.Forget(id);
              break;
            case 1:
              call = rig.Recall({1}, 5);
              break;
            case 2:
              call = rig.Get({id, "id1", "id2", "id3", "id4", "id5", "id6", "id7"});
              break;
            case 3:
              call = rig.Scroll(3);
              break;
            case 4:
              call = rig.NewCall(CallKind::kIntrospect);
              break;
            default:
              call = rig.Remember(id, {1});
          }
          if (random.Below(3) == 0) {
            call->question.deadline_ns =
                rig.clock.MonotonicNs() + static_cast<int64_t>(random.Below(30)) * kNanosPerMilli;
          }
          if (rig.door->Submit(call)) {
            open.push_back(call);
          } else {
            ++call->answered;  // As a transport does.
          }
          break;
        }
        case 8:
          rig.core->Poll();
          break;
        default:
          rig.shards[random.Below(4)]->Poll();
      }
    }
    for (auto& shard : rig.shards) shard->takes = shard->answers = true;
    rig.Settle();
    rig.ExpectIdle();
    for (const TestCall* call : open) ASSERT_EQ(call->answered, 1);
  }
}

// ---- Payload in logs ----

class GatewayRecordsTest : public testing::Test {
 public:
  GatewayRecordsTest() : rig_({.logs = &logs_}) {
    logs_.ends_at_once = true;
    for (int i = 0; i < kIds; ++i) {
      TestCall* call = rig_.Remember(IdOf(i), {static_cast<float>(i), 1});
      rig_.DoWell(call);
    }
    logs_.ends_at_once = false;
  }
  ~GatewayRecordsTest() override {
    EXPECT_TRUE(PinsAreLeft());
    EXPECT_EQ(rig_.core->records()->under_way(), 0u);
    rig_.ExpectIdle();
  }

 protected:
  bool PinsAreLeft() { return logs_.pins.Passed(logs_.pins.Close()); }
  // The shards answer; the disk does not.
  void Run(int steps = 20) {
    for (int i = 0; i < steps; ++i) {
      rig_.core->Poll();
      for (auto& shard : rig_.shards) shard->Poll();
    }
  }
  std::vector<Found> Finish(TestCall* call) {
    for (int i = 0; i < 1'000 && call->answered == 0; ++i) {
      if (!logs_.reads.empty()) logs_.End(logs_.reads.size() - 1);
      Run(1);
    }
    EXPECT_EQ(call->answered, 1);
    EXPECT_EQ(call->answer.reason, RefusalReason::kNone);
    return FoundIn(call->answer);
  }

  static constexpr int kIds = 60;
  FakeLogs logs_;
  Rig rig_;
};

TEST_F(GatewayRecordsTest, ARecallHasThePayloadsOfTheBestAlone) {
  for (const bool with_vector : {false, true}) {
    TestCall* call = rig_.Recall({0, 1}, 10);
    call->question.with_vector = with_vector;
    ASSERT_TRUE(rig_.door->Submit(call));
    Run();
    EXPECT_EQ(call->answered, 0);
    EXPECT_EQ(logs_.reads.size(), 10u);
    EXPECT_FALSE(PinsAreLeft());
    const auto found = Finish(call);
    ASSERT_EQ(found.size(), 10u);
    for (int i = 0; i < 10; ++i) {
      EXPECT_EQ(found[static_cast<size_t>(i)].id, IdOf(i));
      EXPECT_EQ(found[static_cast<size_t>(i)].payload, "about " + IdOf(i));
      EXPECT_EQ(found[static_cast<size_t>(i)].header.flags, 0);
      EXPECT_EQ(found[static_cast<size_t>(i)].header.confidence, 0.5F);
      EXPECT_EQ(found[static_cast<size_t>(i)].header.vector_dimension, with_vector ? 2 : 0);
    }
  }
}

TEST_F(GatewayRecordsTest, GetsAndScrollsAreReadInWindows) {
  std::vector<std::string> ids;
  for (int i = 0; i < kIds; ++i) ids.push_back(IdOf(i));
  TestCall* get = rig_.Get(ids);
  ASSERT_TRUE(rig_.door->Submit(get));
  Run(100);
  EXPECT_EQ(logs_.reads.size(), HitWindow::kHits);
  std::set<std::string> seen;
  for (const Found& found : Finish(get)) {
    EXPECT_EQ(found.payload, "about " + found.id);
    seen.insert(found.id);
  }
  EXPECT_EQ(seen.size(), size_t{kIds});
  TestCall* scroll = rig_.Scroll(1'000);
  ASSERT_TRUE(rig_.door->Submit(scroll));
  Run(100);
  seen.clear();
  for (const Found& found : Finish(scroll)) {
    EXPECT_EQ(found.payload, "about " + found.id);
    seen.insert(found.id);
  }
  EXPECT_EQ(seen.size(), size_t{kIds});
}

TEST_F(GatewayRecordsTest, IdsAloneAreNotRead) {
  TestCall* call = rig_.Recall({0, 1}, 10);
  call->question.with_payload = false;
  rig_.DoWell(call);
  EXPECT_TRUE(logs_.reads.empty());
  EXPECT_TRUE(PinsAreLeft());
}

// Whoever asked has gone, or waits no longer, while records are read.
TEST_F(GatewayRecordsTest, AnAbandonedCallLeavesNothingBehind) {
  TestCall* recall = rig_.Recall({0, 1}, 10);
  recall->question.deadline_ns = rig_.clock.MonotonicNs() + kNanosPerSecond;
  TestCall* get = rig_.Get({IdOf(1), IdOf(2)});
  ASSERT_TRUE(rig_.door->Submit(recall));
  ASSERT_TRUE(rig_.door->Submit(get));
  Run();
  EXPECT_EQ(logs_.reads.size(), 12u);
  rig_.door->Cancel(get);
  rig_.clock.AdvanceNs(2 * kNanosPerSecond);
  Run();
  EXPECT_EQ(recall->answered, 1);
  EXPECT_EQ(recall->answer.reason, RefusalReason::kDeadlinePassed);
  EXPECT_EQ(get->answered, 1);
  EXPECT_EQ(get->answer.reason, RefusalReason::kCancelled);
  EXPECT_TRUE(PinsAreLeft());
  EXPECT_EQ(rig_.core->calls_under_way(), 0u);
  EXPECT_EQ(rig_.core->records()->under_way(), 12u) << "the disk still has the memory";
  logs_.EndAll();
  Run();
}

// A page ends by what it will hold, not by what the shards sent.
TEST_F(GatewayRecordsTest, AScrollsPageIsBoundedWithItsPayloads) {
  logs_.ends_at_once = true;
  for (auto& shard : rig_.shards) {
    for (auto& [id, kept] : shard->spaces["s"]) kept.payload = std::string(60'000, 'x');
  }
  TestCall* scroll = rig_.Scroll(1'000);
  rig_.DoWell(scroll);
  EXPECT_FALSE(scroll->answer.scroll_ended);
  EXPECT_GT(scroll->answer.hits.size(), size_t{2} << 20);
  EXPECT_LT(scroll->answer.hits.size(), size_t{4} << 20);
}

}  // namespace
}  // namespace engram
