#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "index/log/log_format.h"
#include "index/log/log_verifier.h"
#include "src/checkpoint_manifest.h"
#include "src/core/data_directory.h"
#include "src/core/disk.h"
#include "src/core/result.h"

namespace engram {

// Makes nothing, which CreatePosixDisk would. Errors: kNotFound, kPermissionDenied, naming it.
Result<std::unique_ptr<Disk>> OpenFolder(const std::string& path);
// Whether a daemon holds the directory, or the one above a log's folder. Looks at the kernel's list
// of locks, so as not to be in the way of a daemon that starts.
bool IsInUse(const std::string& directory);
// As segments have it.
LogInstance LogInstanceOf(const InstanceId& id);
// Not looked at, which is no damage: it may not be read, is of another version, or the machine has
// no room for it.
bool IsUnread(const Error& error);

// What a message says behind "PATH, offset N: " or "PATH at offset N: ", or PATH alone, where it
// begins like this.
std::string WithoutPlace(const std::string& message, const std::string& path, uint64_t offset);

// What is wrong with a data directory, but for what its segments hold.
struct DataReport {
  // By names below the directory. Offset 0: the file is missing, or it is not known where in it.
  std::vector<LogFinding> damages;
  // No damage: what was being written when a process ended.
  std::vector<LogFinding> rests;
  std::vector<Error> unread;
  std::optional<CheckpointManifest> manifest;  // where there is a sound one
};

// Checks what a start needs beside sound logs (VerifyLog, VerifyVault):
//
// 1. INSTANCE and CHECKPOINT are there and sound. Where there is no CHECKPOINT the logs alone have
//    all (src/missing_checkpoint.h).
// 2. The folder and the file of each log that CHECKPOINT names are there, the file is as long as
//    CHECKPOINT says, with zeros up to the end of the page, and each extent of it has its checksum.
// 3. The records that live lie in segments that are there and are long enough.
// 4. Each file of the quarantine is sound, and each line of REPLAY-CRASHES.
//
// A daemon may run on it: where it replaces the checkpoint meanwhile, all is looked at again. Waits
// for the disk. Nothing is written.
DataReport VerifyDataFiles(const std::string& data);

}  // namespace engram
