#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "index/rabitq_learner.h"
#include "index/recall_job.h"
#include "index/space.h"
#include "src/core/arena_heap.h"
#include "src/core/check.h"
#include "src/core/commit_stamp.h"
#include "src/core/hash.h"
#include "src/core/huge_page_arena.h"
#include "src/core/observation.h"
#include "src/core/reader_epochs.h"
#include "src/core/shard_port.h"

// What the tests of spaces, recalls and the shard share: vectors in every dtype, an exact model of
// a space, and hits as they are read from result slots.

namespace engram {

// An arena and its heap.
struct TestHeap {
  explicit TestHeap(size_t bytes) : arena(Make(bytes)), heap(&arena) {}
  static HugePageArena Make(size_t bytes) {
    auto made = HugePageArena::Create({.reserve_bytes = bytes});
    CHECK(made.has_value(), "the test's arena");
    return *std::move(made);
  }
  // Leaves about `bytes` that have never been handed out.
  void LeaveOnly(size_t bytes) {
    while (arena.reserve_bytes() - arena.used_bytes() >= bytes + 2 * kCacheLineBytes) {
      (void)arena.Allocate(kCacheLineBytes, kCacheLineBytes);
    }
  }
  HugePageArena arena;
  ArenaHeap heap;
};

// Multiples of 1/4 from -24 to 24, not all zero: each dtype holds them without rounding.
inline std::vector<float> QuarterVector(SplitMix64* random, uint32_t dimension) {
  std::vector<float> vector(dimension);
  for (float& value : vector) value = (static_cast<float>(random->Below(193)) - 96) * 0.25F;
  if (std::ranges::all_of(vector, [](float value) { return value == 0; })) vector[0] = 1;
  return vector;
}

inline constexpr float kQuarterScale = 0.25F;  // of QuarterVectors as int8

inline uint16_t HalfBits(float value) {
  if (value == 0) return 0;
  int exponent = 0;
  const float mantissa = std::frexp(std::fabs(value), &exponent);  // 0.5 to 1
  const auto bits =
      static_cast<uint16_t>((exponent + 14) << 10 | static_cast<int>((2 * mantissa - 1) * 1024));
  return static_cast<uint16_t>(value < 0 ? bits | 0x8000 : bits);
}

inline std::vector<std::byte> EncodeVector(VectorDtype dtype, std::span<const float> vector) {
  std::vector<std::byte> bytes(VectorBytes(dtype, static_cast<uint32_t>(vector.size())));
  for (size_t i = 0; i < vector.size(); ++i) {
    std::byte* to = bytes.data() + i * ElementBytes(dtype);
    if (dtype == VectorDtype::kF32) std::memcpy(to, &vector[i], 4);
    const auto narrow = dtype == VectorDtype::kF16
                            ? HalfBits(vector[i])
                            : static_cast<uint16_t>(std::bit_cast<uint32_t>(vector[i]) >> 16);
    if (dtype == VectorDtype::kF16 || dtype == VectorDtype::kBf16) std::memcpy(to, &narrow, 2);
    if (dtype == VectorDtype::kInt8) {
      *to = static_cast<std::byte>(static_cast<int8_t>(vector[i] / kQuarterScale));
    }
  }
  return bytes;
}

inline std::span<const std::byte> BytesOf(const std::string& text) {
  return std::as_bytes(std::span(text));
}

// The definition of each metric's score, in double.
inline double ExactScore(Metric metric, std::span<const float> a, std::span<const float> b) {
  double dot = 0;
  double norms = 0;
  double a_norm = 0;
  double b_norm = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    dot += double{a[i]} * b[i];
    norms += (double{a[i]} - b[i]) * (double{a[i]} - b[i]);
    a_norm += double{a[i]} * a[i];
    b_norm += double{b[i]} * b[i];
  }
  if (metric == Metric::kCosine) return dot / std::sqrt(a_norm * b_norm);
  return metric == Metric::kL2 ? norms : dot;
}

struct Hit {
  std::string id;
  std::string payload;
  float score = 0;
  int64_t when_ns = 0;
  float confidence = 0;
  CommitStamp stamp = kNoStamp;
  std::vector<float> vector = {};
  bool payload_omitted = false;
  std::vector<std::byte> at_address = {};  // of a hit that refers to a record: its bytes
  std::string space = {};                  // where all spaces were recalled
  bool operator==(const Hit&) const = default;
};

inline std::vector<float> VectorAt(const std::byte* from, size_t dimension) {
  std::vector<float> vector(dimension);
  if (dimension > 0) std::memcpy(vector.data(), from, dimension * sizeof(float));
  return vector;
}

