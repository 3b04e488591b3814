#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "src/core/disk.h"
#include "src/core/log_address.h"
#include "src/core/result.h"

namespace engram {

// The file of the data directory in which a process that dies while it recovers says of which
// record: a line for each such death, written by its signal handler. A start that recovers removes
// it. Its grammar:
//
//   crash := "replay " address " signal " number " crc32c " crc "\n"
//
// `address` (src/core/log_address.h) has 16 hexadecimal digits, `number` 2 decimal ones, `crc` 8
// hexadecimal ones and covers the line before " crc32c". What is no such line is passed over: a
// disk without room may have taken a part of one.
inline constexpr const char* kReplayCrashesName = "REPLAY-CRASHES";

// By record: how many starts have died of it. Nothing where the file is missing.
Result<std::map<LogAddress, uint32_t>> ReadReplayCrashes(Disk& root);
// Where in the file something is that is no whole line: `cut_off` is what the beginning of a write
// may have left, `damaged` no write leaves. Nothing where the file is missing. Errors: as above.
struct ReplayCrashCheck {
  std::vector<uint64_t> damaged;
  std::vector<uint64_t> cut_off;
};
Result<ReplayCrashCheck> CheckReplayCrashLines(Disk& root);
// For good. Nothing happens where there is none.
Result<void> RemoveReplayCrashes(Disk& root);

// While it lives, a thread that dies of a signal of its own making (SIGSEGV, SIGBUS, SIGILL,
// SIGFPE, SIGABRT) inside a ReplayScope leaves a line in the file. What follows is what would have
// followed without it: an end by that signal, with a core dump where the system makes one.
//
// Only the process itself can make it write: a kill -9, the kernel's want of memory and a power cut
// run no handler, and a signal that another process sends is told by its sender. So whoever kills a
// daemon that replays, as often as he likes, does not put a healthy record in quarantine.
//
// Thread safety: one of them lives at a time; made and ended by the thread that starts the others.
class ReplayCrashHandler {
 public:
  // `directory`: the data directory.
  explicit ReplayCrashHandler(const std::string& directory);
  ~ReplayCrashHandler();
  ReplayCrashHandler(const ReplayCrashHandler&) = delete;
  ReplayCrashHandler& operator=(const ReplayCrashHandler&) = delete;
};

// While it lives, signal handlers of the thread that made it run on memory of their own, so that
// the end of its stack can be told as well.
class SignalStack {
 public:
  SignalStack();
  ~SignalStack();
  SignalStack(const SignalStack&) = delete;
  SignalStack& operator=(const SignalStack&) = delete;

 private:
  std::unique_ptr<char[]> memory_;
};

}  // namespace engram
