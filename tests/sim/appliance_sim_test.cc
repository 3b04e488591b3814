// The whole engine stepped in one thread: simulated clock and network, everything from one seed.

#include <gtest/gtest.h>

#include <memory>
#include <set>
#include <string>
#include <vector>

#include "src/appliance.h"
#include "tests/sim/sim_client.h"

namespace engram {
namespace {

struct SimOptions {
  uint64_t seed = 1;
  uint16_t ingress_cores = 1;
  uint16_t shards = 2;
  uint32_t lane_capacity = 512;
  size_t max_chunk_bytes = 700;
  uint16_t partitions = 1;
  uint64_t grow_partition_at = 0;
};

// An appliance, its networks and clients, stepped in an order drawn from the seed.
class Simulation {
 public:
  explicit Simulation(const SimOptions& options) : random_(options.seed) {
    std::vector<Network*> networks;
    for (uint16_t i = 0; i < options.ingress_cores; ++i) {
      SimulatedNetworkOptions network_options;
      network_options.network.max_connections = 64;
      network_options.max_chunk_bytes = options.max_chunk_bytes;
      networks_.push_back(
          std::make_unique<SimulatedNetwork>(&clock_, options.seed + i, network_options));
      networks.push_back(networks_.back().get());
      EXPECT_TRUE(networks_.back()->Start().has_value());
    }
    ApplianceOptions appliance_options;
    appliance_options.shards = options.shards;
    appliance_options.ingest.max_connections = 64;
    appliance_options.ingest.partial_frame_bytes = 1 << 20;
    appliance_options.shard.memory_limit_bytes = size_t{64} << 20;
    appliance_options.max_spaces = 64;
    appliance_options.shard.max_sessions = 256;
    appliance_options.shard.seed = options.seed;
    appliance_options.shard.grow_partition_at = options.grow_partition_at;
    appliance_options.space_defaults.partitions = options.partitions;
    appliance_options.mesh.lane_capacity = options.lane_capacity;
    appliance_options.mesh.recall_lane_capacity = 64;
    auto appliance = Appliance::Create(appliance_options, &clock_, networks);
    EXPECT_TRUE(appliance.has_value());
    appliance_ = *std::move(appliance);
  }

  SimClient& AddClient(const SimClientOptions& options) {
    const size_t ingress = random_.Below(networks_.size());
    clients_.push_back(std::make_unique<SimClient>(networks_[ingress].get(), options));
    return *clients_.back();
  }

