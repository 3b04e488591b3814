#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "src/core/huge_page_arena.h"
#include "src/core/ids.h"
#include "src/core/result.h"
#include "src/core/shard_port.h"
#include "src/core/slot_slab.h"

namespace engram {

struct MeshOptions {
  uint16_t producers = 1;
  uint16_t shards = 1;
  // Observations that may wait between one producer and one shard, on each of the two lanes.
  uint32_t lane_capacity = 8'192;
  // Recalls and other requests that may wait between one producer and one shard.
  uint32_t recall_lane_capacity = 1'024;
  // Observations that one shard may have under way at one other shard.
  uint32_t peer_capacity = 1'024;
  HugePagePolicy huge_pages = HugePagePolicy::kAuto;
  std::vector<int> producer_numa_node;  // by producer; missing ones are left to the kernel
  std::vector<int> shard_numa_node;     // by shard, likewise
  SpaceCatalogue* catalogue = nullptr;  // handed to every core; outlives them
};

// A producer's end of the whole mesh.
struct ProducerPort {
  ProducerId producer;
  SlotSlab* slab = nullptr;
  std::vector<ProducerLink> shards;
  const StampBoard* stamps = nullptr;   // of all shards
  SpaceCatalogue* catalogue = nullptr;  // of all cores
};

// Every ring and slab between P producers and S shards: P x S x 3 lanes forward, P x S completion
// rings and P x S result returns back; between every ordered pair of shards a ring of requests and
// one of answers; and the board where the shards publish their stamps. Made once at the start; each
// core then takes its own end.
//
// Invariants: a completion ring has room for one entry per slot that can be out (the producer's and
// the shard's) and for the notices beside them, so a shard never finds it full. A ring of answers
// has room for more than the ring of requests, so a shard that has no more requests under way than
// peer_capacity gets every answer.
class RingMesh {
 public:
  // Errors: kResourceExhausted when the slabs do not fit in memory.
  static Result<RingMesh> Create(const MeshOptions& options);

  // Each may be taken once.
  ProducerPort TakeProducer(ProducerId producer);
  ShardPort TakeShard(ShardId shard);

  PageKind page_kind() const { return slabs_.front()->page_kind(); }

 private:
  RingMesh() = default;
  void LinkProducers(const MeshOptions& options);
  void LinkPeers(const MeshOptions& options);

  std::vector<std::unique_ptr<SlotSlab>> slabs_;         // by producer
  std::vector<std::unique_ptr<SlotSlab>> result_slabs_;  // by shard
  std::vector<ProducerPort> producers_;
  std::vector<ShardPort> shards_;
  std::unique_ptr<StampBoard> stamps_;
};

}  // namespace engram
