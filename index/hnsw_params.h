#pragma once

#include <cstdint>

namespace engram {

// How a graph is built, in the terms of Malkov & Yashunin, "Efficient and robust approximate
// nearest neighbor search using Hierarchical Navigable Small World graphs" (2018).
struct HnswBuildParams {
  // Links that a new node makes on each level, and the most that a node keeps on levels 1 and up.
  // The paper's M and M_max. 2 to 64.
  uint32_t M = 24;
  // The most links that a node keeps on level 0. The paper's M_max0. M to 128.
  uint32_t M0 = 48;
  // How many candidates the search for a new node's neighbours keeps. The paper's efConstruction.
  // 1 to kMaxEf.
  uint32_t ef_construction = 64;
  // From this and a node's number its level is drawn, with the paper's m_L = 1 / ln(M).
  uint64_t seed = 0x656E6772616D;
  // Algorithm 4's extendCandidates: consider also the candidates' neighbours. For extremely
  // clustered data; costs up to M0 times the distances of the selection. In batches on the
  // upper levels alone.
  bool extend_candidates = false;
  // Algorithm 4's keepPrunedConnections: fill a new node's links up to M with the nearest of those
  // that the heuristic discarded.
  bool keep_pruned = false;
  // A candidate is discarded where alpha times its distance to a chosen neighbour is not above its
  // distance to the node. 1 is the paper's rule; above 1 keeps more long links (Vamana's alpha,
  // Subramanya et al. 2019). At least 1.
  float alpha = 1.0F;
  // Of batch linking: members of inverted lists that a node is compared with by code. About
  // ef_construction of the nearest, more where codes are short, are compared again by int8, and its
  // links chosen among two thirds of that (BatchLinker::CandidatesFor).
  uint32_t scanned = 3'500;
};

// How a graph is searched.
struct HnswSearchParams {
  // How many of the nearest nodes the search keeps on level 0; the paper's ef. 1 to kMaxEf; raised
  // to the number of results asked for.
  uint32_t ef = 64;
};

}  // namespace engram
