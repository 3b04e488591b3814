#include "dataplane/ring_mesh.h"

#include <array>
#include <utility>

#include "dataplane/admission_gate.h"
#include "src/core/check.h"

namespace engram {

namespace {

constexpr std::array kResultClasses = {
    SlotClass{.slot_bytes = 8 * 1024, .count = 256},
    SlotClass{.slot_bytes = kResultSlotBytes, .count = 64},
};

int NodeAt(const std::vector<int>& nodes, size_t index) {
  return index < nodes.size() ? nodes[index] : -1;
}

// Room for a full lane of 768-d f32 observations with modest payloads, and less of the other sizes.
std::array<SlotClass, 4> ProducerClasses(uint32_t lane_capacity) {
  return {SlotClass{.slot_bytes = 1024, .count = lane_capacity},
          SlotClass{.slot_bytes = 4 * 1024, .count = lane_capacity},
          SlotClass{.slot_bytes = 20 * 1024, .count = lane_capacity / 8 + 64},
          SlotClass{.slot_bytes = kMaxSlotBytes, .count = lane_capacity / 64 + 16}};
}

}  // namespace

Result<RingMesh> RingMesh::Create(const MeshOptions& options) {
  CHECK(options.producers > 0 && options.shards > 0, "a mesh has two sides");
  CHECK(options.catalogue != nullptr, "every core needs the catalogue of spaces");
  RingMesh mesh;
  mesh.stamps_ = std::make_unique<StampBoard>(options.shards);
  const auto producer_classes = ProducerClasses(options.lane_capacity);
  for (uint16_t p = 0; p < options.producers; ++p) {
    auto slab = SlotSlab::Create(producer_classes, options.huge_pages,
                                 NodeAt(options.producer_numa_node, p));
    if (!slab) return std::unexpected(slab.error());
    mesh.slabs_.push_back(std::make_unique<SlotSlab>(*std::move(slab)));
    mesh.producers_.push_back({.producer = ProducerId(p),
                               .slab = mesh.slabs_.back().get(),
                               .shards = {},
                               .stamps = mesh.stamps_.get(),
                               .catalogue = options.catalogue});
  }
  for (uint16_t s = 0; s < options.shards; ++s) {
    auto slab =
        SlotSlab::Create(kResultClasses, options.huge_pages, NodeAt(options.shard_numa_node, s));
    if (!slab) return std::unexpected(slab.error());
    mesh.result_slabs_.push_back(std::make_unique<SlotSlab>(*std::move(slab)));
    mesh.shards_.push_back({.shard = ShardId(s),
                            .producers = {},
                            .peers = std::vector<PeerLink>(options.shards),
                            .result_slab = mesh.result_slabs_.back().get(),
                            .stamps = mesh.stamps_.get(),
                            .catalogue = options.catalogue});
  }
  mesh.LinkProducers(options);
  mesh.LinkPeers(options);
  return mesh;
}

void RingMesh::LinkProducers(const MeshOptions& options) {
  for (uint16_t p = 0; p < options.producers; ++p) {
    for (uint16_t s = 0; s < options.shards; ++s) {
      ProducerLink producer_link;
      ShardLink shard_link;
      for (size_t lane = 0; lane < kLanes; ++lane) {
        const bool recall_lane = lane == static_cast<size_t>(Lane::kRecall);
        std::tie(producer_link.lanes[lane], shard_link.lanes[lane]) = SpscRing<SlotId>::Create(
            recall_lane ? options.recall_lane_capacity : options.lane_capacity);
      }
      const size_t slots = slabs_[p]->total_slots();
      const size_t result_slots = result_slabs_[s]->total_slots();
      std::tie(shard_link.completions, producer_link.completions) =
          SpscRing<Completion>::Create(slots + result_slots + kNoticeRoom);
      std::tie(producer_link.result_returns, shard_link.result_returns) =
          SpscRing<SlotId>::Create(result_slots);
      producer_link.result_slab = result_slabs_[s].get();
      shard_link.producer_slab = slabs_[p].get();
      producers_[p].shards.push_back(std::move(producer_link));
      shards_[s].producers.push_back(std::move(shard_link));
    }
  }
}

void RingMesh::LinkPeers(const MeshOptions& options) {
  for (uint16_t from = 0; from < options.shards; ++from) {
    for (uint16_t to = 0; to < options.shards; ++to) {
      if (from == to) continue;
      PeerLink& asking = shards_[from].peers[to];
      PeerLink& asked = shards_[to].peers[from];
      std::tie(asking.requests_out, asked.requests_in) =
          SpscRing<PeerMessage>::Create(options.peer_capacity);
      std::tie(asked.done_out, asking.done_in) =
          SpscRing<PeerMessage>::Create(asking.requests_out.capacity() + 1);
    }
  }
}

ProducerPort RingMesh::TakeProducer(ProducerId producer) {
  ProducerPort& port = producers_[producer.value()];
  CHECK(!port.shards.empty(), "a producer's port is taken once");
  return std::exchange(port, ProducerPort{});
}

ShardPort RingMesh::TakeShard(ShardId shard) {
  ShardPort& port = shards_[shard.value()];
  CHECK(!port.producers.empty(), "a shard's port is taken once");
  return std::exchange(port, ShardPort{});
}

}  // namespace engram
