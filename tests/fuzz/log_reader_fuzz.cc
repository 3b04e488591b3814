// Logs that anything happened to: the input is a program that edits a sound log of two segments.
// Each operation is a byte, then what it reads: bytes over a place, sectors lost or moved, numbers
// at the edge of what is allowed in headers of segments, blocks and records, with the checksum made
// right again so that the fuzzer need not guess it, files cut off or gone.
//
// What is left is read and verified. Both must come to an end, agree with each other, and hand out
// nothing but sound records in rising places. What the program leaves over is parsed as a record
// and as a block, in memory of exactly that size.

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <vector>

#include "index/log/log_format.h"
#include "index/log/log_reader.h"
#include "index/log/log_verifier.h"
#include "src/core/check.h"
#include "src/core/crc32c.h"
#include "src/core/log_files.h"
#include "src/core/log_record.h"
#include "tests/fuzz/fuzz_program.h"
#include "tests/index/log/log_builder.h"

namespace engram {
namespace {

constexpr size_t kOperationsMax = 64;
constexpr std::array<uint64_t, 20> kEdges{0,
                                          1,
                                          7,
                                          8,
                                          56,
                                          64,
                                          65,
                                          255,
                                          4'032,
                                          4'096,
                                          8'192,
                                          65'536,
                                          1u << 22,
                                          (1u << 22) + 4'096,
                                          1u << 30,
                                          0x7FFF'FFFF,
                                          0x8000'0000,
                                          0xFFFF'FFFF,
                                          (uint64_t{1} << 32) | 4'096,
                                          UINT64_MAX};

// One at the edge of something, or a small one.
uint64_t EdgeNumber(FuzzProgram* program) {
  const uint8_t choice = program->Byte();
  return choice < kEdges.size() ? kEdges[choice] : uint64_t{choice} * 8;
}

const LogBuilder& SoundLog() {
  static const LogBuilder builder = [] {
    LogBuilder log;
    log.AddSegment(1);
    for (const size_t records : {3, 40, 0, 1, 30}) log.AddBlock(records);
    log.GoToNextSegment();
    log.set_epoch(2);
    for (const size_t records : {1, 35, 2, 0}) log.AddBlock(records);
    return log;
  }();
  return builder;
}

class Machine {
 public:
  explicit Machine(FuzzProgram* program) : program_(program), log_(SoundLog()) {}

  void Run() {
    for (size_t i = 0; i < kOperationsMax && !program_->empty(); ++i) {
      const uint8_t operation = program_->Byte();
      if (operation == 0) break;
      Edit(operation % 11);
    }
  }
  LogFiles& files() { return log_.files(); }

 private:
  // Of one of the files, which may be shorter than it was: nothing then.
  std::span<std::byte> Place(size_t bytes) {
    Bytes& file = log_.files()[SegmentName(1 + program_->Byte() % 2)];
    const size_t at = size_t{program_->Below(128)} * 512 + program_->Byte() % 64 * 8;
    return at + bytes <= file.size() ? std::span(file).subspan(at, bytes) : std::span<std::byte>();
  }
  std::span<std::byte> Block(LogPosition* position) {
    *position = log_.blocks()[program_->Byte() % log_.blocks().size()];
    Bytes& file = log_.files()[SegmentName(SegmentOf(*position))];
    if (OffsetOf(*position) + kLogPageBytes > file.size()) return {};
    return std::span(file).subspan(OffsetOf(*position));
  }
  void SetNumber(std::span<std::byte> bytes, size_t at) {
    const uint64_t number = EdgeNumber(program_);
    std::memcpy(bytes.data() + at, &number, size_t{1} << program_->Byte() % 4);
  }

  void Edit(int operation) {
    LogPosition position = 0;
    switch (operation) {
      case 0:
      case 1: {  // a number anywhere
        const auto place = Place(8);
        if (!place.empty()) SetNumber(place, 0);
        return;
      }
      case 2: {  // a bit
        const auto place = Place(8);
        if (place.empty()) return;
        const uint8_t bit = program_->Byte() % 64;
        place[bit / 8] ^= std::byte{1} << (bit % 8);
        return;
      }
      case 3: {  // a lost sector
        const auto place = Place(512);
        std::ranges::fill(place, std::byte{0});
        return;
      }
      case 4: {  // a page of another place
        const auto from = Place(kLogPageBytes);
        const auto to = Place(kLogPageBytes);
        if (!from.empty() && !to.empty()) std::memmove(to.data(), from.data(), kLogPageBytes);
        return;
      }
      case 5:
      case 6: {  // a block's header
        const auto block = Block(&position);
        if (block.empty()) return;
        SetNumber(block, 8 + program_->Byte() % 48);
        SealBlock(block);
        return;
      }
      case 7: {  // the header of a block's first record
        const auto block = Block(&position);
        if (block.empty()) return;
        SetNumber(block, kBlockHeaderBytes + program_->Byte() % 64);
        SealRecord(block.subspan(kBlockHeaderBytes),
                   MakeLogAddress(0, position + kBlockHeaderBytes));
        return;
      }
      case 8: {  // a segment's header
        Bytes& file = log_.files()[SegmentName(1 + program_->Byte() % 2)];
        if (file.size() < kLogPageBytes) return;
        SetNumber(file, 12 + program_->Byte() % 30);
        const uint32_t crc = Crc32c(std::span(file).subspan(12, kLogPageBytes - 12),
                                    Crc32c(std::span(file).first(8)));
        std::memcpy(file.data() + 8, &crc, sizeof(crc));
        return;
      }
      case 9: {  // a file cut off
        Bytes& file = log_.files()[SegmentName(1 + program_->Byte() % 2)];
        file.resize(std::min(file.size(), size_t{program_->Below(129)} * 512));
        return;
      }
      default:  // a file under another name
        if (auto file = log_.files().extract(SegmentName(1 + program_->Byte() % 2))) {
          file.key() = SegmentName(program_->Byte());
          log_.files().insert(std::move(file));
        }
    }
  }

