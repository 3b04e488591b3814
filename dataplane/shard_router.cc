#include "dataplane/shard_router.h"

#include "src/core/check.h"
#include "src/core/hash.h"

namespace engram {

ShardRouter::ShardRouter(uint16_t shards) : shards_(shards) {
  CHECK(shards > 0, "there is at least one shard");
}

ShardId ShardRouter::HomeOf(std::string_view space) const {
  // Fixed: the answer may not differ between two starts of the daemon.
  constexpr uint64_t kRoutingSeed = 0x656E6772616D0001;
  const uint64_t name = HashString(space, kRoutingSeed);
  uint16_t best = 0;
  uint64_t best_draw = 0;
  for (uint16_t shard = 0; shard < shards_; ++shard) {
    const uint64_t draw = MixBits(name ^ MixBits(shard + uint64_t{1}));
    if (draw > best_draw) {
      best_draw = draw;
      best = shard;
    }
  }
  return ShardId(best);
}

}  // namespace engram
