#include "src/daemon.h"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <system_error>
#include <utility>

#include "src/core/check.h"
#include "src/core/log_files.h"
#include "src/missing_checkpoint.h"
#include "src/replay_crashes.h"

namespace engram {

namespace {

constexpr int64_t kDrainDeadlineNs = 10 * kNanosPerSecond;
constexpr int64_t kControlPeriodNs = 10 * kNanosPerMilli;
// Within which the disk writes what it was given.
constexpr int64_t kFlushSlackNs = kNanosPerSecond;
// Damaged places that are named one by one.
constexpr size_t kUnreadableNoted = 1'000;
// For calls that are under way when the daemon is told to stop; within kDrainDeadlineNs.
constexpr int64_t kGrpcDrainNs = 5 * kNanosPerSecond;
// A restart is faster by a checkpoint before the stop, where more than this would be replayed.
constexpr uint64_t kWorthACheckpointBytes = uint64_t{4} << 20;
constexpr uint64_t kWorthACheckpointRecords = 1'000;
constexpr int kGreetingsPerPoll = 64;
constexpr int64_t kLastCheckpointNs = 60 * kNanosPerSecond;
// Memory made present ahead of a shard's use, and how much of it in one step.
constexpr size_t kPrefaultAheadBytes = size_t{8} << 20;
constexpr size_t kPrefaultStepBytes = size_t{4} << 20;

size_t MachineMemoryBytes() {
  return static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
}

uint64_t SecretSeed() {
  uint64_t seed = 0;
  CHECK(getentropy(&seed, sizeof(seed)) == 0, "the kernel gives random numbers");
  return seed;
}

void NoteFieldsNotHonoured(const Config& config, const NoteFn& note) {
  std::string names;
  for (const std::string& name : FieldsNotHonoured(config)) {
    names += (names.empty() ? "" : ", ") + name;
  }
  if (names.empty()) return;
  note({Severity::kWarning, "configuration: set, but not honoured yet: " + names +
                                " (config/engram.toml says what happens instead)"});
}

bool ServesGrpc(const Config& config) { return config.grpc && GrpcGateway::IsBuilt(); }

uint64_t ToMib(uint64_t bytes) { return bytes >> 20; }

const Counter& CounterNamed(const CounterCatalogue& counters, std::string_view core,
                            std::string_view name) {
  const auto is_it = [&](const CounterView& each) {
    return each.core == core && each.name == name;
  };
  const auto found = std::ranges::find_if(counters, is_it);
  CHECK(found != counters.end(), "the counter is in the catalogue");
  return *found->counter;
}

// What came back from one kind of file, of all shards.
struct RecoveredPart {
  uint64_t read = 0;
  uint64_t total = 0;
  uint64_t observations = 0;