// Appends the hits of one result slot.
inline ResultBatch ReadBatch(const std::byte* slot, std::vector<Hit>* hits) {
  ResultBatch batch;
  std::memcpy(&batch, slot, sizeof(batch));
  const std::byte* from = slot + sizeof(batch);
  const std::byte* const end = from + batch.body_bytes;
  for (uint16_t i = 0; i < batch.count; ++i) {
    HitHeader header;
    std::memcpy(&header, from, sizeof(header));
    if ((header.flags & kHitAtAddress) != 0) {
      const auto* id = reinterpret_cast<const char*>(from) + HitIdOffset(header);
      EXPECT_EQ(header.hit_bytes, PadTo8(sizeof(header) + sizeof(HitReference) + header.id_bytes +
                                         header.space_bytes));
      hits->push_back({.id = {id, header.id_bytes},
                       .payload = {},
                       .score = header.score,
                       .when_ns = header.when_ns,
                       .confidence = header.confidence,
                       .stamp = header.stamp,
                       .vector = {},
                       .payload_omitted = (header.flags & kHitPayloadOmitted) != 0,
                       .at_address = {from, from + header.hit_bytes},
                       .space = {id + header.id_bytes, header.space_bytes}});
      from += header.hit_bytes;
      continue;
    }
    const size_t vector_bytes = header.vector_dimension * sizeof(float);
    const auto* text = reinterpret_cast<const char*>(from + sizeof(header) + vector_bytes);
    const size_t used = UsedHitBytes(header);
    EXPECT_EQ(header.hit_bytes, PadTo8(used));
    EXPECT_EQ(header.reserved, 0u);
    for (size_t n = used; n < header.hit_bytes; ++n) EXPECT_EQ(from[n], std::byte{0});
    hits->push_back({.id = {text, header.id_bytes},
                     .payload = {text + header.id_bytes + header.space_bytes, header.payload_bytes},
                     .score = header.score,
                     .when_ns = header.when_ns,
                     .confidence = header.confidence,
                     .stamp = header.stamp,
                     .vector = VectorAt(from + sizeof(header), header.vector_dimension),
                     .payload_omitted = (header.flags & kHitPayloadOmitted) != 0,
                     .space = {text + header.id_bytes, header.space_bytes}});
    from += header.hit_bytes;
  }
  EXPECT_EQ(from, end) << "the body is as long as the batch says";
  return batch;
}

// The options of a test's space.
inline SpaceOptions TestSpaceOptions(Metric metric, uint32_t dimension,
                                     const HnswBuildParams& build, uint64_t hash_seed = 1) {
  return {.metric = metric,
          .precision = Precision::kF32,
          .traversal = Traversal::kInt8,
          .dimension = dimension,
          .build = build,
          .hash_seed = hash_seed};
}

// Few dimensions, or so many that codes are learned.
inline uint32_t DrawDimension(SplitMix64* random) {
  const uint64_t from = random->Below(4) == 0 ? RabitqLearner::kMinDimension : 1;
  return static_cast<uint32_t>(from + random->Below(5));
}
inline Traversal DrawTraversal(SplitMix64* random, uint32_t dimension) {
  constexpr Traversal kTraversals[] = {Traversal::kInt8, Traversal::kExact, Traversal::kRabitq};
  return kTraversals[random->Below(dimension < RabitqLearner::kMinDimension ? 2 : 3)];
}

struct RecallParams {
  uint32_t k = 10;
  uint32_t ef = 0;
  bool with_payload = false;
  bool with_vector = false;
  uint32_t max_payload_bytes = kMaxAnswerPayloadBytes;
  CommitStamp snapshot = kNoStamp;
  VectorDtype dtype = VectorDtype::kF32;
  uint32_t slice = UINT32_MAX;           // distances
  size_t slot_bytes = kResultSlotBytes;  // the largest slot
  std::string filter = {};
  uint32_t first = 0;
  std::optional<float> bound = {};
  Metric across = Metric::kUnspecified;  // by which all spaces are recalled; else one is
};

struct RecallAnswer {
  RefusalReason reason = RefusalReason::kNone;
  std::vector<Hit> hits;
  int slices = 0;
  int batches = 0;
  // Of each batch: what it ends, and the hits up to its end.
  std::vector<std::pair<BatchEnd, size_t>> ends;
};

