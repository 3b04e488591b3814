#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "src/core/log_address.h"
#include "src/core/log_files.h"

namespace engram {

// One file of a log, or of the vault.
struct LogSegment {
  uint16_t log = 0;
  uint32_t number = 0;
  friend auto operator<=>(const LogSegment&, const LogSegment&) = default;
};
constexpr LogSegment SegmentAt(LogAddress address) {
  return {LogOf(address), SegmentOf(PositionOf(address))};
}

// The record of a node moves: what names it as `from` is to say `to`.
struct OriginMove {
  uint32_t space = 0;  // the shard's number of it
  uint32_t node = 0;
  LogAddress from = kNoLogAddress;
  LogAddress to = kNoLogAddress;
};

// What one shard finds in the segments of all logs while it saves itself: how many bytes of each
// it names, and, of those that are to be taken over, by what.
//
// Thread safety: the control plane's until the shard is told to save, then the shard's until it has
// said that it has saved itself.
// Invariants: Count takes no memory; no more than the room for them are found.
class LiveTable {
 public:
  struct Live {
    uint64_t bytes = 0;
    uint64_t records = 0;
  };
  struct Found {
    LogAddress address = kNoLogAddress;
    uint32_t record_bytes = 0;
    uint32_t space = 0;
    uint32_t node = 0;
  };

  // `segments` rising, each once. Of those in `wanted`, rising, `room` nodes are listed at most.
  LiveTable(std::vector<LogSegment> segments, const std::vector<LogSegment>& wanted, size_t room)
      : segments_(std::move(segments)), live_(segments_.size()), is_wanted_(segments_.size()) {
    for (size_t i = 0; i < segments_.size(); ++i) {
      is_wanted_[i] = std::ranges::binary_search(wanted, segments_[i]) ? 1 : 0;
    }
    found_.reserve(room);
  }

  // A node that is saved. A segment that the table has not is a newer one, or is missing.
  void Count(uint32_t space, uint32_t node, LogAddress address, uint32_t record_bytes) {
    const LogSegment segment = SegmentAt(address);
    if (last_ >= segments_.size() || segments_[last_] != segment) {
      const auto at = std::ranges::lower_bound(segments_, segment);
      if (at == segments_.end() || *at != segment) {
        const bool has_later = at != segments_.end() && at->log == segment.log;
        if (has_later || segment.log == kVaultLog) CountMissing(segment);
        return;
      }
      last_ = static_cast<size_t>(at - segments_.begin());
    }
    live_[last_].bytes += record_bytes;
    ++live_[last_].records;
    if (is_wanted_[last_] != 0 && found_.size() < found_.capacity()) {
      found_.push_back({address, record_bytes, space, node});
    }
  }

  struct Missing {
    LogSegment segment;
    uint64_t records = 0;
  };
  // Segments that are named and are not there: of the vault, or before others of their log. The
  // first few.
  std::span<const Missing> missing() const { return {missing_.data(), missing_count_}; }

  std::span<const LogSegment> segments() const { return segments_; }
  const Live& live(size_t i) const { return live_[i]; }
  std::span<const Found> found() const { return found_; }

 private:
  void CountMissing(LogSegment segment) {
    const auto end = missing_.begin() + static_cast<ptrdiff_t>(missing_count_);
    auto at = std::ranges::find(missing_.begin(), end, segment, &Missing::segment);
    if (at == end) {
      if (missing_count_ == missing_.size()) return;
      ++missing_count_;
      at->segment = segment;
    }
    ++at->records;
  }

  std::vector<LogSegment> segments_;
  std::vector<Live> live_;
  std::vector<uint8_t> is_wanted_;
  std::vector<Found> found_;
  size_t last_ = 0;  // that was counted in
  std::array<Missing, 16> missing_{};
  size_t missing_count_ = 0;
};

}  // namespace engram
