#pragma once

#include <compare>
#include <cstdint>
#include <functional>

namespace engram {

// A number that cannot be mistaken for another kind of number. Costs nothing at run time.
template <typename Tag, typename T>
class StrongId {
 public:
  using Value = T;
  constexpr StrongId() = default;
  constexpr explicit StrongId(T value) : value_(value) {}
  constexpr T value() const { return value_; }
  friend constexpr auto operator<=>(StrongId, StrongId) = default;

 private:
  T value_ = 0;
};

// Index of a shard, 0 to the number of shards - 1.
using ShardId = StrongId<struct ShardIdTag, uint16_t>;
// Index of a producer (an ingress core, later the gateway), 0 to the number of producers - 1.
using ProducerId = StrongId<struct ProducerIdTag, uint16_t>;
// A client's session, 0 where there is none. Drawn at random, so that it cannot be guessed.
using SessionId = StrongId<struct SessionIdTag, uint64_t>;
// Place of an observation in its session: the first is 1, each next one is the last + 1.
using Sequence = uint64_t;
// Place of a vector in one space of one shard.
using NodeId = uint32_t;
inline constexpr NodeId kNoNode = UINT32_MAX;

}  // namespace engram

template <typename Tag, typename T>
struct std::hash<engram::StrongId<Tag, T>> {
  size_t operator()(engram::StrongId<Tag, T> id) const noexcept {
    return std::hash<T>()(id.value());
  }
};
