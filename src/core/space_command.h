#pragma once

#include <cstdint>

namespace engram {

// What an operator has done to a whole space. On the wire: unchangeable.
enum class SpaceCommand : uint8_t {
  kCompact = 1,  // what has ended is swept out now, and its memory given back
  kDrop = 2,     // all of it is gone
  kRebuild = 3,  // all that is in its graph is linked anew
};

}  // namespace engram
