#pragma once

#include <span>
#include <string>

#include "engram/v1/memory.pb.h"
#include "engram/v1/service.pb.h"
#include "src/control/call_faults.h"

// What recalls filter by (src/core/attributes.h), of Engram's messages.

namespace engram {

// The attributes of an episode: where_location, each of who, and memory_type episodic.
Asked AttributesOf(const v1::Episode& episode, std::string* bytes);
// Of a memory: tags, memory_type, and what its metadata has under `filter_keys`, which are those of
// its space. Empty tags are none.
Asked AttributesOf(const v1::Memory& memory, std::span<const std::string> filter_keys,
                   std::string* bytes);

// The filter that `filter` and `context` of a request make together, and the context that it has
// for a cue; empty: there is none. Never empty with such a cue.
Asked FilterOf(const v1::RecallRequest& request, std::span<const std::string> filter_keys,
               std::string* bytes);
Asked FilterOf(const v1::StreamingRecallRequest& request, std::span<const std::string> filter_keys,
               std::string* bytes);

}  // namespace engram
