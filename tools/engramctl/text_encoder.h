#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "src/core/result.h"

namespace engram {

// Turns a text into a unit vector with a static bag-of-words model: no neural network, no word
// order. It reads the model format STBAG001; tools/sample-data/README.md gives the grammar of its
// two files and says where the model comes from.
//
// How a text becomes a vector:
//   1. Lower-case A to Z. A word is a maximal run of a-z, 0-9 and bytes >= 0x80, cut at 24 bytes.
//      The first words_per_text_max() words count; the rest of the text is ignored.
//   2. A word of the vocabulary adds its own row. Any other word adds, for each trigram of bytes of
//      "<word>", the bucket row that FNV-1a of the trigram names, weighted 1 / (its trigrams).
//   3. A row is int8 codes times one float scale. Sums are kept in double, in text order.
//   4. The sum is scaled to length 1 and rounded once to float32.
//
// The same text gives the same bits everywhere, so ground truth computed elsewhere stays exact.
// That asks for plain multiply-then-add: build for a target with fused multiply-add only together
// with -ffp-contract=off.
//
// Thread safety: immutable after Load, so any number of threads may call Encode.
class TextEncoder {
 public:
  // Longest word, in bytes. Longer words are cut, in the vocabulary and in texts alike.
  static constexpr size_t kWordBytesMax = 24;

  // Reads dir/vocab.txt and dir/model_i8.bin. Every length in them is checked against the size of
  // the file before it is used. Errors: kNotFound or kPermissionDenied (cannot open), kCorrupt
  // (truncated, too long, a field out of bounds); the message names file, field and remedy.
  static Result<TextEncoder> Load(const std::string& dir);

  TextEncoder(TextEncoder&&) = default;
  TextEncoder& operator=(TextEncoder&&) = default;
  TextEncoder(const TextEncoder&) = delete;
  TextEncoder& operator=(const TextEncoder&) = delete;

  // Writes a vector of length 1 into `out`, whose size must be dimension(). A text without any word
  // gives the zero vector, which a space with cosine distance refuses: the caller looks.
  void Encode(std::string_view text, std::span<float> out) const;

  uint32_t dimension() const { return dimension_; }
  uint32_t word_count() const { return word_count_; }
  uint32_t bucket_count() const { return bucket_count_; }
  uint32_t words_per_text_max() const { return words_per_text_max_; }

  // The words of `text` that Encode would use, in text order, known or not.
  std::vector<std::string> Words(std::string_view text) const;
  // The row of a word of the vocabulary; its line in vocab.txt, counted from 0.
  std::optional<uint32_t> FindWord(std::string_view word) const;

  // Row `row` of the model: words first, then buckets. row < word_count() + bucket_count().
  float RowScale(uint32_t row) const;
  std::span<const int8_t> RowCodes(uint32_t row) const;

 private:
  struct WordHash {
    using is_transparent = void;
    size_t operator()(std::string_view word) const { return std::hash<std::string_view>{}(word); }
  };
  using Vocabulary = std::unordered_map<std::string, uint32_t, WordHash, std::equal_to<>>;

  TextEncoder() = default;
  Result<void> LoadModel(const std::string& path);
  Result<void> LoadVocabulary(const std::string& path);
  void AddRow(uint32_t row, double weight, std::span<double> sum) const;
  void AddWord(std::string_view word, std::span<double> sum) const;

  // Constant after Load.
  uint32_t dimension_ = 0;
  uint32_t word_count_ = 0;
  uint32_t bucket_count_ = 0;
  uint32_t words_per_text_max_ = 0;
  std::vector<float> scales_;  // [word_count + bucket_count]
  std::vector<int8_t> codes_;  // [word_count + bucket_count][dimension]
  Vocabulary vocabulary_;      // word to row
};

}  // namespace engram
