// Whole daemons that recover: a record that ends them, kills at bad moments, and what clients are
// told meanwhile. Each daemon is a process of its own, forked from this one.

#include <fcntl.h>
#include <grpcpp/create_channel.h>
#include <grpcpp/generic/generic_stub.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <future>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "src/core/clock.h"
#include "src/core/topology.h"
#include "src/daemon.h"
#include "src/replay_crashes.h"
#include "tests/support/scratch_directory.h"
#include "tools/clients/cpp/feed.h"
#include "tools/engramctl/commands.h"
#include "tools/engramctl/feed_loop.h"

namespace engram {
namespace {

constexpr uint64_t kRows = 100;
constexpr uint64_t kPoison = 42;
constexpr int64_t kTimeoutNs = 30 * kNanosPerSecond;

std::atomic<bool> g_stop{false};
void OnStop(int) { g_stop.store(true); }

// What a daemon's shard does before it replays the poisoned record.
enum class AtPoison : uint8_t { kNothing, kAbort, kWaitForStop, kWaitForRelease };

// A running daemon, from outside.
class Process {
 public:
  Process(const std::string& directory, AtPoison at_poison) {
    int lines[2];
    int release[2];
    CHECK(pipe2(lines, O_CLOEXEC) == 0 && pipe2(release, O_CLOEXEC) == 0, "pipes");
    pid_ = fork();
    if (pid_ == 0) _exit(Serve(directory, at_poison, lines[1], release[0]));
    close(lines[1]);
    close(release[0]);
    lines_ = lines[0];
    release_ = release[1];
  }
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;
  ~Process() {
    if (pid_ > 0) {
      kill(pid_, SIGKILL);
      waitpid(pid_, nullptr, 0);
    }
    close(lines_);
    close(release_);
  }

  // The rest of the first line of its log that begins so, or nothing when it ended without one.
  std::optional<std::string> LineAfter(const std::string& prefix) {
    for (size_t next = 0;; ++next) {
      while (next >= log.size()) {
        if (!ReadLine()) return std::nullopt;
      }
      if (log[next].starts_with(prefix)) return log[next].substr(prefix.size());
    }
  }
  // A client's address once it serves.
  Address Ready() {
    const auto address = LineAfter("ready ");
    EXPECT_TRUE(address.has_value()) << Said();
    return address ? *ParseAddress(*address) : Address{};
  }
  std::string Said() const {
    std::string said;
    for (const std::string& line : log) said += line + "\n";
    return said;
  }
  void Release() { CHECK(write(release_, "x", 1) == 1, "a pipe"); }
  // Sends the signal, unless it is 0, and returns what waitpid says of the end.
  int End(int signal) {
    if (signal != 0) kill(pid_, signal);
    int status = 0;
    waitpid(pid_, &status, 0);
    pid_ = 0;
    while (ReadLine()) {
    }
    return status;
  }

  std::vector<std::string> log;

 private:
  static int Serve(const std::string& path, AtPoison at_poison, int lines, int release) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);  // No daemon outlives its test.
    const rlimit no_core = {};
    setrlimit(RLIMIT_CORE, &no_core);  // Half a gigabyte for each that is ended on purpose.
    struct sigaction action = {};
    action.sa_handler = OnStop;
    sigaction(SIGTERM, &action, nullptr);
    const auto say = [lines](const std::string& line) {
      const std::string whole = line + "\n";
      (void)!write(lines, whole.data(), whole.size());
    };
    const NoteFn note = [&](const Note& each) {
      say((each.severity == Severity::kError ? "[error] " : "") + each.text);
    };
    Config config;
    config.listen = {{.host = "127.0.0.1", .port = 0}};
    config.grpc = Endpoint{.host = "127.0.0.1", .port = 0};
    config.http = Endpoint{.host = "127.0.0.1", .port = 0};
    config.memory_limit_mib = 256;
    config.segment_mib = 1;
    config.huge_pages = HugePagePolicy::kOff;
    const auto topology = DiscoverTopology();
    if (!topology) return 2;
    if (topology->cpus.size() > 1) {
      // So that a shard that stands still does not keep the ingress core from answering.
      config.ingress_cpus = config.control_cpus = {topology->cpus[0].os_index};
      config.shard_cpus = {topology->cpus[1].os_index};
    }
    if (!PlanCores(*topology, &config)) return 2;
    auto directory = OpenDataDirectory(path);
    if (!directory) return 3;
    SystemClock clock;
    const auto before_replay = [&](const LogRecord& record) {
      // One that is told to stop is slow from then on, so that it has not recovered before it
      // stops.
      if (g_stop.load()) poll(nullptr, 0, 20);
      if (at_poison == AtPoison::kNothing || record.id != std::to_string(kPoison)) return;
      if (at_poison == AtPoison::kAbort) std::abort();
      say("at the record");
      pollfd entry{.fd = release, .events = POLLIN, .revents = 0};
      while (!g_stop.load() && poll(&entry, 1, 10) == 0) {
      }
      if (g_stop.load()) poll(nullptr, 0, 20);
    };
    auto daemon =
        Daemon::Start(config, *topology, &clock, &*directory, g_stop, note, before_replay);
    if (!daemon) {
      say("failed " + daemon.error().message);
      return 4;
    }
    say("ready " + (*daemon)->endpoints()[0].ToString());
    return (*daemon)->ServeUntil(g_stop, note) ? 0 : 5;
  }
  bool ReadLine() {
    for (;;) {
      if (const size_t end = rest_.find('\n'); end != std::string::npos) {
        log.push_back(rest_.substr(0, end));
        rest_.erase(0, end + 1);
        return true;
      }
      std::array<char, 4096> room;
      const ssize_t count = read(lines_, room.data(), room.size());
      if (count <= 0) return false;
      rest_.append(room.data(), static_cast<size_t>(count));
    }
  }

