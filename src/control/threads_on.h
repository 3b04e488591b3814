#pragma once

#include <sched.h>

#include <cstddef>
#include <vector>

namespace engram {

// While it lives, threads that this thread starts run on `cpus`.
class ThreadsOn {
 public:
  explicit ThreadsOn(const std::vector<int>& cpus) {
    restore_ = sched_getaffinity(0, sizeof(before_), &before_) == 0;
    cpu_set_t wanted;
    CPU_ZERO(&wanted);
    for (const int cpu : cpus) CPU_SET(static_cast<size_t>(cpu), &wanted);
    if (!cpus.empty()) pinned_ = sched_setaffinity(0, sizeof(wanted), &wanted) == 0;
  }
  ~ThreadsOn() {
    if (restore_) sched_setaffinity(0, sizeof(before_), &before_);
  }
  ThreadsOn(const ThreadsOn&) = delete;
  ThreadsOn& operator=(const ThreadsOn&) = delete;
  bool pinned() const { return pinned_; }

 private:
  cpu_set_t before_{};
  bool restore_ = false;
  bool pinned_ = true;
};

}  // namespace engram