  // One component, chosen by chance, does one round; time goes on a little.
  void Step() {
    const uint64_t parts = networks_.size() + appliance_->shards() + clients_.size();
    uint64_t part = random_.Below(parts);
    clock_.AdvanceNs(static_cast<int64_t>(random_.Below(20'000)));
    if (part < networks_.size()) {
      appliance_->ingest(part).Poll();
      return;
    }
    part -= networks_.size();
    if (part < appliance_->shards()) {
      appliance_->shard(part).Poll();
      return;
    }
    clients_[part - appliance_->shards()]->Step();
  }

  // Until every client is done, or `max_steps`.
  bool Run(uint64_t max_steps = 2'000'000) {
    for (uint64_t i = 0; i < max_steps; ++i) {
      Step();
      if (i % 64 == 0 && AllDone()) return true;
    }
    return AllDone();
  }

  bool AllDone() const {
    for (const auto& client : clients_) {
      if (!client->done()) return false;
    }
    return true;
  }

  uint64_t Digest() const {
    uint64_t digest = static_cast<uint64_t>(clock_ns());
    for (const auto& client : clients_) digest = MixBits(digest ^ client->digest());
    return digest;
  }

  void ExpectNoViolations() const {
    for (const auto& client : clients_) {
      for (const std::string& violation : client->violations()) ADD_FAILURE() << violation;
    }
  }

  const Space* FindSpace(const std::string& name) const {
    for (size_t s = 0; s < appliance_->shards(); ++s) {
      if (const Space* space = appliance_->shard(s).FindSpace(name)) return space;
    }
    return nullptr;
  }

  int64_t clock_ns() const { return const_cast<SimulatedClock&>(clock_).MonotonicNs(); }
  SimulatedClock& clock() { return clock_; }
  Appliance& appliance() { return *appliance_; }
  std::vector<std::unique_ptr<SimClient>>& clients() { return clients_; }

 private:
  SimulatedClock clock_;
  SplitMix64 random_;
  std::vector<std::unique_ptr<SimulatedNetwork>> networks_;
  std::unique_ptr<Appliance> appliance_;
  std::vector<std::unique_ptr<SimClient>> clients_;
};

SimClientOptions ClientOf(uint64_t seed, std::string space) {
  SimClientOptions options;
  options.seed = seed;
  options.space = std::move(space);
  return options;
}

// Would catch: an ack before visibility, a reordered or lost observation, answers to the wrong
// connection, state shared between spaces.
TEST(ApplianceSim, TenClientsInTenSpacesSettleEverythingInOrder) {
  Simulation simulation({.seed = 7, .ingress_cores = 2, .shards = 3});
  for (uint64_t i = 0; i < 10; ++i) {
    SimClientOptions options = ClientOf(100 + i, "space-" + std::to_string(i));
    options.metric = i % 3 == 0 ? Metric::kL2 : Metric::kCosine;
    options.priority = i % 4 == 0 ? Priority::kHigh : Priority::kNormal;
    options.invalid_percent = 10;
    simulation.AddClient(options);
  }
  ASSERT_TRUE(simulation.Run());
  simulation.ExpectNoViolations();
  for (const auto& client : simulation.clients()) {
    const Space* space = simulation.FindSpace(client->options().space);
    ASSERT_NE(space, nullptr);
    // The ids are the same in every space, the observations are not.
    EXPECT_EQ(space->live(), client->stored().size());
    EXPECT_GT(client->recalls_answered(), 0u);
    EXPECT_GT(client->refusals().size(), 0u);
  }
  for (size_t s = 0; s < simulation.appliance().shards(); ++s) {
    const auto sound = simulation.appliance().shard(s).CheckInvariants();
    EXPECT_TRUE(sound.has_value()) << sound.error().message;
  }
}

// Would catch: anything that depends on addresses, the machine's clock, or uninitialised memory.
// One space over eight shards, which grows while its clients write to it. Their checks then cover
// the merging of recalls: what was acked is the first hit of a recall by its own vector, wherever
// it is stored.
TEST(ApplianceSim, ClientsOfOneSpaceSpreadItOverEightShards) {
  for (const uint16_t partitions : {1, 3, 8}) {
    Simulation simulation({.seed = 11 + uint64_t{partitions},
                           .ingress_cores = 2,
                           .shards = 8,
                           .partitions = partitions,
                           .grow_partition_at = 60});
    for (uint64_t i = 0; i < 8; ++i) {
      SimClientOptions options = ClientOf(300 + i, "busy");
      options.invalid_percent = 5;
      options.observations = 150;
      options.id_prefix = "c" + std::to_string(i) + "-";
      simulation.AddClient(options);
    }
    ASSERT_TRUE(simulation.Run());
    simulation.ExpectNoViolations();
    const SpaceEntry& space = *simulation.appliance().spaces().Find("busy");
    EXPECT_EQ(space.partitions(), partitions == 3 ? 6u : 8u);
    size_t live = 0;
    size_t stored = 0;
    size_t recalls = 0;
    for (uint16_t p = 0; p < space.partitions(); ++p) {
      const Shard& shard = simulation.appliance().shard(space.ShardOf(p).value());
      ASSERT_NE(shard.FindSpace("busy"), nullptr) << "partition " << p;
      EXPECT_GT(shard.FindSpace("busy")->live(), 0u) << "partition " << p;
      live += shard.FindSpace("busy")->live();
      EXPECT_TRUE(shard.CheckInvariants().has_value());
    }
    for (const auto& client : simulation.clients()) {
      stored += client->stored().size();
      recalls += client->recalls_answered();
      EXPECT_GT(client->recalls_answered(), 20u);
    }
    EXPECT_EQ(live, stored) << "each is stored once";
    EXPECT_GT(recalls, 200u);
  }
}

TEST(ApplianceSim, TheSameSeedGivesTheSameTrace) {
  const auto digest_of = [](uint64_t seed) {
    Simulation simulation({.seed = seed, .ingress_cores = 2, .shards = 2});
    for (uint64_t i = 0; i < 5; ++i) {
      SimClientOptions options = ClientOf(seed * 10 + i, "s" + std::to_string(i % 3));
      options.observations = 60;
      options.invalid_percent = 5;
      simulation.AddClient(options);
    }
    EXPECT_TRUE(simulation.Run());
    return simulation.Digest();
  };
  std::set<uint64_t> digests;
  for (uint64_t seed = 1; seed <= 5; ++seed) {
    const uint64_t digest = digest_of(seed);
    EXPECT_EQ(digest, digest_of(seed)) << "seed " << seed;
    digests.insert(digest);
  }
  EXPECT_EQ(digests.size(), 5u) << "the digest does not look at what happened";
}

// Would catch: a refusal for lack of room that loses, doubles or reorders observations, and
// go-back-N that does not end.
TEST(ApplianceSim, ClientsThatIgnoreCreditAreSentBackAndLoseNothing) {
  uint64_t rollbacks = 0;
  for (uint64_t seed = 1; seed <= 5; ++seed) {
    Simulation simulation({.seed = seed, .shards = 1, .lane_capacity = 16});
    for (uint64_t i = 0; i < 6; ++i) {
      SimClientOptions options = ClientOf(seed * 100 + i, "s" + std::to_string(i));
      options.honours_credit = false;
      options.observations = 300;
      options.recall_percent = 5;
      simulation.AddClient(options);
    }
    ASSERT_TRUE(simulation.Run()) << "seed " << seed;
    simulation.ExpectNoViolations();
    for (const auto& client : simulation.clients()) {
      rollbacks += client->rollbacks();
      EXPECT_EQ(client->stored().size(), 300u);
    }
  }
  EXPECT_GT(rollbacks, 0u) << "nothing was ever refused: the test does not test";
}

// Would catch: credit that lets clients run into a full ring.
TEST(ApplianceSim, ClientsThatKeepToTheirCreditAreNeverRefused) {
  Simulation simulation({.seed = 3, .shards = 1, .lane_capacity = 256});
  for (uint64_t i = 0; i < 4; ++i) {
    SimClientOptions options = ClientOf(i, "s" + std::to_string(i));
    options.observations = 1500;
    options.recall_percent = 2;
    simulation.AddClient(options);
  }
  ASSERT_TRUE(simulation.Run());
  simulation.ExpectNoViolations();
  for (const auto& client : simulation.clients()) EXPECT_EQ(client->rollbacks(), 0u);
}

// Would catch: a drain that cuts off what was acked, or never ends.
TEST(ApplianceSim, ADrainEndsEveryConnection) {
  Simulation simulation({.seed = 5, .ingress_cores = 2, .shards = 2});
  for (uint64_t i = 0; i < 6; ++i) simulation.AddClient(ClientOf(i, "s" + std::to_string(i)));
  for (int i = 0; i < 2'000; ++i) simulation.Step();
  for (size_t i = 0; i < simulation.appliance().ingest_cores(); ++i) {
    simulation.appliance().ingest(i).BeginDrain();
  }
  const auto drained = [&] {
    Appliance& appliance = simulation.appliance();
    return appliance.ingest(0).drained() && appliance.ingest(1).drained() &&
           appliance.shard(0).Idle() && appliance.shard(1).Idle();
  };
  for (int i = 0; i < 2'000'000 && !drained(); ++i) simulation.Step();
  EXPECT_TRUE(drained());
  uint64_t acked = 0;
  for (const auto& client : simulation.clients()) {
    const Space* space = simulation.FindSpace(client->options().space);
    acked += client->stored().size();
    // What was acked stays; what was taken and not acked yet may be there too.
    EXPECT_GE(space == nullptr ? 0 : space->live(), client->stored().size());
  }
  EXPECT_GT(acked, 0u);
}

}  // namespace
}  // namespace engram