  void Add(const std::atomic<uint64_t>& bytes_read, const std::atomic<uint64_t>& bytes,
           uint64_t stored) {
    read += bytes_read.load(std::memory_order_relaxed);
    total += bytes.load(std::memory_order_relaxed);
    observations += stored;
  }
  std::string Describe(const std::string& source) const {
    return std::to_string(observations) + " from the " + source + " (" +
           std::to_string(ToMib(read)) + " of " + std::to_string(ToMib(total)) + " MiB read)";
  }
};

}  // namespace

Result<std::unique_ptr<Daemon>> Daemon::Start(const Config& config, const Topology& topology,
                                              Clock* clock, DataDirectory* directory,
                                              const std::atomic<bool>& stop, const NoteFn& note,
                                              const ReplayHook& before_replay) {
  std::unique_ptr<Daemon> daemon(new Daemon(clock));
  NoteFieldsNotHonoured(config, note);
  if (config.grpc && !GrpcGateway::IsBuilt()) {
    note(
        {Severity::kWarning, "grpc: this engramd was built without it; listen.grpc is not served"});
  }
  if (auto made = daemon->MakeNetworks(config, note); !made) return std::unexpected(made.error());
  if (auto made = daemon->MakeLogs(config, topology, directory, note); !made) {
    return std::unexpected(made.error());
  }
  if (auto made = daemon->MakeGuards(config, directory, before_replay, note); !made) {
    return std::unexpected(made.error());
  }
  if (auto made = daemon->MakeAppliance(config, topology, directory->instance().id); !made) {
    return std::unexpected(made.error());
  }
  if (auto made = daemon->MakeCores(config); !made) return std::unexpected(made.error());
  note({Severity::kInfo, std::string("memory: observations in ") +
                             std::string(PageKindName(daemon->appliance_->shard(0).page_kind())) +
                             " pages, slots in " +
                             std::string(PageKindName(daemon->appliance_->slot_page_kind())) +
                             " pages"});
  if (auto recovered = daemon->Recover(config, directory, stop, note); !recovered) {
    daemon->Join();
    return std::unexpected(recovered.error());
  }
  daemon->serving_.store(true, std::memory_order_release);
  for (const auto& core : daemon->cores_) core->runner->WakeIfSleeping();
  if (daemon->grpc_ != nullptr) daemon->grpc_->SetServing();
  return daemon;
}

// From the first thread until the appliance can serve. Whoever asks meanwhile is told how far it
// is; a record that ends the process is known to the next start.
Result<void> Daemon::Recover(const Config& config, DataDirectory* directory,
                             const std::atomic<bool>& stop, const NoteFn& note) {
  {
    const ReplayCrashHandler handler(directory->path());
    if (auto started = StartThreads(); !started) return started;
    if (auto started = StartGrpc(config); !started) return started;
    for (const Endpoint& endpoint : endpoints_) {
      note({Severity::kInfo, "recovering: " + endpoint.ToString() + " answers with how far it is"});
    }
    if (grpc_ != nullptr) {
      note({Severity::kInfo,
            "recovering: grpc health at " + grpc_->endpoint().ToString() + " is NOT_SERVING"});
    }
    if (auto recovered = AwaitRecovery(stop, note); !recovered) return recovered;
  }
  if (auto removed = RemoveReplayCrashes(directory->disk()); !removed) return removed;
  KeepRoomForCheckpoint();
  auto prepared = logs_->PrepareFirst();
  // What is there can be recalled; what comes is refused until there is room.
  if (!prepared && HasRecovered()) {
    note({Severity::kError, prepared.error().message + ". Recalls are served, writes are refused"});
    return {};
  }
  return prepared;
}

bool Daemon::HasRecovered() const {
  for (size_t s = 0; s < appliance_->shards(); ++s) {
    const RecoveryProgress& progress = appliance_->shard(s).recovery();
    if (progress.total_bytes.load(std::memory_order_relaxed) > 0 ||
        progress.checkpoint_bytes.load(std::memory_order_relaxed) > 0) {
      return true;
    }
  }
  return false;
}

Daemon::~Daemon() { Join(); }

Result<void> Daemon::MakeNetworks(const Config& config, const NoteFn& note) {
  NetworkOptions options;
  options.max_connections = config.limits.max_connections;
  options.share_port = config.ingress_cpus.size() > 1;
  std::vector<Endpoint> wanted = config.listen;
  for (size_t i = 0; i < config.ingress_cpus.size(); ++i) {
    std::string how;
    auto network = CreateNetwork(config.network_backend, options, &how);
    if (!network) return std::unexpected(network.error());
    if (how.empty()) how = (*network)->backend();
    if (i == 0) note({Severity::kInfo, "network: " + how});
    for (Endpoint& endpoint : wanted) {
      auto bound = (*network)->Listen(endpoint);
      if (!bound) return std::unexpected(bound.error());
      endpoint = *std::move(bound);  // The next ingress core shares the port that was given.
    }
    networks_.push_back(*std::move(network));
  }
  endpoints_ = wanted;
  if (!ServesGrpc(config)) return {};
  auto streams = StreamNetwork::Create({.max_connections = config.limits.max_connections});
  if (!streams) return std::unexpected(streams.error());
  streams_ = *std::move(streams);
  return {};
}

Result<void> Daemon::MakeLogs(const Config& config, const Topology& topology,
                              DataDirectory* directory, const NoteFn& note) {
  auto manifest = ReadManifest(directory->disk());
  if (!manifest) return std::unexpected(manifest.error());
  auto entries = directory->disk().List();
  if (!entries) return std::unexpected(entries.error());
  LogStoreOptions options;
  options.shards = static_cast<uint16_t>(config.shard_cpus.size());
  options.instance = directory->instance().id;
  options.existing = LogsAmong(*entries);
  if (*manifest) options.checkpoint = **manifest;
  options.writer.flush_interval_ns = config.flush_interval_ms * kNanosPerMilli;
  options.keeper.segment_bytes = config.segment_mib << 20;
  options.huge_pages = config.huge_pages;
  for (const int cpu : config.shard_cpus) options.shard_numa_node.push_back(topology.NodeOf(cpu));
  const LogStore::DiskFactory open_folder =
      [backend = config.disk_backend, path = directory->path()](
          const std::string& folder, const DiskOptions& disk, std::string* why) {
        return CreateDisk(backend, path + "/" + folder, disk, why);
      };
  if (!*manifest) {
    if (auto whole = CheckLogsAreWhole(directory->disk(), open_folder); !whole) return whole;
  }
  std::string how;
  auto logs = LogStore::Open(options, clock_, open_folder, &how);
  if (!logs) return std::unexpected(logs.error());
  if (!how.empty()) note({Severity::kInfo, "disk: " + how});
  logs_ = *std::move(logs);
  health_ = std::make_unique<HealthWatch>(options.shards);
  pins_ = std::make_unique<ReadPins>(static_cast<uint32_t>(config.ingress_cpus.size()) + 2);
  checkpointer_ = std::make_unique<Checkpointer>(
      CheckpointerOptions{.every_bytes = uint64_t{config.checkpoint_mib} << 20, .retention = {}},
      &directory->disk(), logs_.get(), clock_, options.checkpoint, pins_.get());
  return directory->disk().SyncDirectory();
}

// What is in quarantine, and what earlier starts have died of.
Result<void> Daemon::MakeGuards(const Config& config, DataDirectory* directory,
                                const ReplayHook& before_replay, const NoteFn& note) {
  ReplayGuardOptions options;
  auto crashes = ReadReplayCrashes(directory->disk());
  if (!crashes) return std::unexpected(crashes.error());
  options.crashes = *std::move(crashes);
  options.before_replay = before_replay;
  options.open_folder = [backend = config.disk_backend,
                         path = directory->path() + "/" + kQuarantineFolder] {
    return CreateDisk(backend, path,
                      {.max_in_flight = 1, .max_open_files = 1, .registered_buffers = {}}, nullptr);
  };
  auto entries = directory->disk().List();
  if (!entries) return std::unexpected(entries.error());
  if (std::ranges::find(*entries, kQuarantineFolder, &DirectoryEntry::name) != entries->end()) {
    const auto folder = options.open_folder();
    if (!folder) return std::unexpected(folder.error());
    auto quarantined = ReadQuarantine(**folder, note);
    if (!quarantined) return std::unexpected(quarantined.error());
    options.quarantined = *std::move(quarantined);
  }
  for (uint16_t s = 0; s < logs_->shards(); ++s) {
    guards_.push_back(std::make_unique<ReplayGuard>(options));
  }
  return {};
}

Result<void> Daemon::MakeAppliance(const Config& config, const Topology& topology,
                                   const InstanceId& instance) {
  ApplianceOptions options;
  options.shards = static_cast<uint16_t>(config.shard_cpus.size());
  options.ingest.max_connections = config.limits.max_connections;
  options.ingest.recall_batch = config.limits.recall_batch;
  options.ingest.huge_pages = config.huge_pages;
  options.ingest.checkpoint_requests = &checkpointer_->requests();
  options.ingest.compaction_requests = &checkpointer_->compactions();
  options.ingest.lease = &checkpointer_->lease();
  options.ingest.instance_id = ToString(instance);
  std::error_code ignored;
  options.ingest.data_directory =
      std::filesystem::absolute(config.data_directory, ignored).string();
  const size_t limit =
      config.memory_limit_mib > 0 ? config.memory_limit_mib << 20 : MachineMemoryBytes() / 4 * 3;
  options.shard.memory_limit_bytes = limit / options.shards;
  options.shard.huge_pages = config.huge_pages;
  options.shard.default_ef = config.index.default_ef;
  options.max_spaces = config.limits.max_spaces;
  options.max_partitions = static_cast<uint16_t>(config.index.max_partitions);
  for (uint16_t s = 0; s < options.shards; ++s) {
    options.storage.push_back(logs_->ForShard(s));
    options.storage.back().guard = guards_[s].get();
  }
  options.log_disks = logs_->disks();
  options.unwritten_ns =
      std::max(kNanosPerSecond, config.flush_interval_ms * kNanosPerMilli + kFlushSlackNs);
  options.pins = pins_.get();
  options.space_defaults.precision = config.index.precision;
  options.space_defaults.durability = config.durability;
  options.space_defaults.ttl_ns = static_cast<int64_t>(config.ttl_s) * kNanosPerSecond;
  options.space_defaults.partitions = static_cast<uint16_t>(config.index.partitions);
  options.space_defaults.filter_keys =
      std::make_shared<const std::vector<std::string>>(config.index.filter_keys);
  for (const SpaceConfig& space : config.spaces) {
    SpaceSettings settings;
    settings.metric = space.metric;
    settings.precision = space.precision;
    settings.durability = space.durability;
    settings.dimension = static_cast<uint16_t>(space.dimension);
    settings.partitions = static_cast<uint16_t>(space.partitions);
    settings.ttl_ns = static_cast<int64_t>(space.ttl_s) * kNanosPerSecond;
    settings.quota_observations = space.quota_observations;
    settings.quota_bytes = space.quota_mib << 20;
    settings.when_full = space.quota_when_full;
    settings.filter_keys = std::make_shared<const std::vector<std::string>>(space.filter_keys);
    options.spaces.emplace_back(space.name, settings);
  }
  options.shard.traversal = config.index.traversal;
  options.shard.grow_partition_at = config.index.grow_partition_at;
  options.shard.max_sessions = config.limits.max_sessions;
  options.shard.session_idle_timeout_ns = config.limits.idle_timeout_s * kNanosPerSecond;
  options.shard.cleanup_interval_ns = config.limits.cleanup_interval_s * kNanosPerSecond;
  options.shard.session_keep_ns = config.session_keep_days * 86'400 * kNanosPerSecond;
  options.shard.build.M = config.index.m;
  options.shard.build.M0 = 2 * config.index.m;
  options.shard.build.ef_construction = config.index.ef_construction;
  options.shard.build.extend_candidates = config.index.extend_candidates;
  options.shard.build.keep_pruned = config.index.keep_pruned;
  options.shard.build.alpha = static_cast<float>(config.index.alpha);
  options.shard.seed = SecretSeed();
  options.gateway = ServesGrpc(config);
  options.mesh.huge_pages = config.huge_pages;
  for (const int cpu : config.ingress_cpus) {
    options.mesh.producer_numa_node.push_back(topology.NodeOf(cpu));
  }
  // The ingress core of streams and the gateway.
  for (int i = 0; i < 2; ++i) {
    options.mesh.producer_numa_node.push_back(topology.NodeOf(config.control_cpus.front()));
  }
  for (const int cpu : config.shard_cpus) {
    options.mesh.shard_numa_node.push_back(topology.NodeOf(cpu));
  }
  std::vector<Network*> networks;
  for (const auto& network : networks_) networks.push_back(network.get());
  if (streams_ != nullptr) networks.push_back(streams_.get());
  auto appliance = Appliance::Create(options, clock_, networks);
  if (!appliance) return std::unexpected(appliance.error());
  appliance_ = *std::move(appliance);
  return {};
}

// Its core shares the control plane's first processor with gRPC's threads, so it sleeps when there
// is nothing to do, whatever the other cores do.
Result<void> Daemon::MakeGateway(const Config& config) {
  if (streams_ == nullptr) return {};
  GatewayOptions options;
  options.huge_pages = config.huge_pages;
  auto gateway = GatewayCore::Create(options, clock_, appliance_->TakeGatewayPort(),
                                     appliance_->gateway_records());
  if (!gateway) return std::unexpected(gateway.error());
  gateway_ = *std::move(gateway);
  gateway_->AddCounters("gateway", &appliance_->counters());
  auto core = CoreOn(config.control_cpus.front(), config);
  if (!core) return std::unexpected(core.error());
  gateway_runner_ = (*core)->runner.get();
  gateway_runner_->AddPoll([gateway = gateway_.get()] { return gateway->Poll(); });
  streams_->SetWake([runner = gateway_runner_] { runner->WakeIfSleeping(); });
  MakeIngress(gateway_runner_, networks_.size(), streams_.get(), config.limits.max_connections);
  return {};
}

Result<Daemon::Core*> Daemon::CoreOn(int cpu, const Config& config) {
  for (const auto& core : cores_) {
    if (core->cpu == cpu) return core.get();
  }
  auto core = std::make_unique<Core>();
  core->cpu = cpu;
  const auto ingress = std::ranges::find(config.ingress_cpus, cpu);
  CoreRunner::Sleeper sleeper;
  if (ingress != config.ingress_cpus.end()) {
    Network* network = networks_[static_cast<size_t>(ingress - config.ingress_cpus.begin())].get();
    core->network = network;
    sleeper = {.wait = [network](int64_t timeout_ns) { network->Wait(timeout_ns); },
               .wake = [network] { network->Wake(); }};
  } else {
    auto doorbell = Doorbell::Create();
    if (!doorbell) return std::unexpected(doorbell.error());
    core->doorbell = std::make_unique<Doorbell>(*std::move(doorbell));
    Doorbell* bell = core->doorbell.get();
    sleeper = {.wait = [bell](int64_t timeout_ns) { bell->Wait(timeout_ns); },
               .wake = [bell] { bell->Wake(); }};
  }
  const bool shared = ingress == config.ingress_cpus.end() &&
                      std::ranges::find(config.shard_cpus, cpu) == config.shard_cpus.end();
  core->runner = std::make_unique<CoreRunner>("cpu" + std::to_string(cpu),
                                              shared ? IdleStrategy::kSleep : config.idle, clock_,
                                              std::move(sleeper));
  cores_.push_back(std::move(core));
  return cores_.back().get();
}

// Until it serves, a greeter answers in its place.
void Daemon::MakeIngress(CoreRunner* runner, size_t index, Network* network,
                         uint32_t max_connections) {
  greeters_.push_back(std::make_unique<RecoveryGreeter>(network, max_connections,
                                                        [this] { return DescribeRecovery(); }));
  drained_.push_back(std::make_unique<std::atomic<bool>>(false));
  IngestCore* ingest = &appliance_->ingest(index);
  std::atomic<bool>* drained = drained_.back().get();
  std::unique_ptr<RecoveryGreeter>* greeter = &greeters_[index];
  runner->AddPoll([this, ingest, drained, greeter] {
    if (*greeter != nullptr) {
      if (!serving_.load(std::memory_order_acquire)) return (*greeter)->Poll(kGreetingsPerPoll);
      (*greeter)->HandOver(ingest);
      greeter->reset();
    }
    if (drain_.load(std::memory_order_relaxed)) {
      ingest->BeginDrain();
      if (ingest->drained()) drained->store(true, std::memory_order_release);
    }
    return ingest->Poll();
  });
}

Result<void> Daemon::MakeCores(const Config& config) {
  greeters_.reserve(config.ingress_cpus.size() + 1);
  for (size_t i = 0; i < config.ingress_cpus.size(); ++i) {
    auto core = CoreOn(config.ingress_cpus[i], config);
    if (!core) return std::unexpected(core.error());
    MakeIngress((*core)->runner.get(), i, networks_[i].get(), config.limits.max_connections);
  }
  for (size_t i = 0; i < config.shard_cpus.size(); ++i) {
    auto core = CoreOn(config.shard_cpus[i], config);
    if (!core) return std::unexpected(core.error());
    Shard* shard = &appliance_->shard(i);
    (*core)->runner->AddPoll([shard] { return shard->Poll(); });
  }
  if (auto made = MakeGateway(config); !made) return made;
  checkpointer_->AddCounters(&appliance_->counters());
  health_->AddCounters(&appliance_->counters());
  for (size_t s = 0; s < guards_.size(); ++s) {
    appliance_->counters().push_back(
        {"shard" + std::to_string(s), "records_quarantined", &guards_[s]->left_out()});
  }
  for (const auto& core : cores_) {
    for (const auto& peer : cores_) {
      if (peer != core) core->runner->AddPeer(peer->runner.get());
    }
    core->runner->AddCounters(&appliance_->counters());
  }
  for (size_t i = 0; i < networks_.size(); ++i) {
    for (size_t c = 0; c < kNetworkCounters; ++c) {
      const auto which = static_cast<NetworkCounter>(c);
      appliance_->counters().push_back({"network" + std::to_string(i), NetworkCounterName(which),
                                        &networks_[i]->counters()[which]});
    }
  }
  return {};
}

Result<void> Daemon::StartThreads() {
  std::atomic<int> started{0};
  std::atomic<bool> failed{false};
  while (Prefault()) {
  }
  for (const auto& core : cores_) {
    threads_.emplace_back([this, &core, &started, &failed] { RunCore(*core, &started, &failed); });
  }
  for (int seen = started.load(); seen < static_cast<int>(cores_.size()); seen = started.load()) {
    started.wait(seen);
  }
  if (failed.load()) {
    return Fail(ErrorCode::kInternal,
                "a core could not be pinned or its network not be started: check cores.* and "
                "listen.backend, or set listen.backend = \"posix\"");
  }
  return {};
}

// Says now and then how far the shards are.
Result<void> Daemon::AwaitRecovery(const std::atomic<bool>& stop, const NoteFn& note) {
  auto bell = Doorbell::Create();
  if (!bell) return std::unexpected(bell.error());
  int64_t next_note_ns = clock_->MonotonicNs() + kNanosPerSecond;
  for (;;) {
    bool recovering = false;
    for (size_t s = 0; s < appliance_->shards(); ++s) {
      const RecoveryProgress& progress = appliance_->shard(s).recovery();
      if (progress.failed.load(std::memory_order_acquire)) {
        for (const Note& line : progress.notes) note(line);
        return std::unexpected(progress.error);
      }
      recovering |= appliance_->shard(s).is_recovering();
    }
    if (!recovering) break;
    if (stop.load()) return Fail(ErrorCode::kUnavailable, "stopped while recovering");
    if (clock_->MonotonicNs() >= next_note_ns) {
      next_note_ns += kNanosPerSecond;
      note({Severity::kInfo, "recovery: " + DescribeRecovery()});
    }
    if (!Prefault()) bell->Wait(kNanosPerMilli);
  }
  note({Severity::kInfo, "recovery: " + DescribeRecovery()});
  for (size_t s = 0; s < appliance_->shards(); ++s) {
    for (const Note& line : appliance_->shard(s).recovery().notes) note(line);
  }
  return {};
}

// Any thread, once the shards are made.
std::string Daemon::DescribeRecovery() const {
  RecoveredPart checkpoint;
  RecoveredPart log;
  for (size_t s = 0; s < appliance_->shards(); ++s) {
    const RecoveryProgress& progress = appliance_->shard(s).recovery();
    // Before all of them, so that it is not more.
    const uint64_t replayed = progress.replayed.load(std::memory_order_acquire);
    checkpoint.Add(progress.checkpoint_bytes_read, progress.checkpoint_bytes,
                   progress.observations.load(std::memory_order_relaxed) - replayed);
    log.Add(progress.bytes_read, progress.total_bytes, replayed);
  }
  const std::string all =
      std::to_string(checkpoint.observations + log.observations) + " observations stored again: ";
  if (checkpoint.total == 0) return all + log.Describe("log");
  return all + checkpoint.Describe("checkpoint") + ", " + log.Describe("log");
}

// Once the gateway core polls: what a client asks is answered from the first call on.
Result<void> Daemon::StartGrpc(const Config& config) {
  if (gateway_ == nullptr) return {};
  GrpcOptions options;
  options.endpoint = *config.grpc;
  options.cpus = config.control_cpus;
  options.recovering = [this] { return DescribeRecovery(); };
  auto door = gateway_->OpenDoor([runner = gateway_runner_] { runner->WakeIfSleeping(); });
  auto grpc = GrpcGateway::Start(options, std::move(door), clock_, &appliance_->counters(),
                                 &appliance_->spaces(), streams_.get());
  if (!grpc) return std::unexpected(grpc.error());
  grpc_ = *std::move(grpc);
  return {};
}

void Daemon::RunCore(const Core& core, std::atomic<int>* started, std::atomic<bool>* failed) {
  pthread_setname_np(pthread_self(), core.runner->name().c_str());
  const SignalStack signal_stack;
  bool sound = PinThisThread(core.cpu).has_value();
  if (sound && core.network != nullptr) sound = core.network->Start().has_value();
  if (sound && core.runner.get() == gateway_runner_) sound = streams_->Start().has_value();
  if (!sound) failed->store(true);
  started->fetch_add(1);
  started->notify_all();
  if (sound) core.runner->Run();
}

bool Daemon::Prefault() {
  size_t made = 0;
  for (size_t s = 0; s < appliance_->shards(); ++s) {
    made += appliance_->shard(s).PrefaultAhead(kPrefaultAheadBytes, kPrefaultStepBytes);
  }
  return made > 0;
}

// The spaces that have more partitions than when this was called last.
void Daemon::NoteGrowth(const NoteFn& note) {
  uint64_t growths = 0;
  for (size_t s = 0; s < appliance_->shards(); ++s) {
    growths += appliance_->shard(s).counter(ShardCounter::kSpacesGrown).Read();
  }
  if (growths == growths_noted_) return;
  growths_noted_ = growths;
  const SpaceCatalogue& spaces = appliance_->spaces();
  partitions_noted_.resize(spaces.size());
  for (uint32_t index = 0; index < partitions_noted_.size(); ++index) {
    const SpaceEntry& space = *spaces.At(index);
    const uint16_t partitions = space.partitions();
    const uint16_t before = std::max(partitions_noted_[index], space.first_partitions());
    partitions_noted_[index] = partitions;
    if (partitions > before) {
      note({Severity::kInfo, "space " + std::string(space.name()) + " has grown to " +
                                 std::to_string(partitions) + " partitions"});
    }
  }
}

// Each place once, and not more than an operator may read.
void Daemon::NoteUnreadable(const NoteFn& note) {
  const auto look = [&](RecordReader* records) {
    if (records == nullptr) return;
    while (const auto address = records->TakeUnreadable()) {
      if (unreadable_noted_.size() == kUnreadableNoted) continue;
      if (!unreadable_noted_.insert(*address).second) continue;
      const LogPosition position = PositionOf(*address);
      note({Severity::kError,
            LogFolder(LogOf(*address)) + "/" + SegmentName(SegmentOf(position)) +
                " is damaged at offset " + std::to_string(OffsetOf(position)) +
                ": recalls leave out the payload that lies there; check this disk"});
      health_->SeeDamagedPlace();
      if (unreadable_noted_.size() == kUnreadableNoted) {
        note({Severity::kError,
              "more damaged places are not named; engramctl log verify finds them all"});
      }
    }
  };
  for (size_t i = 0; i < appliance_->ingest_cores(); ++i) look(appliance_->ingest(i).records());
  if (gateway_ != nullptr) look(gateway_->records());
}

// When it begins and when it ends.
void Daemon::NoteTrouble(const NoteFn& note) {
  trouble_noted_.resize(logs_->shards());
  for (uint16_t s = 0; s < logs_->shards(); ++s) {
    const SegmentTrouble trouble = logs_->trouble(s);
    if (trouble == std::exchange(trouble_noted_[s], trouble)) continue;
    const std::string log = LogFolder(s);
    switch (trouble) {
      case SegmentTrouble::kDiskFull:
        note({Severity::kError, log + " has no room for its next segment: free some on this disk. "
                                      "Once what is prepared is "
                                      "used up writes are refused with disk_full; recalls go on"});
        break;
      case SegmentTrouble::kFailing:
        note({Severity::kError, log + " cannot prepare its next segment: check this disk. Once "
                                      "what is prepared is used up "
                                      "writes are refused with disk_failing; recalls go on"});
        break;
      case SegmentTrouble::kNone:
        note({Severity::kInfo, log + " has its next segment again"});
        break;
    }
  }
}

void Daemon::WatchHealth() {
  for (uint16_t s = 0; s < logs_->shards(); ++s) {
    const Shard& shard = appliance_->shard(s);
    health_->SeeLog(s, logs_->trouble(s), shard.counter(ShardCounter::kLogErrors).Read(),
                    shard.counter(ShardCounter::kLogCommits).Read());
  }
  health_->SeeCheckpoints(
      checkpointer_->completed(),
      CounterNamed(appliance_->counters(), kControlCore, "checkpoints_failed").Read());
}

bool Daemon::ServeUntil(const std::atomic<bool>& stop, const NoteFn& note) {
  auto bell = Doorbell::Create();
  CHECK(bell.has_value(), "a descriptor is left for the control plane");
  while (!stop.load()) {
    NoteGrowth(note);
    NoteUnreadable(note);
    NoteTrouble(note);
    WatchHealth();
    KeepRoomForCheckpoint();
    const int work = logs_->Poll() + checkpointer_->Poll(note);
    if (!Prefault()) bell->Wait(work > 0 ? kNanosPerMilli : kControlPeriodNs);
  }
  const int64_t deadline_ns = clock_->MonotonicNs() + kDrainDeadlineNs;
  drain_.store(true);
  for (const auto& core : cores_) core->runner->WakeIfSleeping();
  if (grpc_ != nullptr) grpc_->Shutdown(kGrpcDrainNs);
  const auto all_drained = [&] {
    return std::ranges::all_of(drained_, [](const auto& flag) { return flag->load(); });
  };
  while (!all_drained() && clock_->MonotonicNs() < deadline_ns) {
    for (const auto& core : cores_) core->runner->WakeIfSleeping();
    bell->Wait(kNanosPerMilli);
  }
  const bool drained = all_drained();
  checkpointer_->BeginStop();
  if (IsWorthACheckpoint()) checkpointer_->Request();
  const int64_t saved_by_ns = clock_->MonotonicNs() + kLastCheckpointNs;
  while (checkpointer_->busy() && clock_->MonotonicNs() < saved_by_ns) {
    const int work = logs_->Poll() + checkpointer_->Poll(note);
    for (const auto& core : cores_) core->runner->WakeIfSleeping();
    if (work == 0) bell->Wait(kNanosPerMilli);
  }
  for (size_t s = 0; s < appliance_->shards(); ++s) appliance_->shard(s).HurryLog();
  const int64_t settled_by_ns = clock_->MonotonicNs() + kDrainDeadlineNs;
  while (!LogsSettled() && clock_->MonotonicNs() < settled_by_ns) {
    logs_->Poll();
    for (const auto& core : cores_) core->runner->WakeIfSleeping();
    bell->Wait(kNanosPerMilli);
  }
  Join();
  return drained;
}

// The log must not take the room of the checkpoint after which its segments are freed. A checkpoint
// holds what is in memory, and less.
void Daemon::KeepRoomForCheckpoint() {
  uint64_t bytes = 0;
  for (size_t s = 0; s < appliance_->shards(); ++s) {
    bytes += appliance_->shard(s).counter(ShardCounter::kMemoryUsedBytes).Read();
  }
  logs_->KeepFree(bytes);
}

// A restart would have much to replay.
bool Daemon::IsWorthACheckpoint() const {
  uint64_t replayed = 0;
  for (size_t s = 0; s < appliance_->shards(); ++s) {
    replayed += appliance_->shard(s).recovery().replayed.load(std::memory_order_relaxed);
  }
  return checkpointer_->bytes_since_last() >= kWorthACheckpointBytes ||
         (checkpointer_->completed() == 0 && replayed >= kWorthACheckpointRecords);
}

bool Daemon::LogsSettled() const {
  for (size_t s = 0; s < appliance_->shards(); ++s) {
    const Shard& shard = appliance_->shard(s);
    if (shard.counter(ShardCounter::kLogUnsettledBytes).Read() > 0) return false;
  }
  return true;
}

void Daemon::Join() {
  // Its calls are answered by a core that still runs.
  grpc_.reset();
  for (const auto& core : cores_) core->runner->Stop();
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

}  // namespace engram
