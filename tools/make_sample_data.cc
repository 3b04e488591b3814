// Makes tools/sample-data from the unpacked data set debwn-text-768:
//
//   make_sample_data SOURCE_DIR DESTINATION_DIR
//
// The same source gives the same files. The steps:
//   1. Read the texts, the queries and the full encoder.
//   2. Take what must be in: the right package of every short phrase, and the neighbourhood of
//      kDemonstrationPhrase. Their words open the vocabulary. So do the words of those document
//      queries that need the fewest new ones.
//   3. Fill the vocabulary up to kVocabularyWords with the words that most texts use.
//   4. A text is eligible when the full encoder knows no word of it that the vocabulary lacks. Fill
//      a quota for each source with eligible texts, in the order of the source. So the cut encoder
//      gives the very bits of the full one: known words have the same rows, and words that neither
//      knows go to the same buckets, all of which are kept.
//   5. Write texts, queries and the cut encoder.
//   6. Read them back, encode all, and compare each vector with the source's, bit by bit.
//   7. Compute exact ground truth from those vectors; print how often the right package is found.
#include <zlib.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <unordered_map>
#include <utility>
#include <vector>

#include "src/core/result.h"
#include "tools/engramctl/text_encoder.h"
#include "tools/engramctl/text_file.h"

namespace engram {
namespace {

static_assert(std::endian::native == std::endian::little, "the vector files are little-endian");

constexpr size_t kVocabularyWords = 12'000;
constexpr size_t kGroundTruthDepth = 100;
constexpr std::string_view kDemonstrationPhrase = "network packet sniffer";
constexpr std::string_view kDemonstrationKey = "sniffit";
// How many of the nearest Debian packages are its neighbourhood.
constexpr size_t kDemonstrationNeighbours = 100;

struct Quota {
  std::string_view source;
  size_t texts;
  size_t queries;
  // What a text of this source weighs when words are counted.
  uint64_t weight;
};
constexpr std::array<Quota, 3> kQuotas = {
    {{"debian", 14'000, 320, 12}, {"wordnet", 4'500, 100, 1}, {"kjv", 3'500, 80, 4}}};

// Sections that repeat what another package of the same source says.
constexpr std::array<std::string_view, 9> kDullSections = {
    "debug",        "doc",          "introspection", "libdevel", "libs",
    "localization", "metapackages", "oldlibs",       "tasks"};
// The first section to fill: the demonstration's neighbourhood.
constexpr std::string_view kFirstSection = "net";
// Marks of dictionary entries about abuse and sex. A sample is read by strangers.
constexpr std::array<std::string_view, 11> kMarksLeftOut = {
    "derogat", "disparag", "ethnic", "insult", "obscen", "offensive",
    "pejorat", "sexual",   "slur",   "taboo",  "vulgar"};

using WordRows = std::vector<uint32_t>;  // rows of the full model, sorted, each once

struct ShortQuery {
  std::string phrase;
  uint64_t target = 0;  // row of the right package in the base
};

struct Source {
  TextEncoder encoder;
  std::vector<TextRow> base;
  std::vector<TextRow> query_docs;
  std::vector<ShortQuery> query_short;
  std::vector<WordRows> base_words;
  std::unordered_map<uint32_t, std::string> spelling;  // row of the full model to word
};

struct Selection {
  std::set<uint32_t> vocabulary;  // rows of the full model
  std::vector<size_t> texts;      // rows of the base, rising
  std::vector<size_t> query_docs;
};

std::unexpected<Error> Forward(Error& error) { return std::unexpected(std::move(error)); }

// ---- 1. Reading ----

Result<std::vector<ShortQuery>> ReadShortQueries(const std::string& path, size_t base_rows) {
  std::ifstream file(path);
  if (!file) return Fail(ErrorCode::kNotFound, path + ": cannot open it");
  std::vector<ShortQuery> queries;
  for (std::string line; std::getline(file, line);) {
    // id, row of the right package, package, phrase
    const size_t first = line.find('\t');
    const size_t last = line.rfind('\t');
    if (first == std::string::npos || last == first) {
      return Fail(ErrorCode::kCorrupt, path + ": a line has fewer than four columns");
    }
    ShortQuery query;
    query.target = std::strtoull(line.c_str() + first + 1, nullptr, 10);
    query.phrase = line.substr(last + 1);
    if (query.target >= base_rows) {
      return Fail(ErrorCode::kCorrupt, path + ": a right package is not in the base");
    }
    queries.push_back(std::move(query));
  }
  return queries;
}

WordRows KnownWords(const TextEncoder& encoder, std::string_view text) {
  WordRows rows;
  for (const std::string& word : encoder.Words(text)) {
    if (const auto row = encoder.FindWord(word)) rows.push_back(*row);
  }
  std::sort(rows.begin(), rows.end());
  rows.erase(std::unique(rows.begin(), rows.end()), rows.end());
  return rows;
}

Result<Source> ReadSource(const std::string& dir) {
  auto encoder = TextEncoder::Load(dir);
  if (!encoder) return Forward(encoder.error());
  auto base = ReadTexts(dir + "/base.tsv");
  if (!base) return Forward(base.error());
  auto docs = ReadTexts(dir + "/query_docs.tsv");
  if (!docs) return Forward(docs.error());
  auto phrases = ReadShortQueries(dir + "/query_short.tsv", base->size());
  if (!phrases) return Forward(phrases.error());

  Source source{
      std::move(*encoder), std::move(*base), std::move(*docs), std::move(*phrases), {}, {}};
  // The demonstration phrase joins the others, so that its answer is in the ground truth.
  for (size_t row = 0; row < source.base.size(); ++row) {
    const TextRow& text = source.base[row];
    if (text.source == "debian" && text.key == kDemonstrationKey) {
      source.query_short.push_back({std::string(kDemonstrationPhrase), row});
    }
  }
  for (const TextRow& row : source.base) {
    source.base_words.push_back(KnownWords(source.encoder, row.text));
  }
  const auto spell = [&source](std::string_view text) {
    for (std::string& word : source.encoder.Words(text)) {
      if (const auto row = source.encoder.FindWord(word)) {
        source.spelling.emplace(*row, std::move(word));
      }
    }
  };
  for (const TextRow& row : source.base) spell(row.text);
  for (const TextRow& row : source.query_docs) spell(row.text);
  for (const ShortQuery& query : source.query_short) spell(query.phrase);
  return source;
}

// ---- Vectors ----

// The product of two floats is exact in double, so only the order of the sum matters: by index.
double InnerProduct(std::span<const float> a, std::span<const float> b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += static_cast<double>(a[i]) * b[i];
  return sum;
}

using Vectors = std::vector<std::vector<float>>;

Vectors EncodeAll(const TextEncoder& encoder, std::span<const TextRow> rows) {
  Vectors vectors(rows.size(), std::vector<float>(encoder.dimension()));
  for (size_t i = 0; i < rows.size(); ++i) encoder.Encode(rows[i].text, vectors[i]);
  return vectors;
}

// The `depth` nearest of `base` by inner product, nearest first, ties by lower id.
std::vector<int32_t> Nearest(const Vectors& base, std::span<const float> query, size_t depth) {
  std::vector<std::pair<double, int32_t>> scored;
  scored.reserve(base.size());
  for (size_t i = 0; i < base.size(); ++i) {
    scored.emplace_back(-InnerProduct(base[i], query), static_cast<int32_t>(i));
  }
  depth = std::min(depth, scored.size());
  std::partial_sort(scored.begin(), scored.begin() + static_cast<ptrdiff_t>(depth), scored.end());
  std::vector<int32_t> ids;
  for (size_t i = 0; i < depth; ++i) ids.push_back(scored[i].second);
  return ids;
}

// ---- 2 to 4. Choosing ----

bool Covered(const WordRows& words, const std::set<uint32_t>& vocabulary) {
  return !words.empty() && std::all_of(words.begin(), words.end(),
                                       [&](uint32_t row) { return vocabulary.contains(row); });
}

bool LeftOut(const TextRow& row) {
  return row.source == "wordnet" &&
         std::any_of(kMarksLeftOut.begin(), kMarksLeftOut.end(), [&](std::string_view mark) {
           return row.text.find(mark) != std::string::npos;
         });
}

// Rows of the base that must be in, whatever their words.
std::set<size_t> MustHave(const Source& source) {
  std::set<size_t> rows;
  for (const ShortQuery& query : source.query_short) rows.insert(query.target);

  std::vector<float> phrase(source.encoder.dimension());
  source.encoder.Encode(kDemonstrationPhrase, phrase);
  std::vector<float> vector(source.encoder.dimension());
  std::vector<std::pair<double, size_t>> scored;
  for (size_t row = 0; row < source.base.size(); ++row) {
    if (source.base[row].source != "debian") continue;
    source.encoder.Encode(source.base[row].text, vector);
    scored.emplace_back(-InnerProduct(phrase, vector), row);
  }
  std::sort(scored.begin(), scored.end());
  scored.resize(std::min(scored.size(), kDemonstrationNeighbours));
  for (const auto& [score, row] : scored) rows.insert(row);
  return rows;
}

// Takes the `count` document queries of a source that need the fewest new words.
void TakeQueries(const Source& source, const Quota& quota, Selection& selection) {
  std::vector<std::pair<size_t, size_t>> by_new_words;
  std::vector<WordRows> words(source.query_docs.size());
  for (size_t i = 0; i < source.query_docs.size(); ++i) {
    const TextRow& row = source.query_docs[i];
    if (row.source != quota.source || LeftOut(row)) continue;
    words[i] = KnownWords(source.encoder, row.text);
    if (words[i].empty()) continue;
    const auto is_new = [&](uint32_t word) { return !selection.vocabulary.contains(word); };
    by_new_words.emplace_back(std::count_if(words[i].begin(), words[i].end(), is_new), i);
  }
  std::sort(by_new_words.begin(), by_new_words.end());
  by_new_words.resize(std::min(by_new_words.size(), quota.queries));
  for (const auto& [new_words, i] : by_new_words) {
    selection.vocabulary.insert(words[i].begin(), words[i].end());
    selection.query_docs.push_back(i);
  }
}

void FillVocabulary(const Source& source, std::set<uint32_t>& vocabulary) {
  std::map<std::string_view, uint64_t> weights;
  for (const Quota& quota : kQuotas) weights[quota.source] = quota.weight;
  std::vector<std::pair<int64_t, uint32_t>> by_use(source.encoder.word_count());
  for (uint32_t word = 0; word < by_use.size(); ++word) by_use[word] = {0, word};
  for (size_t i = 0; i < source.base.size(); ++i) {
    const auto weight = static_cast<int64_t>(weights[source.base[i].source]);
    for (const uint32_t word : source.base_words[i]) by_use[word].first -= weight;
  }
  std::sort(by_use.begin(), by_use.end());
  for (const auto& [use, word] : by_use) {
    if (vocabulary.size() >= kVocabularyWords || use == 0) break;
    vocabulary.insert(word);
  }
}

void TakeTexts(const Source& source, const Quota& quota, const std::set<size_t>& must_have,
               Selection& selection) {
  std::vector<size_t> first, rest;
  size_t room = quota.texts;
  for (size_t i = 0; i < source.base.size(); ++i) {
    const TextRow& row = source.base[i];
    if (row.source != quota.source) continue;
    if (must_have.contains(i)) {
      selection.texts.push_back(i);
      --room;
      continue;
    }
    const bool dull =
        std::find(kDullSections.begin(), kDullSections.end(), row.category) != kDullSections.end();
    if (dull || LeftOut(row) || !Covered(source.base_words[i], selection.vocabulary)) continue;
    (row.category == kFirstSection ? first : rest).push_back(i);
  }
  first.insert(first.end(), rest.begin(), rest.end());
  first.resize(std::min(first.size(), room));
  selection.texts.insert(selection.texts.end(), first.begin(), first.end());
}

Selection Choose(const Source& source) {
  Selection selection;
  const std::set<size_t> must_have = MustHave(source);
  for (const size_t row : must_have) {
    selection.vocabulary.insert(source.base_words[row].begin(), source.base_words[row].end());
  }
  for (const ShortQuery& query : source.query_short) {
    const WordRows words = KnownWords(source.encoder, query.phrase);
    selection.vocabulary.insert(words.begin(), words.end());
  }
  for (const Quota& quota : kQuotas) TakeQueries(source, quota, selection);
  FillVocabulary(source, selection.vocabulary);
  for (const Quota& quota : kQuotas) TakeTexts(source, quota, must_have, selection);
  std::sort(selection.texts.begin(), selection.texts.end());
  std::sort(selection.query_docs.begin(), selection.query_docs.end());
  return selection;
}

// ---- 5. Writing ----

Result<void> WriteFile(const std::string& path, std::string_view bytes) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  file.close();
  if (!file) return Fail(ErrorCode::kInternal, path + ": cannot write it; is there room?");
  return {};
}

// Rows get new ids, their place in the file.
Result<void> WriteTexts(const std::string& path, std::span<const TextRow> rows) {
  const gzFile file = gzopen(path.c_str(), "wb9");
  if (file == nullptr) return Fail(ErrorCode::kInternal, path + ": cannot open it for writing");
  bool ok = true;
  for (size_t i = 0; i < rows.size(); ++i) {
    const std::string line = std::to_string(i) + '\t' + rows[i].source + '\t' + rows[i].category +
                             '\t' + rows[i].key + '\t' + rows[i].text + '\n';
    ok = ok && gzwrite(file, line.data(), static_cast<unsigned>(line.size())) ==
                   static_cast<int>(line.size());
  }
  ok = gzclose(file) == Z_OK && ok;
  if (!ok) return Fail(ErrorCode::kInternal, path + ": cannot write it; is there room?");
  return {};
}

template <typename T>
void Append(std::string& bytes, std::span<const T> values) {
  bytes.append(reinterpret_cast<const char*>(values.data()), values.size_bytes());
}

Result<void> WriteEncoder(const std::string& dir, const Source& source,
                          const std::set<uint32_t>& words) {
  const TextEncoder& full = source.encoder;
  std::vector<uint32_t> rows(words.begin(), words.end());
  std::string vocabulary;
  for (const uint32_t row : rows) vocabulary += source.spelling.at(row) + '\n';
  for (uint32_t i = 0; i < full.bucket_count(); ++i) rows.push_back(full.word_count() + i);

  std::string model = "STBAG001";
  const std::array<uint32_t, 4> header = {static_cast<uint32_t>(words.size()), full.bucket_count(),
                                          full.dimension(), full.words_per_text_max()};
  Append<uint32_t>(model, header);
  for (const uint32_t row : rows) {
    const float scale = full.RowScale(row);
    Append<float>(model, std::span(&scale, 1));
  }
  for (const uint32_t row : rows) Append<int8_t>(model, full.RowCodes(row));
  if (auto written = WriteFile(dir + "/vocab.txt", vocabulary); !written) return written;
  return WriteFile(dir + "/model_i8.bin", model);
}

Result<void> WriteIvecs(const std::string& path, std::span<const std::vector<int32_t>> rows) {
  std::string bytes;
  for (const std::vector<int32_t>& row : rows) {
    const int32_t length = static_cast<int32_t>(row.size());
    Append<int32_t>(bytes, std::span(&length, 1));
    Append<int32_t>(bytes, row);
  }
  return WriteFile(path, bytes);
}

// ---- 6. Checking ----

// Row `row` of the .fvecs file of the source, whose rows all have `dimension` values.
Result<std::vector<float>> ReadFvecsRow(std::ifstream& file, const std::string& path, size_t row,
                                        uint32_t dimension) {
  int32_t length = 0;
  std::vector<float> vector(dimension);
  file.seekg(static_cast<std::streamoff>(row * (sizeof(length) + dimension * sizeof(float))));
  file.read(reinterpret_cast<char*>(&length), sizeof(length));
  file.read(reinterpret_cast<char*>(vector.data()),
            static_cast<std::streamsize>(dimension * sizeof(float)));
  if (!file || length != static_cast<int32_t>(dimension)) {
    return Fail(ErrorCode::kCorrupt, path + ": row " + std::to_string(row) + " is missing");
  }
  return vector;
}

// CRC-32 of what the vectors are as an .fvecs file.
uint32_t FvecsCrc(const Vectors& vectors) {
  std::string bytes;
  uLong crc = crc32(0, nullptr, 0);
  for (const std::vector<float>& vector : vectors) {
    const int32_t length = static_cast<int32_t>(vector.size());
    bytes.clear();
    Append<int32_t>(bytes, std::span(&length, 1));
    Append<float>(bytes, vector);
    crc = crc32(crc, reinterpret_cast<const Bytef*>(bytes.data()), static_cast<uInt>(bytes.size()));
  }
  return static_cast<uint32_t>(crc);
}

Result<void> CheckBits(const Vectors& vectors, const std::string& path,
                       std::span<const size_t> rows) {
  std::ifstream file(path, std::ios::binary);
  for (size_t i = 0; i < rows.size(); ++i) {
    const auto expected =
        ReadFvecsRow(file, path, rows[i], static_cast<uint32_t>(vectors[i].size()));
    if (!expected) return std::unexpected(expected.error());
    if (std::memcmp(expected->data(), vectors[i].data(), expected->size() * sizeof(float)) != 0) {
      return Fail(ErrorCode::kInternal,
                  path + ": row " + std::to_string(rows[i]) +
                      " differs from what the cut encoder gives; was the source's text changed?");
    }
  }
  return {};
}

// ---- The whole ----

// A query set of the sample: its texts, and the rows of the source's .fvecs that they must equal.
struct QuerySet {
  std::string name;
  std::vector<TextRow> rows;
  std::vector<size_t> source_rows;
};

QuerySet DocumentQueries(const Source& source, const Selection& selection) {
  QuerySet set{"query_docs", {}, selection.query_docs};
  for (const size_t i : selection.query_docs) set.rows.push_back(source.query_docs[i]);
  return set;
}

// The demonstration phrase stands last and has no row in the source's file.
QuerySet ShortQueries(const Source& source) {
  QuerySet set{"query_short", {}, {}};
  for (const ShortQuery& query : source.query_short) {
    const TextRow& right = source.base[query.target];
    set.rows.push_back({0, right.source, right.category, right.key, query.phrase});
    if (query.phrase != kDemonstrationPhrase) set.source_rows.push_back(set.source_rows.size());
  }
  return set;
}

void PrintFound(const std::vector<std::vector<int32_t>>& truth,
                const std::vector<std::vector<int32_t>>& right) {
  size_t at_1 = 0, at_10 = 0;
  for (size_t i = 0; i < truth.size(); ++i) {
    const auto end = truth[i].begin() + 10;
    const auto found = std::find(truth[i].begin(), end, right[i][0]);
    at_1 += found == truth[i].begin();
    at_10 += found != end;
  }
  std::printf("query_short: right package first %.3f, in the first ten %.3f\n",
              static_cast<double>(at_1) / static_cast<double>(truth.size()),
              static_cast<double>(at_10) / static_cast<double>(truth.size()));
}

Result<void> WriteChecksums(const std::string& dir, const std::map<std::string, uint32_t>& sums) {
  std::string text;
  for (const auto& [name, sum] : sums) {
    std::array<char, 16> hex;
    std::snprintf(hex.data(), hex.size(), "%08x", sum);
    text += name + '\t' + hex.data() + '\n';
  }
  return WriteFile(dir + "/checksums.tsv", text);
}

Result<void> Make(const std::string& source_dir, const std::string& dir) {
  auto source = ReadSource(source_dir);
  if (!source) return Forward(source.error());
  const Selection selection = Choose(*source);

  std::error_code failed;
  std::filesystem::create_directories(dir + "/encoder", failed);
  if (failed) return Fail(ErrorCode::kInternal, dir + ": cannot create it: " + failed.message());
  if (auto ok = WriteEncoder(dir + "/encoder", *source, selection.vocabulary); !ok) return ok;
  std::vector<TextRow> texts;
  for (const size_t row : selection.texts) texts.push_back(source->base[row]);
  if (auto ok = WriteTexts(dir + "/texts.tsv.gz", texts); !ok) return ok;

  auto encoder = TextEncoder::Load(dir + "/encoder");
  if (!encoder) return Forward(encoder.error());
  auto read_back = ReadTexts(dir + "/texts.tsv.gz");
  if (!read_back) return Forward(read_back.error());
  const Vectors base = EncodeAll(*encoder, *read_back);
  if (auto ok = CheckBits(base, source_dir + "/base.fvecs", selection.texts); !ok) return ok;
  std::map<std::string, uint32_t> sums = {{"base.fvecs", FvecsCrc(base)}};
  std::printf("%zu texts, %zu words\n", texts.size(), selection.vocabulary.size());

  for (const QuerySet& set : {DocumentQueries(*source, selection), ShortQueries(*source)}) {
    const std::string path = dir + '/' + set.name + ".tsv.gz";
    if (auto ok = WriteTexts(path, set.rows); !ok) return ok;
    const Vectors queries = EncodeAll(*encoder, set.rows);
    if (auto ok = CheckBits(queries, source_dir + '/' + set.name + ".fvecs", set.source_rows);
        !ok) {
      return ok;
    }
    sums[set.name + ".fvecs"] = FvecsCrc(queries);
    std::printf("%s: %zu queries\n", set.name.c_str(), queries.size());

    std::vector<std::vector<int32_t>> truth;
    for (const auto& query : queries) truth.push_back(Nearest(base, query, kGroundTruthDepth));
    if (auto ok = WriteIvecs(dir + "/gt100_ip_" + set.name + ".ivecs", truth); !ok) return ok;
    if (set.name != "query_short") continue;

    std::vector<std::vector<int32_t>> right;
    for (const ShortQuery& query : source->query_short) {
      const auto place =
          std::lower_bound(selection.texts.begin(), selection.texts.end(), query.target);
      right.push_back({static_cast<int32_t>(place - selection.texts.begin())});
    }
    if (auto ok = WriteIvecs(dir + "/right_query_short.ivecs", right); !ok) return ok;
    PrintFound(truth, right);
  }
  return WriteChecksums(dir, sums);
}

}  // namespace
}  // namespace engram

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: make_sample_data SOURCE_DIR DESTINATION_DIR\n");
    return 2;
  }
  if (auto made = engram::Make(argv[1], argv[2]); !made) {
    std::fprintf(stderr, "make_sample_data: %s\n", made.error().message.c_str());
    return 1;
  }
  return 0;
}
