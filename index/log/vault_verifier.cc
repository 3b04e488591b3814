#include "index/log/vault_verifier.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "src/core/check.h"
#include "src/core/clock.h"
#include "src/core/log_files.h"
#include "src/core/log_record.h"

namespace engram {

namespace {

constexpr size_t kWindowBytes = size_t{1} << 20;
static_assert(kWindowBytes >= 2 * kMaxLogRecordBytes);

class VaultVerifier {
 public:
  VaultVerifier(Disk& disk, const LogInstance& instance, const VaultVisitFn& visit)
      : disk_(disk),
        instance_(instance),
        visit_(visit),
        window_(std::make_unique<std::byte[]>(kWindowBytes)) {}

  Result<LogReport> Run();

 private:
  Result<void> CheckFile(uint32_t number, uint64_t file_bytes);
  Result<std::optional<SegmentHeader>> CheckHeader(uint32_t number, uint64_t file_bytes);
  Result<void> CheckRecords(const SegmentHeader& header);
  Result<void> CheckZeros(const SegmentHeader& header);
  Result<std::span<std::byte>> Look(uint64_t offset, uint64_t end);
  bool Mend(uint32_t number, uint64_t offset, std::span<std::byte> bytes, LogRecord* record,
            size_t* record_bytes);
  void Count(const LogRecord& record, size_t bytes);
  void AddDamage(uint32_t number, uint64_t offset, uint64_t bytes, std::string text);

