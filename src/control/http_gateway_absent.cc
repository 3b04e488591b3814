// Stands for http_gateway.cc in a build without Boost.Beast or simdjson.

#include "src/control/http_gateway.h"

namespace engram {

bool HttpGateway::IsBuilt() { return false; }

Result<std::unique_ptr<HttpGateway>> HttpGateway::Start(const HttpOptions& options, GatewayDoor,
                                                        Clock*, const SpaceCatalogue*,
                                                        StreamNetwork*) {
  return Fail(ErrorCode::kUnavailable,
              "listen.http: " + options.endpoint.ToString() +
                  " cannot be served: this engramd was built without Boost.Beast and simdjson. "
                  "Install libboost-dev and libsimdjson-dev and build again, or set listen.http = "
                  "\"\"");
}

}  // namespace engram
