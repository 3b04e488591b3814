#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "src/control/gateway_inbox.h"
#include "src/core/clock.h"
#include "src/core/counters.h"
#include "src/core/network.h"
#include "src/core/result.h"

namespace engram {

struct GrpcOptions {
  Endpoint endpoint;      // port 0: any free one
  std::vector<int> cpus;  // where gRPC's threads run
  // The largest request. A batch of 64 observations of 4,096 dimensions fits, and four times the
  // largest single one.
  int max_request_bytes = 4 << 20;
  // What all requests and answers under way may take; gRPC reads no more of them beyond it.
  size_t memory_bytes = size_t{512} << 20;
  int max_calls_of_connection = 1'024;  // under way
};

// Engram's unary calls over gRPC (engram.v1.EngramService), with grpc.health.v1 and server
// reflection. Threads are gRPC's own; they reach the appliance through the gateway core's door
// only.
//
// Lifecycle: Start, once the gateway core polls; Shutdown, while it still does; destructor.
class GrpcGateway {
 public:
  // Whether this program was built with gRPC; without it Start fails with kUnavailable.
  static bool IsBuilt();
  // `clock` and `counters` (read by Introspect, filled before Start) outlive the gateway. Errors
  // name listen.grpc and the remedy.
  static Result<std::unique_ptr<GrpcGateway>> Start(const GrpcOptions& options, GatewayDoor door,
                                                    Clock* clock, const CounterCatalogue* counters);
  virtual ~GrpcGateway() = default;

  // With the port that was given.
  virtual const Endpoint& endpoint() const = 0;
  // Takes no more calls, waits until those that were taken are answered, and cuts those that are
  // not by then. Blocks.
  virtual void Shutdown(int64_t timeout_ns) = 0;
};

}  // namespace engram
