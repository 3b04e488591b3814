#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "dataplane/ingest_core.h"
#include "src/core/simulated_network.h"
#include "tests/dataplane/fake_shard.h"
#include "tests/dataplane/wire.h"

namespace engram {

// What a fake shard answers.
inline FakeShard::Batch HitBatch(const std::vector<WireHit>& hits) {
  FakeShard::Batch batch{.body = {}, .count = static_cast<uint16_t>(hits.size())};
  for (const WireHit& hit : hits) batch.body += WireText(HitBytesOf(hit));
  return batch;
}

struct HarnessOptions {
  IngestOptions ingest = {};
  SimulatedNetworkOptions network = {};
  uint16_t shards = 1;
  uint16_t partitions = 1;  // of a new space
  uint32_t lane_capacity = 64;
  uint32_t recall_lane_capacity = 64;
  RecordAccess records = {};
  uint64_t seed = 1;
};

// Bytes move in large pieces and at once, so that a test says what is cut and when.
inline HarnessOptions CalmOptions() {
  HarnessOptions options;
  options.network.network.max_connections = 64;
  options.network.min_delay_ns = 10 * kNanosPerMicro;
  options.network.max_delay_ns = 10 * kNanosPerMicro;
  options.network.max_chunk_bytes = 65'536;
  options.network.partial_send_probability = 0;
  return options;
}

// A whole ingress core in one thread: simulated clock and network, real rings, scripted shards.
class IngestHarness {
 public:
  explicit IngestHarness(HarnessOptions options = {})
      : options_(Prepared(std::move(options))),
        network_(&clock_, options_.seed, options_.network),
        spaces_(1000, options_.shards, options_.shards, {.partitions = options_.partitions}),
        mesh_(MakeMesh(options_, &spaces_)) {
    ProducerPort port = mesh_->TakeProducer(ProducerId(0));
    slab_ = port.slab;
    for (uint16_t s = 0; s < options_.shards; ++s) {
      shards_.push_back(
          std::make_unique<FakeShard>(mesh_->TakeShard(ShardId(s)), &clock_, options_.seed + s));
    }
    auto core = IngestCore::Create(options_.ingest, &clock_, &network_, std::move(port),
                                   &catalogue_, options_.records);
    CHECK(core.has_value(), "the core was made");
    core_ = *std::move(core);
    partial_blocks_ = core_->free_partial_blocks();
    core_->AddCounters("ingress0", &catalogue_);
    const bool started = network_.Start().has_value();
    CHECK(started, "the network started");
  }

