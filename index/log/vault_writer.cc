#include "index/log/vault_writer.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "src/core/check.h"
#include "src/core/log_files.h"
#include "src/core/log_record.h"

namespace engram {

namespace {

constexpr size_t kOutBytes =
    (size_t{1} << 20) + (kMaxLogRecordBytes / kLogPageBytes + 2) * size_t{kLogPageBytes};

uint32_t OffsetAt(LogAddress address) { return OffsetOf(PositionOf(address)); }

}  // namespace

VaultWriter::VaultWriter(const VaultWriterOptions& options, Disk* vault, OpenLogFn open_log,
                         Clock* clock)
    : options_(options), vault_(vault), open_log_(std::move(open_log)), clock_(clock) {
  CHECK(options.segment_bytes >= 2 * kLogPageBytes + kMaxLogRecordBytes,
        "a segment of the vault holds any record");
  static_assert(kStretchBytes >= kMaxLogRecordBytes);
}

// The disks go on with the memory of what is under way.
VaultWriter::~VaultWriter() {
  DiskCompletion end;
  while (vault_->in_flight() > 0 && vault_->Poll({&end, 1}) == 0) vault_->Wait(kNanosPerSecond);
  CloseSource();
  if (file_) vault_->Close(*file_);
}

std::string VaultWriter::NewName() const {
  return SegmentName(number_) + std::string(kTemporarySuffix);
}

void VaultWriter::Begin(std::vector<VaultMove> moves, uint32_t number) {
  CHECK(!active(), "one after the other");
  moves_ = std::move(moves);
  written_.clear();
  unsound_.clear();
  number_ = number;
  next_ = 0;
  // Needed now and then only.
  memory_ = std::make_unique_for_overwrite<std::byte[]>(kStretchBytes + kOutBytes + kLogPageBytes);
  const auto address = std::bit_cast<uintptr_t>(memory_.get());
  out_ = memory_.get() + (kLogPageBytes - address % kLogPageBytes);
  in_ = out_ + kOutBytes;
  step_ = Step::kGather;
}

int VaultWriter::Poll(const NoteFn& note) {
  switch (step_) {
    case Step::kIdle:
      return 0;
    case Step::kGather:
      if (clock_->MonotonicNs() < not_before_ns_) return 0;
      Gather(note);
      break;
    case Step::kReading:
    case Step::kWriting:
    case Step::kHeader:
    case Step::kFlushing:
      TakeCompletion(note);
      break;
  }
  return 1;
}

// ---------------------------------------------------------------------------------------------
// 1.

// The stretch of a file that begins with the next record, as long as there are others in it.
void VaultWriter::Gather(const NoteFn& note) {
  if (ends_file_ || (next_ == moves_.size() && file_)) {
    EndFile();
    return;
  }
  if (next_ == moves_.size()) {
    CloseSource();
    memory_.reset();
    step_ = Step::kIdle;
    return;
  }
  const VaultMove& first = moves_[next_];
  const LogSegment segment = SegmentAt(first.from);
  if (source_segment_ != segment && !OpenSource(segment, note)) return;
  stretch_at_ = OffsetAt(first.from);
  size_t bytes = 0;
  for (size_t i = next_; i < moves_.size() && SegmentAt(moves_[i].from) == segment; ++i) {
    const size_t end = OffsetAt(moves_[i].from) + moves_[i].record_bytes - stretch_at_;
    if (end > kStretchBytes) break;
    bytes = end;
  }
  CHECK(bytes > 0 && source_->Read(*source_file_, stretch_at_, {in_, bytes}, 0),
        "nothing else is under way");
  step_ = Step::kReading;
}

bool VaultWriter::OpenSource(LogSegment segment, const NoteFn& note) {
  CloseSource();
  auto disk = open_log_(segment.log);
  if (!disk) {
    GiveUp(disk.error().message, note);
    return false;
  }
  source_ = *std::move(disk);
  source_segment_ = segment;
  const auto file = source_->Open(SegmentName(segment.number), OpenMode::kRead, Caching::kBuffered);
  if (!file) {
    LeaveSegment("cannot be read (" + file.error().message + ")", moves_[next_].from, note);
    return false;
  }
  source_file_ = file->id;
  return true;
}

void VaultWriter::CloseSource() {
  DiskCompletion end;
  while (source_ && source_->in_flight() > 0 && source_->Poll({&end, 1}) == 0) {
    source_->Wait(kNanosPerSecond);
  }
  if (source_file_) source_->Close(*source_file_);
  source_file_.reset();
  source_segment_.reset();
  source_.reset();
}

// What is left of this segment's records stays where it is.
void VaultWriter::LeaveSegment(const std::string& why, LogAddress at, const NoteFn& note) {
  const LogSegment segment = SegmentAt(at);
  note({Severity::kError,
        "taking over failed: " + LogFolder(segment.log) + "/" + SegmentName(segment.number) +
            ": the record at offset " + std::to_string(OffsetAt(at)) + " " + why +
            "; the segment is kept as it is: run engramctl log verify, and restore what is damaged "
            "from a backup"});
  unsound_.push_back(segment);
  while (next_ < moves_.size() && SegmentAt(moves_[next_].from) == segment) {
    if (file_) places_.push_back(kNoLogAddress);
    ++next_;
  }
  CloseSource();
  step_ = Step::kGather;
}

// As many of the `bytes` in in_ as there is room for: the others are read again.
void VaultWriter::TakeRecords(size_t bytes, const NoteFn& note) {
  const LogSegment segment = *source_segment_;
  step_ = Step::kGather;
  for (; next_ < moves_.size() && SegmentAt(moves_[next_].from) == segment; ++next_) {
    const VaultMove& move = moves_[next_];
    const size_t at = OffsetAt(move.from) - stretch_at_;
    if (at + move.record_bytes > kStretchBytes) return;
    LogRecord record;
    size_t record_bytes = 0;
    auto fault = LogRecordFault::kTooShort;
    if (at < bytes) {
      fault = ParseLogRecord({in_ + at, bytes - at}, move.from, &record, &record_bytes);
    }
    if (fault != LogRecordFault::kNone || record_bytes != move.record_bytes ||
        record.kind != LogRecordKind::kUpsert) {
      const bool is_other = fault == LogRecordFault::kNone;
      LeaveSegment(
          std::string(is_other ? "is not the one that was stored" : LogRecordFaultText(fault)),
          move.from, note);
      return;
    }
    if (file_ && file_at_ + out_used_ + record_bytes > options_.segment_bytes) {
      ends_file_ = true;
      return;
    }
    if (out_used_ >= kStretchBytes) {
      WriteOut(out_used_ / kLogPageBytes * kLogPageBytes);
      return;
    }
    if (!file_ && !BeginFile(note)) return;
    const auto offset = static_cast<uint32_t>(file_at_ + out_used_);
    const LogAddress to = MakeLogAddress(kVaultLog, MakeLogPosition(number_, offset));
    WriteLogRecord(record, to, out_ + out_used_);
    places_.push_back(to);
    out_used_ += record_bytes;
    record_bytes_ += static_cast<uint32_t>(record_bytes);
    ++record_count_;
  }
}

// ---------------------------------------------------------------------------------------------
// 2.

bool VaultWriter::BeginFile(const NoteFn& note) {
  CHECK(number_ <= kMaxSegment, "the vault does not outlive its numbers");
  // What an attempt that failed has left may be longer than what is written now.
  if (auto gone = vault_->Remove(NewName()); !gone && gone.error().code != ErrorCode::kNotFound) {
    GiveUp(gone.error().message, note);
    return false;
  }
  auto file = vault_->Open(NewName(), OpenMode::kCreate, Caching::kDirect);
  if (!file) {
    GiveUp(file.error().message, note);
    return false;
  }
  file_ = file->id;
  first_ = next_;
  places_.clear();
  file_at_ = kLogPageBytes;
  out_used_ = 0;
  record_bytes_ = record_count_ = 0;
  return true;
}

void VaultWriter::WriteOut(size_t bytes) {
  CHECK(vault_->Write(*file_, file_at_, {out_, bytes}, 0), "nothing else is under way");
  out_written_ = bytes;
  not_before_ns_ = clock_->MonotonicNs() +
                   static_cast<int64_t>(bytes * kNanosPerSecond / options_.bytes_per_second);
  step_ = Step::kWriting;
}

// ---------------------------------------------------------------------------------------------
// 3.

// The rest, padded to a page, then the header.
void VaultWriter::EndFile() {
  ends_file_ = true;
  if (out_used_ == 0) {
    WriteHeader();
    return;
  }
  const size_t padded = (out_used_ + kLogPageBytes - 1) / kLogPageBytes * kLogPageBytes;
  std::memset(out_ + out_used_, 0, padded - out_used_);
  out_used_ = padded;
  WriteOut(padded);
}

void VaultWriter::WriteHeader() {
  WriteSegmentHeader({.log = kVaultLog,
                      .number = number_,
                      .segment_bytes = static_cast<uint32_t>(file_at_),
                      .recycled = false,
                      .instance = options_.instance,
                      .vault = true,
                      .record_bytes = record_bytes_,
                      .record_count = record_count_},
                     out_);
  CHECK(vault_->Write(*file_, 0, {out_, kLogPageBytes}, 0), "nothing else is under way");
  step_ = Step::kHeader;
}

void VaultWriter::NameFile(const NoteFn& note) {
  vault_->Close(*file_);
  file_.reset();
  auto named = vault_->Rename(NewName(), SegmentName(number_));
  if (named) named = vault_->SyncDirectory();
  if (!named) {
    GiveUp(named.error().message, note);
    return;
  }
  for (size_t i = 0; i < places_.size(); ++i) moves_[first_ + i].to = places_[i];
  written_.push_back({number_, file_at_});
  ++number_;
  ends_file_ = false;
  step_ = Step::kGather;
}

// ---------------------------------------------------------------------------------------------

void VaultWriter::TakeCompletion(const NoteFn& note) {
  Disk* const disk = step_ == Step::kReading ? source_.get() : vault_;
  DiskCompletion end;
  if (disk->Poll({&end, 1}) == 0) return;
  if (step_ == Step::kReading) {
    if (end.error != 0) {
      LeaveSegment(std::string("cannot be read (") + std::strerror(end.error) + ")",
                   moves_[next_].from, note);
    } else {
      TakeRecords(end.bytes, note);
    }
    return;
  }
  if (end.error != 0) {
    GiveUp(vault_->directory() + "/" + NewName() + ": " + std::strerror(end.error), note);
    return;
  }
  switch (step_) {
    case Step::kWriting:
      file_at_ += out_written_;
      out_used_ -= out_written_;
      std::memmove(out_, out_ + out_written_, out_used_);
      step_ = Step::kGather;
      break;
    case Step::kHeader:
      step_ = Step::kFlushing;
      CHECK(vault_->Flush(*file_, 0), "nothing else is under way");
      break;
    case Step::kFlushing:
      NameFile(note);
      break;
    default:
      break;
  }
}

// What was begun goes, so that it does not take the room that may be missing.
void VaultWriter::GiveUp(const std::string& why, const NoteFn& note) {
  note({Severity::kError,
        "taking over failed: " + why + "; what was not taken over is kept where it is"});
  CloseSource();
  if (file_) vault_->Close(*file_);
  file_.reset();
  (void)vault_->Remove(NewName());
  (void)vault_->Remove(SegmentName(number_));
  ++number_;
  ends_file_ = false;
  memory_.reset();
  step_ = Step::kIdle;
}

}  // namespace engram
