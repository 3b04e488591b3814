#include "index/log/log_verifier.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <unordered_set>
#include <utility>

#include "src/core/check.h"
#include "src/core/clock.h"
#include "src/core/log_files.h"

namespace engram {

namespace {

constexpr uint32_t kSectorBytes = 512;
constexpr uint32_t kPieceBytes = 1u << 20;

class Verifier {
 public:
  Verifier(Disk& disk, uint16_t log, const LogInstance& instance, LogPosition replay_from,
           bool needs)
      : disk_(disk),
        log_(log),
        instance_(instance),
        replayed_(SegmentOf(replay_from)),
        needs_(needs && replay_from != 0) {}

  Result<LogReport> Run();

 private:
  Result<std::vector<LogReader::Range>> FindRuns();
  Result<bool> IsUsedAgain(uint32_t number);
  Result<void> ReadRun(const LogReader::Range& run);
  Result<LogPosition> ReadFrom(LogPosition from, const LogReader::Range& run);
  Result<void> CheckEnd(const LogReader& reader);
  Result<size_t> ReadAt(uint32_t number, uint64_t offset, std::span<std::byte> to);
  void Count(const LogEntry& entry);
  void TakeSegments(const LogReader& reader);
  Result<void> CheckRests();
  Result<void> CheckRest(const LogReader::Segment& segment, uint64_t file_bytes);
  void CheckPiece(uint32_t number, uint32_t offset, std::span<const std::byte> piece);
  void AddRest(uint32_t number, uint32_t offset, std::string text);