inline RecallAnswer RunRecall(const Space& space, RecallJob* job, std::span<const float> query,
                              const RecallParams& params) {
  RecallAnswer answer;
  std::vector<std::byte> vector = EncodeVector(params.dtype, query);
  for (const char byte : params.filter) vector.push_back(static_cast<std::byte>(byte));
  RecallRequest request;
  request.dtype = params.dtype;
  request.with_payload = params.with_payload;
  request.with_vector = params.with_vector;
  request.max_payload_bytes = params.max_payload_bytes;
  request.snapshot = params.snapshot;
  request.dimension = static_cast<uint16_t>(query.size());
  request.k = params.k;
  request.ef = params.ef;
  request.scale = kQuarterScale;
  request.first = params.first;
  request.has_bound = params.bound.has_value();
  request.bound = params.bound.value_or(0);
  request.filter_bytes = static_cast<uint16_t>(params.filter.size());
  answer.reason = job->Begin(space, request, vector.data(), /*default_ef=*/64);
  if (answer.reason != RefusalReason::kNone) return answer;
  do {
    ++answer.slices;
  } while (!job->Search(params.slice));
  for (bool last = false; !last; ++answer.batches) {
    const size_t bytes = job->NextBatchBytes(params.slot_bytes);
    EXPECT_LE(bytes, params.slot_bytes);
    std::vector<std::byte> slot(bytes);
    last = job->EmitBatch(slot);
    const ResultBatch batch = ReadBatch(slot.data(), &answer.hits);
    EXPECT_EQ(batch.metric, space.metric());
    EXPECT_EQ(batch.is_last(), last);
    answer.ends.push_back({batch.end, answer.hits.size()});
    EXPECT_EQ(sizeof(batch) + batch.body_bytes, bytes) << "a slot of the exact size is filled";
    while (job->is_searching() && !job->Search(params.slice)) ++answer.slices;
    if (bytes == sizeof(batch) && batch.end == BatchEnd::kNothing) {
      ADD_FAILURE() << "an empty batch that ends nothing";
      break;
    }
  }
  return answer;
}

// What a space must hold: the definition of upsert and delete.
class SpaceModel {
 public:
  struct Entry {
    std::vector<float> vector;
    std::string payload;
    int64_t when_ns = 0;
    float confidence = 0;
  };

  explicit SpaceModel(Metric metric) : metric_(metric) {}
  std::map<std::string, Entry>& entries() { return entries_; }
  const std::map<std::string, Entry>& entries() const { return entries_; }

  std::vector<double> BestScores(std::span<const float> query, size_t k) const {
    std::vector<double> scores;
    for (const auto& [id, entry] : entries_) {
      scores.push_back(ExactScore(metric_, entry.vector, query));
    }
    std::ranges::sort(scores, [this](double a, double b) { return Nearer(a, b); });
    scores.resize(std::min(k, scores.size()));
    return scores;
  }

  // Each hit is a live entry with its own score and content, none comes twice, the nearest first.
  void ExpectSound(const std::vector<Hit>& hits, std::span<const float> query,
                   bool with_payload) const {
    std::set<std::string> seen;
    for (size_t i = 0; i < hits.size(); ++i) {
      const Hit& hit = hits[i];
      const auto entry = entries_.find(hit.id);
      ASSERT_TRUE(entry != entries_.end()) << "a result that is not stored: " << hit.id;
      ASSERT_TRUE(seen.insert(hit.id).second) << hit.id << " came twice";
      const double score = ExactScore(metric_, entry->second.vector, query);
      ASSERT_NEAR(hit.score, score, Tolerance(score)) << hit.id;
      ASSERT_EQ(hit.when_ns, entry->second.when_ns) << hit.id;
      ASSERT_EQ(hit.confidence, entry->second.confidence) << hit.id;
      if (with_payload && !hit.payload_omitted) {
        ASSERT_EQ(hit.payload, entry->second.payload) << hit.id;
      } else {
        ASSERT_EQ(hit.payload, "");
      }
      if (i > 0) {
        ASSERT_FALSE(Nearer(hit.score, hits[i - 1].score)) << "out of order at " << i;
      }
    }
  }

  // The k nearest, no more, no fewer; among equally near ones any.
  void ExpectExact(const std::vector<Hit>& hits, std::span<const float> query, size_t k,
                   bool with_payload) const {
    ASSERT_NO_FATAL_FAILURE(ExpectSound(hits, query, with_payload));
    const std::vector<double> best = BestScores(query, k);
    ASSERT_EQ(hits.size(), best.size());
    for (size_t i = 0; i < best.size(); ++i) {
      ASSERT_NEAR(hits[i].score, best[i], Tolerance(best[i])) << "place " << i;
    }
  }

  // How many of the hits are as near as the kth nearest.
  size_t CountTrue(const std::vector<Hit>& hits, std::span<const float> query, size_t k) const {
    const std::vector<double> best = BestScores(query, k);
    return static_cast<size_t>(std::ranges::count_if(hits, [&](const Hit& hit) {
      const double bound = best.back();
      return !Nearer(bound, hit.score) || std::fabs(hit.score - bound) <= Tolerance(bound);
    }));
  }

 private:
  bool Nearer(double a, double b) const { return metric_ == Metric::kL2 ? a < b : a > b; }
  static double Tolerance(double score) { return 2e-6 + 1e-6 * std::fabs(score); }

  Metric metric_;
  std::map<std::string, Entry> entries_;
};

}  // namespace engram
