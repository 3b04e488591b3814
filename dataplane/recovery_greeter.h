#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "dataplane/frame_format.h"
#include "src/core/counters.h"
#include "src/core/network.h"

namespace engram {

// What an ingress core's connections meet while the shards recover: a ping is answered (the daemon
// lives), anything else is refused with `recovering`, which says how far it is and when to come
// again. When the shards serve, those that have asked for nothing yet go on with the ingress core
// as if they had just come.
//
// Thread safety: the ingress core's alone. Allocates: it is done before the core serves.
class RecoveryGreeter final : public NetworkHandler {
 public:
  // `network` outlives it. `progress` is a sentence for a person, asked for at each refusal.
  RecoveryGreeter(Network* network, uint32_t max_connections,
                  std::function<std::string()> progress);

  // One bounded round; returns how much was done.
  int Poll(int budget) { return network_->Poll(*this, budget); }
  // Gives every connection to `next`, which gets all events from now on and passes over those of
  // connections that it does not know; or ends it, where it was refused or has begun to say
  // something, which cannot be given. Whoever finds his connection gone tries again, as he was
  // told.
  void HandOver(NetworkHandler* next);

  const Counter& refused() const { return refused_; }

  // NetworkHandler.
  void OnAccept(ConnectionId id) override;
  void OnReceive(ConnectionId id, std::span<const std::byte> bytes) override;
  void OnClosed(ConnectionId id, CloseCause cause) override;

  static constexpr uint32_t kRetryAfterMs = 1'000;

 private:
  struct Guest {
    ConnectionId id;
    bool open = false;
    bool refused = false;
    uint32_t begun_bytes = 0;  // of a frame, in `begun`
    std::array<std::byte, kFrameHeaderBytes> begun{};
  };
  void Refuse(Guest& guest, const FrameHeader& header);

  Network* const network_;
  const std::function<std::string()> progress_;
  std::vector<Guest> guests_;  // by ConnectionId::index
  Counter refused_;
};

}  // namespace engram
