#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "dataplane/ingest_core.h"
#include "dataplane/record_reader.h"
#include "dataplane/ring_mesh.h"
#include "index/shard.h"
#include "src/core/check.h"
#include "src/core/clock.h"
#include "src/core/counters.h"
#include "src/core/network.h"
#include "src/core/read_pins.h"
#include "src/core/result.h"
#include "src/core/space_catalogue.h"

namespace engram {

struct ApplianceOptions {
  uint16_t shards = 1;
  IngestOptions ingest;
  ShardOptions shard;  // memory_limit_bytes is one shard's
  // By shard; empty: observations live in memory only.
  std::vector<ShardStorage> storage;
  // Over the folders of their logs, for the cores that answer; with storage.
  RecordAccess::DiskFactory log_disks;
  int64_t unwritten_ns = kNanosPerSecond;  // see RecordAccess
  // With a place for each ingress core and one for the gateway; outlives the appliance. nullptr: it
  // has its own.
  ReadPins* pins = nullptr;
  MeshOptions mesh;  // producers, shards and catalogue are filled in
  // One producer more, for TakeGatewayPort.
  bool gateway = false;
  uint32_t max_spaces = 10'000;
  // To how many partitions a space may grow, at most `shards`; 0: that many.
  uint16_t max_partitions = 0;
  // For spaces that are not configured; what it leaves open is cosine, f32, one partition.
  SpaceSettings space_defaults;
  std::vector<std::pair<std::string, SpaceSettings>> spaces;
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
  SpaceCatalogue& spaces() { return *spaces_; }
  // Once, where the options asked for a gateway.
  ProducerPort TakeGatewayPort() { return mesh_.TakeProducer(gateway_); }
  RecordAccess gateway_records() { return RecordsFor(gateway_.value()); }
  // Of all cores that answer; who frees what the logs hold closes epochs.
  ReadPins* pins() { return pins_; }

 private:
  Appliance(std::unique_ptr<SpaceCatalogue> spaces, RingMesh mesh, ProducerId gateway,
            const RecordAccess::DiskFactory& log_disks, int64_t unwritten_ns, ReadPins* pins)
      : spaces_(std::move(spaces)),
        mesh_(std::move(mesh)),
        gateway_(gateway),
        log_disks_(log_disks),
        unwritten_ns_(unwritten_ns),
        own_pins_(gateway.value() + 1U),
        pins_(pins != nullptr ? pins : &own_pins_) {
    CHECK(pins_->readers() > gateway.value(), "each core that answers has its place");
  }

  RecordAccess RecordsFor(uint32_t place) { return {log_disks_, pins_, place, unwritten_ns_}; }

  std::unique_ptr<SpaceCatalogue> spaces_;
  RingMesh mesh_;
  ProducerId gateway_;  // the last one
  const RecordAccess::DiskFactory log_disks_;
  const int64_t unwritten_ns_;
  ReadPins own_pins_;
  ReadPins* const pins_;  // by producer
  CounterCatalogue catalogue_;
  std::vector<std::unique_ptr<IngestCore>> ingest_;
  std::vector<std::unique_ptr<Shard>> shards_;
};

}  // namespace engram
