#include "index/log/log_reader.h"

#include <algorithm>
#include <utility>

#include "src/core/check.h"
#include "src/core/clock.h"
#include "src/core/log_files.h"

namespace engram {

namespace {

constexpr const char* kRemedy = "restore a backup of the data directory";
// A turn of Next goes through this much without a record.
constexpr int kStepsPerCall = 64;

bool IsZero(std::span<const std::byte> bytes) {
  return std::ranges::all_of(bytes, [](std::byte b) { return b == std::byte{0}; });
}

void FlipBit(std::span<std::byte> bytes, uint64_t bit) {
  bytes[bit / 8] ^= std::byte{1} << (bit % 8);
}

// The first page of a segment's file. False: the file is shorter.
Result<bool> ReadHead(Disk& disk, uint32_t number, std::span<std::byte> page) {
  const std::string name = SegmentName(number);
  const auto file = disk.Open(name, OpenMode::kRead, Caching::kBuffered);
  if (!file) return std::unexpected(file.error());
  CHECK(disk.Read(file->id, 0, page, 0), "nothing is under way");
  DiskCompletion end;
  while (disk.Poll({&end, 1}) == 0) disk.Wait(kNanosPerSecond);
  disk.Close(file->id);
  if (end.error != 0) return FailErrno("read " + disk.directory() + "/" + name, end.error);
  return end.bytes == page.size();
}

}  // namespace

LogReader::LogReader(Disk* disk, uint16_t log, const LogInstance& instance)
    : disk_(disk),
      log_(log),
      instance_(instance),
      windows_{SegmentWindow(disk, 0), SegmentWindow(disk, SegmentWindow::kTags)} {}

// The disk goes on writing to the memory of what is under way.
LogReader::~LogReader() {
  for (SegmentWindow& window : windows_) window.Stop();
  while (disk_->in_flight() > 0 && !(windows_[0].idle() && windows_[1].idle())) {
    disk_->Wait(kNanosPerSecond);
    Drive();
  }
  for (Opened& opened : opened_) {
    if (opened.file) disk_->Close(*opened.file);
  }
}

std::string LogReader::FileOf(uint32_t number) const {
  return disk_->directory() + "/" + SegmentName(number);
}

// ---------------------------------------------------------------------------------------------
// Opening

Result<void> LogReader::Open(LogPosition from, uint32_t epoch, const Range& range) {
  CHECK(phase_ == Phase::kClosed && disk_->in_flight() == 0, "a reader is opened once, alone");
  last_epoch_ = highest_epoch_ = epoch;
  if (auto listed = ListSegments(from, range); !listed) return listed;
  if (auto begun = BeginAt(from); !begun) return begun;
  uint32_t most_bytes = kLogPageBytes;
  for (const Segment& segment : segments_) most_bytes = std::max(most_bytes, segment.bytes);
  for (SegmentWindow& window : windows_) window.Allocate(most_bytes);
  return {};
}

Result<void> LogReader::ListSegments(LogPosition from, const Range& range) {
  const auto entries = disk_->List();
  if (!entries) return std::unexpected(entries.error());
  for (const DirectoryEntry& entry : *entries) {
    const auto number = SegmentNumber(entry.name);
    if (!number || *number < SegmentOf(from)) continue;
    if (*number < range.first || *number > range.last) continue;
    if (auto added = AddSegment(*number, entry.size_bytes); !added) return added;
  }
  std::ranges::sort(segments_, {}, &Segment::number);
  // One that was needed no longer gets its next number before it gets its next name.
  if (from == 0) {
    const auto first = std::ranges::find(segments_, false, &Segment::renumbered);
    segments_.erase(segments_.begin(), first);
  }
  return {};
}

Result<void> LogReader::AddSegment(uint32_t number, uint64_t file_bytes) {
  Segment segment;
  segment.number = number;
  segment.bytes = static_cast<uint32_t>(std::min<uint64_t>(file_bytes, kMaxSegmentBytes) /
                                        kLogPageBytes * kLogPageBytes);
  if (segment.bytes == 0) {
    segment.trouble = "is shorter than a segment's header";
  } else {
    std::array<std::byte, kLogPageBytes> page;
    const auto read = ReadHead(*disk_, number, page);
    if (!read) return std::unexpected(read.error());
    if (!*read) segment.trouble = "is shorter than a segment's header";
    if (auto parsed = ParseHead(page, &segment); !parsed) return parsed;
  }
  segments_.push_back(std::move(segment));
  return {};
}

// 1. A single turned bit is mended.
// 2. What still does not match its CRC was never finished, or is damaged: what lies behind tells.
// 3. One that matches and is not of this log, or not known here, was put there by someone.
Result<void> LogReader::ParseHead(std::span<std::byte> page, Segment* segment) {
  if (!segment->trouble.empty()) return {};
  SegmentHeader header;
  std::string why = ParseSegmentHeader(page, &header);
  if (const auto bit = FindFlippedBitOfSegmentHeader(page)) {
    FlipBit(page, *bit);
    mended_.push_back({SegmentName(segment->number), *bit});
    why = ParseSegmentHeader(page, &header);
  }
  const std::string file = FileOf(segment->number);
  if (!why.empty()) {
    const auto version = SegmentHeaderVersion(page);
    if (!version) {
      segment->trouble = why;
      return {};
    }
    if (*version != kLogFormatVersion) {
      return Fail(ErrorCode::kUnavailable, file + " " + why + ": start the program that wrote it");
    }
    return Fail(ErrorCode::kCorrupt, file + " " + why + ", at offset 0: " + kRemedy);
  }
  if (header.instance != instance_) {
    return Fail(ErrorCode::kCorrupt, file +
                                         " belongs to another data directory, as its header at "
                                         "offset 0 says: move it away, or " +
                                         kRemedy);
  }
  if (header.log != log_) {
    return Fail(ErrorCode::kCorrupt, file + " belongs to log " + std::to_string(header.log) +
                                         ", not " + std::to_string(log_) +
                                         ", as its header at offset 0 says: move it back, or " +
                                         kRemedy);
  }
  segment->recycled = header.recycled;
  if (header.number != segment->number) {
    segment->renumbered = true;
    segment->trouble = "has the header of segment " + std::to_string(header.number);
  } else if (segment->bytes < header.segment_bytes) {
    segment->trouble =
        "has less than the " + std::to_string(header.segment_bytes) + " bytes that its header says";
  } else {
    segment->bytes = header.segment_bytes;
  }
  return {};
}

Result<void> LogReader::BeginAt(LogPosition from) {
  for (const Segment& segment : segments_) total_bytes_ += segment.bytes;
  if (from == 0) {
    if (segments_.empty()) {
      phase_ = Phase::kEnd;
    } else if (!segments_[0].trouble.empty()) {
      phase_ = Phase::kSearch;
      search_offset_ = kLogPageBytes;
      missing_ = segments_[0].number;
    } else {
      phase_ = Phase::kWalk;
      position_ = MakeLogPosition(segments_[0].number, kLogPageBytes);
    }
    return {};
  }
  const std::string file = FileOf(SegmentOf(from));
  const std::string why = "reading begins at its offset " + std::to_string(OffsetOf(from));
  if (segments_.empty() || segments_[0].number != SegmentOf(from)) {
    return Fail(ErrorCode::kCorrupt, file + " is missing, and " + why + ": " + kRemedy);
  }
  if (!segments_[0].trouble.empty()) {
    return Fail(ErrorCode::kCorrupt,
                file + " " + segments_[0].trouble + ", and " + why + ": " + kRemedy);
  }
  const uint32_t offset = OffsetOf(from);
  if (offset % kLogPageBytes != 0 || offset < kLogPageBytes || offset > segments_[0].bytes) {
    return Fail(ErrorCode::kCorrupt, file + " has no block at offset " + std::to_string(offset) +
                                         ", where reading is to begin: " + kRemedy);
  }
  phase_ = Phase::kWalk;
  position_ = from;
  return {};
}

// ---------------------------------------------------------------------------------------------
// Reading

Result<LogStep> LogReader::Next(LogEntry* entry) {
  CHECK(phase_ != Phase::kClosed, "open it first");
  if (error_) return std::unexpected(*error_);
  for (int step = 0; records_left_ == 0; ++step) {
    if (phase_ == Phase::kEnd) return LogStep::kEnd;
    if (step == kStepsPerCall) return LogStep::kPending;
    ReadAhead();
    const Result<bool> went_on = Step();
    if (!went_on) {
      error_ = went_on.error();
      return std::unexpected(*error_);
    }
    if (!*went_on) return LogStep::kPending;
  }
  TakeRecord(entry);
  return LogStep::kRecord;
}

Result<bool> LogReader::Step() {
  switch (phase_) {
    case Phase::kWalk:
      return Walk();
    case Phase::kNextSegment:
      return TryNextSegment();
    case Phase::kMend:
      return Mend();
    case Phase::kMendNextSegment:
      return MendNextSegment();
    case Phase::kSearch:
      return Search();
    case Phase::kClosed:
    case Phase::kEnd:
      break;
  }
  return true;
}

Result<bool> LogReader::Walk() {
  Candidate candidate;
  const auto examined = Examine(segment_, OffsetOf(position_), &candidate);
  if (!examined || !*examined) return examined;
  if (candidate.live) {
    Accept(candidate);
  } else {
    fault_ = candidate;
    phase_ = Phase::kNextSegment;
  }
  return true;
}

Result<bool> LogReader::TryNextSegment() {
  if (HasNextSegment()) {
    Candidate candidate;
    const auto examined = Examine(segment_ + 1, kLogPageBytes, &candidate);
    if (!examined || !*examined) return examined;
    if (candidate.live) {
      Accept(candidate);
      return true;
    }
    // Of the two places where the next block may be, the one that looks more like it is named.
    const bool has_header = candidate.check.fault == BlockFault::kBadRecord ||
                            candidate.check.fault == BlockFault::kBadPadding;
    if (OffsetOf(position_) >= segments_[segment_].bytes ||
        (has_header && candidate.header.previous == position_) ||
        (fault_.zero && !has_header && !candidate.zero)) {
      fault_ = candidate;
    }
  }
  phase_ = Phase::kMend;
  return true;
}

Result<bool> LogReader::Mend() {
  Candidate candidate;
  const auto tried = MendAt(segment_, OffsetOf(position_), &candidate);
  if (!tried || !*tried) return tried;
  if (candidate.live) {
    Accept(candidate);
  } else {
    phase_ = Phase::kMendNextSegment;
  }
  return true;
}

Result<bool> LogReader::MendNextSegment() {
  if (HasNextSegment()) {
    Candidate candidate;
    const auto tried = MendAt(segment_ + 1, kLogPageBytes, &candidate);
    if (!tried || !*tried) return tried;
    if (candidate.live) {
      Accept(candidate);
      return true;
    }
  }
  search_segment_ = segment_;
  search_offset_ = OffsetOf(position_);
  phase_ = Phase::kSearch;
  return true;
}

// Some pages of what lies behind the place where the log seems to end.
Result<bool> LogReader::Search() {
  for (uint32_t page = 0; page < kPagesPerStep; ++page) {
    const Segment& segment = segments_[search_segment_];
    if (search_offset_ >= segment.bytes) {
      if (search_segment_ + 1 == segments_.size()) {
        phase_ = Phase::kEnd;
        return true;
      }
      const Segment& next = segments_[++search_segment_];
      search_offset_ = kLogPageBytes;
      if (!missing_ && next.number != segment.number + 1) missing_ = segment.number + 1;
      if (!missing_ && !next.trouble.empty()) missing_ = next.number;
      continue;
    }
    std::span<std::byte> bytes;
    const auto looked = Look(search_segment_, search_offset_, kLogPageBytes, &bytes);
    if (!looked || !*looked) return looked;
    if (auto searched = SearchPage(bytes); !searched) return searched;
    search_offset_ += kLogPageBytes;
  }
  return false;
}

// A block's header is enough: what it says of others was true when it was written.
Result<bool> LogReader::SearchPage(std::span<const std::byte> page) {
  const Segment& segment = segments_[search_segment_];
  const LogPosition position = MakeLogPosition(segment.number, search_offset_);
  BlockHeader header;
  if (ParseBlockHeader(page, log_, position, instance_, &header) != BlockFault::kNone) return true;
  highest_epoch_ = std::max(highest_epoch_, header.epoch);
  if (header.epoch < last_epoch_) return true;
  if (first_found_ == 0 && position > position_ && segment.trouble.empty()) {
    first_found_ = position;
  }
  if (!missing_ && header.durable <= position_) return true;
  return Damaged(position);
}

std::unexpected<Error> LogReader::Damaged(LogPosition found) {
  damage_.emplace();
  damage_->resume = first_found_;
  for (size_t i = search_segment_ + 1; damage_->resume == 0 && i < segments_.size(); ++i) {
    if (!segments_[i].trouble.empty()) continue;
    damage_->resume = MakeLogPosition(segments_[i].number, kLogPageBytes);
  }
  const std::string later =
      FileOf(SegmentOf(found)) + ", offset " + std::to_string(OffsetOf(found));
  std::string what;
  if (missing_) {
    damage_->file = SegmentName(*missing_);
    const auto segment = std::ranges::find(segments_, *missing_, &Segment::number);
    what = FileOf(*missing_) + ", offset 0: the segment " +
           (segment != segments_.end() ? segment->trouble : "is missing") +
           ", and what was written to it or behind it lies in " + later;
  } else {
    const uint32_t number = segments_[fault_.segment].number;
    damage_->file = SegmentName(number);
    damage_->offset = fault_.offset + fault_.check.offset;
    what = FileOf(number) + ", offset " + std::to_string(damage_->offset) +
           ": acknowledged records are damaged: the block at offset " +
           std::to_string(fault_.offset) + " " + std::string(BlockFaultText(fault_.check.fault));
    if (fault_.check.fault == BlockFault::kBadRecord) {
      what += " (it " + std::string(LogRecordFaultText(fault_.check.record_fault)) + ")";
    }
    what += ", and the one in " + later + " says that it was durable";
  }
  return Fail(ErrorCode::kCorrupt, what + ": " + kRemedy);
}

// ---------------------------------------------------------------------------------------------
// Blocks

bool LogReader::HasNextSegment() const {
  return segment_ + 1 < segments_.size() &&
         segments_[segment_ + 1].number == segments_[segment_].number + 1 &&
         segments_[segment_ + 1].trouble.empty();
}

Result<bool> LogReader::Examine(size_t segment, uint32_t offset, Candidate* candidate) {
  candidate->segment = segment;
  candidate->offset = offset;
  candidate->check = {.fault = BlockFault::kTooShort};
  if (offset >= segments_[segment].bytes) return true;
  const LogPosition position = MakeLogPosition(segments_[segment].number, offset);
  std::span<std::byte> page;
  auto looked = Look(segment, offset, kLogPageBytes, &page);
  if (!looked || !*looked) return looked;
  BlockHeader& header = candidate->header;
  candidate->check.fault = ParseBlockHeader(page, log_, position, instance_, &header);
  if (candidate->check.fault != BlockFault::kNone) {
    candidate->zero = candidate->check.fault == BlockFault::kNoBlock && IsZero(page);
    return true;
  }
  looked = Look(segment, offset, header.block_bytes, &candidate->bytes);
  if (!looked || !*looked) return looked;
  candidate->check = CheckBlock(candidate->bytes, log_, position, instance_, &header);
  candidate->live = candidate->check.fault == BlockFault::kNone && IsLive(*candidate);
  return true;
}

// A sound block in its place. The first block of the segment in which reading begins may follow on
// anything: what was before is not known.
bool LogReader::IsLive(const Candidate& candidate) const {
  const BlockHeader& header = candidate.header;
  if (header.epoch < last_epoch_ || header.previous > header.position) return false;
  const bool first =
      blocks_ == 0 && candidate.segment == segment_ && candidate.offset == kLogPageBytes;
  return first || header.previous == position_;
}

Result<bool> LogReader::MendAt(size_t segment, uint32_t offset, Candidate* candidate) {
  if (offset >= segments_[segment].bytes) return true;
  candidate->segment = segment;
  candidate->offset = offset;
  std::span<std::byte> bytes;
  const auto looked = Look(segment, offset, kMaxBlockBytes, &bytes);
  if (!looked || !*looked) return looked;
  const LogPosition position = MakeLogPosition(segments_[segment].number, offset);
  const auto bit = FindFlippedBitOfBlock(bytes, log_, position, instance_);
  if (!bit) return true;
  FlipBit(bytes, *bit);
  candidate->check = CheckBlock(bytes, log_, position, instance_, &candidate->header);
  candidate->bytes = bytes.first(candidate->header.block_bytes);
  candidate->live = IsLive(*candidate);
  if (candidate->live) {
    mended_.push_back({SegmentName(segments_[segment].number), uint64_t{offset} * 8 + *bit});
  } else {
    FlipBit(bytes, *bit);
  }
  return true;
}

void LogReader::Accept(const Candidate& candidate) {
  const BlockHeader& header = candidate.header;
  segment_ = candidate.segment;
  position_ = header.position + header.block_bytes;
  segments_[segment_].live_bytes = OffsetOf(position_);
  last_epoch_ = header.epoch;
  highest_epoch_ = std::max(highest_epoch_, header.epoch);
  durable_ = std::max(durable_, header.durable);
  ++blocks_;
  block_ = candidate.bytes;
  block_header_ = header;
  record_at_ = kBlockHeaderBytes;
  records_left_ = header.record_count;
  phase_ = Phase::kWalk;
}

void LogReader::TakeRecord(LogEntry* entry) {
  entry->address = MakeLogAddress(log_, block_header_.position + record_at_);
  entry->record_bytes =
      static_cast<uint32_t>(ReadLogRecord(block_.subspan(record_at_), &entry->record));
  entry->block_begin = block_header_.position;
  entry->block_end = position_;
  entry->epoch = block_header_.epoch;
  record_at_ += entry->record_bytes;
  --records_left_;
}

// ---------------------------------------------------------------------------------------------
// Bytes

Result<bool> LogReader::OpenWindow(size_t segment, uint32_t offset) {
  Opened& opened = opened_[segment % 2];
  SegmentWindow& window = windows_[segment % 2];
  if (opened.segment == segment) return true;
  window.Stop();
  if (!window.idle()) return false;
  if (opened.file) disk_->Close(*opened.file);
  opened = {};
  const std::string name = SegmentName(segments_[segment].number);
  const auto file = disk_->Open(name, OpenMode::kRead, Caching::kBuffered);
  if (!file) return std::unexpected(file.error());
  opened.file = file->id;
  opened.segment = segment;
  window.Begin(file->id, offset, segments_[segment].bytes);
  return true;
}

Result<bool> LogReader::Look(size_t segment, uint32_t offset, uint32_t bytes,
                             std::span<std::byte>* found) {
  SegmentWindow& window = windows_[segment % 2];
  for (const bool last_try : {false, true}) {
    const auto open = OpenWindow(segment, offset);
    if (!open) return open;
    if (*open) {
      if (const auto there = window.At(offset, bytes)) {
        *found = *there;
        return true;
      }
      const std::string where =
          FileOf(segments_[segment].number) + ", offset " + std::to_string(window.error_offset());
      if (window.error() == SegmentWindow::kCutOff) {
        return Fail(ErrorCode::kCorrupt, where + ": the file ends here: " + kRemedy);
      }
      if (window.error() != 0) return FailErrno("read " + where, window.error());
    }
    if (!last_try) Drive();
  }
  return false;
}

void LogReader::Drive() {
  for (SegmentWindow& window : windows_) window.Pump();
  std::array<DiskCompletion, 8> ends;
  const size_t count = disk_->in_flight() > 0 ? disk_->Poll(ends) : 0;
  for (const DiskCompletion& end : std::span(ends).first(count)) {
    windows_[end.tag / SegmentWindow::kTags].TakeEnd(end);
  }
}

// Keeps the disk busy: the rest of this segment, then the next one. An error shows when what it is
// about is needed.
void LogReader::ReadAhead() {
  const size_t segment = phase_ == Phase::kSearch ? search_segment_ : segment_;
  const SegmentWindow& window = windows_[segment % 2];
  if (opened_[segment % 2].segment == segment && window.asked_for_all() &&
      segment + 1 < segments_.size()) {
    (void)OpenWindow(segment + 1, kLogPageBytes);
  }
  if (disk_->in_flight() > 0 || windows_[0].wants_reads() || windows_[1].wants_reads()) Drive();
}

uint64_t LogReader::bytes_read() const {
  if (phase_ == Phase::kEnd) return total_bytes_;
  const bool searching = phase_ == Phase::kSearch;
  const size_t last = searching ? search_segment_ : segment_;
  uint64_t bytes = searching ? search_offset_ : OffsetOf(position_);
  for (size_t i = 0; i < last; ++i) bytes += segments_[i].bytes;
  return bytes;
}

Result<std::optional<SegmentHeader>> FindSegmentHeader(Disk& disk) {
  const auto entries = disk.List();
  if (!entries) return std::unexpected(entries.error());
  for (const DirectoryEntry& entry : *entries) {
    const auto number = SegmentNumber(entry.name);
    if (!number) continue;
    std::array<std::byte, kLogPageBytes> page;
    const auto read = ReadHead(disk, *number, page);
    if (!read) return std::unexpected(read.error());
    if (!*read) continue;
    if (const auto bit = FindFlippedBitOfSegmentHeader(page)) FlipBit(page, *bit);
    SegmentHeader header;
    if (ParseSegmentHeader(page, &header).empty()) return header;
  }
  return std::nullopt;
}

}  // namespace engram
