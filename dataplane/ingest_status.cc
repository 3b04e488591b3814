// What an ingress core says of itself and, from the catalogue, of every other core. Cold, but on
// the core's own thread: bounded work, no allocation.

#include <array>
#include <charconv>
#include <cstring>

#include "dataplane/ingest_core.h"
#include "src/core/log_address.h"
#include "src/core/log_files.h"

namespace engram {

namespace {

constexpr size_t kStatusFrameBytes = 60 * 1024;

// Appends text to a fixed buffer; what does not fit is cut.
class LineWriter {
 public:
  explicit LineWriter(std::span<std::byte> buffer) : buffer_(buffer) {}
  void Text(std::string_view text) {
    const size_t count = std::min(text.size(), buffer_.size() - used_);
    std::memcpy(buffer_.data() + used_, text.data(), count);
    used_ += count;
  }
  void Number(uint64_t value) {
    std::array<char, 24> digits;
    const auto end = std::to_chars(digits.data(), digits.data() + digits.size(), value).ptr;
    Text({digits.data(), end});
  }
  size_t room() const { return buffer_.size() - used_; }
  std::span<const std::byte> Take() {
    const std::span<const std::byte> written = buffer_.first(used_);
    used_ = 0;
    return written;
  }

 private:
  std::span<std::byte> buffer_;
  size_t used_ = 0;
};

}  // namespace

std::string_view IngestCounterName(IngestCounter counter) {
  static constexpr std::array<std::string_view, static_cast<size_t>(IngestCounter::kCount)> kNames =
      {"connections_opened",
       "connections_closed",
       "bytes_received",
       "frames_received",
       "frames_gathered",
       "observations_received",
       "observations_accepted",
       "observations_repeated",
       "recalls_received",
       "recalls_answered",
       "acks_sent",
       "naks_sent",
       "partial_frames_evicted",
       "detaches_lost"};
  return kNames[static_cast<size_t>(counter)];
}

void IngestCore::AddCounters(std::string_view core, CounterCatalogue* catalogue) const {
  for (size_t i = 0; i < static_cast<size_t>(IngestCounter::kCount); ++i) {
    const auto which = static_cast<IngestCounter>(i);
    catalogue->push_back({std::string(core), IngestCounterName(which), &counters_[which]});
  }
  if (records_ != nullptr) records_->AddCounters(core, catalogue);
  for (const RefusalInfo& info : kRefusals) {
    catalogue->push_back(
        {std::string(core), info.name, &refusals_[static_cast<size_t>(info.reason)]});
  }
}

// One line `core counter value` each.
void IngestCore::SendStatus(Connection& connection, uint64_t request_id) {
  // The frame being answered may lie at the scratch buffer's start; it is 33 bytes long.
  LineWriter lines(std::span<std::byte>(scratch_).last(kStatusFrameBytes));
  const IntrospectionBody body{.what = IntrospectWhat::kStatus};
  const uint64_t session = connection.session.value();
  constexpr size_t kLineRoom = 256;
  const auto say = [&](std::string_view name, std::string_view text) {
    if (text.empty()) return;
    lines.Text(name);
    lines.Text(text);
    lines.Text("\n");
  };
  say("control data_directory ", options_.data_directory);
  say("control instance_id ", options_.instance_id);
  // By this core, which is the one that reads for whoever asks.
  const auto place = [&](std::string_view name, LogAddress address) {
    if (address == kNoLogAddress) return;
    lines.Text("records ");
    lines.Text(name);
    lines.Text(" ");
    lines.Text(LogFolder(LogOf(address)));
    lines.Text("/");
    lines.Text(SegmentName(SegmentOf(PositionOf(address))));
    lines.Text(":");
    lines.Number(OffsetOf(PositionOf(address)));
    lines.Text("\n");
  };
  if (records_ != nullptr) {
    place("unreadable_at", records_->unreadable());
    place("mended_at", records_->mended());
  }
  for (const CounterView& view : *catalogue_) {
    const uint64_t value = view.counter->Read();
    lines.Text(view.core);
    lines.Text(" ");
    lines.Text(view.name);
    lines.Text(" ");
    lines.Number(value);
    lines.Text("\n");
    if (lines.room() < kLineRoom) {
      SendIntrospection(network_, connection.id, session, request_id, body, true, lines.Take());
    }
  }
  SendIntrospection(network_, connection.id, session, request_id, body, false, lines.Take());
}

}  // namespace engram
