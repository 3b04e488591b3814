#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "src/core/result.h"

namespace engram {

// One observation or query as a person reads it.
struct TextRow {
  uint64_t id = 0;
  std::string source;    // the collection it comes from, such as "debian"
  std::string category;  // a section, word class or book: a natural filter
  std::string key;       // a name inside the source, such as a package name
  std::string text;
};

// A column that recalls may filter by: its name and where it is.
struct TextColumn {
  std::string_view name;
  std::string TextRow::* value;
};
// Of source, category and key; another name is none of them (nothing is returned).
std::optional<TextColumn> FindTextColumn(std::string_view name);

// Whether ReadTexts takes a file of that name for one with columns.
bool HasTextColumns(std::string_view path);

// What ReadTexts accepts at most: a small gzip file can hold a great deal.
struct TextLimits {
  size_t line_bytes_max = 64 * 1024;            // a line without its newline
  uint64_t file_bytes_max = uint64_t{1} << 30;  // the file after decompression
  size_t rows_max = 4'000'000;
};

// Reads a whole file of texts, plain or gzip alike. A name that ends in .tsv or .tsv.gz has five
// columns, id<TAB>source<TAB>category<TAB>key<TAB>text, where id is a decimal number. Any other
// name has one text a line, and the id is the line's number, counted from 0.
//
// Errors: kNotFound or kPermissionDenied (cannot open), kCorrupt (a cut or damaged gzip file, a
// line that is too long or has another number of columns, no line at all), kResourceExhausted (over
// a bound). The message names file, line and remedy.
Result<std::vector<TextRow>> ReadTexts(const std::string& path, const TextLimits& limits = {});

}  // namespace engram
