#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "src/core/result.h"

namespace engram {

// What was copied: the bytes that were written, and their CRC-32C.
struct CopiedFile {
  uint64_t bytes = 0;
  uint32_t crc = 0;
  uint64_t inode = 0;  // of the file that was copied
};

struct CopyRange {
  uint64_t kept_bytes = UINT64_MAX;  // what lies behind them is written as zeros
};

// Copies a file to one that must not exist, and flushes it. `between` is called every now and then
// and may end the copy. Errors: kNotFound, there is no `from`, and nothing was made; others of the
// files, named; those of `between`.
Result<CopiedFile> CopyFile(const std::string& from, const std::string& to, const CopyRange& range,
                            const std::function<Result<void>()>& between);
// The same without a copy.
Result<CopiedFile> ChecksumFile(const std::string& path);
// Names in the directory stay.
Result<void> SyncFolder(const std::string& path);
// Whole, flushed, and then under its name.
Result<void> WriteTextFile(const std::string& path, const std::string& text);

}  // namespace engram
