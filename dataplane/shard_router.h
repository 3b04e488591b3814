#pragma once

#include <cstdint>
#include <string_view>

#include "src/core/ids.h"

namespace engram {

// The home shard of a space, by rendezvous hashing (Thaler and Ravishankar 1998): each shard draws
// a number from the space's name and its own, the highest wins. So when a shard is added or
// removed, only the spaces of that shard move. The same on every machine.
class ShardRouter {
 public:
  // `shards` is at least 1.
  explicit ShardRouter(uint16_t shards);

  ShardId HomeOf(std::string_view space) const;
  uint16_t shards() const { return shards_; }

 private:
  uint16_t shards_;
};

}  // namespace engram