  pid_t pid_ = 0;
  int lines_ = -1;
  int release_ = -1;
  std::string rest_;
};

std::vector<float> VectorOf(uint64_t row) {
  return {static_cast<float>(row), static_cast<float>(row % 7), 1};
}
std::string PayloadOf(uint64_t row) { return "payload of " + std::to_string(row); }

class DaemonRecoveryTest : public testing::Test {
 protected:
  // All rows over one new session.
  void LoadRows(const Address& address) {
    auto connection = Connection::Connect(address, kTimeoutNs);
    ASSERT_TRUE(connection.has_value());
    ASSERT_TRUE(connection->Hello({.space = "s", .metric = Metric::kL2}, kTimeoutNs).has_value());
    session_ = connection->hello().session;
    std::vector<float> vector;
    std::string id;
    std::string payload;
    std::vector<std::unique_ptr<Feed>> feeds;
    feeds.push_back(std::make_unique<Feed>(
        *std::move(connection), [&](uint64_t index, engram::Observation* observation) {
          vector = VectorOf(index);
          id = std::to_string(index);
          payload = PayloadOf(index);
          observation->dimension = 3;
          observation->vector = std::as_bytes(std::span<const float>(vector));
          observation->id = id;
          observation->payload = payload;
        }));
    feeds.front()->Offer(kRows);
    const auto done = DriveFeeds(feeds, [](int64_t) { return kNothingMore; });
    ASSERT_TRUE(done.has_value()) << done.error().message;
    ASSERT_EQ(feeds.front()->counts().acked, kRows);
  }
  // The rows that are found by their own vector with their payload.
  std::set<uint64_t> RowsOf(const Address& address) {
    std::set<uint64_t> rows;
    auto connection = Connection::Connect(address, kTimeoutNs);
    if (!connection || !connection->Hello({.space = "s", .no_session = true}, kTimeoutNs))
      return rows;
    RecallStream recalls(&*connection);
    for (uint64_t row = 0; row < kRows; ++row) {
      const auto vector = VectorOf(row);
      recalls.Send({.vector = vector, .k = 1, .with_payload = true});
      const auto answer = recalls.AwaitAnswer(kTimeoutNs);
      if (!answer || answer->refusal || answer->hits.empty()) continue;
      const RecallHit& hit = answer->hits[0];
      if (hit.score == 0 && hit.id == std::to_string(row) && hit.payload == PayloadOf(row)) {
        rows.insert(row);
      }
    }
    return rows;
  }
  uint64_t LastSequence(const Address& address) {
    auto connection = Connection::Connect(address, kTimeoutNs);
    EXPECT_TRUE(connection.has_value());
    const auto greeted = connection->Hello({.space = "s", .session = session_}, kTimeoutNs);
    EXPECT_TRUE(greeted.has_value()) << greeted.error().message;
    return connection->hello().last_sequence;
  }
  uint64_t Quarantined(const Address& address) {
    auto connection = Connection::Connect(address, kTimeoutNs);
    EXPECT_TRUE(connection.has_value());
    EXPECT_TRUE(connection->Hello({.no_session = true}, kTimeoutNs).has_value());
    const auto status = IntrospectStatus(*connection, kTimeoutNs);
    EXPECT_TRUE(status.has_value());
    const std::string name = "shard0 records_quarantined ";
    const size_t at = status->find(name);
    return at == std::string::npos ? UINT64_MAX : std::stoull(status->substr(at + name.size()));
  }
  static bool EndedBy(int status, int signal) {
    return WIFSIGNALED(status) && WTERMSIG(status) == signal;
  }

