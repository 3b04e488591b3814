#include "src/appliance.h"

#include <string>
#include <utility>

#include "src/core/check.h"
#include "src/core/hash.h"

namespace engram {

Result<std::unique_ptr<Appliance>> Appliance::Create(const ApplianceOptions& options, Clock* clock,
                                                     const std::vector<Network*>& networks) {
  CHECK(!networks.empty() && options.shards > 0, "an appliance has an ingress and a shard core");
  CHECK(options.storage.empty() || options.log_disks != nullptr, "what lies in logs can be read");
  MeshOptions mesh_options = options.mesh;
  const auto ingest_cores = static_cast<uint16_t>(networks.size());
  mesh_options.producers = static_cast<uint16_t>(ingest_cores + (options.gateway ? 1 : 0));
  mesh_options.shards = options.shards;
  auto spaces = std::make_unique<SpaceCatalogue>(
      options.max_spaces, options.shards,
      options.max_partitions == 0 ? options.shards : options.max_partitions, options.space_defaults,
      MixBits(~options.shard.seed));
  for (const auto& [name, settings] : options.spaces) {
    if (spaces->Configure(name, settings) == nullptr) {
      return Fail(ErrorCode::kResourceExhausted,
                  "space " + name + ": more spaces are configured than limits.max_spaces (" +
                      std::to_string(options.max_spaces) + ") allows");
    }
  }
  mesh_options.catalogue = spaces.get();
  auto mesh = RingMesh::Create(mesh_options);
  if (!mesh) return std::unexpected(mesh.error());
  std::unique_ptr<Appliance> appliance(new Appliance(std::move(spaces), *std::move(mesh),
                                                     ProducerId(ingest_cores), options.log_disks,
                                                     options.unwritten_ns, options.pins));
  for (uint16_t s = 0; s < options.shards; ++s) {
    ShardOptions shard_options = options.shard;
    if (s < mesh_options.shard_numa_node.size()) {
      shard_options.numa_node = mesh_options.shard_numa_node[s];
    }
    auto shard = Shard::Create(shard_options, clock, appliance->mesh_.TakeShard(ShardId(s)),
                               s < options.storage.size() ? options.storage[s] : ShardStorage{});
    if (!shard) return std::unexpected(shard.error());
    appliance->shards_.push_back(*std::move(shard));
    appliance->shards_.back()->AddCounters("shard" + std::to_string(s), &appliance->catalogue_);
  }
  for (uint16_t p = 0; p < ingest_cores; ++p) {
    auto ingest = IngestCore::Create(options.ingest, clock, networks[p],
                                     appliance->mesh_.TakeProducer(ProducerId(p)),
                                     &appliance->catalogue_, appliance->RecordsFor(p));
    if (!ingest) return std::unexpected(ingest.error());
    appliance->ingest_.push_back(*std::move(ingest));
    appliance->ingest_.back()->AddCounters("ingress" + std::to_string(p), &appliance->catalogue_);
  }
  return appliance;
}

}  // namespace engram
