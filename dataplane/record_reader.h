#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "src/core/clock.h"
#include "src/core/counters.h"
#include "src/core/disk.h"
#include "src/core/huge_page_arena.h"
#include "src/core/log_address.h"
#include "src/core/log_record.h"
#include "src/core/observation.h"
#include "src/core/read_pins.h"
#include "src/core/result.h"
#include "src/core/slot_slab.h"
#include "src/core/spsc_ring.h"

namespace engram {

// How a core that answers gets at the logs. Without make_disk there are none.
struct RecordAccess {
  // A Disk over a folder of the data directory (LogFolder), for the core that calls it.
  using DiskFactory = std::function<Result<std::unique_ptr<Disk>>(
      const std::string& folder, const DiskOptions& options, std::string* note)>;
  DiskFactory make_disk;
  ReadPins* pins = nullptr;  // outlives the core
  uint32_t place = 0;        // the core's among the pins' readers
  // So long after its stamp a record may still be unwritten, where its space does not wait for the
  // log.
  int64_t unwritten_ns = kNanosPerSecond;
};

// Holds any record.
inline constexpr size_t kMaxRecordSlotBytes = (kMaxLogRecordBytes + 63) / 64 * 64;

struct RecordReaderOptions {
  // Of all logs; more than there are reads at a time.
  uint32_t max_open_files = 512;
  // A record that does not check out is read again at this pace: once, and where its stamp is
  // younger than retry_for_ns for so long. That of another shard's space which does not wait for
  // its log is about to be written then.
  int64_t retry_ns = 5 * kNanosPerMilli;
  int64_t retry_for_ns = kNanosPerSecond;
  // Memory for records, as many as are read at a time or wait to be handed out. The largest slots
  // hold any record.
  std::vector<SlotClass> slots = {
      {2'048, 128}, {8'192, 128}, {32'768, 48}, {kMaxRecordSlotBytes, 32}};
  HugePagePolicy huge_pages = HugePagePolicy::kAuto;
};

enum class RecordReaderCounter : uint8_t {
  kRecordsRead,
  kRecordBytesRead,
  kReadsRepeated,
  kRecordsMended,      // one bit was flipped on the disk
  kRecordsUnreadable,  // their hits went out without payload and vector
  kUnreadableUnnamed,  // of these, found when too many waited for TakeUnreadable
  kSegmentsOpened,
  kReadsUnderWay,
  kCount,
};
std::string_view RecordReaderCounterName(RecordReaderCounter counter);

// Reads the records that hits refer to (HitReference), several at a time.
//
// 1. Begin takes memory for the record and asks the disk for it. The operating system's cache is
//    the cache: reads are buffered.
// 2. Poll takes what was read. The record must check out, at its address (its CRC covers that), and
//    be the hit's: kind, id, stamp and lengths.
// 3. One that does not is read once more; one that may not be written yet, for a while. Then, where
//    turning one bit makes it the hit's record, it is taken as such; else it is unreadable. What
//    was damaged long ago keeps its memory for one pause only, so others hardly wait for it.
// 4. Release gives the memory back, also of what is still being read.
//
// Those that wait for memory ask again after each Poll, in the order in which they came. Once one
// found none, nobody behind it gets any of that size until the next Poll: what becomes free
// meanwhile would else go to whoever asks then, and large records could be overtaken for ever.
//
// Files stay open, those that were used least recently are closed for others. When an epoch of the
// pins is closed all are closed that are not being read: a file that was removed gives back its
// room then.
//
// Thread safety: one core's alone; counters, `unreadable` and `mended` may be read by others, and
// one other thread may call TakeUnreadable.
// Takes no memory after Create but for the first reading of a log and the opening of a file, which
// may wait for the disk; nothing else does, but with a backend whose Poll waits.
class RecordReader {
 public:
  using Ticket = uint32_t;
  static constexpr Ticket kNone = UINT32_MAX;
  enum class State : uint8_t { kReading, kReady, kUnreadable };

  // Errors: kResourceExhausted.
  static Result<std::unique_ptr<RecordReader>> Create(const RecordReaderOptions& options,
                                                      Clock* clock, const RecordAccess& access);
  RecordReader(const RecordReader&) = delete;
  RecordReader& operator=(const RecordReader&) = delete;

  // `hit` refers to a record, and stays where it is until Release. kNone: no memory is free now.
  Ticket Begin(const std::byte* hit);
  State state(Ticket ticket) const;
  // Once it is ready, until Release.
  const LogRecord& record(Ticket ticket) const { return reads_[ticket].record; }
  void Release(Ticket ticket);
  // One bounded round; returns how much was done, and more than 0 while the disk is reading.
  int Poll();

  // Whoever asks shards for references is inside the pins from before until they are read.
  ReadPins::Epoch EnterPins() { return access_.pins->Enter(access_.place); }
  void LeavePins(ReadPins::Epoch epoch) { access_.pins->Leave(access_.place, epoch); }

  uint32_t under_way() const { return used_reads_; }
  uint32_t open_files() const { return static_cast<uint32_t>(file_of_.size()); }
  // Where the last one lies that could not be read; kNoLogAddress: none.
  LogAddress unreadable() const { return unreadable_.load(std::memory_order_relaxed); }
  // Where they lie, in the order in which they were found, some maybe again and again; each is
  // handed out once. For the control plane.
  std::optional<LogAddress> TakeUnreadable() { return unreadable_out_.TryPop(); }
  // Likewise, of the last one that was mended.
  LogAddress mended() const { return mended_.load(std::memory_order_relaxed); }
  void AddCounters(std::string_view core, CounterCatalogue* catalogue) const;
  const Counter& counter(RecordReaderCounter which) const { return counters_[which]; }

 private:
  enum class Step : uint8_t {
    kFree,
    kWaiting,  // in waiting_, for its turn or until due_ns
    kAtDisk,
    kReady,
    kUnreadable,
  };
  struct Read {
    Step step = Step::kFree;
    bool released = false;  // while the disk still has its memory
    SlotId memory = kNoSlot;
    uint32_t file = 0;  // in files_, while the disk reads
    const std::byte* hit = nullptr;
    HitReference reference{};
    uint32_t tries = 0;  // that came to nothing
    int64_t began_ns = 0;
    int64_t due_ns = 0;
    LogRecord record;
  };
  struct File {
    uint64_t key = 0;  // log and segment; 0: none is open here
    FileId id;
    uint32_t reads = 0;  // under way
    bool ends = false;   // to be closed with the last of them
    uint64_t used = 0;   // when, as a number that rises
  };
  static constexpr uint32_t kNoFile = UINT32_MAX;
  static constexpr size_t kLogs = 256;
  static constexpr uint32_t kLeastTries = 2;
  static constexpr size_t kUnreadableKept = 1'024;

  RecordReader(const RecordReaderOptions& options, Clock* clock, const RecordAccess& access,
               SlotSlab slab);

  SlotId AcquireMemory(size_t bytes);
  bool Submit(Ticket ticket);
  int SubmitWaiting();
  int TakeCompletions();
  void TakeCompletion(const DiskCompletion& end);
  bool IsTheHits(const Read& read, const LogRecord& record) const;
  bool Check(Read* read);
  bool Mend(Read* read);
  bool MayBeUnwritten(const Read& read) const;
  void TryAgain(Ticket ticket);
  void Wait(Ticket ticket, int64_t due_ns);
  void Free(Ticket ticket);
  uint32_t FileFor(LogAddress address);
  uint32_t OpenFile(uint16_t log, uint32_t segment);
  void CloseFile(uint32_t file);
  Disk* DiskOf(uint16_t log);
  void CloseIdleFiles();

  // Constant after construction.
  const RecordReaderOptions options_;
  Clock* const clock_;
  const RecordAccess access_;

  // Owner core only.
  SlotSlab slab_;
  std::vector<Read> reads_;  // by ticket
  std::vector<Ticket> free_reads_;
  std::vector<Ticket> waiting_;
  std::vector<Ticket> waited_;  // while those that wait are gone through
  uint32_t used_reads_ = 0;
  uint64_t short_sizes_ = 0;  // bits of the slots' sizes of which somebody found none
  std::vector<File> files_;
  std::unordered_map<uint64_t, uint32_t> file_of_;
  uint64_t last_use_ = 0;
  ReadPins::Epoch epoch_ = 0;
  int64_t now_ns_ = 0;
  // Behind the memory that their reads go to.
  std::array<std::unique_ptr<Disk>, kLogs> disks_;
  std::vector<Disk*> used_disks_;
  SpscRing<LogAddress>::Producer unreadable_in_;

  // Written by the owner, read by others.
  std::atomic<LogAddress> unreadable_{kNoLogAddress};
  std::atomic<LogAddress> mended_{kNoLogAddress};
  CounterSet<RecordReaderCounter, static_cast<size_t>(RecordReaderCounter::kCount)> counters_;

  // The control plane's.
  // alignas: each TryPop writes to it.
  alignas(kFalseSharingBytes) SpscRing<LogAddress>::Consumer unreadable_out_;
};

}  // namespace engram
