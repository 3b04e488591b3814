#include "dataplane/record_reader.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <span>
#include <tuple>
#include <utility>

#include "src/core/check.h"
#include "src/core/commit_stamp.h"
#include "src/core/log_files.h"
#include "src/core/shard_port.h"

namespace engram {

namespace {

constexpr size_t kCompletionBatch = 64;

HitHeader HeaderOf(const std::byte* hit) {
  HitHeader header;
  std::memcpy(&header, hit, sizeof(header));
  return header;
}

uint64_t KeyOf(uint16_t log, uint32_t segment) { return uint64_t{log} << 32 | segment; }

}  // namespace

std::string_view RecordReaderCounterName(RecordReaderCounter counter) {
  static constexpr std::array<std::string_view, static_cast<size_t>(RecordReaderCounter::kCount)>
      kNames = {"records_read",           "record_bytes_read",     "record_reads_repeated",
                "records_mended",         "records_unreadable",    "records_unreadable_unnamed",
                "record_segments_opened", "record_reads_under_way"};
  return kNames[static_cast<size_t>(counter)];
}

Result<std::unique_ptr<RecordReader>> RecordReader::Create(const RecordReaderOptions& options,
                                                           Clock* clock,
                                                           const RecordAccess& access) {
  CHECK(access.make_disk != nullptr && access.pins != nullptr, "a reader has logs and pins");
  CHECK(!options.slots.empty() && options.slots.back().slot_bytes >= kMaxLogRecordBytes,
        "the largest slots hold any record");
  CHECK(options.slots.size() <= 64, "each size has its bit");
  auto slab = SlotSlab::Create(options.slots, options.huge_pages, -1);
  if (!slab) return std::unexpected(slab.error());
  CHECK(options.max_open_files > slab->total_slots(), "a file can be opened for every read");
  return std::unique_ptr<RecordReader>(new RecordReader(options, clock, access, *std::move(slab)));
}

RecordReader::RecordReader(const RecordReaderOptions& options, Clock* clock,
                           const RecordAccess& access, SlotSlab slab)
    : options_(options),
      clock_(clock),
      access_(access),
      slab_(std::move(slab)),
      // What is released while the disk still has it keeps its memory, and so its place.
      reads_(slab_.total_slots()),
      files_(options.max_open_files),
      epoch_(access.pins->current()),
      now_ns_(clock->MonotonicNs()) {
  free_reads_.reserve(reads_.size());
  waiting_.reserve(reads_.size());
  waited_.reserve(reads_.size());
  file_of_.reserve(files_.size());
  used_disks_.reserve(kLogs);
  std::tie(unreadable_in_, unreadable_out_) = SpscRing<LogAddress>::Create(kUnreadableKept);
  for (auto ticket = static_cast<Ticket>(reads_.size()); ticket > 0; --ticket) {
    free_reads_.push_back(ticket - 1);
  }
}

// ---- What the answers ask for ----

RecordReader::Ticket RecordReader::Begin(const std::byte* hit) {
  HitReference reference;
  std::memcpy(&reference, hit + sizeof(HitHeader), sizeof(reference));
  CHECK((HeaderOf(hit).flags & kHitAtAddress) != 0, "the hit refers to a record");
  CHECK(reference.record_bytes >= kLogRecordHeaderBytes &&
            reference.record_bytes <= kMaxLogRecordBytes,
        "a record has a record's length");
  const SlotId memory = AcquireMemory(reference.record_bytes);
  if (memory == kNoSlot) return kNone;
  const Ticket ticket = free_reads_.back();
  free_reads_.pop_back();
  if (used_reads_++ == 0) now_ns_ = clock_->MonotonicNs();
  Read& read = reads_[ticket];
  read = {.step = Step::kWaiting,
          .memory = memory,
          .hit = hit,
          .reference = reference,
          .began_ns = now_ns_,
          .record = {}};
  if (!Submit(ticket)) Wait(ticket, now_ns_);
  return ticket;
}

RecordReader::State RecordReader::state(Ticket ticket) const {
  switch (reads_[ticket].step) {
    case Step::kReady:
      return State::kReady;
    case Step::kUnreadable:
      return State::kUnreadable;
    case Step::kFree:
    case Step::kWaiting:
    case Step::kAtDisk:
      break;
  }
  return State::kReading;
}

void RecordReader::Release(Ticket ticket) {
  Read& read = reads_[ticket];
  CHECK(read.step != Step::kFree && !read.released, "a read is released once");
  if (read.step == Step::kAtDisk || read.step == Step::kWaiting) {
    read.released = true;  // Whoever has it next frees it.
    read.hit = nullptr;
  } else {
    Free(ticket);
  }
}

int RecordReader::Poll() {
  if (const ReadPins::Epoch now = access_.pins->current(); now != epoch_) {
    epoch_ = now;
    CloseIdleFiles();
  }
  short_sizes_ = 0;
  if (used_reads_ == 0) return 0;
  now_ns_ = clock_->MonotonicNs();
  int work = TakeCompletions();
  work += SubmitWaiting();
  uint32_t at_disk = 0;
  for (Disk* disk : used_disks_) at_disk += disk->in_flight();
  counters_[RecordReaderCounter::kReadsUnderWay].Set(used_reads_);
  return work + static_cast<int>(at_disk);
}

// A larger place where those of its size are taken, but not before somebody who waits for one.
SlotId RecordReader::AcquireMemory(size_t bytes) {
  size_t size = 0;
  while (options_.slots[size].slot_bytes < bytes) ++size;
  if ((short_sizes_ >> size & 1) != 0) return kNoSlot;
  for (size_t larger = size; larger < options_.slots.size(); ++larger) {
    if ((short_sizes_ >> larger & 1) != 0) continue;
    const SlotId slot = slab_.Acquire(options_.slots[larger].slot_bytes);
    if (slot != kNoSlot) return slot;
  }
  short_sizes_ |= uint64_t{1} << size;
  return kNoSlot;
}

void RecordReader::Free(Ticket ticket) {
  Read& read = reads_[ticket];
  slab_.Release(read.memory);
  read.step = Step::kFree;
  free_reads_.push_back(ticket);
  --used_reads_;
  counters_[RecordReaderCounter::kReadsUnderWay].Set(used_reads_);
}

// ---- To the disk and back ----

// False when it has to wait for others.
bool RecordReader::Submit(Ticket ticket) {
  Read& read = reads_[ticket];
  const LogAddress address = read.reference.address;
  const uint32_t file = FileFor(address);
  if (file == kNoFile) return false;
  const std::span<std::byte> to(slab_.At(read.memory), read.reference.record_bytes);
  if (!disks_[LogOf(address)]->Read(files_[file].id, OffsetOf(PositionOf(address)), to, ticket)) {
    return false;
  }
  ++files_[file].reads;
  read.file = file;
  read.step = Step::kAtDisk;
  return true;
}

void RecordReader::Wait(Ticket ticket, int64_t due_ns) {
  reads_[ticket].step = Step::kWaiting;
  reads_[ticket].due_ns = due_ns;
  waiting_.push_back(ticket);
}

int RecordReader::SubmitWaiting() {
  if (waiting_.empty()) return 0;
  int work = 0;
  std::swap(waiting_, waited_);
  for (const Ticket ticket : waited_) {
    Read& read = reads_[ticket];
    if (read.released) {
      Free(ticket);
      ++work;
    } else if (read.due_ns > now_ns_) {
      waiting_.push_back(ticket);
    } else if (Submit(ticket)) {
      ++work;
    } else {
      TryAgain(ticket);
    }
  }
  waited_.clear();
  return work;
}

int RecordReader::TakeCompletions() {
  std::array<DiskCompletion, kCompletionBatch> ends;
  int work = 0;
  for (Disk* disk : used_disks_) {
    if (disk->in_flight() == 0) continue;
    const size_t count = disk->Poll(ends);
    for (size_t i = 0; i < count; ++i) TakeCompletion(ends[i]);
    work += static_cast<int>(count);
  }
  return work;
}

void RecordReader::TakeCompletion(const DiskCompletion& end) {
  const auto ticket = static_cast<Ticket>(end.tag);
  Read& read = reads_[ticket];
  CHECK(read.step == Step::kAtDisk, "the disk ends what was begun");
  File& file = files_[read.file];
  if (--file.reads == 0 && file.ends) CloseFile(read.file);
  if (read.released) {
    Free(ticket);
    return;
  }
  const bool whole = end.error == 0 && end.bytes == read.reference.record_bytes;
  // Nothing to mend: what lies there is from before.
  if (!whole) std::memset(slab_.At(read.memory), 0, sizeof(uint32_t));
  if (!whole || !Check(&read)) {
    TryAgain(ticket);
    return;
  }
  read.step = Step::kReady;
  counters_[RecordReaderCounter::kRecordsRead].Add(1);
  counters_[RecordReaderCounter::kRecordBytesRead].Add(end.bytes);
}

// ---- What is right ----

bool RecordReader::IsTheHits(const Read& read, const LogRecord& record) const {
  const HitHeader header = HeaderOf(read.hit);
  const std::string_view id(reinterpret_cast<const char*>(read.hit) + HitIdOffset(header),
                            header.id_bytes);
  const bool stamp_fits = read.reference.has_older_stamp != 0 ? record.stamp < header.stamp
                                                              : record.stamp == header.stamp;
  return record.kind == LogRecordKind::kUpsert && record.id == id && stamp_fits &&
         (header.payload_bytes == 0 || header.payload_bytes == record.payload.size()) &&
         (header.vector_dimension == 0 || header.vector_dimension == record.dimension);
}

bool RecordReader::Check(Read* read) {
  const std::span<const std::byte> bytes(slab_.At(read->memory), read->reference.record_bytes);
  size_t record_bytes = 0;
  const LogRecordFault fault =
      ParseLogRecord(bytes, read->reference.address, &read->record, &record_bytes);
  return fault == LogRecordFault::kNone && record_bytes == bytes.size() &&
         IsTheHits(*read, read->record);
}

// 3. That what never was this record becomes it by one bit is next to impossible: its id, stamp and
// lengths fit as well.
bool RecordReader::Mend(Read* read) {
  const std::span<std::byte> bytes(slab_.At(read->memory), read->reference.record_bytes);
  const auto bit = FindFlippedBit(bytes, read->reference.address);
  if (!bit) return false;
  bytes[*bit / 8] ^= std::byte{1} << (*bit % 8);
  return Check(read);
}

// A record is written soon after its stamp, or never. The clock on the wall is the stamps'.
bool RecordReader::MayBeUnwritten(const Read& read) const {
  const int64_t waited_ns = now_ns_ - read.began_ns;
  if (waited_ns >= options_.retry_for_ns) return false;
  const int64_t began_unix_ns = clock_->WallNs() - waited_ns;
  return began_unix_ns - UnixNsOf(HeaderOf(read.hit).stamp) < options_.retry_for_ns;
}

void RecordReader::TryAgain(Ticket ticket) {
  Read& read = reads_[ticket];
  if (++read.tries < kLeastTries || MayBeUnwritten(read)) {
    counters_[RecordReaderCounter::kReadsRepeated].Add(1);
    Wait(ticket, now_ns_ + options_.retry_ns);
    return;
  }
  if (read.step == Step::kAtDisk && Mend(&read)) {
    read.step = Step::kReady;
    mended_.store(read.reference.address, std::memory_order_relaxed);
    counters_[RecordReaderCounter::kRecordsMended].Add(1);
    return;
  }
  read.step = Step::kUnreadable;
  unreadable_.store(read.reference.address, std::memory_order_relaxed);
  counters_[RecordReaderCounter::kRecordsUnreadable].Add(1);
  if (!unreadable_in_.TryPush(read.reference.address)) {
    counters_[RecordReaderCounter::kUnreadableUnnamed].Add(1);
  }
}

// ---- Files ----

// kNoFile: it cannot be opened now.
uint32_t RecordReader::FileFor(LogAddress address) {
  const uint16_t log = LogOf(address);
  const uint32_t segment = SegmentOf(PositionOf(address));
  const auto found = file_of_.find(KeyOf(log, segment));
  const uint32_t file = found != file_of_.end() ? found->second : OpenFile(log, segment);
  if (file != kNoFile) files_[file].used = ++last_use_;
  return file;
}

uint32_t RecordReader::OpenFile(uint16_t log, uint32_t segment) {
  uint32_t place = kNoFile;
  for (uint32_t i = 0; i < files_.size(); ++i) {
    if (files_[i].key == 0) {
      place = i;
      break;
    }
    const bool idle = files_[i].reads == 0;
    if (idle && (place == kNoFile || files_[i].used < files_[place].used)) place = i;
  }
  Disk* disk = DiskOf(log);
  if (place == kNoFile || disk == nullptr) return kNoFile;
  if (files_[place].key != 0) CloseFile(place);
  const auto opened = disk->Open(SegmentName(segment), OpenMode::kRead, Caching::kBuffered);
  if (!opened) return kNoFile;
  files_[place] = {.key = KeyOf(log, segment), .id = opened->id};
  file_of_[files_[place].key] = place;
  counters_[RecordReaderCounter::kSegmentsOpened].Add(1);
  return place;
}

void RecordReader::CloseFile(uint32_t file) {
  File& closed = files_[file];
  disks_[closed.key >> 32]->Close(closed.id);
  file_of_.erase(closed.key);
  closed = File();
}

// nullptr: it cannot be used now.
Disk* RecordReader::DiskOf(uint16_t log) {
  if (disks_[log] != nullptr) return disks_[log].get();
  DiskOptions options;
  options.max_in_flight = std::bit_ceil(static_cast<uint32_t>(reads_.size()));
  options.max_open_files = options_.max_open_files;
  auto disk = access_.make_disk(LogFolder(log), options, nullptr);
  if (!disk) return nullptr;
  disks_[log] = *std::move(disk);
  used_disks_.push_back(disks_[log].get());
  return disks_[log].get();
}

void RecordReader::CloseIdleFiles() {
  for (uint32_t i = 0; i < files_.size(); ++i) {
    if (files_[i].key == 0) continue;
    if (files_[i].reads == 0) {
      CloseFile(i);
    } else {
      files_[i].ends = true;
    }
  }
}

void RecordReader::AddCounters(std::string_view core, CounterCatalogue* catalogue) const {
  for (size_t i = 0; i < static_cast<size_t>(RecordReaderCounter::kCount); ++i) {
    const auto which = static_cast<RecordReaderCounter>(i);
    catalogue->push_back({std::string(core), RecordReaderCounterName(which), &counters_[which]});
  }
}

}  // namespace engram
