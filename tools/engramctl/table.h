#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <string>
#include <string_view>
#include <vector>

namespace engram {

// 1234567 as "1,234,567".
std::string WithThousands(uint64_t number);

// Width of the terminal behind `file` in columns; 0 when it is none.
size_t TerminalColumns(std::FILE* file);

// `text` (UTF-8) cut to `columns` characters, the last of them "…" where something was cut.
// 0 columns: not cut. Counts code points, so wide characters take more room than that.
std::string CutToColumns(std::string_view text, size_t columns);

// Lines of cells under a heading, each column as wide as its widest cell. The last column is cut so
// that a line fits the terminal.
class Table {
 public:
  enum class Align { kLeft, kRight };
  struct Column {
    std::string heading;
    Align align = Align::kLeft;
  };

  explicit Table(std::vector<Column> columns) : columns_(std::move(columns)) {}

  // One cell a column.
  void AddRow(std::vector<std::string> cells);
  // `line_columns`: width of a line, 0 for any.
  std::string ToString(size_t line_columns) const;
  // On standard output, as wide as it is.
  void Print() const;

 private:
  std::vector<Column> columns_;
  std::vector<std::vector<std::string>> rows_;
};

}  // namespace engram
