#include "src/appliance.h"

#include <string>
#include <utility>

#include "src/core/check.h"

namespace engram {

Result<std::unique_ptr<Appliance>> Appliance::Create(const ApplianceOptions& options, Clock* clock,
                                                     const std::vector<Network*>& networks) {
  CHECK(!networks.empty() && options.shards > 0, "an appliance has an ingress and a shard core");
  MeshOptions mesh_options = options.mesh;
  mesh_options.producers = static_cast<uint16_t>(networks.size());
  mesh_options.shards = options.shards;
  auto mesh = RingMesh::Create(mesh_options);
  if (!mesh) return std::unexpected(mesh.error());
  std::unique_ptr<Appliance> appliance(new Appliance(*std::move(mesh)));
  for (uint16_t s = 0; s < options.shards; ++s) {
    ShardOptions shard_options = options.shard;
    if (s < mesh_options.shard_numa_node.size()) {
      shard_options.numa_node = mesh_options.shard_numa_node[s];
    }
    auto shard = Shard::Create(shard_options, clock, appliance->mesh_.TakeShard(ShardId(s)));
    if (!shard) return std::unexpected(shard.error());
    appliance->shards_.push_back(*std::move(shard));
    appliance->shards_.back()->AddCounters("shard" + std::to_string(s), &appliance->catalogue_);
  }
  for (uint16_t p = 0; p < mesh_options.producers; ++p) {
    auto ingest =
        IngestCore::Create(options.ingest, clock, networks[p],
                           appliance->mesh_.TakeProducer(ProducerId(p)), &appliance->catalogue_);
    if (!ingest) return std::unexpected(ingest.error());
    appliance->ingest_.push_back(*std::move(ingest));
    appliance->ingest_.back()->AddCounters("ingress" + std::to_string(p), &appliance->catalogue_);
  }
  return appliance;
}

}  // namespace engram
