#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "src/core/log_address.h"

namespace engram {

// Where logs lie in a data directory: each in a folder of its own, in files of a fixed size.

// Not a shard's log: records that were taken over from segments that were mostly dead
// (index/log/FORMAT.md, "The vault"). No shard has so high a number.
inline constexpr uint16_t kVaultLog = 255;

// "log-003" for 3, "vault" for kVaultLog.
std::string LogFolder(uint16_t log);
// Nothing for other names.
std::optional<uint16_t> LogOfFolder(std::string_view name);

// "segment-0000002a.log" for 42.
std::string SegmentName(uint32_t number);
// Nothing for other names.
std::optional<uint32_t> SegmentNumber(std::string_view name);

}  // namespace engram