  Disk& disk_;
  const uint16_t log_;
  const LogInstance instance_;
  const uint32_t replayed_;  // segments from this one on are replayed
  const bool needs_;         // that one has to be there
  LogReport report_;
  std::unordered_set<uint64_t> sessions_;
  std::map<uint32_t, LogReader::Segment> segments_;
  uint32_t block_end_ = 0;  // of the block whose header was seen behind the end
};

Result<LogReport> Verifier::Run() {
  const auto runs = FindRuns();
  if (!runs) return std::unexpected(runs.error());
  for (const LogReader::Range& run : *runs) {
    if (const auto read = ReadRun(run); !read) return std::unexpected(read.error());
  }
  if (const auto checked = CheckRests(); !checked) return std::unexpected(checked.error());
  report_.sessions = sessions_.size();
  return std::move(report_);
}

// Segments that follow each other, but for gaps among those that are not replayed. What is missing
// of the others is damage.
Result<std::vector<LogReader::Range>> Verifier::FindRuns() {
  const auto entries = disk_.List();
  if (!entries) return std::unexpected(entries.error());
  std::vector<uint32_t> numbers;
  for (const DirectoryEntry& entry : *entries) {
    const auto number = SegmentNumber(entry.name);
    if (!number) continue;
    if (*number < replayed_) {
      const auto used = IsUsedAgain(*number);
      if (!used) return std::unexpected(used.error());
      if (*used) {
        report_.unfinished.push_back({.file = SegmentName(*number),
                                      .offset = 0,
                                      .bytes = entry.size_bytes,
                                      .text = "was about to be used again"});
        continue;
      }
    }
    numbers.push_back(*number);
  }
  std::ranges::sort(numbers);
  if (needs_ && !std::ranges::binary_search(numbers, replayed_)) {
    report_.damages.push_back({.file = SegmentName(replayed_),
                               .offset = 0,
                               .bytes = 0,
                               .text = "is missing, and is replayed at a start"});
  }
  std::vector<LogReader::Range> runs;
  for (const uint32_t number : numbers) {
    const bool follows = !runs.empty() && (number == runs.back().last + 1 || number > replayed_);
    if (follows) {
      runs.back().last = number;
    } else {
      runs.push_back({.first = number, .last = number});
    }
  }
  return runs;
}

// It has the header of a later one, whose name it was to get.
Result<bool> Verifier::IsUsedAgain(uint32_t number) {
  std::array<std::byte, kLogPageBytes> page;
  const auto read = ReadAt(number, 0, page);
  if (!read) return std::unexpected(read.error());
  SegmentHeader header;
  return *read == page.size() && ParseSegmentHeader(page, &header).empty() && header.log == log_ &&
         header.instance == instance_ && header.number > number;
}

Result<void> Verifier::ReadRun(const LogReader::Range& run) {
  for (LogPosition from = 0;;) {
    const auto resume = ReadFrom(from, run);
    if (!resume) return std::unexpected(resume.error());
    if (*resume <= from) return {};
    from = *resume;
  }
}

// Where a run ends that is followed by others, nothing was cut off: a block that is not sound was
// acknowledged. One of an earlier epoch is what a crash has left.
Result<void> Verifier::CheckEnd(const LogReader& reader) {
  const LogPosition end = reader.end();
  std::array<std::byte, kSectorBytes> sector;
  const auto read = ReadAt(SegmentOf(end), OffsetOf(end), sector);
  if (!read) return std::unexpected(read.error());
  BlockHeader header;
  const BlockFault fault = ParseBlockHeader(sector, log_, end, instance_, &header);
  if (*read < sector.size() || (fault != BlockFault::kNone && fault != BlockFault::kBadHeader)) {
    return {};
  }
  if (fault == BlockFault::kNone && header.epoch < reader.last_epoch()) return {};
  report_.damages.push_back({.file = SegmentName(SegmentOf(end)),
                             .offset = OffsetOf(end),
                             .bytes = fault == BlockFault::kNone ? header.block_bytes : 0,
                             .text = "the block here is not sound, and others followed it"});
  return {};
}

// Fewer bytes at the end of the file.
Result<size_t> Verifier::ReadAt(uint32_t number, uint64_t offset, std::span<std::byte> to) {
  const auto file = disk_.Open(SegmentName(number), OpenMode::kRead, Caching::kBuffered);
  if (!file) return std::unexpected(file.error());
  CHECK(disk_.Read(file->id, offset, to, 0), "nothing else is under way");
  DiskCompletion end;
  while (disk_.Poll({&end, 1}) == 0) disk_.Wait(kNanosPerSecond);
  disk_.Close(file->id);
  if (end.error != 0) {
    return FailErrno("read " + disk_.directory() + "/" + SegmentName(number), end.error);
  }
  return end.bytes;
}

// Returns where reading can go on behind damage; 0: it came to the end.
Result<LogPosition> Verifier::ReadFrom(LogPosition from, const LogReader::Range& run) {
  LogReader reader(&disk_, log_, instance_);
  const uint32_t epoch = from == 0 ? 0 : report_.last_epoch;
  if (const auto opened = reader.Open(from, epoch, run); !opened) {
    return std::unexpected(opened.error());
  }
  LogEntry entry;
  LogPosition resume = 0;
  for (;;) {
    const auto step = reader.Next(&entry);
    if (!step) {
      const auto& damage = reader.damage();
      if (!damage) return std::unexpected(step.error());
      report_.damages.push_back({.file = damage->file,
                                 .offset = damage->offset,
                                 .bytes = 0,
                                 .text = step.error().message});
      resume = damage->resume;
      break;
    }
    if (*step == LogStep::kEnd) break;
    if (*step == LogStep::kRecord) {
      Count(entry);
    } else {
      disk_.Wait(kNanosPerSecond);
    }
  }
  TakeSegments(reader);
  for (const MendedBit& bit : reader.mended()) {
    // A header is looked at by each reader.
    if (std::ranges::find(report_.mended, bit) == report_.mended.end()) {
      report_.mended.push_back(bit);
    }
  }
  report_.blocks += reader.blocks();
  report_.last_epoch = reader.last_epoch();
  report_.end = reader.end();
  if (resume == 0 && run.last + 1 < replayed_ && SegmentOf(report_.end) == run.last) {
    if (const auto checked = CheckEnd(reader); !checked) return std::unexpected(checked.error());
  }
  return resume;
}

void Verifier::Count(const LogEntry& entry) {
  const LogRecord& record = entry.record;
  if (report_.records == 0) report_.first_stamp = record.stamp;
  ++report_.records;
  report_.record_bytes += entry.record_bytes;
  ++report_.records_of_kind[static_cast<size_t>(record.kind)];
  const auto space = report_.records_of_space.find(std::string(record.space));
  if (space != report_.records_of_space.end()) {
    ++space->second;
  } else {
    report_.records_of_space.emplace(record.space, 1);
  }
  if (record.session.value() != 0) sessions_.insert(record.session.value());
  report_.first_stamp = std::min(report_.first_stamp, record.stamp);
  report_.last_stamp = std::max(report_.last_stamp, record.stamp);
}

void Verifier::TakeSegments(const LogReader& reader) {
  for (const LogReader::Segment& segment : reader.segments()) {
    auto [at, added] = segments_.try_emplace(segment.number, segment);
    at->second.live_bytes = std::max(at->second.live_bytes, segment.live_bytes);
    if (added && !segment.trouble.empty()) {
      report_.unfinished.push_back({.file = SegmentName(segment.number),
                                    .offset = 0,
                                    .bytes = segment.bytes,
                                    .text = segment.trouble});
    }
  }
  report_.segments = segments_.size();
}

Result<void> Verifier::CheckRests() {
  const auto entries = disk_.List();
  if (!entries) return std::unexpected(entries.error());
  for (const DirectoryEntry& entry : *entries) {
    const auto number = SegmentNumber(entry.name);
    if (!number) continue;
    const auto segment = segments_.find(*number);
    if (segment == segments_.end() || !segment->second.trouble.empty()) continue;
    if (const auto checked = CheckRest(segment->second, entry.size_bytes); !checked) {
      return checked;
    }
  }
  return {};
}

Result<void> Verifier::CheckRest(const LogReader::Segment& segment, uint64_t file_bytes) {
  if (file_bytes > segment.bytes) {
    report_.damages.push_back({.file = SegmentName(segment.number),
                               .offset = segment.bytes,
                               .bytes = file_bytes - segment.bytes,
                               .text = "the file is longer than its header says"});
  }
  if (segment.recycled) return {};
  const std::string name = SegmentName(segment.number);
  const auto file = disk_.Open(name, OpenMode::kRead, Caching::kBuffered);
  if (!file) return std::unexpected(file.error());
  const uint32_t piece_bytes = std::min(kPieceBytes, segment.bytes);
  const auto buffer = std::make_unique_for_overwrite<std::byte[]>(piece_bytes);
  block_end_ = 0;
  Result<void> result;
  for (uint32_t at = std::max(segment.live_bytes, kLogPageBytes); result && at < segment.bytes;) {
    const uint32_t bytes = std::min(piece_bytes, segment.bytes - at);
    CHECK(disk_.Read(file->id, at, {buffer.get(), bytes}, 0), "nothing else is under way");
    DiskCompletion end;
    while (disk_.Poll({&end, 1}) == 0) disk_.Wait(kNanosPerSecond);
    if (end.error != 0) {
      result = FailErrno("read " + disk_.directory() + "/" + name, end.error);
    }
    CheckPiece(segment.number, at, {buffer.get(), end.bytes});
    at += bytes;
  }
  disk_.Close(file->id);
  return result;
}

void Verifier::CheckPiece(uint32_t number, uint32_t offset, std::span<const std::byte> piece) {
  for (uint32_t at = 0; at + kSectorBytes <= piece.size(); at += kSectorBytes) {
    const auto sector = piece.subspan(at, kSectorBytes);
    int bits = 0;
    uint32_t first = kSectorBytes;
    for (uint32_t i = 0; i < kSectorBytes; i += sizeof(uint64_t)) {
      uint64_t eight = 0;
      std::memcpy(&eight, sector.data() + i, sizeof(eight));
      if (eight == 0) continue;
      if (bits == 0) first = i + static_cast<uint32_t>(std::countr_zero(eight)) / 8;
      bits += std::popcount(eight);
    }
    if (bits == 0) continue;
    const uint32_t place = offset + at;
    BlockHeader header;
    if (place % kLogPageBytes == 0 && ParseBlockHeader(sector, log_, MakeLogPosition(number, place),
                                                       instance_, &header) == BlockFault::kNone) {
      block_end_ = std::max(block_end_, place + header.block_bytes);
    }
    if (place < block_end_) {
      AddRest(number, place, "of a block that was cut off before it was acknowledged");
    } else if (bits > 1) {
      AddRest(number, place, "of a write that was cut off before it was acknowledged");
    } else {
      report_.damages.push_back({.file = SegmentName(number),
                                 .offset = place + first,
                                 .bytes = 1,
                                 .text = "a bit is set behind the last block, where zeros belong"});
    }
  }
}

// What lies close together is one rest.
void Verifier::AddRest(uint32_t number, uint32_t offset, std::string text) {
  const std::string file = SegmentName(number);
  if (!report_.rests.empty()) {
    LogFinding& last = report_.rests.back();
    if (last.file == file && offset - (last.offset + last.bytes) <= kLogPageBytes) {
      last.bytes = offset + kSectorBytes - last.offset;
      return;
    }
  }
  report_.rests.push_back(
      {.file = file, .offset = offset, .bytes = kSectorBytes, .text = std::move(text)});
}

}  // namespace

Result<LogReport> VerifyLog(Disk& disk, uint16_t log, const LogInstance& instance,
                            LogPosition replay_from, bool needs) {
  return Verifier(disk, log, instance, replay_from, needs).Run();
}

}  // namespace engram