  static void SealBlock(std::span<std::byte> block) {
    const auto header = block.first(kBlockHeaderBytes);
    const uint32_t crc = Crc32c(header.subspan(8), Crc32c(header.first(4)));
    std::memcpy(block.data() + 4, &crc, sizeof(crc));
  }
  static void SealRecord(std::span<std::byte> record, LogAddress address) {
    uint32_t length = 0;
    std::memcpy(&length, record.data(), sizeof(length));
    if (length < kLogRecordHeaderBytes || length > record.size()) return;
    std::array<std::byte, 12> prefix;
    std::memcpy(prefix.data(), &address, 8);
    std::memcpy(prefix.data() + 8, &length, 4);
    const uint32_t crc = Crc32c(record.subspan(8, length - 8), Crc32c(prefix));
    std::memcpy(record.data() + 4, &crc, sizeof(crc));
  }

  FuzzProgram* program_;
  LogBuilder log_;
};

void ReadAll(const LogFiles& files) {
  const ReadResult read = ReadLog(files);
  CHECK(std::ranges::is_sorted(read.addresses), "records lie in rising places");
  MemoryDisk disk(&files);
  const auto report = VerifyLog(disk, 0, kTestInstance);
  if (!report) {
    CHECK(!read.error.empty(), "what cannot be verified cannot be read");
    return;
  }
  CHECK(report->records >= read.records.size(), "the verifier reads at least as much");
  if (!read.error.empty()) {
    CHECK(!report->damages.empty(), "what stops the reader is damage");
    return;
  }
  CHECK(report->records == read.records.size() && report->end == read.end, "both read the same");
  CHECK(report->mended == read.mended, "both mend the same");
  if (read.end == 0) return;
  const ReadResult behind = ReadLog(files, read.end, read.last_epoch);
  CHECK(behind.error.empty() && behind.records.empty() && behind.end == read.end,
        "nothing lies behind the end");
}

void ParseAlone(std::span<const std::byte> input) {
  // In memory of exactly its size, so that ASan sees each byte beyond.
  const auto memory = std::make_unique<std::byte[]>(input.size());
  if (!input.empty()) std::memcpy(memory.get(), input.data(), input.size());
  const std::span<std::byte> bytes(memory.get(), input.size());
  LogRecord record;
  size_t length = 0;
  if (ParseLogRecord(bytes, 1, &record, &length) == LogRecordFault::kNone) {
    CHECK(length <= bytes.size() && LogRecordBytes(record) == length, "a record is its parts");
  }
  (void)FindFlippedBit(bytes, 1);
  BlockHeader header;
  (void)CheckBlock(bytes, 0, MakeLogPosition(1, kLogPageBytes), kTestInstance, &header);
  (void)FindFlippedBitOfBlock(bytes, 0, MakeLogPosition(1, kLogPageBytes), kTestInstance);
}

// A block or a record of the sound log, cut or not, with an edit: what parsers are mostly given.
void ParsePart(FuzzProgram* program) {
  LogBuilder log = SoundLog();
  const LogPosition position = log.blocks()[program->Byte() % log.blocks().size()];
  const auto file = std::span<std::byte>(log.file(SegmentOf(position)));
  std::span<std::byte> block = file.subspan(OffsetOf(position));
  block = block.first(std::min<size_t>(block.size(), 1 + program->Below(3 * kLogPageBytes)));
  if (block.size() > 8) {
    const uint64_t number = EdgeNumber(program);
    std::memcpy(block.data() + program->Below(static_cast<uint32_t>(block.size() - 8)), &number, 4);
  }
  const auto memory = std::make_unique<std::byte[]>(block.size());
  std::memcpy(memory.get(), block.data(), block.size());
  const std::span<std::byte> exact(memory.get(), block.size());
  BlockHeader header;
  const BlockCheck check = CheckBlock(exact, 0, position, kTestInstance, &header);
  const auto bit = FindFlippedBitOfBlock(exact, 0, position, kTestInstance);
  CHECK(!bit || check.fault != BlockFault::kNone, "a sound block has nothing to mend");
  if (!bit) return;
  exact[*bit / 8] ^= std::byte{1} << (*bit % 8);
  CHECK(CheckBlock(exact, 0, position, kTestInstance, &header).fault == BlockFault::kNone,
        "a mended block is sound");
}

void Run(std::span<const uint8_t> input) {
  FuzzProgram program(input);
  const uint8_t choice = program.Byte();
  if (choice % 8 == 0) {
    ParsePart(&program);
  } else {
    Machine machine(&program);
    machine.Run();
    ReadAll(machine.files());
  }
  ParseAlone(program.rest());
}

}  // namespace
}  // namespace engram

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  engram::Run(std::span(data, size));
  return 0;
}
