#include "dataplane/ring_mesh.h"

#include <gtest/gtest.h>

#include <set>

#include "dataplane/admission_gate.h"

namespace engram {
namespace {

// Only handed on.
SpaceCatalogue* Spaces() {
  static SpaceCatalogue spaces(10, 3, 3, {});
  return &spaces;
}

RingMesh MakeMesh(MeshOptions options) {
  options.huge_pages = HugePagePolicy::kOff;
  options.catalogue = Spaces();
  auto mesh = RingMesh::Create(options);
  EXPECT_TRUE(mesh.has_value());
  return *std::move(mesh);
}

constexpr MeshOptions Small() {
  return {.producers = 2,
          .shards = 3,
          .lane_capacity = 16,
          .recall_lane_capacity = 8,
          .peer_capacity = 4,
          .producer_numa_node = {},
          .shard_numa_node = {}};
}

TEST(RingMeshTest, EveryPairHasItsOwnRings) {
  RingMesh mesh = MakeMesh(Small());
  std::vector<ProducerPort> producers;
  std::vector<ShardPort> shards;
  for (uint16_t p = 0; p < 2; ++p) producers.push_back(mesh.TakeProducer(ProducerId(p)));
  for (uint16_t s = 0; s < 3; ++s) shards.push_back(mesh.TakeShard(ShardId(s)));
  for (uint16_t p = 0; p < 2; ++p) {
    EXPECT_EQ(producers[p].producer, ProducerId(p));
    ASSERT_EQ(producers[p].shards.size(), 3u);
    for (uint16_t s = 0; s < 3; ++s) {
      EXPECT_EQ(shards[s].shard, ShardId(s));
      ASSERT_EQ(shards[s].producers.size(), 2u);
      ProducerLink& out = producers[p].shards[s];
      for (size_t lane = 0; lane < kLanes; ++lane) {
        ASSERT_TRUE(out.lanes[lane].TryPush(static_cast<SlotId>(100 * p + 10 * s + lane)));
      }
      ASSERT_TRUE(out.result_returns.TryPush(1000 + 10 * p + s));
      ASSERT_TRUE(
          shards[s].producers[p].completions.TryPush({.sequence = uint64_t{2000} + 10 * p + s}));
      EXPECT_EQ(shards[s].producers[p].producer_slab, producers[p].slab);
      EXPECT_EQ(out.result_slab, shards[s].result_slab);
    }
  }
  for (uint16_t p = 0; p < 2; ++p) {
    for (uint16_t s = 0; s < 3; ++s) {
      ShardLink& in = shards[s].producers[p];
      for (size_t lane = 0; lane < kLanes; ++lane) {
        EXPECT_EQ(in.lanes[lane].TryPop(), static_cast<SlotId>(100 * p + 10 * s + lane));
        EXPECT_EQ(in.lanes[lane].TryPop(), std::nullopt);
      }
      EXPECT_EQ(in.result_returns.TryPop(), 1000u + 10 * p + s);
      const auto completion = producers[p].shards[s].completions.TryPop();
      ASSERT_TRUE(completion.has_value());
      EXPECT_EQ(completion->sequence, 2000u + 10 * p + s);
    }
  }
  // One slab a core.
  std::set<const SlotSlab*> slabs;
  for (const ProducerPort& port : producers) slabs.insert(port.slab);
  for (const ShardPort& port : shards) slabs.insert(port.result_slab);
  EXPECT_EQ(slabs.size(), 5u);
}

TEST(RingMeshTest, EveryOrderedPairOfShardsHasItsOwnRings) {
  RingMesh mesh = MakeMesh(Small());
  std::vector<ShardPort> shards;
  for (uint16_t s = 0; s < 3; ++s) shards.push_back(mesh.TakeShard(ShardId(s)));
  for (uint16_t from = 0; from < 3; ++from) {
    ASSERT_EQ(shards[from].peers.size(), 3u);
    EXPECT_FALSE(shards[from].peers[from].requests_out) << "a shard has no ring to itself";
    for (uint16_t to = 0; to < 3; ++to) {
      if (from == to) continue;
      PeerLink& link = shards[from].peers[to];
      PeerMessage message;
      message.ticket = uint64_t{10} * from + to;
      ASSERT_TRUE(link.requests_out.TryPush(message));
      message.ticket += 100;
      ASSERT_TRUE(link.done_out.TryPush(message));
    }
  }
  for (uint16_t from = 0; from < 3; ++from) {
    for (uint16_t to = 0; to < 3; ++to) {
      if (from == to) continue;
      PeerLink& link = shards[to].peers[from];
      const auto request = link.requests_in.TryPop();
      ASSERT_TRUE(request.has_value());
      EXPECT_EQ(request->ticket, 10u * from + to);
      EXPECT_FALSE(link.requests_in.TryPop().has_value());
      const auto done = link.done_in.TryPop();
      ASSERT_TRUE(done.has_value());
      EXPECT_EQ(done->ticket, 100u + 10 * from + to);
      EXPECT_FALSE(link.done_in.TryPop().has_value());
    }
  }
}

// A home shard that keeps no more under way than the ring of requests holds gets every answer.
TEST(RingMeshTest, AnswersHaveMoreRoomThanRequests) {
  RingMesh mesh = MakeMesh(Small());
  ShardPort home = mesh.TakeShard(ShardId(0));
  ShardPort owner = mesh.TakeShard(ShardId(1));
  EXPECT_EQ(home.peers[1].requests_out.capacity(), 4u);
  EXPECT_GT(owner.peers[0].done_out.capacity(), home.peers[1].requests_out.capacity());
}

TEST(RingMeshTest, AllCoresShareTheBoardAndTheCatalogue) {
  RingMesh mesh = MakeMesh(Small());
  const ProducerPort producer = mesh.TakeProducer(ProducerId(1));
  const ShardPort shard = mesh.TakeShard(ShardId(2));
  EXPECT_EQ(producer.catalogue, Spaces());
  EXPECT_EQ(shard.catalogue, Spaces());
  ASSERT_EQ(producer.stamps, shard.stamps);
  EXPECT_EQ(producer.stamps->shards(), 3u);
  shard.stamps->Publish(ShardId(2), 1234);
  EXPECT_EQ(producer.stamps->CompleteUpTo(ShardId(2), 0), 1234u);
}

TEST(RingMeshTest, CapacitiesAreThoseAskedFor) {
  RingMesh mesh = MakeMesh(Small());
  const ProducerPort producer = mesh.TakeProducer(ProducerId(0));
  const ShardPort shard = mesh.TakeShard(ShardId(0));
  const auto& lanes = producer.shards[0].lanes;
  EXPECT_EQ(lanes[static_cast<size_t>(Lane::kRecall)].capacity(), 8u);
  EXPECT_EQ(lanes[static_cast<size_t>(Lane::kHigh)].capacity(), 16u);
  EXPECT_EQ(lanes[static_cast<size_t>(Lane::kNormal)].capacity(), 16u);
  // A shard never finds these full: one entry for each slot that can be out, and the notices.
  EXPECT_GE(producer.shards[0].completions.capacity(),
            producer.slab->total_slots() + shard.result_slab->total_slots() + kNoticeRoom);
  EXPECT_GE(producer.shards[0].result_returns.capacity(), shard.result_slab->total_slots());
}

TEST(RingMeshTest, SlotsHoldTheGreatest) {
  for (const uint32_t lane_capacity : {1, 16, 1024}) {
    MeshOptions options = Small();
    options.lane_capacity = lane_capacity;
    RingMesh mesh = MakeMesh(options);
    const ProducerPort producer = mesh.TakeProducer(ProducerId(1));
    EXPECT_GE(producer.slab->max_slot_bytes(), kMaxSlotBytes);
    EXPECT_NE(producer.slab->Acquire(kMaxSlotBytes, 20), kNoSlot);
    // Some 4,096-d f32 vector without payload, and a full lane of 768-d ones.
    EXPECT_NE(producer.slab->Acquire(kRequestBodyOffset + 16'384, 20), kNoSlot);
    for (uint32_t i = 0; i < lane_capacity; ++i) {
      EXPECT_NE(producer.slab->Acquire(kRequestBodyOffset + 3072 + 256), kNoSlot);
    }
    ShardPort shard = mesh.TakeShard(ShardId(2));
    EXPECT_NE(shard.result_slab->Acquire(kResultSlotBytes), kNoSlot);
  }
}

TEST(RingMeshDeathTest, AnEndIsTakenOnce) {
  RingMesh mesh = MakeMesh(Small());
  (void)mesh.TakeProducer(ProducerId(0));
  (void)mesh.TakeShard(ShardId(0));
  EXPECT_DEATH((void)mesh.TakeProducer(ProducerId(0)), "taken once");
  EXPECT_DEATH((void)mesh.TakeShard(ShardId(0)), "taken once");
}

}  // namespace
}  // namespace engram
