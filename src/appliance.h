#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "dataplane/ingest_core.h"
#include "dataplane/ring_mesh.h"
#include "index/shard.h"
#include "src/core/clock.h"
#include "src/core/counters.h"
#include "src/core/network.h"
#include "src/core/result.h"

namespace engram {

struct ApplianceOptions {
  uint16_t shards = 1;
  IngestOptions ingest;
  ShardOptions shard;  // memory_limit_bytes is one shard's
  MeshOptions mesh;    // producers and shards are filled in
};

// The engine put together: ingress cores, the mesh, shard cores. It starts no thread and takes its
// clock and networks from outside, so that main pins it to cores and a test steps it in one thread.
//
// Lifecycle: Create, then from each core's own thread its Poll, again and again. The networks are
// listening, and started by their own threads before the first Poll.
class Appliance {
 public:
  // One ingress core a network. `clock` and `networks` outlive the appliance. Errors:
  // kResourceExhausted naming what did not fit.
  static Result<std::unique_ptr<Appliance>> Create(const ApplianceOptions& options, Clock* clock,
                                                   const std::vector<Network*>& networks);

  size_t ingest_cores() const { return ingest_.size(); }
  size_t shards() const { return shards_.size(); }
  IngestCore& ingest(size_t index) { return *ingest_[index]; }
  Shard& shard(size_t index) { return *shards_[index]; }
  // Before the first Poll others may add theirs; `status` shows them all.
  CounterCatalogue& counters() { return catalogue_; }
  PageKind slot_page_kind() const { return mesh_.page_kind(); }

 private:
  explicit Appliance(RingMesh mesh) : mesh_(std::move(mesh)) {}

  RingMesh mesh_;
  CounterCatalogue catalogue_;
  std::vector<std::unique_ptr<IngestCore>> ingest_;
  std::vector<std::unique_ptr<Shard>> shards_;
};

}  // namespace engram
