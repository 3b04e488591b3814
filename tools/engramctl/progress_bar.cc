#include "tools/engramctl/progress_bar.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <utility>

#include "src/core/clock.h"
#include "tools/engramctl/table.h"

namespace engram {

namespace {

constexpr int64_t kRedrawNs = 100 * kNanosPerMilli;
constexpr size_t kBarColumns = 24;

}  // namespace

ProgressBar::ProgressBar(std::string label, uint64_t total)
    : label_(std::move(label)), total_(total), enabled_(isatty(STDERR_FILENO) != 0) {}

void ProgressBar::Update(uint64_t done, uint64_t refused, int64_t now_ns) {
  if (!enabled_ || total_ == 0) return;
  if (start_ns_ == 0) start_ns_ = now_ns;
  if (now_ns - last_ns_ < kRedrawNs) return;
  last_ns_ = now_ns;
  drawn_ = true;

  const uint64_t shown = std::min(done, total_);
  const auto filled = static_cast<size_t>(shown * kBarColumns / total_);
  const double seconds =
      static_cast<double>(now_ns - start_ns_) / static_cast<double>(kNanosPerSecond);
  const auto rate = seconds > 0 ? static_cast<uint64_t>(static_cast<double>(done) / seconds) : 0;
  std::string line = label_ + " [" + std::string(filled, '=') +
                     std::string(kBarColumns - filled, ' ') + "] " +
                     std::to_string(shown * 100 / total_) + " %  " + WithThousands(done) + " of " +
                     WithThousands(total_) + "  " + WithThousands(rate) + "/s";
  if (refused > 0) line += "  " + WithThousands(refused) + " refused";
  // Back to the first column, and away with what is left of a longer line.
  std::fprintf(stderr, "\r%s\x1b[K", CutToColumns(line, TerminalColumns(stderr)).c_str());
  std::fflush(stderr);
}

void ProgressBar::Clear() {
  if (!drawn_) return;
  std::fputs("\r\x1b[K", stderr);
  drawn_ = false;
}

}  // namespace engram
