// The small files of a data directory and of a backup: CHECKPOINT, INSTANCE, REPLAY-CRASHES, the
// files of the quarantine, BACKUP.
//
// 1. The input chooses a file, whether it begins as a sound one whose numbers the input says, or as
//    the input's bytes, and then edits it: bytes over others, parts lost, doubled or moved.
// 2. Unless it says no the checksum is put right again, so that the fuzzer need not guess it.
// 3. The reader takes it, in memory of exactly its size, or refuses it. What it takes is written
//    again and must read the same.

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "index/log/replay_guard.h"
#include "src/checkpoint_manifest.h"
#include "src/core/check.h"
#include "src/core/clock.h"
#include "src/core/crc32c.h"
#include "src/core/data_directory.h"
#include "src/core/simulated_disk.h"
#include "src/replay_crashes.h"
#include "tests/fuzz/fuzz_program.h"
#include "tests/index/log/log_builder.h"
#include "tools/engramctl/backup_list.h"

namespace engram {
namespace {

constexpr size_t kOperationsMax = 24;
constexpr size_t kFileBytesMax = 16'384;
constexpr size_t kQuarantineCrcEnd = 12;
constexpr std::string_view kCrcKey = "crc32c ";

uint32_t CrcOf(std::string_view text) { return Crc32c(std::as_bytes(std::span(text))); }
std::string CrcLine(std::string_view text) {
  std::array<char, 16> digits{};
  std::snprintf(digits.data(), digits.size(), "%08x", CrcOf(text));
  return std::string(kCrcKey) + digits.data() + "\n";
}

// Up to eight bytes, so that small ones are as likely as large ones.
uint64_t AnyNumber(FuzzProgram* program) {
  uint64_t number = 0;
  for (uint8_t n = program->Byte() % 9; n > 0; --n) number = number << 8 | program->Byte();
  return number;
}

// An edited copy of what is there: the operations know lines and bytes alone.
void Edit(FuzzProgram* program, std::string* text) {
  constexpr std::array<std::string_view, 16> kWords{"0",
                                                    "1",
                                                    "-1",
                                                    "+1",
                                                    " ",
                                                    "\n",
                                                    "x",
                                                    "F",
                                                    "18446744073709551616",
                                                    "4294967296",
                                                    "255",
                                                    "../",
                                                    "crc32c ",
                                                    "kept 254 from 0000000000000000\n",
                                                    "version 3",
                                                    "file 00000000 0 a\n"};
  const size_t at = program->Below(static_cast<uint32_t>(text->size() + 1));
  switch (program->Byte() % 7) {
    case 0:
      if (at < text->size()) (*text)[at] = static_cast<char>(program->Byte());
      return;
    case 1:
      if (at < text->size()) (*text)[at] ^= static_cast<char>(1 << program->Byte() % 8);
      return;
    case 2:
      text->erase(at, program->Byte() % 64);
      return;
    case 3: {
      const std::string_view word = kWords[program->Byte() % kWords.size()];
      if (text->size() + word.size() <= kFileBytesMax) text->insert(at, word);
      return;
    }
    case 4: {  // a word over what is there
      const std::string_view word = kWords[program->Byte() % kWords.size()];
      if (at + word.size() <= text->size()) text->replace(at, word.size(), word);
      return;
    }
    case 5: {  // a line twice, or elsewhere
      const size_t begin = at == 0 ? 0 : text->rfind('\n', at - 1) + 1;
      const std::string line = text->substr(begin, text->find('\n', begin) - begin + 1);
      if ((program->Byte() & 1) != 0) text->erase(begin, line.size());
      const size_t to = text->find('\n', program->Below(static_cast<uint32_t>(text->size() + 1)));
      if (to == std::string::npos || text->size() + line.size() > kFileBytesMax) return;
      text->insert(to + 1, line);
      return;
    }
    default:
      text->resize(std::min<size_t>(at, kFileBytesMax));
  }
}

// As the input's bytes, or what is sound with edits.
std::string Edited(FuzzProgram* program, std::string sound) {
  const size_t operations = program->Byte() % kOperationsMax;
  for (size_t i = 0; i < operations && !program->empty(); ++i) Edit(program, &sound);
  return sound;
}
std::string RawText(FuzzProgram* program) {
  const std::vector<std::byte> bytes = program->Bytes(kFileBytesMax);
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// The last line of a sound file is that with the checksum.
std::string SealText(const std::string& text) {
  const size_t at = text.rfind(kCrcKey);
  const std::string body = text.substr(0, at == std::string::npos ? text.size() : at);
  return body + CrcLine(body);
}

// A reader sees memory of exactly the text's size.
std::vector<char> Exact(std::string_view text) { return {text.begin(), text.end()}; }
std::string_view ViewOf(const std::vector<char>& bytes) { return {bytes.data(), bytes.size()}; }
LogFiles FileOf(const char* name, std::string_view text) {
  const auto bytes = std::as_bytes(std::span(text));
  return {{name, Bytes(bytes.begin(), bytes.end())}};
}

// ---------------------------------------------------------------------------------------------

std::string SoundManifest(FuzzProgram* program) {
  CheckpointManifest manifest;
  manifest.round = static_cast<uint32_t>(AnyNumber(program));
  const size_t logs = 1 + program->Byte() % 8;
  for (size_t i = 0; i < logs; ++i) {
    manifest.logs.push_back({.from = AnyNumber(program),
                             .epoch = static_cast<uint32_t>(AnyNumber(program)),
                             .file_bytes = AnyNumber(program)});
  }
  auto log = static_cast<uint16_t>(logs);
  for (uint8_t n = program->Byte() % 4; n > 0; --n) {
    manifest.kept.push_back({.log = log, .from = AnyNumber(program)});
    log = static_cast<uint16_t>(log + 1 + program->Byte() % 64);
  }
  return PrintManifest(manifest);
}

void ReadManifestText(const std::string& text) {
  const std::vector<char> exact = Exact(text);
  const auto manifest = ParseManifest(ViewOf(exact));
  const LogFiles files = FileOf(kCheckpointManifestName, text);
  MemoryDisk disk(&files);
  const auto read = ReadManifest(disk);
  CHECK(disk.open_files() == 0 && disk.in_flight() == 0, "everything is closed again");
  CHECK(read.has_value() == manifest.has_value(), "the file says what its text says");
  if (!manifest) {
    CHECK(read.error().code == ErrorCode::kCorrupt || read.error().code == ErrorCode::kUnavailable,
          "it is damage, or another version");
    return;
  }
  CHECK(read->has_value() && **read == *manifest, "the file says what its text says");
  CHECK(!manifest->logs.empty() && manifest->logs.size() < kVaultLog, "a shard has a log");
  for (const CheckpointManifest::Kept& kept : manifest->kept) {
    CHECK(kept.log >= manifest->logs.size() && kept.log < kVaultLog, "it is of no shard");
  }
  CHECK(ParseManifest(PrintManifest(*manifest)) == manifest, "it is written as it was read");
}

std::string SoundInstance(FuzzProgram* program) {
  std::string text = "engram data directory\nformat_version ";
  text += std::to_string(program->Byte() % 4);
  InstanceId id;
  for (uint8_t& byte : id) byte = program->Byte();
  text += "\ninstance_id " + ToString(id) + "\ncreated_ns ";
  text += std::to_string(static_cast<int64_t>(AnyNumber(program))) + "\n";
  return text + CrcLine(text);
}

void ReadInstanceText(const std::string& text) {
  const LogFiles files = FileOf(kInstanceFileName, text);
  MemoryDisk memory(&files);
  const auto read = ReadInstance(memory);
  CHECK(memory.open_files() == 0 && memory.in_flight() == 0, "everything is closed again");
  // A start writes it anew where it is of an earlier version.
  SimulatedClock clock;
  SimulatedDisk medium(&clock, 1);
  std::unique_ptr<Disk> disk = medium.Open("data");
  CHECK(ReplaceFile(*disk, kInstanceFileName, std::as_bytes(std::span(text))).has_value(),
        "nothing fails");
  const auto opened = OpenDataDirectory(std::move(disk), 1, InstanceId{});
  CHECK(opened.has_value() == read.has_value(), "a start takes what can be read");
  if (!read) {
    CHECK(opened.error().code == read.error().code && read.error().code != ErrorCode::kNotFound,
          "and says why not");
    return;
  }
  CHECK(read->format_version <= kDataFormatVersion, "no later version is read");
  const auto again = ReadInstance(*medium.Open("data"));
  CHECK(again.has_value() && again->format_version == kDataFormatVersion && again->id == read->id &&
            again->created_ns == read->created_ns,
        "it is written as it was read");
}

std::string SoundCrashes(FuzzProgram* program) {
  std::string text;
  for (uint8_t n = program->Byte() % 8; n > 0; --n) {
    std::array<char, 64> line{};
    const uint64_t address = (program->Byte() & 1) != 0 ? 4'096 : AnyNumber(program);
    std::snprintf(line.data(), line.size(), "replay %016llx signal %02d",
                  static_cast<unsigned long long>(address), program->Byte() % 100);
    text += std::string(line.data()) + " " + CrcLine(line.data());
  }
  return text;
}
// Each line's own checksum.
std::string SealLines(std::string_view text) {
  std::string sealed;
  while (!text.empty()) {
    const size_t end = std::min(text.find('\n'), text.size() - 1) + 1;
    const std::string_view line = text.substr(0, end);
    const size_t at = line.rfind(std::string(" ") + std::string(kCrcKey));
    sealed += line.substr(0, at == std::string_view::npos ? line.size() : at);
    if (at != std::string_view::npos) {
      const std::string_view covered = line.substr(0, at);
      constexpr size_t kCoveredBytes = 33;
      sealed +=
          " " + CrcLine(covered.substr(covered.size() - std::min(covered.size(), kCoveredBytes)));
    }
    text.remove_prefix(end);
  }
  return sealed;
}

void ReadCrashesText(const std::string& text) {
  const LogFiles files = FileOf(kReplayCrashesName, text);
  MemoryDisk disk(&files);
  const auto read = ReadReplayCrashes(disk);
  CHECK(disk.open_files() == 0 && disk.in_flight() == 0, "everything is closed again");
  CHECK(read.has_value(), "a file of this length is read, whatever it says");
  for (const auto& [address, crashes] : *read) {
    std::array<char, 64> line{};
    std::snprintf(line.data(), line.size(), "replay %016llx signal ",
                  static_cast<unsigned long long>(address));
    uint32_t lines = 0;
    for (size_t at = text.find(line.data()); at != std::string::npos;
         at = text.find(line.data(), at + 1)) {
      ++lines;
    }
    CHECK(crashes > 0 && crashes <= lines, "each crash is a line");
  }
}

std::string SoundQuarantine(FuzzProgram* program) {
  SplitMix64 random(program->Byte());
  const LogAddress address = AnyNumber(program);
  const OwnedRecord owned = RandomRecord(random, AnyNumber(program));
  const LogRecord record = owned.get();
  QuarantinedRecord kept{.address = address,
                         .stamp = record.stamp,
                         .since_unix_ns = static_cast<int64_t>(AnyNumber(program)),
                         .crashes = static_cast<uint32_t>(AnyNumber(program)),
                         .record = Bytes(LogRecordBytes(record))};
  WriteLogRecord(record, address, kept.record.data());
  const Bytes bytes = WriteQuarantined(kept);
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}
// The record's checksum with its address, its length with the file's, then the file's checksum.
void SealQuarantine(std::string* text) {
  if (text->size() < kQuarantineHeaderBytes) return;
  const auto bytes = std::as_writable_bytes(std::span(*text));
  const auto record = bytes.subspan(kQuarantineHeaderBytes);
  const auto length = static_cast<uint32_t>(record.size());
  std::memcpy(bytes.data() + 44, &length, sizeof(length));
  if (length >= kLogRecordHeaderBytes) {
    std::array<std::byte, 12> prefix;
    std::memcpy(prefix.data(), bytes.data() + 16, 8);
    std::memcpy(prefix.data() + 8, &length, sizeof(length));
    std::memcpy(record.data(), &length, sizeof(length));
    const uint32_t crc = Crc32c(record.subspan(8), Crc32c(prefix));
    std::memcpy(record.data() + 4, &crc, sizeof(crc));
  }
  const uint32_t crc = Crc32c(bytes.subspan(kQuarantineCrcEnd));
  std::memcpy(bytes.data() + 8, &crc, sizeof(crc));
}

void ReadQuarantineBytes(const std::string& text, std::string_view name) {
  const std::vector<char> exact = Exact(text);
  const auto record = ParseQuarantined(std::as_bytes(std::span(exact)));
  if (record) {
    const Bytes again = WriteQuarantined(*record);
    CHECK(std::ranges::equal(again, std::as_bytes(std::span(exact))), "nothing else lies in it");
  }
  const auto named = QuarantinedAddress(name);
  CHECK(!named || QuarantineFileName(*named) == name, "an address has one name");
  // Under the name that it shall have, and under another one.
  const LogAddress address =
      record ? record->address : MakeLogAddress(3, MakeLogPosition(42, 4'096));
  for (const std::string& file : {QuarantineFileName(address), std::string(name)}) {
    const LogFiles files = FileOf(file.c_str(), text);
    MemoryDisk disk(&files);
    size_t notes = 0;
    const auto read = ReadQuarantine(disk, [&](const auto&) { ++notes; });
    CHECK(disk.open_files() == 0 && disk.in_flight() == 0, "everything is closed again");
    CHECK(read.has_value(), "a damaged one does not hide the others");
    const auto of_name = QuarantinedAddress(file);
    CHECK(read->size() == (of_name ? 1u : 0u), "each file that is named after a record counts");
    if (!of_name) continue;
    const bool is_sound = record && record->address == *of_name;
    CHECK(read->begin()->first == *of_name, "it is left out");
    CHECK(read->begin()->second == (is_sound ? record->stamp : kOpenStamp), "with its stamp");
    CHECK(notes == (is_sound ? 1 : 2), "what is damaged is told");
  }
}

std::string SoundBackup(FuzzProgram* program) {
  BackupList list;
  list.made_unix_ns = static_cast<int64_t>(AnyNumber(program));
  for (uint8_t n = program->Byte() % 6; n > 0; --n) {
    std::string name = (program->Byte() & 1) != 0 ? "log-000/" : "";
    name += "segment-" + std::to_string(program->Byte()) + ".log";
    list.files.push_back({.crc = static_cast<uint32_t>(AnyNumber(program)),
                          .bytes = AnyNumber(program),
                          .name = std::move(name)});
  }
  return PrintBackupList(list);
}

void ReadBackupText(const std::string& text) {
  const std::vector<char> exact = Exact(text);
  const auto list = ParseBackupList(ViewOf(exact));
  if (!list) return;
  for (const BackupList::File& file : list->files) {
    CHECK(!file.name.empty() && file.name.front() != '/' && file.name.back() != '/',
          "a name has one or two parts");
    CHECK(std::ranges::count(file.name, '/') <= 1, "a name has one or two parts");
    const std::string path = "/" + file.name + "/";
    CHECK(path.find("/../") == std::string::npos && path.find("/./") == std::string::npos,
          "no file lies elsewhere");
  }
  CHECK(ParseBackupList(PrintBackupList(*list)) == list, "it is written as it was read");
}

void Run(std::span<const uint8_t> input) {
  FuzzProgram program(input);
  const uint8_t choice = program.Byte();
  const bool is_raw = (choice & 0xC0) == 0xC0;
  const bool seals = (choice & 0x38) != 0x38;
  const auto make = [&](auto sound) {
    return is_raw ? RawText(&program) : Edited(&program, sound(&program));
  };
  switch (choice % 5) {
    case 0: {
      const std::string text = make(SoundManifest);
      ReadManifestText(seals ? SealText(text) : text);
      return;
    }
    case 1: {
      std::string text = make(SoundInstance);
      ReadInstanceText(seals ? SealText(text) : text);
      return;
    }
    case 2: {
      const std::string text = make(SoundCrashes);
      ReadCrashesText(seals ? SealLines(text) : text);
      return;
    }
    case 3: {
      std::string name = QuarantineFileName(AnyNumber(&program));
      if ((program.Byte() & 1) != 0) Edit(&program, &name);
      std::string text = make(SoundQuarantine);
      if (seals) SealQuarantine(&text);
      ReadQuarantineBytes(text, name);
      return;
    }
    default: {
      const std::string text = make(SoundBackup);
      ReadBackupText(seals ? SealText(text) : text);
    }
  }
}

}  // namespace
}  // namespace engram

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  engram::Run({data, size});
  return 0;
}
