#include "src/replay_crashes.h"

#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <functional>
#include <optional>
#include <span>
#include <string_view>

#include "index/log/replay_guard.h"
#include "src/core/check.h"
#include "src/core/crc32c.h"

namespace engram {

namespace {

constexpr std::array kSignals = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT};
constexpr std::string_view kReplay = "replay ";
constexpr std::string_view kSignal = " signal ";
constexpr std::string_view kCrc = " crc32c ";
constexpr size_t kAddressDigits = 16;
constexpr size_t kCrcDigits = 8;
constexpr size_t kCoveredBytes = kReplay.size() + kAddressDigits + kSignal.size() + 2;
constexpr size_t kLineBytes = kCoveredBytes + kCrc.size() + kCrcDigits + 1;
// A start adds one line.
constexpr size_t kMaxFileBytes = size_t{1} << 20;
constexpr size_t kSignalStackBytes = size_t{64} << 10;

// What the handler reads; set before it is installed.
std::array<char, 4096> g_path;
std::array<struct sigaction, kSignals.size()> g_before;
std::atomic<bool> g_told{false};
static_assert(std::atomic<bool>::is_always_lock_free, "a signal handler uses it");

void WriteHex(uint64_t value, size_t digits, char* to) {
  for (size_t i = digits; i > 0; --i, value >>= 4) to[i - 1] = "0123456789abcdef"[value & 15];
}

// Calls nothing that a signal handler may not call.
std::array<char, kLineBytes> LineOf(LogAddress address, int signal) {
  std::array<char, kLineBytes> line;
  char* to = line.data();
  const auto append = [&to](std::string_view text) {
    std::memcpy(to, text.data(), text.size());
    to += text.size();
  };
  append(kReplay);
  WriteHex(address, kAddressDigits, to);
  to += kAddressDigits;
  append(kSignal);
  *to++ = static_cast<char>('0' + signal / 10 % 10);
  *to++ = static_cast<char>('0' + signal % 10);
  append(kCrc);
  WriteHex(Crc32c(std::as_bytes(std::span(line)).first(kCoveredBytes)), kCrcDigits, to);
  to += kCrcDigits;
  *to = '\n';
  return line;
}

std::optional<LogAddress> AddressIn(std::string_view line) {
  if (line.size() < kLineBytes) return std::nullopt;
  line.remove_prefix(line.size() - kLineBytes);  // What a write left that was cut off.
  LogAddress address = 0;
  int signal = 0;
  const char* digits = line.data() + kReplay.size();
  const char* number = digits + kAddressDigits + kSignal.size();
  if (std::from_chars(digits, digits + kAddressDigits, address, 16).ec != std::errc() ||
      std::from_chars(number, number + 2, signal).ec != std::errc()) {
    return std::nullopt;
  }
  const auto sound = LineOf(address, signal);
  if (line != std::string_view(sound.data(), sound.size())) return std::nullopt;
  return address;
}

// A signal that the kernel raised for what this thread did, or that the process sent itself, as
// abort() does.
bool IsOwn(const siginfo_t& info) {
  return info.si_code > 0 || (info.si_code != SI_QUEUE && info.si_pid == getpid());
}

void OnCrash(int signal, siginfo_t* info, void*) {
  const int saved_errno = errno;
  const LogAddress address = RecordUnderReplay();
  if (address != kNoLogAddress && IsOwn(*info) && !g_told.exchange(true)) {
    const auto line = LineOf(address, signal);
    const int fd =
        open(g_path.data(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOFOLLOW, 0600);
    // Where it cannot be written, the crash does not count; nothing else can be done about it here.
    if (fd >= 0) (void)!write(fd, line.data(), line.size());
  }
  for (size_t i = 0; i < kSignals.size(); ++i) {
    if (kSignals[i] == signal) sigaction(signal, &g_before[i], nullptr);
  }
  errno = saved_errno;
  // Waits until this handler returns; a faulting instruction would come again anyway.
  raise(signal);
}

// Each with the newline that ends it; the last one may have none.
Result<void> VisitLines(Disk& root,
                        const std::function<void(std::string_view line, uint64_t offset)>& visit) {
  const auto content = ReadWholeFile(root, kReplayCrashesName, kMaxFileBytes);
  if (!content) {
    if (content.error().code == ErrorCode::kNotFound) return {};
    return std::unexpected(content.error());
  }
  std::string_view text(reinterpret_cast<const char*>(content->data()), content->size());
  for (uint64_t offset = 0; !text.empty();) {
    const size_t end = std::min(text.find('\n'), text.size() - 1) + 1;
    visit(text.substr(0, end), offset);
    text.remove_prefix(end);
    offset += end;
  }
  return {};
}

}  // namespace

Result<std::map<LogAddress, uint32_t>> ReadReplayCrashes(Disk& root) {
  std::map<LogAddress, uint32_t> crashes;
  auto visited = VisitLines(root, [&](std::string_view line, uint64_t) {
    if (const auto address = AddressIn(line)) ++crashes[*address];
  });
  if (!visited) return std::unexpected(visited.error());
  return crashes;
}

// The newline is the last byte of a write: what was cut off has none, and what follows it begins
// in the middle of a line.
Result<ReplayCrashCheck> CheckReplayCrashLines(Disk& root) {
  ReplayCrashCheck check;
  auto visited = VisitLines(root, [&](std::string_view line, uint64_t offset) {
    const bool is_whole = AddressIn(line).has_value();
    const size_t other_bytes = line.size() - (is_whole ? kLineBytes : 0);
    if (other_bytes == 0) return;
    const bool may_be_cut = other_bytes < kLineBytes && (is_whole || line.back() != '\n');
    (may_be_cut ? check.cut_off : check.damaged).push_back(offset);
  });
  if (!visited) return std::unexpected(visited.error());
  return check;
}

Result<void> RemoveReplayCrashes(Disk& root) {
  if (auto removed = root.Remove(kReplayCrashesName); !removed) {
    if (removed.error().code == ErrorCode::kNotFound) return {};
    return removed;
  }
  return root.SyncDirectory();
}

ReplayCrashHandler::ReplayCrashHandler(const std::string& directory) {
  const std::string path = directory + "/" + kReplayCrashesName;
  CHECK(path.size() < g_path.size(), "the kernel takes no longer name of a file either");
  std::memcpy(g_path.data(), path.c_str(), path.size() + 1);
  g_told.store(false);
  (void)LineOf(1, 1);  // What the checksum sets up when it is called first is done outside.
  struct sigaction action = {};
  action.sa_sigaction = OnCrash;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (size_t i = 0; i < kSignals.size(); ++i) {
    CHECK(sigaction(kSignals[i], &action, &g_before[i]) == 0, "these signals have handlers");
  }
}

ReplayCrashHandler::~ReplayCrashHandler() {
  for (size_t i = 0; i < kSignals.size(); ++i) sigaction(kSignals[i], &g_before[i], nullptr);
}

SignalStack::SignalStack() : memory_(new char[kSignalStackBytes]) {
  const stack_t stack = {.ss_sp = memory_.get(), .ss_flags = 0, .ss_size = kSignalStackBytes};
  CHECK(sigaltstack(&stack, nullptr) == 0, "a thread outside of a handler may set its stack");
}

SignalStack::~SignalStack() {
  const stack_t none = {.ss_sp = nullptr, .ss_flags = SS_DISABLE, .ss_size = 0};
  sigaltstack(&none, nullptr);
}

}  // namespace engram
