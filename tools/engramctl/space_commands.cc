// What an operator has done to a whole space.

#include <cstdio>
#include <iostream>
#include <string>

#include <nlohmann/json.hpp>

#include "src/core/clock.h"
#include "tools/engramctl/commands.h"
#include "tools/engramctl/table.h"

namespace engram {

namespace {

// Without a sign of life.
constexpr int64_t kLongestSilenceNs = 600 * kNanosPerSecond;

int RunCommand(const ServerOptions& server, SpaceCommand what, const std::string& space,
               const char* done_text) {
  auto connection = OpenReader(server, "");
  if (!connection) return connection.error();
  const auto done = CommandSpace(*connection, what, space, kLongestSilenceNs);
  if (!done) return ReportError(done.error(), space);
  if (server.json) {
    std::printf("%s\n", nlohmann::json({{"observations", done->observations},
                                        {"bytes_before", done->bytes_before},
                                        {"bytes_after", done->bytes_after}})
                            .dump()
                            .c_str());
  } else {
    std::printf("%s observations %s; memory in use %s bytes, was %s\n",
                WithThousands(done->observations).c_str(), done_text,
                WithThousands(done->bytes_after).c_str(),
                WithThousands(done->bytes_before).c_str());
  }
  return kExitOk;
}

// Whether the operator has typed the space's name.
bool Confirms(const std::string& space) {
  std::fprintf(stderr, "All that space %s holds will be gone for good. Type its name to go on: ",
               Printable(space).c_str());
  std::string answer;
  return std::getline(std::cin, answer) && answer == space;
}

}  // namespace

int RunCompact(const ServerOptions& server, const SpaceCommandOptions& options) {
  return RunCommand(server, SpaceCommand::kCompact, options.space, "swept out");
}

int RunRebuild(const ServerOptions& server, const SpaceCommandOptions& options) {
  return RunCommand(server, SpaceCommand::kRebuild, options.space, "linked anew");
}

int RunDrop(const ServerOptions& server, const SpaceCommandOptions& options) {
  if (!options.yes && !Confirms(options.space)) {
    std::fprintf(stderr, "engramctl: nothing was dropped\n");
    return kExitFailed;
  }
  return RunCommand(server, SpaceCommand::kDrop, options.space, "dropped");
}

}  // namespace engram
