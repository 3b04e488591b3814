#include "src/missing_checkpoint.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "index/checkpoint/checkpoint_file.h"
#include "src/checkpoint_manifest.h"
#include "src/core/log_files.h"

namespace engram {

namespace {

// A file that says that the log has lost its beginning, or nothing.
std::optional<std::string> WitnessAmong(const std::vector<DirectoryEntry>& entries, uint16_t log) {
  std::optional<uint32_t> first;
  std::optional<std::string> checkpoint;
  for (const DirectoryEntry& entry : entries) {
    if (const auto number = SegmentNumber(entry.name))
      first = std::min(first.value_or(*number), *number);
    if (CheckpointRound(entry.name)) checkpoint = entry.name;
  }
  if (log != kVaultLog && first == 1) return std::nullopt;
  if (checkpoint) return checkpoint;
  return first ? std::optional(SegmentName(*first)) : std::nullopt;
}

}  // namespace

Result<void> CheckLogsAreWhole(
    Disk& root,
    const std::function<Result<std::unique_ptr<Disk>>(
        const std::string& folder, const DiskOptions& options, std::string* note)>& open_folder) {
  const auto folders = root.List();
  if (!folders) return std::unexpected(folders.error());
  for (const DirectoryEntry& folder : *folders) {
    const auto log = LogOfFolder(folder.name);
    if (!log) continue;
    const DiskOptions options{.max_in_flight = 1, .max_open_files = 1, .registered_buffers = {}};
    auto disk = open_folder(folder.name, options, nullptr);
    if (!disk) return std::unexpected(disk.error());
    const auto entries = (*disk)->List();
    if (!entries) return std::unexpected(entries.error());
    const auto witness = WitnessAmong(*entries, *log);
    if (!witness) continue;
    return Fail(ErrorCode::kCorrupt,
                root.directory() + "/" + kCheckpointManifestName + " is missing, but " +
                    folder.name + "/" + *witness +
                    " is there, and the logs alone do not have all: put that file back, or restore "
                    "a backup; to begin with nothing, choose another data.directory");
  }
  return {};
}

}  // namespace engram
