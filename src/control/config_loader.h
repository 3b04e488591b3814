#pragma once

#include <string>
#include <string_view>

#include "src/control/config.h"
#include "src/core/result.h"

namespace engram {

// Reads a TOML file. Errors: kNotFound, or kInvalidArgument with every fault at once, a line each:
// "FILE:LINE: field: what is wrong; what to write".
Result<Config> LoadConfig(const std::string& path);
// The same from text; `name` stands for the file in messages.
Result<Config> ParseConfig(std::string_view text, const std::string& name);

}  // namespace engram
