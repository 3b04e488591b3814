// Vaults that anything happened to: the input is a program that edits two sound segments of a
// vault. Each operation is a byte, then what it reads: bytes over a place, numbers in the header
// with the checksum made right again so that the fuzzer need not guess it, files cut off, longer or
// under another number.
//
// What is left is verified: it must come to an end, and hand out nothing but records that are sound
// at their addresses, in rising places, none twice. What was changed and is not what it was is
// told.

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "index/log/log_format.h"
#include "index/log/vault_verifier.h"
#include "src/core/check.h"
#include "src/core/log_files.h"
#include "src/core/log_record.h"
#include "tests/fuzz/fuzz_program.h"
#include "tests/index/log/log_builder.h"

namespace engram {
namespace {

constexpr size_t kOperationsMax = 32;

Bytes MakeSegment(uint32_t number, size_t count) {
  SplitMix64 random(number);
  Bytes bytes(kLogPageBytes);
  for (size_t i = 0; i < count; ++i) {
    const OwnedRecord owned = RandomRecord(random, i + 1, 300);
    const LogRecord record = owned.get();
    const size_t at = bytes.size();
    bytes.resize(at + LogRecordBytes(record));
    WriteLogRecord(record,
                   MakeLogAddress(kVaultLog, MakeLogPosition(number, static_cast<uint32_t>(at))),
                   &bytes[at]);
  }
  const auto record_bytes = static_cast<uint32_t>(bytes.size() - kLogPageBytes);
  bytes.resize((bytes.size() + kLogPageBytes - 1) / kLogPageBytes * kLogPageBytes);
  WriteSegmentHeader({.log = kVaultLog,
                      .number = number,
                      .segment_bytes = static_cast<uint32_t>(bytes.size()),
                      .recycled = false,
                      .instance = kTestInstance,
                      .vault = true,
                      .record_bytes = record_bytes,
                      .record_count = static_cast<uint32_t>(count)},
                     bytes.data());
  return bytes;
}

void Edit(FuzzProgram* program, LogFiles* files) {
  const uint32_t number = 1 + program->Byte() % 2;
  const auto at = files->find(SegmentName(number));
  if (at == files->end()) return;
  Bytes& bytes = at->second;
  switch (program->Byte() % 6) {
    case 0:
      for (uint32_t offset = program->Number(), i = program->Byte() % 16; i > 0; --i, ++offset) {
        if (!bytes.empty()) bytes[offset % bytes.size()] = std::byte{program->Byte()};
      }
      break;
    case 1:
      if (!bytes.empty()) {
        bytes[program->Number() % bytes.size()] ^= std::byte{1} << (program->Byte() % 8);
      }
      break;
    case 2:
      bytes.resize(program->Number() % (bytes.size() + 2 * kLogPageBytes));
      break;
    case 3: {
      SegmentHeader header;
      if (bytes.size() < kLogPageBytes || !ParseSegmentHeader(bytes, &header).empty()) break;
      header.record_bytes = program->Number();
      header.record_count = program->Number();
      header.segment_bytes = program->Number();
      WriteSegmentHeader(header, bytes.data());
      break;
    }
    case 4: {
      const uint32_t from = program->Number();
      const uint32_t to = program->Number();
      for (uint32_t i = 0; i < 512 && !bytes.empty(); ++i) {
        bytes[(to + i) % bytes.size()] = bytes[(from + i) % bytes.size()];
      }
      break;
    }
    default: {
      Bytes moved = std::move(bytes);
      files->erase(at);
      (*files)[SegmentName(1 + program->Byte())] = std::move(moved);
      break;
    }
  }
}

void Run(std::span<const uint8_t> input) {
  static const LogFiles kSound{{SegmentName(1), MakeSegment(1, 9)},
                               {SegmentName(2), MakeSegment(2, 40)}};
  LogFiles files = kSound;
  FuzzProgram program(input);
  for (size_t i = 0; i < kOperationsMax && !program.empty(); ++i) Edit(&program, &files);
  MemoryDisk disk(&files);
  LogAddress last = kNoLogAddress;
  uint64_t records = 0;
  const auto report = VerifyVault(
      disk, kTestInstance, [&](const LogRecord&, LogAddress address, uint32_t record_bytes) {
        CHECK(address > last && LogOf(address) == kVaultLog, "addresses rise");
        last = address + record_bytes / 8 - 1;
        ++records;
      });
  CHECK(disk.open_files() == 0 && disk.in_flight() == 0, "everything is closed again");
  if (!report) return;
  CHECK(report->records == records, "what is counted was handed out");
  if (files != kSound) {
    bool is_less = !report->sound();
    // A whole file may be gone, under another number or not.
    for (const auto& [name, bytes] : kSound) is_less |= !files.contains(name);
    // Numbers in the header that fit all the same.
    CHECK(is_less, "what was changed is told");
  }
}

}  // namespace
}  // namespace engram

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  engram::Run({data, size});
  return 0;
}
