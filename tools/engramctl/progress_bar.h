#pragma once

#include <cstdint>
#include <string>

namespace engram {

// A line on standard error that is drawn over and over; nothing where that is no terminal.
class ProgressBar {
 public:
  // `label` says what is counted up to `total`.
  ProgressBar(std::string label, uint64_t total);
  ~ProgressBar() { Clear(); }
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;

  // Draws when the last time is long enough ago.
  void Update(uint64_t done, uint64_t refused, int64_t now_ns);
  // Takes the line away, so that others can be written.
  void Clear();

 private:
  const std::string label_;
  const uint64_t total_;
  const bool enabled_;
  bool drawn_ = false;
  int64_t start_ns_ = 0;
  int64_t last_ns_ = 0;
};

}  // namespace engram
