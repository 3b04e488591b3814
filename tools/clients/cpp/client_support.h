#pragma once

#include <cstddef>
#include <cstdint>
#include <expected>
#include <span>
#include <string>

#include "src/core/clock.h"
#include "src/core/result.h"
#include "tools/clients/cpp/engram_client.h"

// What the client's own files share.

namespace engram {

// A connection on which nothing was received for so long is pinged.
inline constexpr int64_t kKeepAliveNs = 60 * kNanosPerSecond;

// Monotonic.
int64_t NowNs();

// Waits for `events` on `fd` until `deadline_ns`. False when the time is over.
bool WaitFor(int fd, short events, int64_t deadline_ns);

// kCorrupt: the server said what it may not.
std::unexpected<Error> FailGrammar(const std::string& what);

// Adds the hits of one result frame to `answer`, which may come to have `k` of them.
Result<void> AddHits(std::span<const std::byte> body, uint32_t k, RecallAnswer& answer);

}  // namespace engram
