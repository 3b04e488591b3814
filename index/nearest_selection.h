#pragma once

#include <cstddef>
#include <cstdint>

namespace engram {

// Choosing the nearest of many by SIMD, without sorting them. Arrays have room for kSelectionSlack
// more elements than are in use; what lies there is read and may be overwritten, never used.
inline constexpr size_t kSelectionSlack = 16;

// A bound such that the elements nearer than it weigh at least `least` together, and where ties
// allow at most `most`; all of them where they weigh less. `weights` nullptr: each weighs 1.
// Distances that are not a number count as farther than all others. About a dozen passes.
float BoundOfNearest(const float* distances, const float* weights, size_t count, float least,
                     float most);

// Keeps those elements that are nearer than `bound`, in their order; returns how many.
size_t KeepNearer(float bound, float* distances, uint32_t* ids, size_t count);

// Appends to `out_distances` and `out_ids` each of `count` elements whose distance
// offsets[i] + factors[i] * scale * products[i] is below `bound`; returns how many.
size_t AppendNearer(const int32_t* products, const float* offsets, const float* factors,
                    float scale, const uint32_t* ids, size_t count, float bound,
                    float* out_distances, uint32_t* out_ids);

// The places, in rising order, of the elements that are nearer than `bound`, up to `most` of them;
// returns how many. `places` has room for `most` + kSelectionSlack.
size_t PlacesNearer(const float* distances, size_t count, float bound, size_t most,
                    uint32_t* places);

// out[i] = offsets[i] + factors[i] * scale * products[i]; returns the place of the least, the first
// of several. `count` is at least 1.
size_t ScaleProducts(const int32_t* products, const float* offsets, const float* factors,
                     float scale, size_t count, float* out);

}  // namespace engram
