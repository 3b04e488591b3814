#pragma once

#include <cstdint>
#include <functional>

#include "index/log/log_format.h"
#include "index/log/log_verifier.h"
#include "src/core/disk.h"
#include "src/core/log_address.h"
#include "src/core/log_record.h"
#include "src/core/result.h"

namespace engram {

// Reads all segments of the vault in `disk`'s folder (index/log/FORMAT.md, "The vault"): each byte
// is under a checksum or has to be zero. Behind a record that is damaged it goes on at the next
// sound one. Single turned bits are damage as well, named to the byte.
//
// Waits for the disk; for tools, not for a core. Nothing is written. Errors: those of the disk, and
// a segment of another directory or version. `visit` (may be empty) gets each sound record, in the
// order of the addresses.
using VaultVisitFn =
    std::function<void(const LogRecord& record, LogAddress address, uint32_t record_bytes)>;
Result<LogReport> VerifyVault(Disk& disk, const LogInstance& instance,
                              const VaultVisitFn& visit = {});

}  // namespace engram
