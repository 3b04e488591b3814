#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "src/core/clock.h"
#include "src/core/disk.h"
#include "src/core/hash.h"

namespace engram {

// What the simulated disk does to its users. Probabilities are 0 to 1.
struct SimulatedDiskFaults {
  // How long an operation takes, drawn evenly between the two: so ends come in any order.
  int64_t min_delay_ns = 10 * kNanosPerMicro;
  int64_t max_delay_ns = 200 * kNanosPerMicro;
  // EIO. A failed write may have written a part.
  double read_error_probability = 0.0;
  double write_error_probability = 0.0;
  // EIO. The writes that the flush should have covered may be dropped, whatever later flushes say.
  double flush_error_probability = 0.0;
  // Files together may have this many bytes; a write beyond gets ENOSPC, and may write a part.
  uint64_t capacity_bytes = UINT64_MAX;
  // What each write that no flush covered meets in a crash: lost, kept, or else torn, which keeps
  // any of its sectors.
  double crash_loses_write_probability = 0.4;
  double crash_keeps_write_probability = 0.3;
};

// The medium behind simulated Disks: directories in memory, chance from a seed, time from a
// SimulatedClock. The same seed and the same calls give the same results, byte for byte.
//
// It keeps to the letter of what Disk promises about crashes and to nothing more: unflushed writes
// survive singly and in parts, a file's name needs SyncDirectory also where its bytes are flushed.
// Changes of names survive as a prefix of their order in each directory, as in a journal.
//
// Thread safety: one thread, together with all its Disks. May allocate at any time.
class SimulatedDisk {
 public:
  // `clock` outlives the medium.
  SimulatedDisk(SimulatedClock* clock, uint64_t seed, const SimulatedDiskFaults& faults = {});
  SimulatedDisk(const SimulatedDisk&) = delete;
  SimulatedDisk& operator=(const SimulatedDisk&) = delete;
  ~SimulatedDisk();

  // A Disk over one directory, made where it is missing. Must not outlive the medium.
  std::unique_ptr<Disk> Open(const std::string& directory, const DiskOptions& options = {});

  // Power fails. Every Disk opened before is dead: its calls fail, its operations never end, and
  // its destruction is all that is left. What survived is there for those opened after.
  void Crash();

  // For what follows.
  void SetFaults(const SimulatedDiskFaults& faults) { faults_ = faults; }
  const SimulatedDiskFaults& faults() const { return faults_; }
  // No operation ends before `until_ns` of the clock.
  void StallUntil(int64_t until_ns) { stalled_until_ns_ = until_ns; }
  // Turns one bit of what is there, flushed or not. The file exists and is long enough.
  void FlipBit(const std::string& directory, const std::string& name, uint64_t bit);
  // What a reader would find now, or nothing when there is no such file.
  std::optional<std::vector<std::byte>> ContentOf(const std::string& directory,
                                                  const std::string& name) const;
  // Some bytes of that; nothing where they are not all there.
  std::optional<std::vector<std::byte>> BytesOf(const std::string& directory,
                                                const std::string& name, uint64_t offset,
                                                size_t bytes) const;
  // Bytes of all files.
  uint64_t used_bytes() const;

  static constexpr size_t kSectorBytes = 512;

 private:
  friend class SimulatedDiskHandle;

  // A write that ended and that no flush has made durable.
  struct UnflushedWrite {
    uint64_t number = 0;  // of ended writes, rising
    uint64_t offset = 0;
    std::vector<std::byte> bytes;
    bool dropped = false;  // a failed flush: later ones leave it out
  };
  struct File {
    std::vector<std::byte> content;  // what readers see
    std::vector<std::byte> durable;
    std::vector<UnflushedWrite> unflushed;
  };
  using Names = std::map<std::string, std::shared_ptr<File>>;
  // One change of names: `to` gets `file`, or goes when there is none; `from` goes, if not empty.
  struct NameChange {
    std::string from;
    std::string to;
    std::shared_ptr<File> file;
  };
  struct Directory {
    Names names;
    Names durable;
    std::vector<NameChange> unsynced;
    const Disk* locked_by = nullptr;
  };

  bool Chance(double probability);
  int64_t EndsNs();
  static void Apply(const NameChange& change, Names& names);
  static void ApplyBytes(uint64_t offset, std::span<const std::byte> bytes,
                         std::vector<std::byte>& content);
  void Write(File& file, uint64_t offset, std::span<const std::byte> bytes);
  void CrashWrite(File& file, uint64_t offset, std::span<const std::byte> bytes);

  SimulatedClock* const clock_;
  SplitMix64 random_;
  SimulatedDiskFaults faults_;
  std::map<std::string, Directory> directories_;
  std::vector<class SimulatedDiskHandle*> handles_;  // alive
  uint64_t ended_writes_ = 0;
  int64_t stalled_until_ns_ = 0;
};

}  // namespace engram
