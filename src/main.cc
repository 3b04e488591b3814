// engramd: the ingestion appliance. Reads the configuration, logs what it found, serves until
// SIGTERM or SIGINT, drains, and exits 0.

#include <csignal>
#include <cstdio>

#include <atomic>
#include <string>
#include <vector>

#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>
#include <CLI/CLI.hpp>

#include "src/control/config.h"
#include "src/control/config_loader.h"
#include "src/core/clock.h"
#include "src/core/data_directory.h"
#include "src/core/note.h"
#include "src/core/topology.h"
#include "src/daemon.h"

namespace engram {
namespace {

std::atomic<bool> g_stop{false};
static_assert(std::atomic<bool>::is_always_lock_free, "a signal handler sets it");

void OnStopSignal(int) { g_stop.store(true); }

std::string ListOf(const std::vector<int>& cpus) {
  std::string text;
  for (const int cpu : cpus) {
    if (!text.empty()) text += ",";
    text += std::to_string(cpu);
  }
  return text;
}

spdlog::level::level_enum LevelOf(Severity severity) {
  switch (severity) {
    case Severity::kInfo:
      return spdlog::level::info;
    case Severity::kWarning:
      return spdlog::level::warn;
    case Severity::kError:
      break;
  }
  return spdlog::level::err;
}

int Fatal(const Error& error) {
  spdlog::error("{}", error.message);
  return 1;
}

int Serve(Config config) {
  auto topology = DiscoverTopology();
  if (!topology) return Fatal(topology.error());
  if (auto planned = PlanCores(*topology, &config); !planned) return Fatal(planned.error());
  auto directory = OpenDataDirectory(config.data_directory);
  if (!directory) return Fatal(directory.error());
  spdlog::info("data directory: {}", config.data_directory);
  spdlog::info("cores: {} processors; ingress on {}, shards on {}, control on {}",
               topology->cpus.size(), ListOf(config.ingress_cpus), ListOf(config.shard_cpus),
               ListOf(config.control_cpus));
  SystemClock clock;
  const NoteFn note = [](const Note& line) {
    spdlog::log(LevelOf(line.severity), "{}", line.text);
  };
  auto daemon = Daemon::Start(config, *topology, &clock, &*directory, g_stop, note);
  if (!daemon) return Fatal(daemon.error());
  if (auto pinned = PinThisThread(config.control_cpus.front()); !pinned) {
    return Fatal(pinned.error());
  }
  for (const Endpoint& endpoint : (*daemon)->endpoints()) {
    spdlog::info("listening on {}", endpoint.ToString());
  }
  if (const GrpcGateway* grpc = (*daemon)->grpc(); grpc != nullptr) {
    spdlog::info("grpc: serving engram.v1.EngramService at {}", grpc->endpoint().ToString());
  }
  if (const HttpGateway* http = (*daemon)->http(); http != nullptr) {
    spdlog::info("http: serving at {}", http->endpoint().ToString());
  }
  spdlog::info("ready");
  const bool drained = (*daemon)->ServeUntil(g_stop, note);
  if (!drained) spdlog::warn("some connections did not end in time and were cut");
  spdlog::info("stopped");
  return 0;
}

int Main(int argc, char** argv) {
  CLI::App app("engramd: streams observations into memory spaces and recalls them");
  std::string config_path;
  app.add_option("--config", config_path, "TOML file (config/engram.toml documents every field)");
  CLI11_PARSE(app, argc, argv);
  spdlog::set_default_logger(spdlog::stderr_color_mt("engramd"));
  struct sigaction action = {};
  action.sa_handler = OnStopSignal;
  sigaction(SIGTERM, &action, nullptr);
  sigaction(SIGINT, &action, nullptr);
  // A peer that is gone is an error of send, not a signal.
  signal(SIGPIPE, SIG_IGN);
  if (config_path.empty()) return Serve(Config());
  auto config = LoadConfig(config_path);
  if (!config) return Fatal(config.error());
  return Serve(*std::move(config));
}

}  // namespace
}  // namespace engram

int main(int argc, char** argv) { return engram::Main(argc, argv); }
