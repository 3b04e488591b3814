#include "tools/engramctl/backup_list.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdio>
#include <span>

#include "src/core/crc32c.h"

namespace engram {

namespace {

constexpr std::string_view kTitle = "engram backup\nversion 1\n";
constexpr std::string_view kCrc = "crc32c ";

std::string Hex(uint32_t value) {
  std::array<char, 9> digits;
  std::snprintf(digits.data(), digits.size(), "%08x", value);
  return digits.data();
}

uint32_t CrcOf(std::string_view text) { return Crc32c(std::as_bytes(std::span(text))); }

bool IsPart(std::string_view part) {
  const auto is_plain = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' ||
           c == '_' || c == '-';
  };
  return !part.empty() && part != "." && part != ".." && std::ranges::all_of(part, is_plain);
}

bool IsName(std::string_view name) {
  const size_t slash = name.find('/');
  if (slash == std::string_view::npos) return IsPart(name);
  return IsPart(name.substr(0, slash)) && IsPart(name.substr(slash + 1));
}

// What stands before `end` in the text, which is moved behind it.
std::optional<std::string_view> Take(std::string_view& text, char end) {
  const size_t at = text.find(end);
  if (at == std::string_view::npos) return std::nullopt;
  const std::string_view taken = text.substr(0, at);
  text.remove_prefix(at + 1);
  return taken;
}

template <typename T>
bool TakeNumber(std::string_view& text, char end, int base, T* number) {
  const auto word = Take(text, end);
  if (!word) return false;
  const auto [stop, error] = std::from_chars(word->begin(), word->end(), *number, base);
  return error == std::errc() && stop == word->end();
}

bool TakeWord(std::string_view& text, std::string_view word) {
  if (!text.starts_with(word)) return false;
  text.remove_prefix(word.size());
  return true;
}

}  // namespace

std::string PrintBackupList(const BackupList& list) {
  std::string text(kTitle);
  text += "made_ns " + std::to_string(list.made_unix_ns) + "\n";
  text += "files " + std::to_string(list.files.size()) + "\n";
  for (const BackupList::File& file : list.files) {
    text += "file " + Hex(file.crc) + " " + std::to_string(file.bytes) + " " + file.name + "\n";
  }
  return text + std::string(kCrc) + Hex(CrcOf(text)) + "\n";
}

std::optional<BackupList> ParseBackupList(std::string_view text) {
  const size_t crc_at = text.rfind(kCrc);
  if (crc_at == std::string_view::npos) return std::nullopt;
  std::string_view rest = text.substr(0, crc_at);
  if (text.substr(crc_at) != std::string(kCrc) + Hex(CrcOf(rest)) + "\n") return std::nullopt;
  BackupList list;
  size_t files = 0;
  if (!TakeWord(rest, kTitle) || !TakeWord(rest, "made_ns ") ||
      !TakeNumber(rest, '\n', 10, &list.made_unix_ns) || !TakeWord(rest, "files ") ||
      !TakeNumber(rest, '\n', 10, &files)) {
    return std::nullopt;
  }
  while (TakeWord(rest, "file ")) {
    BackupList::File file;
    if (!TakeNumber(rest, ' ', 16, &file.crc) || !TakeNumber(rest, ' ', 10, &file.bytes)) {
      return std::nullopt;
    }
    const auto name = Take(rest, '\n');
    if (!name || !IsName(*name)) return std::nullopt;
    file.name = *name;
    list.files.push_back(std::move(file));
  }
  if (!rest.empty() || list.files.size() != files) return std::nullopt;
  return list;
}

}  // namespace engram
