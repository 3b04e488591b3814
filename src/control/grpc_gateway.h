#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "src/control/gateway_inbox.h"
#include "src/core/clock.h"
#include "src/core/counters.h"
#include "src/core/network.h"
#include "src/core/result.h"
#include "src/core/space_catalogue.h"
#include "src/core/stream_network.h"

namespace engram {

struct GrpcOptions {
  Endpoint endpoint;      // port 0: any free one
  std::vector<int> cpus;  // where gRPC's threads run
  // The largest request: what gRPC's clients take too unless told otherwise.
  int max_request_bytes = 4 << 20;
  // What requests under way may take; gRPC reads no more of them beyond it.
  size_t request_memory_bytes = size_t{512} << 20;
  // What the answers to reading calls may take that clients have not read yet. Beyond it calls are
  // told to come again, but for small answers, which may take some more: so a client that does not
  // read cannot take everything from the others.
  size_t unread_bytes = size_t{512} << 20;
  size_t unread_small_bytes = size_t{64} << 20;
  // A client that says nothing for this long is asked whether it lives, and is cut off if it does
  // not say so in time. With it go its calls and what it has not read.
  int keepalive_ms = 60'000;
  int keepalive_timeout_ms = 20'000;
  int max_calls_of_connection = 1'024;  // under way
  // Where it is given, calls are refused with UNAVAILABLE and what this says (any thread asks),
  // and health is NOT_SERVING, until SetServing. Empty: it serves at once.
  std::function<std::string()> recovering = {};
};

// Engram's calls and streams over gRPC (engram.v1.EngramService), with grpc.health.v1 and server
// reflection. Threads are gRPC's own; they reach the appliance through the gateway core's door and
// the pipes of streams only.
//
// Lifecycle: Start, once the gateway core polls; SetServing, where the options asked for it;
// Shutdown, while it still does; destructor.
//
// Health is told under three names. "" and the service's are SERVING while calls are answered;
// "liveness" is from the start until Shutdown.
class GrpcGateway {
 public:
  // Whether this program was built with gRPC; without it Start fails with kUnavailable.
  static bool IsBuilt();
  // `clock`, `counters` (read by Introspect, filled before Start), `spaces` and `streams` (whose
  // ingress core polls until Shutdown has returned) outlive the gateway.
  // Errors name listen.grpc and the remedy.
  static Result<std::unique_ptr<GrpcGateway>> Start(const GrpcOptions& options, GatewayDoor door,
                                                    Clock* clock, const CounterCatalogue* counters,
                                                    const SpaceCatalogue* spaces,
                                                    StreamNetwork* streams);
  virtual ~GrpcGateway() = default;

  // With the port that was given.
  virtual const Endpoint& endpoint() const = 0;
  // What was recovered is there: calls are answered from now on. Any thread, once.
  virtual void SetServing() = 0;
  // Takes no more calls, waits until those that were taken are answered, and cuts those that are
  // not by then. Blocks.
  virtual void Shutdown(int64_t timeout_ns) = 0;
};

}  // namespace engram
