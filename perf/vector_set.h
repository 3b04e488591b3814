#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "src/core/observation.h"
#include "src/core/result.h"

namespace engram {

// Vectors in memory as float32, each from a cache line on with zeros behind it, which is how the
// f32 kernels take them.
//
// Thread safety: constant once loaded or filled.
class VectorSet {
 public:
  // The first `rows_max` rows of a vector file (tools/engramctl/vector_file.h). `normalise`: scaled
  // to norm 1. Errors: those of the file; kInvalidArgument naming a row that is no vector.
  static Result<VectorSet> Load(const std::string& path, uint64_t rows_max, bool normalise);
  // To be filled, row by row.
  static VectorSet Zeros(size_t size, uint32_t dimension) { return {size, dimension}; }
  std::span<float> Row(size_t row) { return {At(row), dimension_}; }

  size_t size() const { return size_; }
  uint32_t dimension() const { return dimension_; }
  // `dimension()` floats.
  std::span<const float> operator[](size_t row) const { return {At(row), dimension_}; }
  // The row with its padding.
  const std::byte* Bytes(size_t row) const { return reinterpret_cast<const std::byte*>(At(row)); }
  size_t padded_dimension() const { return stride_; }

 private:
  struct Freer {
    void operator()(float* values) const { std::free(values); }
  };

  VectorSet(size_t size, uint32_t dimension);
  float* At(size_t row) const { return values_.get() + row * stride_; }

  size_t size_;
  uint32_t dimension_;
  size_t stride_;  // in floats
  std::unique_ptr<float[], Freer> values_;
};

// The exact k nearest of each query.
struct ExactTruth {
  uint32_t k = 0;
  std::vector<int32_t> rows;       // k a query, nearest first
  std::vector<double> kth_scores;  // the score of each query's last row
  std::span<const int32_t> Of(size_t query) const { return std::span(rows).subspan(query * k, k); }
};

// From a file of nearest rows. Errors: those of the file; kInvalidArgument where it has too few
// queries or neighbours, or names rows that `base` has not.
Result<ExactTruth> LoadTruth(const std::string& path, const VectorSet& base,
                             const VectorSet& queries, Metric metric, uint32_t k);
// By comparing each query with every one of the first `rows` rows: in float first, then in double
// among the nearest some; ties by lower row. There are at least k rows.
ExactTruth ComputeTruth(const VectorSet& base, const VectorSet& queries, Metric metric, uint32_t k,
                        size_t rows = SIZE_MAX);

// recall@k of what was returned: k rows a query, -1 where there are fewer. A row as near as the kth
// true one is a hit (tools/engramctl/recall_quality.h).
double RecallAtK(const VectorSet& base, const VectorSet& queries, const ExactTruth& truth,
                 Metric metric, std::span<const int64_t> returned);

}  // namespace engram
