#include "dataplane/recovery_greeter.h"

#include <algorithm>
#include <utility>

#include "dataplane/frame_writer.h"
#include "src/core/check.h"

namespace engram {

RecoveryGreeter::RecoveryGreeter(Network* network, uint32_t max_connections,
                                 std::function<std::string()> progress)
    : network_(network), progress_(std::move(progress)), guests_(max_connections) {}

void RecoveryGreeter::OnAccept(ConnectionId id) {
  CHECK(id.index < guests_.size(), "the network has as many places as the ingress core");
  guests_[id.index] = {.id = id, .open = true};
}

void RecoveryGreeter::OnReceive(ConnectionId id, std::span<const std::byte> bytes) {
  Guest& guest = guests_[id.index];
  while (!bytes.empty() && guest.open && !guest.refused) {
    const size_t count = std::min<size_t>(bytes.size(), guest.begun.size() - guest.begun_bytes);
    std::copy_n(bytes.begin(), count, guest.begun.begin() + guest.begun_bytes);
    guest.begun_bytes += static_cast<uint32_t>(count);
    bytes = bytes.subspan(count);
    if (guest.begun_bytes < guest.begun.size()) return;
    FrameHeader header;
    const bool is_ping = CheckFrameHeader(guest.begun.data(), &header) == RefusalReason::kNone &&
                         header.type == FrameType::kPing && header.length == 0 &&
                         CheckFrameCrc(header, guest.begun) == RefusalReason::kNone;
    if (!is_ping) {
      Refuse(guest, header);
      return;
    }
    guest.begun_bytes = 0;
    if ((header.flags & kFrameFlagPingAnswer) == 0) {
      SendPingAnswer(network_, id, header.session, header.sequence);
    }
  }
}

void RecoveryGreeter::Refuse(Guest& guest, const FrameHeader& header) {
  const std::string text = progress_();
  NakDetail detail;
  detail.refused_type = header.magic == kFrameMagic ? header.type : FrameType::kHello;
  detail.flags = kNakFlagClosing;
  detail.retry_after_ms = kRetryAfterMs;
  detail.text = text;
  guest.refused = true;
  refused_.Add(1);
  SendNak(network_, guest.id, RefusalReason::kRecovering, detail);
  network_->Close(guest.id, Network::CloseMode::kAfterSending);
}

void RecoveryGreeter::OnClosed(ConnectionId id, CloseCause) { guests_[id.index].open = false; }

void RecoveryGreeter::HandOver(NetworkHandler* next) {
  for (Guest& guest : guests_) {
    if (!guest.open) continue;
    if (guest.refused || guest.begun_bytes > 0) {
      network_->Close(guest.id, Network::CloseMode::kNow);
    } else {
      next->OnAccept(guest.id);
    }
  }
  guests_.clear();
}

}  // namespace engram
