#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include <google/protobuf/timestamp.pb.h>

#include "engram/v1/memory.pb.h"
#include "src/core/observation.h"

// Engram's messages to what a shard keeps (vector, id, time, confidence, payload), and back.

namespace engram {

// What an episode or memory has where the client says nothing.
inline constexpr float kDefaultConfidence = 0.7F;

// How many bytes at the beginning of `text` are UTF-8: all of them where it is. Protobuf's strings
// have to be, and clients refuse a message that breaks that.
size_t Utf8Prefix(std::string_view text);

google::protobuf::Timestamp ToTimestamp(int64_t unix_ns);
// Nothing for a time that nanoseconds in 64 bits cannot say (before 1677 or after 2262), or for
// nanos outside 0 to 999,999,999.
std::optional<int64_t> ToUnixNs(const google::protobuf::Timestamp& time);

v1::ConfidenceCategory CategoryOf(float confidence);
// With the category that follows from the value.
void SetConfidence(float value, v1::Confidence* confidence);
// Its value; where that is 0, the least value of its category.
float ValueOf(const v1::Confidence& confidence);

// How similar two vectors with this score are, 1 at most. Cosine and inner product: the score. L2:
// 1 / (1 + squared distance).
float SimilarityOf(Metric metric, float score);

// The payload of an episode: PayloadKind::kEpisode, all but id, time and embedding.
std::string PayloadOf(const v1::Episode& episode);
// The payload of a memory: PayloadKind::kMemory, all but id and embedding.
std::string PayloadOf(const v1::Memory& memory);

// One hit of an answer.
struct HitView {
  HitHeader header{};
  const std::byte* vector = nullptr;  // header.vector_dimension float32 numbers, not aligned
  std::string_view id;
  std::string_view space;  // empty where one was recalled
  std::string_view payload;
};

// Reads the hits of a GatewayAnswer in order.
class HitReader {
 public:
  explicit HitReader(std::span<const std::byte> hits) : left_(hits) {}
  // Nothing when that was all.
  std::optional<HitView> Next();

 private:
  std::span<const std::byte> left_;
};

// `hit` as a memory, whatever wrote it; confidence is the encoding confidence, activation 0.
void ToMemory(const HitView& hit, v1::Memory* memory);

}  // namespace engram
