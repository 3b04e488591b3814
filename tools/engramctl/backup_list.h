#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "src/core/result.h"

namespace engram {

// The file of a backup that lists all others. It is written last, so a backup without it was cut
// off. Its grammar, in lines of text:
//
//   engram backup
//   version 1
//   made_ns DECIMAL                        since 1970: when copying began
//   files DECIMAL
//   file CRC32C BYTES NAME                 each; 8 hexadecimal digits, a decimal number, a name
//                                          below the folder `data` of the backup
//   crc32c 8 HEXADECIMAL DIGITS            of all bytes before this line
//
// A name has one or two parts of [A-Za-z0-9._-] with a slash between them, none of them "." or
// "..", so that no list can name a file elsewhere.
struct BackupList {
  struct File {
    uint32_t crc = 0;  // CRC-32C of all its bytes
    uint64_t bytes = 0;
    std::string name;
    friend bool operator==(const File&, const File&) = default;
  };
  int64_t made_unix_ns = 0;
  std::vector<File> files;
  friend bool operator==(const BackupList&, const BackupList&) = default;
};

inline constexpr const char* kBackupListName = "BACKUP";
inline constexpr const char* kBackupDataFolder = "data";

std::string PrintBackupList(const BackupList& list);
// Nothing where the text is not whole.
std::optional<BackupList> ParseBackupList(std::string_view text);

}  // namespace engram
