#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "tools/clients/cpp/engram_client.h"

namespace engram {

// Whether bytes go into JSON as text: valid UTF-8 (RFC 3629) without control characters other than
// tab, line feed and carriage return. All others go as base64 (RFC 4648, padded) under the name
// with "_base64" behind it.
bool IsPlainText(std::string_view bytes);
std::string Base64(std::string_view bytes);

// One line without its newline:
//   {"id": "7", "vector": [0.5, -1], "when_ns": 0, "confidence": 1, "stamp": 17..., "payload": "x"}
// Numbers of float32 come back exactly, also by way of a double. "payload_kind" is there unless 0.
std::string JsonLineOf(const RecallHit& hit);
// A line of FILE.ids: the id as a JSON string, or {"id_base64": "..."}.
std::string IdLineOf(std::string_view id);

// The ids that were exported, as 128 bits of hash each: in a scroll one comes again where it was
// updated and so moved to another partition.
//
// Takes 16 bytes for each place, of which up to 3 in 4 are used.
class SeenIds {
 public:
  SeenIds();
  // False where it was added before.
  bool Add(std::string_view id);
  size_t size() const { return size_; }

 private:
  using Key = std::pair<uint64_t, uint64_t>;

  void Grow();
  // Where the key is, or may be put.
  size_t PlaceOf(const Key& key) const;

  std::vector<Key> places_;  // a power of two; {0, 0}: nothing
  size_t size_ = 0;
};

}  // namespace engram
