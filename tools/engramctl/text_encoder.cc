#include "tools/engramctl/text_encoder.h"

#include <array>
#include <bit>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <utility>

#include "src/core/check.h"

namespace engram {

namespace {

// Codes, scales and header are read as they lie in the file.
static_assert(std::endian::native == std::endian::little, "STBAG001 is little-endian");

constexpr char kMagic[8] = {'S', 'T', 'B', 'A', 'G', '0', '0', '1'};
constexpr size_t kHeaderBytes = sizeof(kMagic) + 4 * sizeof(uint32_t);
constexpr size_t kTrigramBytes = 3;

// Limits that no honest model comes near. They keep size arithmetic far from overflow; memory is
// bounded by the rule that the file's size must match its header exactly.
constexpr uint32_t kDimensionMax = 4096;
constexpr uint32_t kWordsMax = 1u << 22;
constexpr uint32_t kBucketsMax = 1u << 20;
constexpr uint32_t kWordsPerTextMax = 1u << 16;
constexpr uint64_t kVocabularyBytesMax = 256u << 20;
constexpr uint64_t kModelBytesMax =
    kHeaderBytes + (uint64_t{kWordsMax} + kBucketsMax) * (sizeof(float) + kDimensionMax);

constexpr char kRemedy[] = "; make the directory again with make_sample_data, or copy it whole";

struct FileCloser {
  void operator()(std::FILE* file) const { std::fclose(file); }
};
using File = std::unique_ptr<std::FILE, FileCloser>;

// A directory opens like a file and then fails on seek or read, so every step keeps errno.
std::unexpected<Error> FailRead(const std::string& path) {
  return FailErrno(path + ": cannot read it; give a directory with vocab.txt and model_i8.bin",
                   errno);
}

std::unexpected<Error> Corrupt(const std::string& path, const std::string& what) {
  return Fail(ErrorCode::kCorrupt, path + ": " + what + kRemedy);
}

Result<File> Open(const std::string& path) {
  errno = 0;
  File file(std::fopen(path.c_str(), "rb"));
  if (!file) return FailRead(path);
  return file;
}

Result<uint64_t> SizeOf(std::FILE* file, const std::string& path, uint64_t bytes_max) {
  errno = 0;
  if (std::fseek(file, 0, SEEK_END) != 0) return FailRead(path);
  const long end = std::ftell(file);
  if (end < 0 || std::fseek(file, 0, SEEK_SET) != 0) return FailRead(path);
  if (static_cast<uint64_t>(end) > bytes_max) {
    return Corrupt(path, "size is " + std::to_string(end) + " bytes, more than the limit of " +
                             std::to_string(bytes_max));
  }
  return static_cast<uint64_t>(end);
}

Result<void> ReadExactly(std::FILE* file, const std::string& path, const char* field,
                         void* destination, size_t bytes) {
  errno = 0;
  if (std::fread(destination, 1, bytes, file) == bytes) return {};
  if (std::ferror(file) != 0) return FailRead(path);
  return Corrupt(path, std::string(field) + " is cut short");
}

Result<void> CheckRange(const std::string& path, const char* field, uint32_t value, uint32_t max) {
  if (value >= 1 && value <= max) return {};
  return Corrupt(path, std::string(field) + " is " + std::to_string(value) + ", not in 1 to " +
                           std::to_string(max));
}

bool IsWordByte(unsigned char byte) {
  return (byte >= 'a' && byte <= 'z') || (byte >= '0' && byte <= '9') || byte >= 0x80;
}

uint32_t Fnv1a(std::string_view bytes) {
  uint32_t hash = 2166136261u;
  for (const char byte : bytes) {
    hash ^= static_cast<unsigned char>(byte);
    hash *= 16777619u;
  }
  return hash;
}

// Calls visit(word) for the first `words_max` words of `text`.
template <typename Visitor>
void ForEachWord(std::string_view text, uint32_t words_max, Visitor visit) {
  std::array<char, TextEncoder::kWordBytesMax> word;
  size_t length = 0;
  uint32_t words = 0;
  for (size_t i = 0; i <= text.size() && words < words_max; ++i) {
    // The end of the text ends a word, as a space would.
    unsigned char byte = i < text.size() ? static_cast<unsigned char>(text[i]) : ' ';
    if (byte >= 'A' && byte <= 'Z') byte = static_cast<unsigned char>(byte - 'A' + 'a');
    if (IsWordByte(byte)) {
      if (length < word.size()) word[length++] = static_cast<char>(byte);
    } else if (length > 0) {
      visit(std::string_view(word.data(), length));
      length = 0;
      ++words;
    }
  }
}

}  // namespace

Result<TextEncoder> TextEncoder::Load(const std::string& dir) {
  TextEncoder encoder;
  if (auto loaded = encoder.LoadModel(dir + "/model_i8.bin"); !loaded) {
    return std::unexpected(std::move(loaded.error()));
  }
  if (auto loaded = encoder.LoadVocabulary(dir + "/vocab.txt"); !loaded) {
    return std::unexpected(std::move(loaded.error()));
  }
  return encoder;
}

// 1. The header says how many rows there are and how wide they are; each number has a limit.
// 2. Together they say how long the file must be. Only then is memory taken.
// 3. Scales, then codes.
Result<void> TextEncoder::LoadModel(const std::string& path) {
  const Result<File> file = Open(path);
  if (!file) return std::unexpected(file.error());
  const Result<uint64_t> size = SizeOf(file->get(), path, kModelBytesMax);
  if (!size) return std::unexpected(size.error());

  char magic[sizeof(kMagic)];
  uint32_t header[4];
  if (auto read = ReadExactly(file->get(), path, "magic", magic, sizeof(magic)); !read) return read;
  if (std::memcmp(magic, kMagic, sizeof(kMagic)) != 0) {
    return Corrupt(path, "magic is not STBAG001, so this is not a model of this encoder");
  }
  if (auto read = ReadExactly(file->get(), path, "header", header, sizeof(header)); !read) {
    return read;
  }
  const struct {
    const char* field;
    uint32_t* value;
    uint32_t max;
  } fields[4] = {{"words", &word_count_, kWordsMax},
                 {"buckets", &bucket_count_, kBucketsMax},
                 {"dimension", &dimension_, kDimensionMax},
                 {"words_per_text_max", &words_per_text_max_, kWordsPerTextMax}};
  for (size_t i = 0; i < 4; ++i) {
    if (auto ok = CheckRange(path, fields[i].field, header[i], fields[i].max); !ok) return ok;
    *fields[i].value = header[i];
  }

  const uint64_t rows = uint64_t{word_count_} + bucket_count_;
  const uint64_t expected = kHeaderBytes + rows * (sizeof(float) + dimension_);
  if (*size != expected) {
    return Corrupt(path, "size is " + std::to_string(*size) + " bytes, but its header says " +
                             std::to_string(expected));
  }

  scales_.resize(rows);
  codes_.resize(rows * dimension_);
  if (auto read = ReadExactly(file->get(), path, "scales", scales_.data(), rows * sizeof(float));
      !read) {
    return read;
  }
  for (uint64_t row = 0; row < rows; ++row) {
    if (!std::isfinite(scales_[row])) {
      return Corrupt(path, "scale of row " + std::to_string(row) + " is not a finite number");
    }
  }
  return ReadExactly(file->get(), path, "codes", codes_.data(), codes_.size());
}

// One word a line, in the order of the model's rows. What follows a tab is a remark.
Result<void> TextEncoder::LoadVocabulary(const std::string& path) {
  const Result<File> file = Open(path);
  if (!file) return std::unexpected(file.error());
  const Result<uint64_t> size = SizeOf(file->get(), path, kVocabularyBytesMax);
  if (!size) return std::unexpected(size.error());
  std::string bytes(*size, '\0');
  if (auto read = ReadExactly(file->get(), path, "text", bytes.data(), bytes.size()); !read) {
    return read;
  }

  vocabulary_.reserve(word_count_);
  uint32_t line_number = 0;
  for (std::string_view rest = bytes; !rest.empty(); ++line_number) {
    const size_t end = rest.find('\n');
    const std::string_view line = rest.substr(0, end);
    rest.remove_prefix(end == std::string_view::npos ? rest.size() : end + 1);
    const std::string_view word = line.substr(0, line.find('\t'));

    const std::string where = "line " + std::to_string(line_number + 1);
    if (line_number >= word_count_) {
      return Corrupt(
          path, where + " is one more than the model's " + std::to_string(word_count_) + " words");
    }
    if (word.empty() || word.size() > kWordBytesMax) {
      return Corrupt(path, where + ": word has " + std::to_string(word.size()) +
                               " bytes, not 1 to " + std::to_string(kWordBytesMax));
    }
    for (const char byte : word) {
      if (!IsWordByte(static_cast<unsigned char>(byte))) {
        return Corrupt(path, where + ": word holds a byte that is not a-z, 0-9 or above 0x7f");
      }
    }
    if (!vocabulary_.emplace(word, line_number).second) {
      return Corrupt(path, where + ": word stands there a second time");
    }
  }
  if (line_number != word_count_) {
    return Corrupt(path, "has " + std::to_string(line_number) + " words, but the model has " +
                             std::to_string(word_count_));
  }
  return {};
}

void TextEncoder::Encode(std::string_view text, std::span<float> out) const {
  CHECK(out.size() == dimension_, "the vector's room is the encoder's dimension");
  std::vector<double> sum(dimension_, 0.0);
  ForEachWord(text, words_per_text_max_, [&](std::string_view word) { AddWord(word, sum); });

  double squares = 0;
  for (const double value : sum) squares += value * value;
  const double inverse_norm = squares > 0 ? 1.0 / std::sqrt(squares) : 0.0;
  for (uint32_t i = 0; i < dimension_; ++i) out[i] = static_cast<float>(sum[i] * inverse_norm);
}

void TextEncoder::AddWord(std::string_view word, std::span<double> sum) const {
  if (const auto row = FindWord(word)) {
    AddRow(*row, 1.0, sum);
    return;
  }
  std::array<char, kWordBytesMax + 2> marked;
  marked[0] = '<';
  std::memcpy(marked.data() + 1, word.data(), word.size());
  marked[word.size() + 1] = '>';

  // A word of n bytes has n trigrams, since its two marks count.
  const double weight = 1.0 / static_cast<double>(word.size());
  for (size_t i = 0; i < word.size(); ++i) {
    const uint32_t bucket = Fnv1a({marked.data() + i, kTrigramBytes}) % bucket_count_;
    AddRow(word_count_ + bucket, weight, sum);
  }
}

void TextEncoder::AddRow(uint32_t row, double weight, std::span<double> sum) const {
  const int8_t* const codes = codes_.data() + size_t{row} * dimension_;
  const double factor = weight * static_cast<double>(scales_[row]);
  for (uint32_t i = 0; i < dimension_; ++i) sum[i] += factor * static_cast<double>(codes[i]);
}

std::vector<std::string> TextEncoder::Words(std::string_view text) const {
  std::vector<std::string> words;
  ForEachWord(text, words_per_text_max_, [&](std::string_view word) { words.emplace_back(word); });
  return words;
}

std::optional<uint32_t> TextEncoder::FindWord(std::string_view word) const {
  const auto found = vocabulary_.find(word);
  if (found == vocabulary_.end()) return std::nullopt;
  return found->second;
}

float TextEncoder::RowScale(uint32_t row) const {
  CHECK(row < scales_.size(), "row is a word or a bucket");
  return scales_[row];
}

std::span<const int8_t> TextEncoder::RowCodes(uint32_t row) const {
  CHECK(row < scales_.size(), "row is a word or a bucket");
  return {codes_.data() + size_t{row} * dimension_, dimension_};
}

}  // namespace engram