  // One round of everything, `step_ns` later. Returns how much was done.
  int Step(int64_t step_ns = 50 * kNanosPerMicro) {
    clock_.AdvanceNs(step_ns);
    int work = core_->Poll();
    for (auto& shard : shards_) work += shard->Poll();
    return work;
  }
  void Run(int steps, int64_t step_ns = 50 * kNanosPerMicro) {
    for (int i = 0; i < steps; ++i) Step(step_ns);
  }
  // Until nothing happens any more. Answers that nobody fetches do not count.
  void Settle() {
    for (int quiet = 0, steps = 0; quiet < 5; ++steps) {
      CHECK(steps < 100'000, "the simulation comes to rest");
      const bool idle = Step() == 0 && !network_.NextArrivalNs();
      quiet = idle ? quiet + 1 : 0;
    }
  }

  // Everybody leaves, everything is answered. True when every slot and block is free and nobody is
  // left.
  bool Finish() {
    for (auto& shard : shards_) {
      shard->held.fill(false);
      shard->SetStalled(false);
    }
    for (SimulatedNetwork::ClientHandle client : clients_) network_.ClientClose(client);
    // Long enough for a close to be forced, in steps that let each sweep come round.
    Settle();
    for (int i = 0; i < 40 && !IsClean(); ++i) {
      Step(kNanosPerSecond / 2);
      Settle();
    }
    return IsClean();
  }
  bool IsClean() const {
    bool clean = core_->open_connections() == 0 && slab_->free_slots() == slab_->total_slots() &&
                 core_->free_partial_blocks() == partial_blocks_ && core_->merges_in_flight() == 0;
    for (const auto& shard : shards_) {
      clean = clean && shard->free_result_slots() == shard->total_result_slots() &&
              shard->unanswered() == 0;
    }
    return clean;
  }

  SimulatedNetwork::ClientHandle Connect() {
    clients_.push_back(network_.ClientConnect());
    return clients_.back();
  }

  SimulatedClock& clock() { return clock_; }
  SimulatedNetwork& network() { return network_; }
  IngestCore& core() { return *core_; }
  FakeShard& shard(size_t index = 0) { return *shards_[index]; }
  size_t shards() const { return shards_.size(); }
  const SlotSlab& slab() const { return *slab_; }
  CounterCatalogue& catalogue() { return catalogue_; }
  SpaceCatalogue& spaces() { return spaces_; }
  uint64_t refused(RefusalReason reason) const { return core_->refusals(reason).Read(); }
  uint64_t counted(IngestCounter which) const { return core_->counter(which).Read(); }

 private:
  static HarnessOptions Prepared(HarnessOptions options) {
    options.ingest.max_connections = options.network.network.max_connections;
    options.ingest.huge_pages = HugePagePolicy::kOff;
    return options;
  }
  static std::unique_ptr<RingMesh> MakeMesh(const HarnessOptions& options, SpaceCatalogue* spaces) {
    auto mesh = RingMesh::Create({.producers = 1,
                                  .shards = options.shards,
                                  .lane_capacity = options.lane_capacity,
                                  .recall_lane_capacity = options.recall_lane_capacity,
                                  .huge_pages = HugePagePolicy::kOff,
                                  .producer_numa_node = {},
                                  .shard_numa_node = {},
                                  .catalogue = spaces});
    CHECK(mesh.has_value(), "the mesh was made");
    return std::make_unique<RingMesh>(*std::move(mesh));
  }

  HarnessOptions options_;
  SimulatedClock clock_;
  SimulatedNetwork network_;
  SpaceCatalogue spaces_;
  std::unique_ptr<RingMesh> mesh_;
  CounterCatalogue catalogue_;
  SlotSlab* slab_ = nullptr;
  size_t partial_blocks_ = 0;
  std::vector<std::unique_ptr<FakeShard>> shards_;
  std::vector<SimulatedNetwork::ClientHandle> clients_;
  std::unique_ptr<IngestCore> core_;
};

// A client by hand: sends bytes, keeps the frames that came back.
class TestClient {
 public:
  explicit TestClient(IngestHarness* harness) : harness_(harness), handle_(harness->Connect()) {}

  void Send(std::span<const std::byte> bytes) { harness_->network().ClientSend(handle_, bytes); }
  // Sends a hello and awaits the answer; the session's id, 0 when it was refused.
  uint64_t Hello(const WireHello& hello = {}) {
    Send(HelloBytes(hello));
    harness_->Settle();
    Receive();
    for (const WireFrame& frame : frames_) {
      if (frame.type == kWireHelloAck) session_ = frame.session;
    }
    return session_;
  }

  // Takes what arrived apart into frames().
  void Receive() {
    const WireBytes bytes = harness_->network().ClientReceive(handle_);
    received_ += bytes.size();
    stream_.insert(stream_.end(), bytes.begin(), bytes.end());
    while (auto frame = TakeWireFrame(&stream_, &sound_)) frames_.push_back(*std::move(frame));
  }
  // Settles, then all frames of the type that came since the last Forget.
  std::vector<WireFrame> Await(uint8_t type) {
    // What is taken makes room for more.
    for (size_t before = SIZE_MAX; before != received_;) {
      before = received_;
      harness_->Settle();
      Receive();
    }
    return Of(type);
  }
  std::vector<WireFrame> Of(uint8_t type) {
    Receive();
    std::vector<WireFrame> found;
    for (const WireFrame& frame : frames_) {
      if (frame.type == type) found.push_back(frame);
    }
    return found;
  }
  std::vector<WireFrame> TakeAll() {
    Receive();
    return std::exchange(frames_, {});
  }
  void Forget() { (void)TakeAll(); }

  bool closed() { return harness_->network().ClientClosedByServer(handle_); }
  bool reset() { return harness_->network().ClientWasReset(handle_); }
  void Shutdown() { harness_->network().ClientShutdown(handle_); }
  void Close() { harness_->network().ClientClose(handle_); }
  void Abort() { harness_->network().ClientClose(handle_, true); }

  uint64_t session() const { return session_; }
  // Every byte so far was part of a sealed frame.
  bool sound() const { return sound_; }
  // The bytes of a frame that is not whole yet.
  size_t leftover() const { return stream_.size(); }

 private:
  IngestHarness* harness_;
  SimulatedNetwork::ClientHandle handle_;
  WireBytes stream_;
  std::vector<WireFrame> frames_;
  uint64_t session_ = 0;
  size_t received_ = 0;
  bool sound_ = true;
};

}  // namespace engram
