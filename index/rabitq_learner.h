#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

#include "index/rabitq_format.h"
#include "index/vector_format.h"
#include "src/core/arena_heap.h"

namespace engram {

// Vectors to learn from: rows of one format, by index. A row stays what it is while it is learnt
// from.
struct RabitqSample {
  const VectorFormat* format = nullptr;
  size_t count = 0;
  // The row with index 0 to count - 1, as `format` wrote it.
  const std::byte* (*row)(const void* context, size_t index) = nullptr;
  const void* context = nullptr;
  // The centroid is the mean of the first so many; 0: of all. The others are there to be told from
  // each other.
  size_t mean_count = 0;
  // Rows that lie close together, up to RabitqLearner::kQueries of them, whose quality is measured
  // apart: where they are few of all, a quality of all would not show how they fare. They stay as
  // the rows do.
  std::span<const uint32_t> near{};
  // The same vectors as int8, a coarser form, whose quality is measured as well; nullptr: none.
  const VectorFormat* coarse = nullptr;
  const std::byte* (*coarse_row)(const void* context, size_t index) = nullptr;
};

// Learns a RabitqFormat from a sample, in slices, and measures how well it tells near from far.
//
// 1. The centroid is the mean of the sample, or of its first part.
// 2. The sample is encoded.
// 3. Some of its vectors are queries, spread over the sample. For each, its kNearest nearest of the
//    others are found by the sample's own distance, then the kCandidates nearest by estimate. Its
//    quality is the share of the nearest that are among the candidates; a candidate as near as the
//    last of them counts as one, so that duplicates do no harm. Likewise by a coarser form. Where
//    there is one, the nearest are looked for among the kConsidered nearest by that alone: a form
//    that loses neighbours from so many does not have those that are left in front either.
//    As many again are of what lies close together, and have a quality of their own.
//
// The quality falls where codes cannot tell neighbours apart: where they are much nearer to each
// other than to the centroid, so that their distances differ by less than the estimate's error, and
// where one dimension outweighs all others. A walk by such codes loses its way.
//
// Thread safety: the owner core's alone. No malloc; memory comes from the heap.
class RabitqLearner {
 public:
  static constexpr size_t kMaxSample = 4096;
  static constexpr size_t kQueries = 64;
  static constexpr size_t kNearest = 10;
  static constexpr size_t kCandidates = 40;
  static constexpr size_t kConsidered = 256;
  // Measured on graphs of 8,000 vectors that were walked with ef 100, by codes and exactly, and
  // re-scored: recall@10 fell by 0.00 to 0.01 where the quality was 0.95 and more, by 0.02 at 0.92,
  // 0.04 at 0.84, 0.09 at 0.82 and 0.14 at 0.71. The 640 pairs of a sample tell the quality to
  // about 0.01.
  static constexpr double kMinQuality = 0.93;
  // What lies close together is told apart less well than what lies anywhere, also where recalls
  // are good. Measured on 8,000 in a hundred clusters and on clouds of half of all, at 768
  // dimensions, where recalls walk by codes; recall@10 fell with ef 64, and with ef 128, by 0.01
  // and 0.00 at 0.92, by 0.02 and 0.00 at 0.83 to 0.89, by 0.07 and 0.00 at 0.70 to 0.81, and with
  // more in a cloud by 0.34 and 0.15 at 0.78. With fewer dimensions, where codes are for linking
  // alone, nothing was lost at 0.82, and of the neighbours of a node a fourth at 0.53.
  static constexpr double kMinNearQuality = 0.8;
  // With few dimensions neighbours draw together so fast as a space grows that a sample is no
  // guide; and a code saves nothing, as an int8 row takes two cache lines.
  static constexpr uint32_t kMinDimension = 65;

  enum class Progress : uint8_t {
    kGoesOn,
    kDone,      // the format and its quality are there
    kNoMemory,  // the heap is spent; all that was taken is given back
  };

  // `heap` outlives the learner.
  explicit RabitqLearner(ArenaHeap* heap) : heap_(heap) {}
  ~RabitqLearner() { Stop(); }
  RabitqLearner(const RabitqLearner&) = delete;
  RabitqLearner& operator=(const RabitqLearner&) = delete;

  // Begins anew. `sample.count` is 1 to kMaxSample; what it points to outlives the learning.
  void Start(const RabitqSample& sample, uint64_t seed);
  // One slice of at most some 100 us. Not after it said kDone or kNoMemory, nor before Start.
  Progress Step();
  // Gives all memory back, a format that was not taken included.
  void Stop();

