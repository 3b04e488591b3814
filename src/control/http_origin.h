#pragma once

#include <span>
#include <string>
#include <string_view>

namespace engram {

// Whether a browser may be served that a page of `origin` (RFC 6454) told to ask us, as `host` (the
// header Host). Without an origin it is no browser, or a page of our own. Else the page has to come
// from the same host, from this machine, or from one of `allowed` (whole origins, like
// "https://example.com"). So a page of somebody else cannot have the browser of a user who may
// reach us speak for him (cross-site WebSocket hijacking).
bool IsServedOrigin(std::string_view origin, std::string_view host,
                    std::span<const std::string> allowed);

}  // namespace engram
