#include "index/log/log_writer.h"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "src/core/check.h"
#include "src/core/log_files.h"

namespace engram {

namespace {

// Tags of the disk's operations: a block's number, or this.
constexpr uint64_t kFlushTag = UINT64_MAX;
// Blocks that fit in the memory of one that is full: most are small where little comes in.
constexpr size_t kBlocksForEach = 8;
// The share of a segment that is kept for deletes when there is no next one.
constexpr uint32_t kReservedShare = 8;

// A page-aligned buffer for MakeLogDurable.
constexpr size_t kCopyBytes = size_t{1} << 20;

Result<void> WaitForEnd(Disk* disk, const std::string& what, size_t bytes) {
  DiskCompletion end;
  while (disk->Poll({&end, 1}) == 0) disk->Wait(kNanosPerSecond);
  if (end.error != 0) return FailErrno(what, end.error);
  if (end.bytes != bytes) {
    return Fail(ErrorCode::kCorrupt, what + ": the file is shorter than it was");
  }
  return {};
}

// [begin, end) of one segment; `end` 0: to the end of the file.
Result<void> WriteAgain(Disk* disk, const std::string& name, uint64_t begin, uint64_t end,
                        std::span<std::byte> memory) {
  auto file = disk->Open(name, OpenMode::kReadWrite, Caching::kDirect);
  if (!file) return std::unexpected(file.error());
  const std::string path = disk->directory() + "/" + name;
  Result<void> done;
  if (end == 0) end = file->size_bytes / kLogPageBytes * kLogPageBytes;
  while (done && begin < end) {
    const auto piece = memory.first(std::min<uint64_t>(memory.size(), end - begin));
    CHECK(disk->Read(file->id, begin, piece, 0), "nothing is under way");
    done = WaitForEnd(disk, "read " + path, piece.size());
    if (!done) break;
    CHECK(disk->Write(file->id, begin, piece, 0), "nothing is under way");
    done = WaitForEnd(disk, "write " + path, piece.size());
    begin += piece.size();
  }
  if (done) {
    CHECK(disk->Flush(file->id, 0), "nothing is under way");
    done = WaitForEnd(disk, "flush " + path, 0);
  }
  disk->Close(file->id);
  return done;
}

}  // namespace

Result<void> MakeLogDurable(Disk* disk, LogPosition durable, LogPosition end) {
  if (end == 0) return {};
  void* memory = std::aligned_alloc(kLogPageBytes, kCopyBytes);
  CHECK(memory != nullptr, "there is memory for a buffer");
  const std::unique_ptr<void, decltype(&std::free)> owner(memory, &std::free);
  const std::span<std::byte> buffer(static_cast<std::byte*>(memory), kCopyBytes);
  // Blocks that are not durable lie in two segments at most.
  const uint32_t last = SegmentOf(end);
  uint32_t segment = durable == 0 ? std::max<uint32_t>(last, 2) - 1 : SegmentOf(durable);
  uint64_t begin = durable == 0 ? kLogPageBytes : OffsetOf(durable);
  for (; segment <= last; ++segment, begin = kLogPageBytes) {
    auto done =
        WriteAgain(disk, SegmentName(segment), begin, segment == last ? OffsetOf(end) : 0, buffer);
    // Before the first one there is nothing.
    if (!done && !(durable == 0 && segment < last && done.error().code == ErrorCode::kNotFound)) {
      return done;
    }
  }
  return {};
}

LogWriter::LogWriter(const LogWriterOptions& options, Disk* disk, SegmentHandoff* handoff,
                     std::span<std::byte> memory)
    : options_(options),
      disk_(disk),
      handoff_(handoff),
      memory_(memory),
      blocks_(size_t{options.blocks} * kBlocksForEach) {
  CHECK(options.block_bytes >= kLeastBlockBytes && options.block_bytes <= kMaxBlockBytes &&
            options.block_bytes % kLogPageBytes == 0,
        "a block is whole pages and holds any record");
  CHECK(options.blocks >= 2 && options.max_writes >= 1, "one block is filled while others go");
  const auto address = std::bit_cast<uintptr_t>(memory.data());
  CHECK(address % kLogPageBytes == 0, "the memory is aligned to a page");
  CHECK(memory.size() >= MemoryBytes(options), "the memory is enough");
}

LogWriter::~LogWriter() {
  while (in_flight_ > 0 && disk_->in_flight() > 0) {
    disk_->Wait(kNanosPerSecond);
    TakeCompletions();
  }
}

Result<void> LogWriter::Start(LogPosition end, uint32_t epoch) {
  epoch_ = epoch;
  position_ = previous_ = written_ = durable_ = records_end_ = said_durable_ = end;
  if (end != 0) {
    if (auto opened = OpenLast(end); !opened) return opened;
  }
  // What an earlier epoch began at the end and did not finish could be completed by what a later
  // one leaves there unfinished; a marker in its place rules that out before anything follows. With
  // the first epoch there is nothing of that kind.
  opened_ = epoch == 1;
  if (!opened_ && LeftInSegment() >= kLogPageBytes) {
    if (auto marked = MarkEpoch(); !marked) return marked;
  }
  handoff_->current.store(SegmentOf(end), std::memory_order_release);
  handoff_->started.store(true, std::memory_order_release);
  return {};
}

Result<void> LogWriter::OpenLast(LogPosition end) {
  auto file = disk_->Open(SegmentName(SegmentOf(end)), OpenMode::kReadWrite, Caching::kDirect);
  if (!file) return std::unexpected(file.error());
  file_ = file->id;
  segment_bytes_ = static_cast<uint32_t>(file->size_bytes);
  return {};
}

Result<void> LogWriter::MarkEpoch() {
  WriteBlockHeader({.log = options_.log,
                    .position = position_,
                    .previous = previous_,
                    .durable = durable_,
                    .epoch = epoch_,
                    .block_bytes = kLogPageBytes,
                    .record_bytes = 0,
                    .record_count = 0,
                    .instance = options_.instance},
                   memory_.data());
  std::memset(memory_.data() + kBlockHeaderBytes, 0, kLogPageBytes - kBlockHeaderBytes);
  CHECK(disk_->Write(file_, OffsetOf(position_), memory_.first(kLogPageBytes), 0),
        "nothing is under way");
  const std::string what = "write the log in " + disk_->directory();
  if (auto written = WaitForEnd(disk_, what, kLogPageBytes); !written) return written;
  CHECK(disk_->Flush(file_, 0), "nothing is under way");
  if (auto flushed = WaitForEnd(disk_, what, 0); !flushed) return flushed;
  position_ += kLogPageBytes;
  previous_ = written_ = durable_ = position_;
  opened_ = true;
  return {};
}

// ---------------------------------------------------------------------------------------------
// Taking records

uint32_t LogWriter::LeftInSegment() const {
  return position_ == 0 ? 0 : segment_bytes_ - OffsetOf(position_);
}

RefusalReason LogWriter::JudgeRoom(size_t bytes, bool frees) const {
  const bool fills = IsFilling();
  const size_t needs = kBlockHeaderBytes + bytes;
  const bool has_next = MayBeginSegment();
  if (!opened_) {
    // Nothing comes before the marker of this epoch.
  } else if (!has_next && !frees && LeftInSegment() < segment_bytes_ / kReservedShare) {
    // What is left is for deletes.
  } else if (fills &&
             kBlockHeaderBytes + At(next_ - 1).record_bytes + bytes <= At(next_ - 1).room) {
    return RefusalReason::kNone;
  } else if (next_ - first_ < blocks_.size() &&
             FindPlace(HeadAfterFilling(), PagesOf(needs)).bytes > 0) {
    const uint32_t taken = fills ? PagesOf(kBlockHeaderBytes + At(next_ - 1).record_bytes) : 0;
    if (has_next || LeftInSegment() >= taken + needs) return RefusalReason::kNone;
  }
  if (failing_) return RefusalReason::kDiskFailing;
  switch (handoff_->trouble.load(std::memory_order_relaxed)) {
    case SegmentTrouble::kDiskFull:
      return has_next ? RefusalReason::kLogBusy : RefusalReason::kDiskFull;
    case SegmentTrouble::kFailing:
      return has_next ? RefusalReason::kLogBusy : RefusalReason::kDiskFailing;
    case SegmentTrouble::kNone:
      break;
  }
  return RefusalReason::kLogBusy;
}

// Where the next block goes if the last one is sealed now.
size_t LogWriter::HeadAfterFilling() const {
  if (!IsFilling()) return head_;
  const Block& block = At(next_ - 1);
  return block.memory_at + PagesOf(kBlockHeaderBytes + block.record_bytes);
}

// In the ring behind `head`, up to its end or else from its beginning.
LogWriter::Place LogWriter::FindPlace(size_t head, size_t bytes) const {
  if (first_ == next_) return {.at = 0, .bytes = memory_.size()};
  const size_t tail = At(first_).memory_at;
  if (head > tail) {
    if (memory_.size() - head >= bytes) return {.at = head, .bytes = memory_.size() - head};
    head = 0;
  }
  return tail - head >= bytes ? Place{.at = head, .bytes = tail - head} : Place{};
}

// Less what a block leaves at the end of the ring or of its last page.
size_t LogWriter::room_bytes() const {
  const size_t kept = options_.block_bytes / 2;
  if (first_ == next_) return memory_.size() - kept;
  const size_t head = HeadAfterFilling();
  const size_t tail = At(first_).memory_at;
  const size_t left = head > tail ? memory_.size() - head + tail : tail - head;
  return left > kept ? left - kept : 0;
}

LogAddress LogWriter::Append(const LogRecord& record, bool urgent, size_t follows) {
  const size_t bytes = LogRecordBytes(record);
  if (IsFilling()) {
    const Block& block = At(next_ - 1);
    if (kBlockHeaderBytes + block.record_bytes + bytes + follows > block.room) Seal(next_ - 1);
  }
  if (!IsFilling()) CHECK(BeginBlock(bytes + follows), "room was judged before");
  const uint64_t number = next_ - 1;
  Block& block = At(number);
  const uint32_t at = static_cast<uint32_t>(kBlockHeaderBytes) + block.record_bytes;
  const LogAddress address = MakeLogAddress(options_.log, block.position + at);
  WriteLogRecord(record, address, MemoryOf(number) + at);
  block.record_bytes += static_cast<uint32_t>(bytes);
  ++block.record_count;
  block.urgent |= urgent;
  records_end_ = block.position + at + bytes;
  last_block_ = block.position;
  return address;
}

// In the rest of the segment, or at the beginning of the next one.
bool LogWriter::BeginBlock(size_t record_bytes) {
  const size_t needs = kBlockHeaderBytes + record_bytes;
  const Place place = FindPlace(head_, PagesOf(needs));
  if (next_ - first_ == blocks_.size() || place.bytes == 0) return false;
  if (LeftInSegment() < needs) {
    if (!MayBeginSegment()) return false;
    BeginSegment();
  }
  Block& block = At(next_);
  block = {.state = State::kFilling,
           .file = file_,
           .position = position_,
           .durable = durable_,
           .previous = previous_,
           .memory_at = place.at,
           .room = static_cast<uint32_t>(
               std::min<size_t>({options_.block_bytes, LeftInSegment(), place.bytes})),
           .began_ns = now_ns_};
  ++next_;
  return true;
}

// The file before the last one must be done with first, so that three are open at most.
void LogWriter::BeginSegment() {
  if (position_ != 0) file_before_ = file_;
  file_ = *next_file_;
  segment_bytes_ = next_segment_bytes_;
  next_file_.reset();
  position_ = MakeLogPosition(SegmentOf(position_) + 1, kLogPageBytes);
  if (previous_ == 0) previous_ = position_;
  handoff_->current.store(SegmentOf(position_), std::memory_order_release);
}

// Ahead of its use, so that taking a record cannot fail for it.
void LogWriter::OpenNextSegment() {
  const uint32_t number = SegmentOf(position_) + 1;
  if (next_file_ || LeftInSegment() > segment_bytes_ / 2 ||
      number > handoff_->prepared.load(std::memory_order_acquire) ||
      (failing_ && now_ns_ < retry_ns_)) {
    return;
  }
  auto file = disk_->Open(SegmentName(number), OpenMode::kReadWrite, Caching::kDirect);
  if (!file) {
    NoteError();
    return;
  }
  next_file_ = file->id;
  next_segment_bytes_ = static_cast<uint32_t>(file->size_bytes);
}

void LogWriter::Seal(uint64_t number) {
  Block& block = At(number);
  const size_t used = kBlockHeaderBytes + block.record_bytes;
  block.bytes = PagesOf(used);
  std::byte* memory = MemoryOf(number);
  std::memset(memory + used, 0, block.bytes - used);
  WriteBlockHeader({.log = options_.log,
                    .position = block.position,
                    .previous = block.previous,
                    .durable = block.durable,
                    .epoch = epoch_,
                    .block_bytes = block.bytes,
                    .record_bytes = block.record_bytes,
                    .record_count = block.record_count,
                    .instance = options_.instance},
                   memory);
  block.state = State::kSealed;
  block.sealed_ns = now_ns_;
  head_ = block.memory_at + block.bytes;
  position_ = previous_ = block.position + block.bytes;
  handoff_->bytes_taken.fetch_add(block.bytes, std::memory_order_relaxed);
}

std::span<const std::byte> LogWriter::NotDurable(LogAddress address) const {
  const LogPosition position = PositionOf(address);
  if (LogOf(address) != options_.log || position < durable_ || position >= records_end_) return {};
  for (uint64_t number = first_; number < next_; ++number) {
    const Block& block = At(number);
    const uint64_t end = kBlockHeaderBytes + block.record_bytes;
    if (position >= block.position && position - block.position < end) {
      const uint64_t at = position - block.position;
      return {MemoryOf(number) + at, end - at};
    }
  }
  return {};
}

// ---------------------------------------------------------------------------------------------
// To the disk

int LogWriter::Poll(int64_t now_ns) {
  now_ns_ = now_ns;
  int work = TakeCompletions();
  OpenNextSegment();
  if (IsFilling() && WantsSeal(At(next_ - 1))) Seal(next_ - 1);
  if (first_ == next_ && in_flight_ == 0 && (!opened_ || records_end_ > said_durable_)) {
    BeginMarker();
  }
  work += Submit();
  work += SubmitFlush();
  if (first_ != next_) calm_since_ns_ = now_ns;
  // What was handed over goes to the kernel with the next round's completions at the latest.
  if (work > 0) work += TakeCompletions();
  // What waits for its time is looked at again soon, but for a disk that fails.
  return work + (failing_ || settled() ? static_cast<int>(in_flight_) : 1);
}

bool LogWriter::WantsSeal(const Block& filling) const {
  if (writing_ >= options_.max_writes || (failing_ && now_ns_ < retry_ns_)) return false;
  // The next one waits in memory while an earlier one is being flushed, unless it is worth a write
  // of its own.
  if (flushing_ && filling.record_bytes < options_.block_bytes / 4) return false;
  return filling.urgent || hurried_ ||
         now_ns_ - filling.began_ns >= options_.flush_interval_ns / 2 ||
         filling.record_bytes > options_.block_bytes / 2;
}

int LogWriter::Submit() {
  if (failing_ && now_ns_ < retry_ns_) return 0;
  int work = 0;
  for (uint64_t number = first_; number < next_ && writing_ < options_.max_writes; ++number) {
    Block& block = At(number);
    if (block.state != State::kSealed) continue;
    if (!disk_->Write(block.file, OffsetOf(block.position), {MemoryOf(number), block.bytes},
                      number)) {
      break;
    }
    block.state = State::kWriting;
    ++writing_;
    ++in_flight_;
    ++work;
  }
  return work;
}

bool LogWriter::WantsFlush(const Block& first) const {
  if (first.state != State::kWritten) return false;
  uint64_t written = first_;
  for (; written < next_ && At(written).state == State::kWritten; ++written) {
    if (At(written).urgent || At(written).record_count == 0) return true;
  }
  return hurried_ || now_ns_ - first.sealed_ns >= options_.flush_interval_ns ||
         2 * room_bytes() < memory_.size() || 2 * (next_ - first_) > blocks_.size();
}

// Of the oldest block's file: it covers what is written there.
int LogWriter::SubmitFlush() {
  if (flushing_ || first_ == next_ || (failing_ && now_ns_ < retry_ns_)) return 0;
  const Block& first = At(first_);
  if (!WantsFlush(first) || !disk_->Flush(first.file, kFlushTag)) return 0;
  flushing_ = true;
  flushing_file_ = first.file;
  ++in_flight_;
  for (uint64_t number = first_; number < next_; ++number) {
    Block& block = At(number);
    if (block.state == State::kWritten && block.file == flushing_file_) {
      block.state = State::kFlushing;
    }
  }
  return 1;
}

int LogWriter::TakeCompletions() {
  if (in_flight_ == 0) return 0;
  std::array<DiskCompletion, 16> ends;
  const size_t count = disk_->Poll(ends);
  for (size_t i = 0; i < count; ++i) {
    --in_flight_;
    if (ends[i].tag == kFlushTag) {
      TakeFlushed(ends[i].error);
    } else {
      TakeWritten(ends[i].tag, ends[i].error);
    }
  }
  if (count > 0) Advance();
  return static_cast<int>(count);
}

void LogWriter::TakeWritten(uint64_t number, int error) {
  Block& block = At(number);
  --writing_;
  block.state = error == 0 ? State::kWritten : State::kSealed;
  if (error != 0) {
    NoteError();
  } else {
    bytes_written_ += block.bytes;
  }
}

// After a flush that failed nothing that it covered counts as written (see Disk).
void LogWriter::TakeFlushed(int error) {
  flushing_ = false;
  if (error != 0) NoteError();
  for (uint64_t number = first_; number < next_; ++number) {
    Block& block = At(number);
    if (block.state != State::kFlushing) continue;
    block.state = error == 0 ? State::kFree : State::kSealed;
  }
  if (error != 0) return;
  ++commits_;
  failing_ = false;
}

void LogWriter::NoteError() {
  failing_ = true;
  ++errors_;
  retry_ns_ = now_ns_ + options_.retry_ns;
}

// Blocks that are durable leave from the front; one behind another that is not waits for it.
void LogWriter::Advance() {
  while (first_ != next_ && At(first_).state == State::kFree) {
    const Block& block = At(first_);
    durable_ = block.position + block.bytes;
    said_durable_ = std::max(said_durable_, block.durable);
    opened_ = true;
    ++first_;
  }
  written_ = std::max(written_, durable_);
  for (uint64_t number = first_; number < next_; ++number) {
    const Block& block = At(number);
    if (block.state != State::kWritten && block.state != State::kFlushing) break;
    written_ = std::max(written_, block.position + block.bytes);
  }
  if (file_before_ && (first_ == next_ || At(first_).file != *file_before_)) {
    disk_->Close(*file_before_);
    file_before_.reset();
  }
}

void LogWriter::BeginMarker() {
  if (!opened_) {
    // In the next segment, as soon as that is there.
    if (BeginBlock(0)) {
      At(next_ - 1).urgent = true;
      Seal(next_ - 1);
    }
    return;
  }
  if (!hurried_ && now_ns_ - calm_since_ns_ < options_.marker_delay_ns) return;
  if (failing_ && now_ns_ < retry_ns_) return;
  // At the end of a segment without a next one it waits.
  if (!BeginBlock(0)) return;
  At(next_ - 1).urgent = true;
  Seal(next_ - 1);
}

}  // namespace engram
