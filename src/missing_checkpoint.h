#pragma once

#include <functional>
#include <memory>
#include <string>

#include "src/core/disk.h"
#include "src/core/result.h"

namespace engram {

// For a data directory without the file CHECKPOINT: whether the logs alone have all that there is.
// They do as long as no segment was ever freed: then each log begins with its first segment, and
// the vault is empty. Checkpoint files alone are no sign: the first round writes them before there
// is a CHECKPOINT, and rounds that fail before it have higher numbers.
//
// `root` is over the data directory, `open_folder` (as LogStore::DiskFactory) makes a Disk over a
// folder in it. Errors: kCorrupt, naming a file that only a CHECKPOINT explains, and the remedy;
// those of the disk.
Result<void> CheckLogsAreWhole(
    Disk& root,
    const std::function<Result<std::unique_ptr<Disk>>(
        const std::string& folder, const DiskOptions& options, std::string* note)>& open_folder);

}  // namespace engram