  // After kDone. 0 to 1; 1 where there is but one vector.
  double quality() const { return quality_; }
  // The same of what lies close together; 1 without any.
  double near_quality() const { return near_quality_; }
  // The same of the coarser form; 1 without one.
  double coarse_quality() const { return coarse_quality_; }
  // Whether a walk may go by the coarser form.
  bool IsCoarseGood() const { return coarse_quality_ >= kMinQuality; }
  // Whether a walk may go by the codes.
  bool IsGood() const {
    return quality_ >= kMinQuality && near_quality_ >= kMinNearQuality &&
           dimension_ >= kMinDimension;
  }
  // The mean of |x - c|^2 over the sample.
  double mean_squared_residual() const { return squares_ / static_cast<double>(sample_.count); }
  // The caller's from now on: RabitqFormat::Destroy with the same heap.
  RabitqFormat* TakeFormat() { return std::exchange(format_, nullptr); }

 private:
  enum class Phase : uint8_t { kIdle, kMean, kCodes, kCoarse, kNearest, kEstimates };
  struct Candidate {
    float distance;
    uint32_t index;
    static bool IsNearer(const Candidate& a, const Candidate& b) { return a.distance < b.distance; }
  };
  // The `limit` smallest that it was shown.
  struct Smallest {
    std::array<Candidate, kConsidered> items;  // a max-heap
    size_t count = 0;
    size_t limit = 0;
    void Show(Candidate candidate);
  };

  Progress AddToMean();
  Progress EncodeSome();
  Progress CompareCoarsely();
  Progress CompareSome();
  Progress EstimateSome();
  double ShareFound() const;
  void JudgeCoarseForm();
  Progress BeginQuery();
  Progress Fail();
  bool MakeFormat();
  void ReleaseWork();
  size_t EndOfSlice(size_t rows) const;
  // Queries of what lies anywhere come first.
  size_t QueryIndex() const {
    return query_ < spread_queries_ ? query_ * MeanCount() / spread_queries_
                                    : sample_.near[query_ - spread_queries_];
  }
  static double Share(double found, size_t queries) {
    return queries == 0 ? 1 : found / static_cast<double>(queries);
  }
  size_t MeanCount() const { return sample_.mean_count == 0 ? sample_.count : sample_.mean_count; }
  const std::byte* Row(size_t index) const { return sample_.row(sample_.context, index); }

  ArenaHeap* heap_;
  RabitqSample sample_;
  uint64_t seed_ = 0;
  uint32_t dimension_ = 0;
  size_t bits_ = 0;
  Phase phase_ = Phase::kIdle;
  size_t next_ = 0;   // row of the phase
  size_t query_ = 0;  // 0 to queries_
  size_t queries_ = 0;
  size_t spread_queries_ = 0;  // of them; the others are of sample_.near
  // Sums over the queries of the share.
  double found_ = 0;
  double found_near_ = 0;
  double quality_ = 0;
  double near_quality_ = 1;
  double squares_ = 0;  // of the residuals, their sum
  double found_coarsely_ = 0;
  double coarse_quality_ = 1;
  RabitqFormat* format_ = nullptr;
  // Out of the heap while it learns.
  double* sums_ = nullptr;      // of the coordinates
  float* vector_ = nullptr;     // one decoded
  std::byte* codes_ = nullptr;  // of the sample
  std::byte* coded_query_ = nullptr;
  size_t codes_bytes_ = 0;
  size_t coded_query_bytes_ = 0;
  Smallest nearest_;
  Smallest candidates_;
};

// Whether a centroid still is where the vectors are. With m the mean of later vectors x,
// mean |x - c|^2 = mean |x - m|^2 + |m - c|^2: the last term is what a new centroid would save, and
// an estimate's error grows with |x - c|.
//
// Thread safety: the owner core's alone. No malloc; memory comes from the heap.
class CentroidDrift {
 public:
  // `heap` outlives this.
  explicit CentroidDrift(ArenaHeap* heap) : heap_(heap) {}
  ~CentroidDrift() { Stop(); }
  CentroidDrift(const CentroidDrift&) = delete;
  CentroidDrift& operator=(const CentroidDrift&) = delete;

  // Begins anew with `format`, which stays until Stop. False, and stopped, where the heap is spent.
  bool Start(const RabitqFormat* format);
  void Stop();
  // `v`: as RabitqFormat::Encode takes it. Below 1 us at 768 dimensions.
  void Add(const float* v);
  uint64_t count() const { return count_; }
  // 0 to 1: the share of the mean squared residual that a new centroid would save, less what the
  // mean of so few vectors saves by chance. 0 before two vectors.
  double SavedShare() const;

 private:
  ArenaHeap* heap_;
  const RabitqFormat* format_ = nullptr;
  double* sums_ = nullptr;  // of x - c, by coordinate
  double squares_ = 0;      // of |x - c|
  uint64_t count_ = 0;
};

}  // namespace engram
