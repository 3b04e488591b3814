#include "index/rabitq_learner.h"

#include <algorithm>
#include <utility>

#include "src/core/check.h"

namespace engram {
namespace {

// What a slice takes on: some 50 us at 768 dimensions, half of the limit, as memory may be cold.
constexpr size_t kBitsEncoded = 32 * 768;
constexpr size_t kBytesCompared = size_t{384} << 10;
constexpr size_t kBitsEstimated = 2048 * 768;
// A slice of one-dimensional vectors has no more of them than this allows.
constexpr size_t kMinBits = 256;

}  // namespace

void RabitqLearner::Smallest::Show(Candidate candidate) {
  constexpr auto nearer = &Candidate::IsNearer;
  if (count < limit) {
    items[count++] = candidate;
    std::push_heap(items.begin(), items.begin() + count, nearer);
  } else if (limit > 0 && candidate.distance < items[0].distance) {
    std::pop_heap(items.begin(), items.begin() + count, nearer);
    items[count - 1] = candidate;
    std::push_heap(items.begin(), items.begin() + count, nearer);
  }
}

void RabitqLearner::Start(const RabitqSample& sample, uint64_t seed) {
  CHECK(sample.count >= 1 && sample.count <= kMaxSample, "a sample is 1 to 4,096 vectors");
  CHECK(sample.mean_count <= sample.count, "the mean is of a part of the sample");
  CHECK(sample.coarse == nullptr || sample.coarse->precision() == Precision::kInt8,
        "the coarser form is int8");
  CHECK(sample.near.size() <= kQueries, "what lies close together is asked for as often");
  Stop();
  sample_ = sample;
  seed_ = seed;
  dimension_ = sample.format->dimension();
  bits_ = RandomRotation::RotatedDimension(dimension_);
  phase_ = Phase::kMean;
  next_ = 0;
  query_ = 0;
  spread_queries_ = sample.count < 2 ? 0 : std::min(kQueries, MeanCount());
  queries_ = sample.count < 2 ? 0 : spread_queries_ + sample.near.size();
  found_ = 0;
  found_near_ = 0;
  quality_ = 0;
  near_quality_ = 1;
  found_coarsely_ = 0;
  coarse_quality_ = 1;
  squares_ = 0;
}

void RabitqLearner::Stop() {
  ReleaseWork();
  RabitqFormat::Destroy(TakeFormat(), heap_);
  phase_ = Phase::kIdle;
}

void RabitqLearner::ReleaseWork() {
  if (sums_ != nullptr) heap_->FreeArray(std::exchange(sums_, nullptr), dimension_);
  if (vector_ != nullptr) heap_->FreeArray(std::exchange(vector_, nullptr), dimension_);
  if (codes_ != nullptr) heap_->Free(std::exchange(codes_, nullptr), codes_bytes_);
  if (coded_query_ != nullptr) {
    heap_->Free(std::exchange(coded_query_, nullptr), coded_query_bytes_);
  }
}

RabitqLearner::Progress RabitqLearner::Fail() {
  Stop();
  return Progress::kNoMemory;
}

size_t RabitqLearner::EndOfSlice(size_t rows) const {
  return std::min(sample_.count, next_ + std::max<size_t>(1, rows));
}

RabitqLearner::Progress RabitqLearner::Step() {
  switch (phase_) {
    case Phase::kMean:
      return AddToMean();
    case Phase::kCodes:
      return EncodeSome();
    case Phase::kCoarse:
      return CompareCoarsely();
    case Phase::kNearest:
      return CompareSome();
    case Phase::kEstimates:
      return EstimateSome();
    case Phase::kIdle:
      break;
  }
  CHECK(false, "a learner steps between Start and its end");
}

RabitqLearner::Progress RabitqLearner::AddToMean() {
  if (next_ == 0) {
    sums_ = heap_->AllocateArray<double>(dimension_);
    vector_ = heap_->AllocateArray<float>(dimension_);
    if (sums_ == nullptr || vector_ == nullptr) return Fail();
    std::fill_n(sums_, dimension_, 0.0);
  }
  const size_t end = std::min(MeanCount(), EndOfSlice(kBitsEncoded / std::max(bits_, kMinBits)));
  for (; next_ < end; ++next_) {
    sample_.format->Decode(Row(next_), vector_);
    for (uint32_t i = 0; i < dimension_; ++i) sums_[i] += double{vector_[i]};
  }
  if (next_ == MeanCount()) {
    if (!MakeFormat()) return Fail();
    next_ = 0;
    phase_ = Phase::kCodes;
  }
  return Progress::kGoesOn;
}

bool RabitqLearner::MakeFormat() {
  for (uint32_t i = 0; i < dimension_; ++i) {
    vector_[i] = static_cast<float>(sums_[i] / static_cast<double>(MeanCount()));
  }
  format_ = RabitqFormat::Create(sample_.format->metric(), dimension_, vector_, seed_, heap_);
  if (format_ == nullptr) return false;
  codes_bytes_ = sample_.count * format_->row_bytes();
  coded_query_bytes_ = format_->query_bytes();
  codes_ = heap_->Allocate(codes_bytes_);
  coded_query_ = heap_->Allocate(coded_query_bytes_);
  return codes_ != nullptr && coded_query_ != nullptr;
}

RabitqLearner::Progress RabitqLearner::EncodeSome() {
  for (const size_t end = EndOfSlice(kBitsEncoded / std::max(bits_, kMinBits)); next_ < end;
       ++next_) {
    sample_.format->Decode(Row(next_), vector_);
    format_->Encode(vector_, codes_ + next_ * format_->row_bytes());
    squares_ += format_->SquaredResidual(vector_);
  }
  return next_ == sample_.count ? BeginQuery() : Progress::kGoesOn;
}

RabitqLearner::Progress RabitqLearner::BeginQuery() {
  if (query_ == queries_) {
    quality_ = Share(found_, spread_queries_);
    near_quality_ = Share(found_near_, queries_ - spread_queries_);
    if (sample_.coarse != nullptr) coarse_quality_ = Share(found_coarsely_, queries_);
    ReleaseWork();
    phase_ = Phase::kIdle;
    return Progress::kDone;
  }
  sample_.format->Decode(Row(QueryIndex()), vector_);
  format_->EncodeQuery(vector_, coded_query_);
  nearest_.count = 0;
  nearest_.limit = kNearest;
  candidates_.count = 0;
  candidates_.limit = kConsidered;
  next_ = 0;
  phase_ = sample_.coarse != nullptr ? Phase::kCoarse : Phase::kNearest;
  return Progress::kGoesOn;
}

RabitqLearner::Progress RabitqLearner::CompareCoarsely() {
  constexpr size_t kAtOnce = 8;
  const auto row = [this](size_t index) { return sample_.coarse_row(sample_.context, index); };
  const std::byte* const query = row(QueryIndex());
  const VectorFormat& coarse = *sample_.coarse;
  for (const size_t end = EndOfSlice(kBytesCompared / std::max(coarse.row_bytes(), kMinBits));
       next_ < end;) {
    const size_t count = std::min(kAtOnce, end - next_);
    const std::byte* rows[kAtOnce];
    float distances[kAtOnce];
    for (size_t i = 0; i < count; ++i) rows[i] = row(next_ + i);
    coarse.distances()(query, rows, count, coarse.padded_dimension(), distances);
    for (size_t i = 0; i < count; ++i, ++next_) {
      if (next_ == QueryIndex()) continue;
      candidates_.Show({distances[i], static_cast<uint32_t>(next_)});
    }
  }
  if (next_ == sample_.count) {
    next_ = 0;
    phase_ = Phase::kNearest;
  }
  return Progress::kGoesOn;
}

// All others, or those that are near by the coarser form.
RabitqLearner::Progress RabitqLearner::CompareSome() {
  const bool by_coarse = sample_.coarse != nullptr;
  const std::byte* const query = Row(QueryIndex());
  const size_t rows = by_coarse ? candidates_.count : sample_.count;
  const size_t end = std::min(
      rows, next_ + std::max<size_t>(
                        1, kBytesCompared / std::max(sample_.format->row_bytes(), kMinBits)));
  for (; next_ < end; ++next_) {
    const size_t index = by_coarse ? candidates_.items[next_].index : next_;
    if (index == QueryIndex()) continue;
    nearest_.Show({sample_.format->Distance(query, Row(index)), static_cast<uint32_t>(index)});
  }
  if (next_ == rows) {
    if (by_coarse) JudgeCoarseForm();
    candidates_.count = 0;
    candidates_.limit = kCandidates;
    next_ = 0;
    phase_ = Phase::kEstimates;
  }
  return Progress::kGoesOn;
}

void RabitqLearner::JudgeCoarseForm() {
  const size_t most = std::min(candidates_.count, kCandidates);
  const auto begin = candidates_.items.begin();
  std::nth_element(begin, begin + most, begin + candidates_.count, &Candidate::IsNearer);
  candidates_.count = most;
  found_coarsely_ += ShareFound();
}

// Of the nearest, among the candidates.
double RabitqLearner::ShareFound() const {
  size_t found = 0;
  for (size_t i = 0; i < candidates_.count; ++i) {
    const float distance =
        sample_.format->Distance(Row(QueryIndex()), Row(candidates_.items[i].index));
    // The last of the nearest is on top of its heap.
    found += static_cast<size_t>(distance <= nearest_.items[0].distance);
  }
  return static_cast<double>(std::min(found, nearest_.count)) / static_cast<double>(nearest_.count);
}

RabitqLearner::Progress RabitqLearner::EstimateSome() {
  constexpr size_t kAtOnce = 8;
  for (const size_t end = EndOfSlice(kBitsEstimated / std::max(bits_, kMinBits)); next_ < end;) {
    const size_t count = std::min(kAtOnce, end - next_);
    const std::byte* codes[kAtOnce];
    float estimates[kAtOnce];
    for (size_t i = 0; i < count; ++i) codes[i] = codes_ + (next_ + i) * format_->row_bytes();
    format_->distances()(coded_query_, codes, count, bits_, estimates);
    for (size_t i = 0; i < count; ++i, ++next_) {
      if (next_ == QueryIndex()) continue;
      candidates_.Show({estimates[i], static_cast<uint32_t>(next_)});
    }
  }
  if (next_ < sample_.count) return Progress::kGoesOn;
  (query_ < spread_queries_ ? found_ : found_near_) += ShareFound();
  ++query_;
  return BeginQuery();
}

bool CentroidDrift::Start(const RabitqFormat* format) {
  Stop();
  sums_ = heap_->AllocateArray<double>(format->dimension());
  if (sums_ == nullptr) return false;
  std::fill_n(sums_, format->dimension(), 0.0);
  format_ = format;
  return true;
}

void CentroidDrift::Stop() {
  if (sums_ != nullptr) heap_->FreeArray(std::exchange(sums_, nullptr), format_->dimension());
  format_ = nullptr;
  squares_ = 0;
  count_ = 0;
}

void CentroidDrift::Add(const float* v) {
  const uint32_t dimension = format_->dimension();
  const float* const centroid = format_->centroid();
  double squares = 0;
  for (uint32_t i = 0; i < dimension; ++i) {
    const double residual = double{v[i]} - double{centroid[i]};
    sums_[i] += residual;
    squares += residual * residual;
  }
  squares_ += squares;
  ++count_;
}

double CentroidDrift::SavedShare() const {
  if (count_ < 2 || squares_ == 0) return 0;
  double squared_sum = 0;
  for (uint32_t i = 0; i < format_->dimension(); ++i) squared_sum += sums_[i] * sums_[i];
  // |mean|^2 over the mean square. Of vectors about the centroid itself it is 1 / count in the
  // mean.
  const auto count = static_cast<double>(count_);
  const double share = squared_sum / count / squares_;
  return std::clamp((count * share - 1) / (count - 1), 0.0, 1.0);
}

}  // namespace engram
