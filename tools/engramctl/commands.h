#pragma once

#include <cstdint>
#include <expected>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "src/core/observation.h"
#include "src/core/result.h"
#include "src/core/topology.h"
#include "src/core/vector_dtype.h"
#include "tools/clients/cpp/engram_client.h"

// The commands of engramctl. Each prints its answer to standard output and what went wrong to
// standard error, and returns the exit code of the process.

namespace engram {

inline constexpr int kExitOk = 0;
inline constexpr int kExitFailed = 1;  // the operation failed, or something was refused for good
inline constexpr int kExitUsage = 2;
inline constexpr int kExitCannotConnect = 3;

struct ServerOptions {
  std::string address{kDefaultAddress};
  bool json = false;
};

struct LoadOptions {
  std::string data;   // path of the vectors
  std::string space;  // empty: default
  Metric metric = Metric::kUnspecified;
  Priority priority = Priority::kNormal;
  VectorDtype dtype = VectorDtype::kNone;  // kNone: as the file has them
  uint64_t rate = 0;                       // observations/s over all connections; 0: closed loop
  uint32_t batch = 16;                     // observations in a frame
  uint64_t count = UINT64_MAX;             // of the file's rows
  uint32_t connections = 1;
  std::string texts;  // path of the payloads, one a row; empty: none
  std::vector<std::string> attributes = {"source", "category"};  // columns of a .tsv; or "none"
  std::string id_prefix;
  bool wait_linked = false;
  uint64_t retry_for_s = 0;  // connect again for so long without progress; 0: not at all
  bool resume = false;       // not only the first time: also when a connection breaks
  // One a connection, in hexadecimal: what an earlier load of the same rows has begun and not
  // ended; 0: a new one. Empty: all new.
  std::vector<std::string> sessions;
};
int RunLoad(const ServerOptions& server, const LoadOptions& options);

// What a recall leaves of what it finds; see recall_filter.h.
struct FilterOptions {
  std::vector<std::string> conditions;  // KEY=VALUE, !KEY=VALUE
  std::vector<std::string> exclusions;  // KEY=VALUE
  std::string since;                    // a time; empty: no bound
  std::string until;
};

struct RecallOptions {
  // Either queries and ground truth,
  std::string queries;
  std::string groundtruth;
  std::string data;  // base vectors for exact ties; empty: ties by returned scores
  std::string id_prefix;
  uint64_t count = UINT64_MAX;
  uint32_t concurrency = 1;
  uint64_t warmup = 0;
  // or nothing but a filter,
  bool latest = false;
  // or a phrase and the model that encodes it.
  std::string text;
  std::string encoder;

