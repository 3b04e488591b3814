#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "src/core/result.h"
#include "tools/engramctl/commands.h"

namespace engram {

// Nanoseconds since 1970 of "2024-05-01T12:30:00Z", with a fraction or an offset such as +02:00
// where there is one, of "2024-05-01" (midnight in UTC), or of seconds since 1970, "1714566600.5".
// Errors: kInvalidArgument, for what is none of these or outside 1678 to 2261.
Result<int64_t> ParseTime(std::string_view text);

// Whether `text` is KEY=VALUE. Errors: kInvalidArgument.
Result<void> CheckCondition(std::string_view text);

// The filter (src/core/attributes.h) of the options of a recall; empty: there is none. An
// observation has to have any of the values that are given for a key, and none of those that are
// excluded for it. The key `tag` stands for tags. Errors: kInvalidArgument.
Result<std::string> FilterBytes(const FilterOptions& options);

}  // namespace engram
