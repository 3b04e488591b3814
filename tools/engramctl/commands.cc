#include "tools/engramctl/commands.h"

#include <cmath>
#include <cstdio>
#include <utility>

#include "src/core/clock.h"

namespace engram {

namespace {

constexpr int64_t kConnectTimeoutNs = 5 * kNanosPerSecond;

}  // namespace

int ReportError(const Error& error) {
  std::fprintf(stderr, "engramctl: %s\n", error.message.c_str());
  return kExitFailed;
}

int ReportError(Error error, const std::string& space) {
  if (error.code == ErrorCode::kNotFound) {
    error.message = "space " + (space.empty() ? "default" : Printable(space)) + ": " +
                    error.message + "; `engramctl spaces` lists those that hold something";
  }
  return ReportError(error);
}

Error RefusedRecall(const Refusal& refusal) {
  const bool unknown = refusal.reason == RefusalReason::kUnknownSpace;
  return {unknown ? ErrorCode::kNotFound : ErrorCode::kInvalidArgument,
          "recall refused: " + refusal.Describe()};
}

std::expected<Connection, int> OpenConnection(const ServerOptions& server,
                                              const HelloOptions& hello) {
  const Result<Address> address = ParseAddress(server.address);
  if (!address) {
    ReportError(address.error());
    return std::unexpected(kExitUsage);
  }
  Result<Connection> connection = Connection::Connect(*address, kConnectTimeoutNs);
  if (!connection) {
    ReportError(connection.error());
    return std::unexpected(kExitCannotConnect);
  }
  if (const Result<void> greeted = connection->Hello(hello, kAnswerTimeoutNs); !greeted) {
    return std::unexpected(ReportError(greeted.error()));
  }
  return *std::move(connection);
}

std::expected<Connection, int> OpenReader(const ServerOptions& server, const std::string& space) {
  HelloOptions hello;
  hello.space = space;
  hello.no_session = true;
  return OpenConnection(server, hello);
}

double Rounded(double value, int places) {
  if (!std::isfinite(value)) return 0;
  const double unit = std::pow(10.0, places);
  return std::round(value * unit) / unit;
}

}  // namespace engram
