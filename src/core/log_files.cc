#include "src/core/log_files.h"

#include <array>
#include <charconv>
#include <cstdio>

namespace engram {

namespace {

constexpr std::string_view kFolderPrefix = "log-";
constexpr size_t kFolderDigits = 3;
constexpr std::string_view kVaultFolder = "vault";
constexpr std::string_view kSegmentPrefix = "segment-";
constexpr std::string_view kSegmentSuffix = ".log";
constexpr size_t kSegmentDigits = 8;

}  // namespace

std::string LogFolder(uint16_t log) {
  if (log == kVaultLog) return std::string(kVaultFolder);
  std::array<char, 8> digits;
  std::snprintf(digits.data(), digits.size(), "%03u", log);
  return std::string(kFolderPrefix) + digits.data();
}

std::optional<uint16_t> LogOfFolder(std::string_view name) {
  if (name == kVaultFolder) return kVaultLog;
  if (name.size() != kFolderPrefix.size() + kFolderDigits || !name.starts_with(kFolderPrefix)) {
    return std::nullopt;
  }
  const std::string_view digits = name.substr(kFolderPrefix.size());
  uint16_t log = 0;
  const auto [end, error] = std::from_chars(digits.begin(), digits.end(), log);
  if (error != std::errc() || end != digits.end() || log >= kVaultLog) return std::nullopt;
  return log;
}

std::string SegmentName(uint32_t number) {
  std::array<char, kSegmentDigits + 1> digits;
  std::snprintf(digits.data(), digits.size(), "%08x", number);
  return std::string(kSegmentPrefix) + digits.data() + std::string(kSegmentSuffix);
}

std::optional<uint32_t> SegmentNumber(std::string_view name) {
  if (name.size() != kSegmentPrefix.size() + kSegmentDigits + kSegmentSuffix.size() ||
      !name.starts_with(kSegmentPrefix) || !name.ends_with(kSegmentSuffix)) {
    return std::nullopt;
  }
  const std::string_view digits = name.substr(kSegmentPrefix.size(), kSegmentDigits);
  uint32_t number = 0;
  const auto [end, error] = std::from_chars(digits.begin(), digits.end(), number, 16);
  if (error != std::errc() || end != digits.end() || SegmentName(number) != name) {
    return std::nullopt;
  }
  return number;
}

}  // namespace engram
