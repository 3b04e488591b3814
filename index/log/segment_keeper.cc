#include "index/log/segment_keeper.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstring>
#include <utility>

#include "src/core/check.h"
#include "src/core/log_files.h"

namespace engram {

namespace {

int ErrnoOf(const Error& error) {
  return error.code == ErrorCode::kResourceExhausted ? ENOSPC : EIO;
}

}  // namespace

SegmentKeeper::SegmentKeeper(const SegmentKeeperOptions& options, Disk* disk, Clock* clock,
                             SegmentHandoff* handoff)
    : options_(options), disk_(disk), clock_(clock), handoff_(handoff) {
  CHECK(options.segment_bytes >= kMinSegmentBytes && options.segment_bytes <= kMaxSegmentBytes &&
            options.segment_bytes % kLogPageBytes == 0,
        "a segment is whole pages, of a size within bounds");
  memory_ = std::make_unique<std::byte[]>(kFillBytes + 2 * kLogPageBytes);
  const auto address = std::bit_cast<uintptr_t>(memory_.get());
  header_ = memory_.get() + (kLogPageBytes - address % kLogPageBytes);
  zeros_ = header_ + kLogPageBytes;
}

// The disk goes on reading the memory of what is under way.
SegmentKeeper::~SegmentKeeper() {
  while (in_flight_ > 0 && disk_->in_flight() > 0) {
    disk_->Wait(kNanosPerSecond);
    TakeCompletions();
  }
  if (file_) disk_->Close(*file_);
}

Result<void> SegmentKeeper::Start(uint32_t last) {
  auto entries = disk_->List();
  if (!entries) return std::unexpected(entries.error());
  for (const DirectoryEntry& entry : *entries) {
    if (!entry.name.ends_with(kTemporarySuffix)) continue;
    if (auto removed = disk_->Remove(entry.name); !removed) return removed;
  }
  handoff_->current.store(last, std::memory_order_relaxed);
  handoff_->prepared.store(last, std::memory_order_relaxed);
  std::vector<uint32_t> beyond;
  for (const DirectoryEntry& entry : *entries) {
    const auto number = SegmentNumber(entry.name);
    if (number && *number > last) beyond.push_back(*number);
    if (number && *number <= last) segments_.emplace(*number, entry.size_bytes);
  }
  std::ranges::sort(beyond);
  for (const uint32_t number : beyond) {
    if (auto taken = TakeOver(number); !taken) return taken;
  }
  return {};
}

// One that was prepared before a restart is ready; one with another header goes.
Result<void> SegmentKeeper::TakeOver(uint32_t number) {
  const std::string name = SegmentName(number);
  auto file = disk_->Open(name, OpenMode::kRead, Caching::kBuffered);
  if (!file) return std::unexpected(file.error());
  SegmentHeader header;
  bool sound =
      file->size_bytes >= kLogPageBytes && disk_->Read(file->id, 0, {header_, kLogPageBytes}, 0);
  DiskCompletion end;
  if (sound) {
    while (disk_->Poll({&end, 1}) == 0) disk_->Wait(kNanosPerSecond);
    sound = end.error == 0 && ParseSegmentHeader({header_, kLogPageBytes}, &header).empty() &&
            header.number == number && header.log == options_.log &&
            header.instance == options_.instance && header.segment_bytes == file->size_bytes;
  }
  disk_->Close(file->id);
  const uint32_t prepared = handoff_->prepared.load(std::memory_order_relaxed);
  if (sound && number == prepared + 1) {
    segments_.emplace(number, header.segment_bytes);
    handoff_->prepared.store(number, std::memory_order_release);
    return {};
  }
  return disk_->Remove(name);
}

Result<void> SegmentKeeper::PrepareFirst() {
  const uint32_t current = handoff_->current.load();
  while (handoff_->prepared.load() < current + options_.ahead) {
    Poll();
    if (handoff_->trouble.load() != SegmentTrouble::kNone) {
      // With one of them it can be begun; the others are tried again.
      if (handoff_->prepared.load() > current) return {};
      return engram::FailErrno("prepare " + disk_->directory() + "/" + SegmentName(number_) +
                                   ": the log needs room on this disk; free some, or set "
                                   "data.segment_mib lower",
                               error_);
    }
    if (disk_->in_flight() > 0) disk_->Wait(kNanosPerSecond);
  }
  return {};
}

void SegmentKeeper::Free(uint32_t number) {
  CHECK(number < handoff_->current.load(std::memory_order_acquire),
        "what is written is needed, and what comes after it");
  if (segments_.erase(number) > 0) spare_.push_back(number);
}

int SegmentKeeper::Poll() {
  const uint32_t before = in_flight_;
  TakeCompletions();
  int work = static_cast<int>(before - in_flight_);
  switch (step_) {
    case Step::kIdle:
      work += Begin() ? 1 : 0;
      break;
    case Step::kFilling:
      Fill();
      break;
    case Step::kWritingHeader:
    case Step::kFlushing:
      break;
  }
  return work + static_cast<int>(in_flight_);
}

bool SegmentKeeper::Begin() {
  const uint32_t prepared = handoff_->prepared.load(std::memory_order_relaxed);
  const uint32_t current = handoff_->current.load(std::memory_order_acquire);
  if (prepared >= current + options_.ahead) {
    // What is too much goes, one a round.
    if (spare_.size() <= options_.spare) return false;
    // Gone or not: nothing needs it, and the next start looks again.
    (void)disk_->Remove(SegmentName(spare_.front()));
    spare_.pop_front();
    return true;
  }
  if (clock_->MonotonicNs() < retry_ns_) return false;
  number_ = prepared + 1;
  CHECK(number_ <= kMaxSegment, "a log does not outlive its numbers");
  error_ = 0;
  filled_ = 0;
  if (!spare_.empty()) return BeginRecycled();
  if (keep_free_ > 0 && disk_->FreeBytes() < keep_free_ + options_.segment_bytes) {
    Fail(ENOSPC);
    return true;
  }
  auto file = disk_->Open(FillingName(), OpenMode::kCreate, Caching::kDirect);
  if (!file) {
    Fail(ErrnoOf(file.error()));
    return true;
  }
  file_ = file->id;
  step_ = Step::kFilling;
  Fill();
  return true;
}

bool SegmentKeeper::BeginRecycled() {
  recycled_ = spare_.front();
  spare_.pop_front();
  auto file = disk_->Open(SegmentName(*recycled_), OpenMode::kReadWrite, Caching::kDirect);
  // One of another size, or that is gone, is no good any more.
  if (!file || file->size_bytes != options_.segment_bytes) {
    if (file) disk_->Close(file->id);
    (void)disk_->Remove(SegmentName(*recycled_));
    recycled_.reset();
    return true;
  }
  file_ = file->id;
  WriteHeader();
  return true;
}

// A few writes at a time, from front to back. The header's page is one of them: the header itself
// comes last, over zeros.
void SegmentKeeper::Fill() {
  while (filled_ < options_.segment_bytes && in_flight_ < kFillsInFlight && error_ == 0) {
    const auto bytes = std::min<uint64_t>(kFillBytes, options_.segment_bytes - filled_);
    if (!disk_->Write(*file_, filled_, {zeros_, bytes}, 0)) return;
    filled_ += bytes;
    ++in_flight_;
  }
}

void SegmentKeeper::WriteHeader() {
  WriteSegmentHeader({.log = options_.log,
                      .number = number_,
                      .segment_bytes = options_.segment_bytes,
                      .recycled = recycled_.has_value(),
                      .instance = options_.instance},
                     header_);
  step_ = Step::kWritingHeader;
  CHECK(disk_->Write(*file_, 0, {header_, kLogPageBytes}, 0), "nothing else is under way");
  ++in_flight_;
}

void SegmentKeeper::TakeCompletions() {
  std::array<DiskCompletion, kFillsInFlight> ends;
  const size_t count = in_flight_ > 0 ? disk_->Poll(ends) : 0;
  for (size_t i = 0; i < count; ++i) {
    --in_flight_;
    if (ends[i].error != 0) error_ = ends[i].error;
  }
  if (in_flight_ > 0 || step_ == Step::kIdle) return;
  if (error_ != 0) {
    Fail(error_);
    return;
  }
  if (step_ == Step::kFilling && filled_ == options_.segment_bytes) {
    WriteHeader();
  } else if (step_ == Step::kWritingHeader) {
    step_ = Step::kFlushing;
    CHECK(disk_->Flush(*file_, 0), "nothing else is under way");
    ++in_flight_;
  } else if (step_ == Step::kFlushing) {
    Finish();
  }
}

void SegmentKeeper::Finish() {
  disk_->Close(*file_);
  file_.reset();
  const std::string from = recycled_ ? SegmentName(*recycled_) : FillingName();
  auto named = disk_->Rename(from, SegmentName(number_));
  if (named) named = disk_->SyncDirectory();
  if (!named) {
    Fail(ErrnoOf(named.error()));
    return;
  }
  recycled_.reset();
  step_ = Step::kIdle;
  segments_.emplace(number_, options_.segment_bytes);
  handoff_->trouble.store(SegmentTrouble::kNone, std::memory_order_relaxed);
  handoff_->prepared.store(number_, std::memory_order_release);
}

// What was begun goes, so that it does not take the room that is missing.
void SegmentKeeper::Fail(int error) {
  error_ = error;
  if (file_) disk_->Close(*file_);
  file_.reset();
  (void)disk_->Remove(recycled_ ? SegmentName(*recycled_) : FillingName());
  recycled_.reset();
  step_ = Step::kIdle;
  retry_ns_ = clock_->MonotonicNs() + options_.retry_ns;
  handoff_->trouble.store(error == ENOSPC ? SegmentTrouble::kDiskFull : SegmentTrouble::kFailing,
                          std::memory_order_relaxed);
}

}  // namespace engram