  Disk& disk_;
  const LogInstance instance_;
  const VaultVisitFn& visit_;
  LogReport report_;
  std::unordered_set<uint64_t> sessions_;
  // The file that is read, and what is there of it.
  FileId file_;
  std::unique_ptr<std::byte[]> window_;
  uint64_t window_at_ = 0;
  size_t window_bytes_ = 0;
};

Result<LogReport> VaultVerifier::Run() {
  const auto entries = disk_.List();
  if (!entries) return std::unexpected(entries.error());
  std::vector<std::pair<uint32_t, uint64_t>> files;
  for (const DirectoryEntry& entry : *entries) {
    if (const auto number = SegmentNumber(entry.name)) {
      files.emplace_back(*number, entry.size_bytes);
    } else if (entry.name.ends_with(kTemporarySuffix)) {
      report_.unfinished.push_back(
          {.file = entry.name, .offset = 0, .bytes = entry.size_bytes, .text = "was never named"});
    }
  }
  std::ranges::sort(files);
  for (const auto& [number, bytes] : files) {
    const auto file = disk_.Open(SegmentName(number), OpenMode::kRead, Caching::kBuffered);
    if (!file) return std::unexpected(file.error());
    file_ = file->id;
    window_bytes_ = 0;
    const auto checked = CheckFile(number, bytes);
    disk_.Close(file_);
    if (!checked) return std::unexpected(checked.error());
    ++report_.segments;
    report_.end = MakeLogPosition(number, static_cast<uint32_t>(bytes));
  }
  report_.sessions = sessions_.size();
  return std::move(report_);
}

Result<void> VaultVerifier::CheckFile(uint32_t number, uint64_t file_bytes) {
  const auto header = CheckHeader(number, file_bytes);
  if (!header) return std::unexpected(header.error());
  if (!*header) return {};
  if (auto checked = CheckRecords(**header); !checked) return checked;
  return CheckZeros(**header);
}

// Nothing where it cannot be told what follows.
Result<std::optional<SegmentHeader>> VaultVerifier::CheckHeader(uint32_t number,
                                                                uint64_t file_bytes) {
  const auto looked = Look(0, std::min<uint64_t>(file_bytes, kLogPageBytes));
  if (!looked) return std::unexpected(looked.error());
  const std::span<std::byte> page = *looked;
  const auto bit = FindFlippedBitOfSegmentHeader(page);
  if (bit) {
    page[*bit / 8] ^= std::byte{1} << (*bit % 8);
    AddDamage(number, *bit / 8, 1, "a bit of the header is turned");
  }
  SegmentHeader header;
  const std::string why = ParseSegmentHeader(page, &header);
  const std::string file = disk_.directory() + "/" + SegmentName(number);
  if (const auto version = SegmentHeaderVersion(page); version && *version != kLogFormatVersion) {
    return Fail(ErrorCode::kUnavailable, file + " " + why + ": start the program that wrote it");
  }
  if (why.empty() && header.instance != instance_) {
    return Fail(ErrorCode::kCorrupt, file +
                                         " belongs to another data directory, as its header at "
                                         "offset 0 says: move it away");
  }
  if (!why.empty() || !header.vault || header.log != kVaultLog || header.number != number) {
    AddDamage(number, 0, file_bytes,
              why.empty() ? "has the header of another segment or log" : why);
    return std::nullopt;
  }
  if (file_bytes != header.segment_bytes) {
    AddDamage(number, std::min<uint64_t>(file_bytes, header.segment_bytes), 0,
              "the file has not the " + std::to_string(header.segment_bytes) +
                  " bytes that its header says");
    header.segment_bytes = static_cast<uint32_t>(
        std::min<uint64_t>(file_bytes, header.segment_bytes) / kLogPageBytes * kLogPageBytes);
    if (header.segment_bytes < 2 * kLogPageBytes) return std::nullopt;
    header.record_bytes = std::min(header.record_bytes, header.segment_bytes - kLogPageBytes);
  }
  return header;
}

// Record after record; behind a damaged one at each multiple of 8 until there is one again.
Result<void> VaultVerifier::CheckRecords(const SegmentHeader& header) {
  const uint64_t end = uint64_t{kLogPageBytes} + header.record_bytes;
  uint32_t count = 0;
  bool is_lost = false;
  for (uint64_t at = kLogPageBytes; at < end;) {
    const auto looked = Look(at, end);
    if (!looked) return std::unexpected(looked.error());
    const LogAddress address =
        MakeLogAddress(kVaultLog, MakeLogPosition(header.number, static_cast<uint32_t>(at)));
    LogRecord record;
    size_t bytes = 0;
    const LogRecordFault fault = ParseLogRecord(*looked, address, &record, &bytes);
    if (fault == LogRecordFault::kNone ||
        (!is_lost && Mend(header.number, at, *looked, &record, &bytes))) {
      Count(record, bytes);
      if (visit_) visit_(record, address, static_cast<uint32_t>(bytes));
      ++count;
      is_lost = false;
      at += bytes;
      continue;
    }
    if (!is_lost) {
      AddDamage(header.number, at, 0, "the record here " + std::string(LogRecordFaultText(fault)));
      is_lost = true;
    }
    at += 8;
  }
  // Where something is damaged that is why.
  const std::string file = SegmentName(header.number);
  if (count != header.record_count &&
      std::ranges::find(report_.damages, file, &LogFinding::file) == report_.damages.end()) {
    AddDamage(header.number, 0, 0,
              "has " + std::to_string(count) + " records, and its header says " +
                  std::to_string(header.record_count));
  }
  return {};
}

// Whether turning one bit makes it a record.
bool VaultVerifier::Mend(uint32_t number, uint64_t offset, std::span<std::byte> bytes,
                         LogRecord* record, size_t* record_bytes) {
  const LogAddress address =
      MakeLogAddress(kVaultLog, MakeLogPosition(number, static_cast<uint32_t>(offset)));
  const auto bit = FindFlippedBit(bytes, address);
  if (!bit) return false;
  bytes[*bit / 8] ^= std::byte{1} << (*bit % 8);
  if (ParseLogRecord(bytes, address, record, record_bytes) != LogRecordFault::kNone) return false;
  AddDamage(number, offset + *bit / 8, 1, "a bit of a record is turned");
  return true;
}

Result<void> VaultVerifier::CheckZeros(const SegmentHeader& header) {
  for (uint64_t at = uint64_t{kLogPageBytes} + header.record_bytes; at < header.segment_bytes;) {
    const auto looked = Look(at, header.segment_bytes);
    if (!looked) return std::unexpected(looked.error());
    const auto other = std::ranges::find_if(*looked, [](std::byte b) { return b != std::byte{0}; });
    if (other != looked->end()) {
      AddDamage(header.number, at + static_cast<uint64_t>(other - looked->begin()), 1,
                "is not zero behind the last record");
      return {};
    }
    if (looked->empty()) return {};
    at += looked->size();
  }
  return {};
}

// What there is from `offset` on, up to `end`: a record of any length, or all of it.
Result<std::span<std::byte>> VaultVerifier::Look(uint64_t offset, uint64_t end) {
  const uint64_t wanted = std::min<uint64_t>(end - offset, kMaxLogRecordBytes);
  if (offset < window_at_ || offset + wanted > window_at_ + window_bytes_) {
    const auto bytes = static_cast<size_t>(std::min<uint64_t>(end - offset, kWindowBytes));
    CHECK(disk_.Read(file_, offset, {window_.get(), bytes}, 0), "nothing else is under way");
    DiskCompletion done;
    while (disk_.Poll({&done, 1}) == 0) disk_.Wait(kNanosPerSecond);
    if (done.error != 0) return FailErrno("read " + disk_.directory(), done.error);
    window_at_ = offset;
    window_bytes_ = done.bytes;
  }
  const size_t at = static_cast<size_t>(offset - window_at_);
  if (at >= window_bytes_) return std::span<std::byte>();
  return std::span(window_.get() + at,
                   static_cast<size_t>(std::min<uint64_t>(window_bytes_ - at, end - offset)));
}

void VaultVerifier::Count(const LogRecord& record, size_t bytes) {
  if (report_.records == 0) report_.first_stamp = record.stamp;
  ++report_.records;
  report_.record_bytes += bytes;
  ++report_.records_of_kind[static_cast<size_t>(record.kind)];
  ++report_.records_of_space[std::string(record.space)];
  if (record.session.value() != 0) sessions_.insert(record.session.value());
  report_.first_stamp = std::min(report_.first_stamp, record.stamp);
  report_.last_stamp = std::max(report_.last_stamp, record.stamp);
}

void VaultVerifier::AddDamage(uint32_t number, uint64_t offset, uint64_t bytes, std::string text) {
  report_.damages.push_back(
      {.file = SegmentName(number), .offset = offset, .bytes = bytes, .text = std::move(text)});
}

}  // namespace

Result<LogReport> VerifyVault(Disk& disk, const LogInstance& instance, const VaultVisitFn& visit) {
  return VaultVerifier(disk, instance, visit).Run();
}

}  // namespace engram