  static std::set<uint64_t> AllBut(std::optional<uint64_t> row) {
    std::set<uint64_t> rows;
    for (uint64_t each = 0; each < kRows; ++each) {
      if (each != row) rows.insert(each);
    }
    return rows;
  }

  ScratchDirectory folder_;
  const std::string data_ = folder_.path() + "/data";
  uint64_t session_ = 0;
};

TEST_F(DaemonRecoveryTest, ARecordThatEndsTwoStartsIsLeftOutOfTheThirdAndKept) {
  {
    Process first(data_, AtPoison::kNothing);
    LoadRows(first.Ready());
    ASSERT_TRUE(EndedBy(first.End(SIGKILL), SIGKILL));
  }
  EXPECT_TRUE(EndedBy(Process(data_, AtPoison::kAbort).End(0), SIGABRT));
  // One that is killed at the same record, or stopped, does not count.
  for (const int signal : {SIGKILL, SIGTERM, SIGABRT}) {
    Process waits(data_, AtPoison::kWaitForStop);
    ASSERT_TRUE(waits.LineAfter("at the record"));
    const int status = waits.End(signal);
    EXPECT_TRUE(signal == SIGTERM ? WIFEXITED(status) : EndedBy(status, signal)) << signal;
  }
  EXPECT_TRUE(EndedBy(Process(data_, AtPoison::kAbort).End(0), SIGABRT));
  const auto kept = data_ + "/" + kQuarantineFolder;
  EXPECT_FALSE(std::filesystem::exists(kept));
  {
    Process third(data_, AtPoison::kAbort);
    const Address address = third.Ready();
    EXPECT_EQ(RowsOf(address), AllBut(kPoison));
    EXPECT_EQ(LastSequence(address), kRows) << "its sequence counts as taken";
    EXPECT_EQ(Quarantined(address), 1u);
    const auto line = third.LineAfter("[error] QUARANTINE: the record in ");
    ASSERT_TRUE(line.has_value());
    EXPECT_TRUE(line->starts_with(data_ + "/log-000/segment-")) << *line;
    EXPECT_FALSE(std::filesystem::exists(data_ + "/" + kReplayCrashesName));
    ASSERT_TRUE(EndedBy(third.End(SIGKILL), SIGKILL));
  }
  std::vector<std::filesystem::path> files;
  for (const auto& file : std::filesystem::directory_iterator(kept)) files.push_back(file.path());
  ASSERT_EQ(files.size(), 1u);
  testing::internal::CaptureStdout();
  EXPECT_EQ(RunQuarantine({.directory = data_, .whole = true}), kExitOk);
  const std::string dump = testing::internal::GetCapturedStdout();
  EXPECT_NE(dump.find(files[0].filename().string()), std::string::npos) << dump;
  EXPECT_NE(dump.find(PayloadOf(kPoison)), std::string::npos) << dump;
  {
    Process fourth(data_, AtPoison::kAbort);
    EXPECT_EQ(RowsOf(fourth.Ready()), AllBut(kPoison)) << "it stays out";
    ASSERT_TRUE(EndedBy(fourth.End(SIGKILL), SIGKILL));
  }
  // A version that can replay it gets it back.
  std::filesystem::remove(files[0]);
  Process healed(data_, AtPoison::kNothing);
  const Address address = healed.Ready();
  EXPECT_EQ(RowsOf(address), AllBut(std::nullopt));
  EXPECT_EQ(Quarantined(address), 0u);
  EXPECT_EQ(healed.End(SIGTERM), 0) << healed.Said();
}

// The answer of grpc.health.v1.Health/Check: 1 SERVING, 2 NOT_SERVING.
int HealthOf(const std::string& address, const std::string& service) {
  grpc::GenericStub stub(grpc::CreateChannel(address, grpc::InsecureChannelCredentials()));
  grpc::ClientContext context;
  context.set_wait_for_ready(true);
  std::string bytes;
  if (!service.empty()) bytes = std::string("\x0a") + static_cast<char>(service.size()) + service;
  const grpc::Slice slice(bytes);
  const grpc::ByteBuffer request(&slice, 1);
  grpc::ByteBuffer response;
  std::promise<grpc::Status> done;
  stub.UnaryCall(&context, "/grpc.health.v1.Health/Check", {}, &request, &response,
                 [&done](grpc::Status status) { done.set_value(std::move(status)); });
  if (!done.get_future().get().ok()) return -1;
  grpc::Slice whole;
  if (!response.DumpToSingleSlice(&whole).ok() || whole.size() != 2) return -1;
  return whole.begin()[1];
}

