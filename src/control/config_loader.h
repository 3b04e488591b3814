#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "src/control/config.h"
#include "src/core/result.h"
#include "src/core/topology.h"

namespace engram {

// A file as far as it could be read, and everything that is wrong with it.
struct ConfigReading {
  Config config;
  std::vector<ConfigFault> faults;  // in the order of the file
};

// Reads TOML strictly: unknown names, wrong types, values out of bounds, and fields that do not fit
// together (see CheckConfig). With a topology also what cannot run on that machine. A mistake in
// TOML itself ends the reading and is then the only fault. `name` stands for the file in messages.
ConfigReading ReadConfig(std::string_view text, const std::string& name, const Topology* topology);

// The same as a result. Errors: kInvalidArgument with every fault at once, a line each:
// "FILE:LINE: field: what is wrong; what to write".
Result<Config> ParseConfig(std::string_view text, const std::string& name,
                           const Topology* topology = nullptr);

// Reads a file and checks it against this machine. Errors: kNotFound, and those of ParseConfig and
// DiscoverTopology.
Result<Config> LoadConfig(const std::string& path);

// Errors: kNotFound, with the remedy.
Result<std::string> ReadConfigFile(const std::string& path);

}  // namespace engram
