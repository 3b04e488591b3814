#include "index/checkpoint/shard_saver.h"

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>

#include "src/core/check.h"
#include "src/core/clock.h"

namespace engram {

namespace {

constexpr uint64_t kFlushTag = 2;  // beside the buffers'

}  // namespace

ShardSaver::ShardSaver(Disk* disk, ArenaHeap* heap, uint32_t max_spaces)
    : disk_(disk),
      memory_(std::make_unique_for_overwrite<std::byte[]>(2 * kBufferBytes + kPageBytes)),
      space_saver_(heap) {
  const auto address = std::bit_cast<uintptr_t>(memory_.get());
  std::byte* aligned = memory_.get() + (kPageBytes - address % kPageBytes);
  vacant_.reserve(max_spaces);
  buffers_[0].memory = aligned;
  buffers_[1].memory = aligned + kBufferBytes;
}

ShardSaver::~ShardSaver() { Abort(); }

bool ShardSaver::Begin(uint32_t round, CommitStamp hold, CommitStamp latest,
                       const ShardContents& contents) {
  CHECK(!active(), "one save at a time");
  done_ = false;
  error_ = 0;
  auto file = disk_->Open(CheckpointName(round), OpenMode::kCreate, Caching::kDirect);
  if (!file) {
    error_ = file.error().code == ErrorCode::kResourceExhausted ? ENOSPC : EIO;
    return false;
  }
  file_ = file->id;
  contents_ = contents;
  round_ = round;
  hold_ = hold;
  latest_ = latest;
  spaces_ = static_cast<uint32_t>(contents.spaces.size());
  vacant_.clear();
  for (const SpaceEntry* entry : contents.entries) vacant_.push_back(entry->is_vacant());
  next_space_ = 0;
  session_cursor_ = 0;
  sessions_ = 0;
  filling_ = 0;
  offset_ = 0;
  written_at_ = 0;
  for (Buffer& buffer : buffers_) buffer.used = 0;
  phase_ = Phase::kHead;
  return true;
}

int ShardSaver::Step() {
  int work = TakeCompletions();
  switch (phase_) {
    case Phase::kIdle:
      return 0;
    case Phase::kHead:
    case Phase::kSessions:
    case Phase::kSpaces:
    case Phase::kEnd:
      if (buffers_[filling_].writing) break;
      // What does not fit goes into the other buffer.
      if (!Fill() && !WriteOut()) break;
      ++work;
      break;
    case Phase::kWriting:
      if (in_flight_ > 0) break;
      if (buffers_[filling_].used > 0) {
        WriteOut();
      } else if (disk_->Flush(*file_, kFlushTag)) {
        ++in_flight_;
        phase_ = Phase::kFlushing;
      }
      ++work;
      break;
    case Phase::kFlushing:
      break;
  }
  return work + static_cast<int>(in_flight_);
}

std::span<std::byte> ShardSaver::Room() {
  Buffer& buffer = buffers_[filling_];
  return {buffer.memory + buffer.used, kBufferBytes - buffer.used};
}

// False when there is too little room in the buffer.
bool ShardSaver::Fill() {
  switch (phase_) {
    case Phase::kHead:
      return FillHead();
    case Phase::kSessions:
      return FillSessions();
    case Phase::kSpaces:
      return FillSpaces();
    case Phase::kEnd:
      return FillEnd();
    default:
      CHECK(false, "the other phases write nothing");
      return false;
  }
}

bool ShardSaver::FillHead() {
  constexpr size_t kMaxListed = sizeof(ListedSpace) + PadTo8(kMaxSpaceNameBytes);
  const auto take = [this](size_t bytes) {
    buffers_[filling_].used += bytes;
    offset_ += bytes;
  };
  if (Room().size() < kMaxExtentBytes) return false;
  std::byte* at = Room().data() + sizeof(ExtentHeader);
  if (offset_ == 0) {
    const ShardExtent body{.round = round_,
                           .shard = contents_.shard,
                           .shards = contents_.shards,
                           .latest_stamp = latest_,
                           .spaces = spaces_,
                           .zero = 0};
    std::memcpy(at, &body, sizeof(body));
    take(SealShardExtent(kShardExtent, 0, sizeof(body), Room().data()));
    return true;
  }
  std::byte* const end = Room().data() + kMaxExtentBytes - kMaxListed;
  uint32_t count = 0;
  for (; next_space_ < spaces_ && at < end; ++next_space_, ++count) {
    const SpaceEntry& entry = *contents_.entries[next_space_];
    ListedSpace listed{};
    // What was dropped is forgotten once no record of it can be replayed any more.
    if (!vacant_[next_space_]) listed.definition = entry.Definition();
    if (!vacant_[next_space_] || contents_.dropped_at[next_space_] >= contents_.replay_from) {
      SetBirth(entry.birth(), &listed);
    }
    listed.name_bytes = static_cast<uint8_t>(entry.name().size());
    std::memcpy(at, &listed, sizeof(listed));
    at += sizeof(listed);
    std::memset(at, 0, PadTo8(entry.name().size()));
    std::memcpy(at, entry.name().data(), entry.name().size());
    at += PadTo8(entry.name().size());
  }
  const auto body = static_cast<size_t>(at - Room().data()) - sizeof(ExtentHeader);
  if (count > 0) take(SealShardExtent(kSpaceListExtent, count, body, Room().data()));
  if (next_space_ == spaces_) {
    next_space_ = 0;
    phase_ = Phase::kSessions;
  }
  return true;
}

bool ShardSaver::FillSessions() {
  const size_t needs = sizeof(ExtentHeader) + kSessionsPerStep * sizeof(SavedSession);
  if (Room().size() < needs) return false;
  std::byte* at = Room().data() + sizeof(ExtentHeader);
  uint32_t count = 0;
  contents_.sessions->Visit(&session_cursor_, kSessionsPerStep,
                            [&](SessionId id, uint32_t space, Sequence last, int64_t unix_ns) {
                              // What was taken and not answered may be lost with the log's end.
                              const Session* active = contents_.sessions->Find(id);
                              if (active != nullptr) last = active->told_sequence;
                              if (last == 0 || space >= spaces_) return;
                              const SavedSession saved{.id = id.value(),
                                                       .last_sequence = last,
                                                       .last_active_unix_ns = unix_ns,
                                                       .space = space,
                                                       .zero = 0};
                              std::memcpy(at, &saved, sizeof(saved));
                              at += sizeof(saved);
                              ++count;
                            });
  sessions_ += count;
  if (count > 0) {
    const size_t bytes =
        SealShardExtent(kSessionsExtent, count, count * sizeof(SavedSession), Room().data());
    buffers_[filling_].used += bytes;
    offset_ += bytes;
  }
  if (session_cursor_ == 0) phase_ = Phase::kSpaces;
  return true;
}

bool ShardSaver::FillSpaces() {
  if (!space_saver_.active()) {
    while (next_space_ < spaces_ && vacant_[next_space_]) ++next_space_;
    if (next_space_ == spaces_) {
      phase_ = Phase::kEnd;
      return true;
    }
    // For lack of memory: again with the next slice.
    const SpaceSaver::Options options{
        .with_payload = true, .live = contents_.live, .space = next_space_};
    if (!space_saver_.Begin(contents_.spaces[next_space_].get(), hold_, options)) return true;
  }
  const size_t bytes = space_saver_.Step(Room(), kNodesPerStep);
  buffers_[filling_].used += bytes;
  offset_ += bytes;
  if (!space_saver_.active()) {
    ++next_space_;
    return true;
  }
  return bytes > 0;
}

bool ShardSaver::FillEnd() {
  if (Room().size() < sizeof(ExtentHeader) + sizeof(ShardEndExtent)) return false;
  const ShardEndExtent body{.sessions = sessions_, .spaces = spaces_, .zero = 0};
  std::memcpy(Room().data() + sizeof(ExtentHeader), &body, sizeof(body));
  const size_t bytes = SealShardExtent(kShardEndExtent, 0, sizeof(body), Room().data());
  buffers_[filling_].used += bytes;
  offset_ += bytes;
  phase_ = Phase::kWriting;
  return true;
}

// The whole pages of the buffer; what is left of the last one goes to the front of the other, but
// at the end, where it is padded. False when that other one is being written.
bool ShardSaver::WriteOut() {
  Buffer& buffer = buffers_[filling_];
  Buffer& other = buffers_[1 - filling_];
  if (other.writing) return false;
  size_t bytes = buffer.used / kPageBytes * kPageBytes;
  const size_t rest = buffer.used - bytes;
  if (phase_ == Phase::kWriting && rest > 0) {
    std::memset(buffer.memory + buffer.used, 0, kPageBytes - rest);
    bytes += kPageBytes;
    other.used = 0;
  } else {
    if (rest > 0) std::memcpy(other.memory, buffer.memory + bytes, rest);
    other.used = rest;
  }
  if (!disk_->Write(*file_, written_at_, {buffer.memory, bytes}, filling_)) return false;
  written_at_ += bytes;
  buffer.writing = true;
  buffer.used = 0;
  ++in_flight_;
  filling_ = 1 - filling_;
  return true;
}

int ShardSaver::TakeCompletions() {
  if (in_flight_ == 0) return 0;
  std::array<DiskCompletion, 3> ends;
  const size_t count = disk_->Poll(ends);
  for (size_t i = 0; i < count; ++i) {
    --in_flight_;
    if (ends[i].error != 0) error_ = ends[i].error;
    if (ends[i].tag != kFlushTag) buffers_[ends[i].tag].writing = false;
  }
  if (error_ != 0 && in_flight_ == 0) {
    Finish(error_);
  } else if (phase_ == Phase::kFlushing && in_flight_ == 0) {
    Finish(0);
  }
  return static_cast<int>(count);
}

void ShardSaver::Finish(int error) {
  space_saver_.Abort();
  error_ = error;
  done_ = error == 0;
  phase_ = Phase::kIdle;
  if (file_) disk_->Close(*file_);
  file_.reset();
}

void ShardSaver::Abort() {
  while (in_flight_ > 0 && disk_->in_flight() > 0) {
    disk_->Wait(kNanosPerSecond);
    TakeCompletions();
  }
  if (active()) Finish(ECANCELED);
}

}  // namespace engram
