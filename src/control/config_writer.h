#pragma once

#include <string>

#include "src/control/config.h"

namespace engram {

// The whole configuration as TOML that ReadConfig takes: every field, those that have no value as a
// comment, and a mark at those that this version does not honour yet. `cores` is what stands for
// the section [cores] (see CoreMapToml); empty: it is written like the others.
std::string ConfigToml(const Config& config, const std::string& cores);

}  // namespace engram
