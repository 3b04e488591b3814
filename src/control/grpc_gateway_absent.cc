// Stands for grpc_gateway.cc in a build without gRPC.

#include "src/control/grpc_gateway.h"

namespace engram {

bool GrpcGateway::IsBuilt() { return false; }

Result<std::unique_ptr<GrpcGateway>> GrpcGateway::Start(const GrpcOptions& options, GatewayDoor,
                                                        Clock*, const CounterCatalogue*,
                                                        const SpaceCatalogue*, StreamNetwork*) {
  return Fail(ErrorCode::kUnavailable,
              "listen.grpc: " + options.endpoint.ToString() +
                  " cannot be served: this engramd was built without gRPC. Install libgrpc++-dev "
                  "and protobuf-compiler-grpc and build again, or set listen.grpc = \"\"");
}

}  // namespace engram