  std::string space;
  uint32_t k = 10;
  uint32_t ef = 0;             // 0: the server's default
  std::optional<float> bound;  // a score
  bool all_spaces = false;
  FilterOptions filter;
  bool at_snapshot = false;
  bool with_vector = false;
};
int RunRecallQuality(const ServerOptions& server, const RecallOptions& options);
int RunRecallOnce(const ServerOptions& server, const RecallOptions& options);

struct EncodeOptions {
  std::string encoder;
  std::string texts;  // "-": lines of standard input
  std::string out;
};
int RunEncode(const EncodeOptions& options);

struct PutOptions {
  std::string space;
  std::string id;
  std::string text;
  std::string encoder;
};
int RunPut(const ServerOptions& server, const PutOptions& options);

struct DeleteOptions {
  std::string space;
  std::vector<std::string> ids;
};
int RunDelete(const ServerOptions& server, const DeleteOptions& options);

int RunStatus(const ServerOptions& server);
int RunSpaces(const ServerOptions& server);
int RunPing(const ServerOptions& server);
// Has a checkpoint made and waits for its end.
int RunCheckpoint(const ServerOptions& server);

struct SpaceCommandOptions {
  std::string space;
  bool yes = false;  // drop: does not ask
};
// What has ended in a space is swept out now.
int RunCompact(const ServerOptions& server, const SpaceCommandOptions& options);
// All that is in a space's graph is linked anew.
int RunRebuild(const ServerOptions& server, const SpaceCommandOptions& options);
// All of a space is gone.
int RunDrop(const ServerOptions& server, const SpaceCommandOptions& options);

// These need no daemon.
struct ConfigOptions {
  bool show = false;      // print the whole of it; else check it
  std::string file;       // empty: the built-in defaults
  std::string synthetic;  // machine to check against, in hwloc's words; empty: this one
  bool json = false;
};
int RunConfig(const ConfigOptions& options);

struct TopologyOptions {
  bool suggest = false;
  std::string synthetic;  // machine to draw, in hwloc's words; empty: this one
  bool json = false;
};
int RunTopology(const TopologyOptions& options);

struct LogOptions {
  std::string directory;  // a data directory, or the folder of one log
  bool json = false;
  // dump:
  std::string from;   // SEGMENT:OFFSET where a block begins; empty: the beginning
  std::string space;  // empty: all
  bool vectors = false;
};
int RunLogDump(const LogOptions& options);
int RunLogVerify(const LogOptions& options);

struct QuarantineOptions {
  std::string directory;  // a data directory
  bool json = false;
  // dump:
  bool whole = false;     // all that the records hold, as JSON
  std::string file = {};  // of the quarantine; empty: all
};
int RunQuarantine(const QuarantineOptions& options);

struct BackupOptions {
  std::string directory;  // made; what is there must be empty
  std::string data;       // the daemon's data directory; empty: as it says
};
// Copies what a running daemon on this machine has: all that it acknowledged before, of each
// session the beginning of what came since.
int RunBackup(const ServerOptions& server, const BackupOptions& options);

struct RestoreOptions {
  std::string backup;
  std::string directory;  // the data directory to be; what is there must be empty
};
// Needs no daemon; of `server` only json counts.
int RunRestore(const ServerOptions& server, const RestoreOptions& options);

enum class ExportFormat : uint8_t { kJsonl, kFvecs };

struct ExportOptions {
  std::string space;
  ExportFormat format = ExportFormat::kJsonl;
  std::string output;  // empty: standard output
};
int RunExport(const ServerOptions& server, const ExportOptions& options);

struct VerifyOptions {
  std::string space;               // empty: all
  uint32_t sample = 100;           // observations of each space
  uint64_t exact_limit = 100'000;  // of larger spaces the exact answers are not computed
  double least_recall = 0.8;       // recall@10 below it is a failure
  uint64_t seed = 0;               // draws the sample; 0: the time
};
// What a running daemon has: invariants, a sample of recalls, payloads in the log.
int RunVerify(const ServerOptions& server, const VerifyOptions& options);

// For the commands ------------------------------------------------------------------------------

inline constexpr int64_t kAnswerTimeoutNs = 30'000'000'000;

// Prints "engramctl: message" to standard error and returns kExitFailed.
int ReportError(const Error& error);
// The same for what was asked of a space, which is named where there is none (kNotFound).
int ReportError(Error error, const std::string& space);

// kNotFound where the space is not known.
Error RefusedRecall(const Refusal& refusal);

// Connects and says hello; on failure says why and returns the exit code.
std::expected<Connection, int> OpenConnection(const ServerOptions& server,
                                              const HelloOptions& hello);

// The same for a connection that only recalls and introspects.
std::expected<Connection, int> OpenReader(const ServerOptions& server, const std::string& space);

// The machine that hwloc's words describe; this one when there are none.
Result<Topology> TopologyOf(const std::string& synthetic);

// The value of one line of the control plane in the daemon's status.
Result<std::string> ControlText(Connection& connection, std::string_view name);
Result<uint64_t> ControlCounter(Connection& connection, std::string_view name);
// Asks for a checkpoint and waits until one has ended that began after that; whether it succeeded.
Result<bool> AwaitCheckpoint(Connection& connection);

// For JSON: `value` with `places` decimals, and 0 for what is no number.
double Rounded(double value, int places);

}  // namespace engram
