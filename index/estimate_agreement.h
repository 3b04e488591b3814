#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "index/hnsw_search.h"
#include "src/core/ids.h"

namespace engram {

// Whether codes still tell near from far where nodes are linked now. A node's candidates are
// compared by int8 in any case: where estimates of these distances do not agree with them, they
// would as well have chosen any others of a crowd.
//
// A node's displacement is how far down the ten nearest by int8 lie among its candidates by
// estimate: 0 where they are the first ten, 1/2 where estimates tell nothing. The highest of the
// running means over 48 nodes, with 66 candidates:
//   MiniLM sentences, Fashion-MNIST, text (3,000 to 30,000)               0.03 to 0.05
//   SIFT                                                                  0.12
//   100 normal clusters that fill up to 80 each, 96 to 768 dimensions     0.18 to 0.22
//   100 clouds of width 0.1 up to 80 each, 96 and 768 dimensions          0.27 and 0.12
//   one cloud of half of all, of width 0.5 to 0.3, or 0.2 in 768          below 0.15
//   of width 0.2 in 96 dimensions, or 0.1 in 768                          0.22 to 0.31
//   of width 0.1 and less in 96 dimensions, or 0.03 in 768                0.41 to 0.61
// This is of the estimates that recalls walk by, which the mean is of. Estimates of signs with
// signs, of which only what is useless is told, have SIFT at 0.16 in the mean instead of 0.07,
// normal clusters at 0.14 instead of 0.09, and text and Fashion-MNIST at 0.06 instead of 0.05. What
// is above the bar of a mean need not be bad, so it is reason to measure and no more.
//
// Thread safety: none. Allocates nothing.
class EstimateAgreement {
 public:
  static constexpr size_t kNearest = 10;
  // Fewer candidates than this tell nothing: there was not much to choose from.
  static constexpr size_t kFewest = 40;
  // A running mean over so many nodes, and not told from fewer.
  static constexpr uint32_t kWindow = 48;
  static constexpr float kDoubtful = 0.15F;
  // A single node's estimates are useless: no node of the real data but one or two, one in a
  // hundred of the clouds of 80, most of a cloud of width 0.1 in 96 dimensions.
  static constexpr float kUseless = 0.4F;
  // Of the nodes that disagreed, so many are known.
  static constexpr size_t kRemembered = 8;

  // 0 to 1, see above; 0 where there are too few. `estimates[i]` is of the candidate that has
  // `keys[i]`. Of several that are the tenth nearest those count that look nearest.
  static float Displacement(std::span<const float> estimates, std::span<const NeighbourKey> keys);

  void Add(NodeId node, std::span<const float> estimates, std::span<const NeighbourKey> keys);
  // There is not the least doubt.
  bool IsCalm() const { return count_ >= kWindow && mean_ < kDoubtful / 2; }
  // Codes are to be looked at again.
  bool IsDoubtful() const { return count_ >= kWindow && mean_ > kDoubtful; }
  float mean() const { return mean_; }
  // Some of those that disagreed last, in no order.
  std::span<const NodeId> disagreed() const { return {disagreed_.data(), remembered_}; }
  // Forgets all.
  void Clear() { *this = {}; }

 private:
  float mean_ = 0;
  uint32_t count_ = 0;
  uint32_t next_ = 0;  // place in disagreed_
  uint32_t remembered_ = 0;
  std::array<NodeId, kRemembered> disagreed_{};
};

}  // namespace engram
