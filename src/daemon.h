#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "dataplane/recovery_greeter.h"
#include "index/log/replay_guard.h"
#include "src/appliance.h"
#include "src/checkpointer.h"
#include "src/control/config.h"
#include "src/control/gateway_core.h"
#include "src/control/grpc_gateway.h"
#include "src/core/data_directory.h"
#include "src/core/doorbell.h"
#include "src/core/log_address.h"
#include "src/core/note.h"
#include "src/core/read_pins.h"
#include "src/core/result.h"
#include "src/core/stream_network.h"
#include "src/core/topology.h"
#include "src/core_runner.h"
#include "src/health_watch.h"
#include "src/log_store.h"

namespace engram {

// The appliance on real threads: networks that listen, one pinned thread a processor of the core
// map, and the control plane's chores. The only place where threads are made.
//
// Lifecycle: Start, ServeUntil (which drains and joins), destructor.
class Daemon {
 public:
  // For tests: called by a shard's thread before each record that it replays.
  using ReplayHook = std::function<void(const LogRecord&)>;
  // What the data directory has is in memory again, and clients are served, when this returns.
  // `directory` outlives the daemon. `note` receives lines for the log, also of how far recovery
  // is. Until then pings and health are answered, and all else is refused with how far it is.
  // Errors name the field of the configuration, its value and the remedy; kUnavailable when `stop`
  // became true meanwhile.
  static Result<std::unique_ptr<Daemon>> Start(const Config& config, const Topology& topology,
                                               Clock* clock, DataDirectory* directory,
                                               const std::atomic<bool>& stop, const NoteFn& note,
                                               const ReplayHook& before_replay = {});
  ~Daemon();
  Daemon(const Daemon&) = delete;
  Daemon& operator=(const Daemon&) = delete;

  // Does the control plane's chores on the calling thread until `stop` is true; then stops
  // accepting, settles what was taken, says close to every client and joins the threads. `note`
  // receives lines for the log. True when all connections ended in time.
  bool ServeUntil(const std::atomic<bool>& stop, const NoteFn& note);

  const std::vector<Endpoint>& endpoints() const { return endpoints_; }
  // Where gRPC is served; nullptr: nowhere.
  const GrpcGateway* grpc() const { return grpc_.get(); }

 private:
  // What runs on one processor.
  struct Core {
    int cpu = -1;
    Network* network = nullptr;
    std::unique_ptr<Doorbell> doorbell;  // of a core without a network
    std::unique_ptr<CoreRunner> runner;
  };

  explicit Daemon(Clock* clock) : clock_(clock) {}
  Result<void> MakeNetworks(const Config& config, const NoteFn& note);
  Result<void> MakeLogs(const Config& config, const Topology& topology, DataDirectory* directory,
                        const NoteFn& note);
  Result<void> MakeGuards(const Config& config, DataDirectory* directory,
                          const ReplayHook& before_replay, const NoteFn& note);
  Result<void> MakeAppliance(const Config& config, const Topology& topology,
                             const InstanceId& instance);
  Result<void> MakeCores(const Config& config);
  void MakeIngress(CoreRunner* runner, size_t index, Network* network, uint32_t max_connections);
  Result<void> MakeGateway(const Config& config);
  Result<Core*> CoreOn(int cpu, const Config& config);
  Result<void> StartThreads();
  Result<void> Recover(const Config& config, DataDirectory* directory,
                       const std::atomic<bool>& stop, const NoteFn& note);
  Result<void> AwaitRecovery(const std::atomic<bool>& stop, const NoteFn& note);
  std::string DescribeRecovery() const;
  bool HasRecovered() const;
  bool LogsSettled() const;
  bool IsWorthACheckpoint() const;
  void KeepRoomForCheckpoint();
  Result<void> StartGrpc(const Config& config);
  void RunCore(const Core& core, std::atomic<int>* started, std::atomic<bool>* failed);
  bool Prefault();
  void NoteGrowth(const NoteFn& note);
  void NoteUnreadable(const NoteFn& note);
  void NoteTrouble(const NoteFn& note);
  void WatchHealth();
  void Join();

  Clock* const clock_;
  std::vector<std::unique_ptr<Network>> networks_;
  std::unique_ptr<StreamNetwork> streams_;  // of the gateway; nullptr: nothing needs it
  std::vector<Endpoint> endpoints_;
  std::unique_ptr<LogStore> logs_;
  std::unique_ptr<ReadPins> pins_;  // of the cores that answer
  std::unique_ptr<Checkpointer> checkpointer_;
  std::vector<std::unique_ptr<ReplayGuard>> guards_;  // by shard
  std::unique_ptr<HealthWatch> health_;
  std::unique_ptr<Appliance> appliance_;
  std::unique_ptr<GatewayCore> gateway_;  // nullptr: nothing needs it
  CoreRunner* gateway_runner_ = nullptr;
  std::vector<std::unique_ptr<Core>> cores_;
  std::vector<std::unique_ptr<RecoveryGreeter>> greeters_;  // by ingress core, until it serves
  std::vector<std::thread> threads_;
  uint64_t growths_noted_ = 0;
  std::vector<uint16_t> partitions_noted_;  // by space
  std::set<LogAddress> unreadable_noted_;
  std::vector<SegmentTrouble> trouble_noted_;  // by shard
  std::atomic<bool> serving_{false};           // ingress cores wait for it
  std::atomic<bool> drain_{false};
  std::vector<std::unique_ptr<std::atomic<bool>>> drained_;  // by ingress core
  // Last: its threads use what stands above.
  std::unique_ptr<GrpcGateway> grpc_;
};

}  // namespace engram
