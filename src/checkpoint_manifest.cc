#include "src/checkpoint_manifest.h"

#include <charconv>
#include <cstdio>

#include "src/core/crc32c.h"
#include "src/core/log_files.h"

namespace engram {

namespace {

constexpr std::string_view kTitle = "engram checkpoint\nversion ";
constexpr uint32_t kVersion = 2;
constexpr std::string_view kCrc = "crc32c ";
// The last number is the vault's.
constexpr size_t kMaxLogs = kVaultLog;
constexpr size_t kMaxManifestBytes = size_t{1} << 20;

std::string Hex(uint64_t value, int digits) {
  char text[24];
  std::snprintf(text, sizeof(text), "%0*llx", digits, static_cast<unsigned long long>(value));
  return text;
}

std::span<const std::byte> BytesOf(std::string_view text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

// Takes words and numbers from the front of a text.
class Words {
 public:
  explicit Words(std::string_view text) : text_(text) {}
  bool Take(std::string_view word) {
    if (!text_.starts_with(word)) return false;
    text_.remove_prefix(word.size());
    return true;
  }
  template <typename T>
  bool TakeNumber(T* number, int base = 10) {
    const auto [end, error] = std::from_chars(text_.begin(), text_.end(), *number, base);
    if (error != std::errc()) return false;
    text_.remove_prefix(static_cast<size_t>(end - text_.begin()));
    return true;
  }
  bool empty() const { return text_.empty(); }

 private:
  std::string_view text_;
};

// The lines before the checksum, behind the version's number; nothing where the text is not whole.
std::optional<Words> CheckManifest(std::string_view text, uint32_t* version) {
  const size_t crc_at = text.rfind(kCrc);
  if (crc_at == std::string_view::npos) return std::nullopt;
  if (text.substr(crc_at) !=
      std::string(kCrc) + Hex(Crc32c(BytesOf(text.substr(0, crc_at))), 8) + "\n") {
    return std::nullopt;
  }
  Words words(text.substr(0, crc_at));
  if (!words.Take(kTitle) || !words.TakeNumber(version)) return std::nullopt;
  return words;
}

}  // namespace

std::string PrintManifest(const CheckpointManifest& manifest) {
  std::string text(kTitle);
  text += std::to_string(kVersion) + "\nround " + std::to_string(manifest.round) + "\n";
  text += "shards " + std::to_string(manifest.logs.size()) + "\n";
  for (size_t i = 0; i < manifest.logs.size(); ++i) {
    const CheckpointManifest::Log& log = manifest.logs[i];
    text += "log " + std::to_string(i) + " from " + Hex(log.from, 16) + " epoch " +
            std::to_string(log.epoch) + " file_bytes " + std::to_string(log.file_bytes) + "\n";
  }
  for (const CheckpointManifest::Kept& kept : manifest.kept) {
    text += "kept " + std::to_string(kept.log) + " from " + Hex(kept.from, 16) + "\n";
  }
  return text + std::string(kCrc) + Hex(Crc32c(BytesOf(text)), 8) + "\n";
}

std::optional<CheckpointManifest> ParseManifest(std::string_view text) {
  uint32_t version = 0;
  auto checked = CheckManifest(text, &version);
  if (!checked || version != kVersion) return std::nullopt;
  Words& words = *checked;
  CheckpointManifest manifest;
  size_t shards = 0;
  if (!words.Take("\nround ") || !words.TakeNumber(&manifest.round) || !words.Take("\nshards ") ||
      !words.TakeNumber(&shards) || !words.Take("\n") || shards == 0 || shards > kMaxLogs) {
    return std::nullopt;
  }
  for (size_t i = 0; i < shards; ++i) {
    CheckpointManifest::Log log;
    size_t number = 0;
    if (!words.Take("log ") || !words.TakeNumber(&number) || number != i || !words.Take(" from ") ||
        !words.TakeNumber(&log.from, 16) || !words.Take(" epoch ") ||
        !words.TakeNumber(&log.epoch) || !words.Take(" file_bytes ") ||
        !words.TakeNumber(&log.file_bytes) || !words.Take("\n")) {
      return std::nullopt;
    }
    manifest.logs.push_back(log);
  }
  while (words.Take("kept ")) {
    CheckpointManifest::Kept kept;
    if (!words.TakeNumber(&kept.log) || kept.log < shards || kept.log >= kMaxLogs ||
        (!manifest.kept.empty() && kept.log <= manifest.kept.back().log) || !words.Take(" from ") ||
        !words.TakeNumber(&kept.from, 16) || !words.Take("\n")) {
      return std::nullopt;
    }
    manifest.kept.push_back(kept);
  }
  if (!words.empty()) return std::nullopt;
  return manifest;
}

Result<std::optional<CheckpointManifest>> ReadManifest(Disk& disk) {
  const auto content = ReadWholeFile(disk, kCheckpointManifestName, kMaxManifestBytes);
  if (!content) {
    if (content.error().code == ErrorCode::kNotFound) return std::nullopt;
    return std::unexpected(content.error());
  }
  const std::string_view text(reinterpret_cast<const char*>(content->data()), content->size());
  auto manifest = ParseManifest(text);
  uint32_t version = 0;
  if (!manifest && CheckManifest(text, &version) && version != kVersion) {
    return Fail(ErrorCode::kUnavailable,
                disk.directory() + "/" + kCheckpointManifestName + " is of version " +
                    std::to_string(version) + ", and this program reads version " +
                    std::to_string(kVersion) + ": start the program that wrote it");
  }
  if (!manifest) {
    return Fail(ErrorCode::kCorrupt, disk.directory() + "/" + kCheckpointManifestName +
                                         " is damaged: restore it, with the directory, from a "
                                         "backup");
  }
  return manifest;
}

Result<void> WriteManifest(Disk& disk, const CheckpointManifest& manifest) {
  return ReplaceFile(disk, kCheckpointManifestName, BytesOf(PrintManifest(manifest)));
}

}  // namespace engram