grpc::Status CallOf(const std::string& address) {
  grpc::GenericStub stub(grpc::CreateChannel(address, grpc::InsecureChannelCredentials()));
  grpc::ClientContext context;
  context.set_wait_for_ready(true);
  const grpc::Slice nothing("");
  const grpc::ByteBuffer request(&nothing, 1);
  grpc::ByteBuffer response;
  std::promise<grpc::Status> done;
  stub.UnaryCall(&context, "/engram.v1.EngramService/Introspect", {}, &request, &response,
                 [&done](grpc::Status status) { done.set_value(std::move(status)); });
  return done.get_future().get();
}

TEST_F(DaemonRecoveryTest, WhoeverAsksMeanwhileIsToldHowFarItIs) {
  if (DiscoverTopology()->cpus.size() < 2) GTEST_SKIP() << "needs two processors";
  {
    Process first(data_, AtPoison::kNothing);
    LoadRows(first.Ready());
    ASSERT_TRUE(EndedBy(first.End(SIGKILL), SIGKILL));
  }
  Process daemon(data_, AtPoison::kWaitForRelease);
  ASSERT_TRUE(daemon.LineAfter("at the record"));
  const auto native = daemon.LineAfter("recovering: 127.0.0.1:");
  const auto grpc_line = daemon.LineAfter("recovering: grpc health at ");
  ASSERT_TRUE(native && grpc_line);
  const Address address = *ParseAddress("127.0.0.1:" + native->substr(0, native->find(' ')));
  const std::string grpc_address = grpc_line->substr(0, grpc_line->find(' '));

  EXPECT_EQ(HealthOf(grpc_address, ""), 2);
  EXPECT_EQ(HealthOf(grpc_address, "engram.v1.EngramService"), 2);
  EXPECT_EQ(HealthOf(grpc_address, "liveness"), 1);
  const grpc::Status refused = CallOf(grpc_address);
  EXPECT_EQ(refused.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_NE(refused.error_message().find(std::to_string(kPoison) + " observations stored again"),
            std::string::npos)
      << refused.error_message();
  EXPECT_NE(refused.error_details().find("google.rpc.RetryInfo"), std::string::npos);

  auto early = Connection::Connect(address, kTimeoutNs);
  ASSERT_TRUE(early.has_value());
  EXPECT_TRUE(early->Ping(kTimeoutNs).has_value());
  auto refused_native = Connection::Connect(address, kTimeoutNs);
  ASSERT_TRUE(refused_native.has_value());
  const auto greeted = refused_native->Hello({.space = "s"}, kTimeoutNs);
  ASSERT_FALSE(greeted.has_value());
  EXPECT_EQ(greeted.error().code, ErrorCode::kUnavailable) << "so that clients come again";
  EXPECT_NE(greeted.error().message.find("recovering"), std::string::npos);
  EXPECT_NE(greeted.error().message.find("observations stored again"), std::string::npos);

  daemon.Release();
  const Address ready = daemon.Ready();
  const auto goes_on = early->Hello({.space = "s", .no_session = true}, kTimeoutNs);
  EXPECT_TRUE(goes_on.has_value())
      << "one that has only pinged goes on: " << goes_on.error().message;
  early = Fail(ErrorCode::kUnavailable, "closed, as the daemon waits for open ones at its end");
  EXPECT_EQ(RowsOf(ready), AllBut(std::nullopt));
  EXPECT_EQ(HealthOf(grpc_address, ""), 1);
  EXPECT_EQ(HealthOf(grpc_address, "engram.v1.EngramService"), 1);
  EXPECT_TRUE(CallOf(grpc_address).ok());
  EXPECT_EQ(daemon.End(SIGTERM), 0) << daemon.Said();
}

TEST_F(DaemonRecoveryTest, AStopIsNotKeptWaitingByTheRecovery) {
  {
    Process first(data_, AtPoison::kNothing);
    LoadRows(first.Ready());
    ASSERT_TRUE(EndedBy(first.End(SIGKILL), SIGKILL));
  }
  Process daemon(data_, AtPoison::kWaitForStop);
  ASSERT_TRUE(daemon.LineAfter("at the record"));
  const int status = daemon.End(SIGTERM);
  EXPECT_TRUE(WIFEXITED(status));
  EXPECT_TRUE(daemon.LineAfter("failed stopped while recovering").has_value());
  Process again(data_, AtPoison::kNothing);
  EXPECT_EQ(RowsOf(again.Ready()), AllBut(std::nullopt));
}

}  // namespace
}  // namespace engram
