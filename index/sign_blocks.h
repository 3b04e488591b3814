#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "index/nearest_selection.h"
#include "index/rabitq_format.h"

namespace engram {

// RaBitQ codes compared with each other: blocks of up to kMembers codes that lie word by word, so
// that one register holds the same word of 16 codes.
//
// Of two residuals r and s, rotated, the signs agree in a dimension with the probability
// 1 - angle / pi (Charikar, "Similarity estimation techniques from rounding algorithms", STOC
// 2002). With t = agreements - disagreements
//   <r, s> is about |r| * |s| * sin(pi / 2 * t / bits),
// and a distance is estimated from that as in RabitqFormat:
//   L2             |r|^2 + |s|^2 - 2 <r, s>
//   cosine         half of it
//   inner product  -<r, s> - <x - c, c> - <q, c>
// At an angle of 45 degrees the error is some 1.8 times that of an estimate by a query of four
// bits; a member costs an exclusive or, a population count and an addition for each word, a seventh
// of a product of its signs with int8 numbers by VPDPBUSD.
//
// A block of P places, block_bytes(P) from a cache line on:
//   bits / 32 rows of P words: word w of member m is that of bits 32 w to 32 w + 31
//   P floats: of a distance, what is the member's alone
//   P floats: its |r|, negative, and doubled for L2
// Members that were never set are zero, or whatever lay there: only the first `count` are used.
//
// Thread safety: constant after construction. No call allocates.
class SignBlocks {
 public:
  static constexpr uint32_t kMembers = 64;
  // A block has a multiple of so many places, kMembers unless told otherwise.
  static constexpr uint32_t kLeastPlaces = 16;

  // A code as a query.
  struct Query {
    const std::byte* code;
    float norm;    // |s|
    float offset;  // of a distance, what is the query's alone
  };
  // Of codes of `bits` bits, a multiple of 64, whose centroid has that norm.
  SignBlocks(Metric metric, size_t bits, float squared_norm_of_centroid)
      : metric_(metric), bits_(bits), squared_norm_of_centroid_(squared_norm_of_centroid) {}
  explicit SignBlocks(const RabitqFormat& format)
      : SignBlocks(format.metric(), format.bits(), format.squared_norm_of_centroid()) {}

  static constexpr size_t BlockBytes(size_t bits, uint32_t places = kMembers) {
    return places * (bits / 8 + 2 * sizeof(float));
  }
  size_t block_bytes(uint32_t places = kMembers) const { return BlockBytes(bits_, places); }
  size_t bits() const { return bits_; }

  // Member `place` becomes the code `row`, as RabitqFormat::Encode writes it.
  void Set(std::byte* block, uint32_t place, const std::byte* row,
           uint32_t places = kMembers) const;
  // Member `to_place` of `to` becomes member `from_place` of `from`.
  void Copy(const std::byte* from, uint32_t from_place, std::byte* to, uint32_t to_place,
            uint32_t from_places = kMembers, uint32_t to_places = kMembers) const;
  // The first `count` members of `to` become those of `from`.
  void CopyFirst(size_t count, const std::byte* from, uint32_t from_places, std::byte* to,
                 uint32_t to_places) const;
  // Of a row, which stays while the query is used.
  Query QueryOf(const std::byte* row) const;

  // Writes the estimates of the first `count` members, and something for up to 15 behind them.
  void Estimate(const std::byte* block, size_t count, const Query& query, float* estimates) const;
  // Appends to `estimates` and `ids` those of the first `count` members whose estimate is below
  // `bound`; returns how many. `of_members`: the members' ids, with kSelectionSlack more behind
  // them, as there is room for behind what is appended.
  size_t AppendNearer(const std::byte* block, size_t count, const Query& query,
                      const uint32_t* of_members, float bound, float* estimates, uint32_t* ids,
                      uint32_t places = kMembers) const;

 private:
  struct Factors {
    float offset;
    float norm;
  };
  Factors FactorsOf(const std::byte* row) const;

  Metric metric_;
  size_t bits_;
  float squared_norm_of_centroid_;
};

}  // namespace engram
