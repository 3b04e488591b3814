#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "index/hnsw_search.h"
#include "src/core/ids.h"

namespace engram {

// Whether codes still tell near from far where nodes are linked now. Of each node the candidates
// that its estimates chose are compared again by int8, so how far the two agree costs no further
// distance: where they do not, the candidates are any ones of a crowd.
//
// A node's displacement is how far down the ten nearest by int8 lie among its candidates by
// estimate: 0 where they are the first ten, 1/2 where estimates tell nothing. Measured with 66
// candidates, the mean and the highest of the running means:
//   Fashion-MNIST, text and MiniLM sentences (to 30,000)        0.03 to 0.05, 0.06
//   SIFT                                                        0.07, 0.10
//   100 normal clusters of 80 in 96 to 768 dimensions           0.08, 0.20
//   100 clouds of width 0.1 among spread ones, 96 dimensions    0.09, 0.25
//   one cloud of half of all, width 0.5 to 0.3                  0.05 to 0.14
//   of width 0.2 in 96 dimensions, 0.1 in 768                   0.15 to 0.25, 0.29
//   of width 0.1 and less in 96 dimensions                      0.38 to 0.53
// Estimates of signs with signs move SIFT to 0.16 and the clusters to 0.14. So what is above the
// bar of a mean need not be bad: it is reason to measure.
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
  // A single node's estimates are useless: of the real data above one in a thousand, of the
  // clusters one in a hundred, of a cloud of width 0.1 in 96 dimensions most.
  static constexpr float kUseless = 0.4F;
  // Of the nodes that disagreed, so many are known.
  static constexpr size_t kRemembered = 8;

  // 0 to 1, see above; 0 where there are too few. `estimates[i]` is of the candidate that has
  // `keys[i]`. Of several that are the tenth nearest those count that look nearest.
  static float Displacement(std::span<const float> estimates, std::span<const NeighbourKey> keys);

  // False where the node's estimates are useless.
  bool Add(NodeId node, std::span<const float> estimates, std::span<const NeighbourKey> keys);
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
