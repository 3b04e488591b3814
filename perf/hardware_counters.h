#pragma once

#include <linux/perf_event.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <system_error>

namespace engram {

// What the processor counts of the calling thread, outside the kernel, while Run runs. Where it is
// not to be had (a virtual machine without counters, kernel.perf_event_paranoid above 2) the
// figures are missing, and why() says why.
class HardwareCounters {
 public:
  struct Counts {
    std::optional<uint64_t> instructions;
    std::optional<uint64_t> llc_misses;  // of the last-level cache
  };

  HardwareCounters() : files_{Open(PERF_COUNT_HW_INSTRUCTIONS), Open(PERF_COUNT_HW_CACHE_MISSES)} {}
  HardwareCounters(const HardwareCounters&) = delete;
  HardwareCounters& operator=(const HardwareCounters&) = delete;
  ~HardwareCounters() {
    for (const int file : files_) {
      if (file >= 0) close(file);
    }
  }

  // Empty where both are counted.
  const std::string& why() const { return why_; }

  template <typename Work>
  Counts Run(Work work) {
    for (const int file : files_) {
      if (file >= 0) (void)ioctl(file, PERF_EVENT_IOC_RESET, 0);
    }
    for (const int file : files_) {
      if (file >= 0) (void)ioctl(file, PERF_EVENT_IOC_ENABLE, 0);
    }
    work();
    for (const int file : files_) {
      if (file >= 0) (void)ioctl(file, PERF_EVENT_IOC_DISABLE, 0);
    }
    return {.instructions = Read(files_[0]), .llc_misses = Read(files_[1])};
  }

 private:
  int Open(uint64_t config) {
    perf_event_attr attributes{};
    attributes.size = sizeof(attributes);
    attributes.type = PERF_TYPE_HARDWARE;
    attributes.config = config;
    attributes.disabled = 1;
    attributes.exclude_kernel = 1;
    attributes.exclude_hv = 1;
    const long file = syscall(SYS_perf_event_open, &attributes, 0, -1, -1, 0);
    if (file < 0) why_ = "perf_event_open: " + std::generic_category().message(errno);
    return static_cast<int>(file);
  }
  static std::optional<uint64_t> Read(int file) {
    uint64_t count = 0;
    if (file < 0 || read(file, &count, sizeof(count)) != sizeof(count)) return std::nullopt;
    return count;
  }

  std::string why_;
  std::array<int, 2> files_;
};

}  // namespace engram
