#include "tools/engramctl/table.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "src/core/check.h"

namespace engram {

namespace {

constexpr std::string_view kGap = "  ";
// A last column narrower than this would tell nothing; lines wrap instead.
constexpr size_t kLastColumnMin = 10;

bool BeginsCharacter(char byte) { return (static_cast<unsigned char>(byte) & 0xC0) != 0x80; }

size_t CountCharacters(std::string_view text) {
  return static_cast<size_t>(std::ranges::count_if(text, BeginsCharacter));
}

}  // namespace

std::string WithThousands(uint64_t number) {
  std::string text = std::to_string(number);
  for (size_t place = text.size(); place > 3; place -= 3) text.insert(place - 3, 1, ',');
  return text;
}

size_t TerminalColumns(std::FILE* file) {
  winsize size = {};
  const int fd = fileno(file);
  if (isatty(fd) == 0 || ioctl(fd, TIOCGWINSZ, &size) != 0) return 0;
  return size.ws_col;
}

std::string CutToColumns(std::string_view text, size_t columns) {
  if (columns == 0 || CountCharacters(text) <= columns) return std::string(text);
  size_t end = 0;
  for (size_t characters = 0; end < text.size(); ++end) {
    if (BeginsCharacter(text[end]) && ++characters == columns) break;
  }
  return std::string(text.substr(0, end)) + "…";
}

void Table::AddRow(std::vector<std::string> cells) {
  CHECK(cells.size() == columns_.size(), "a row has one cell a column");
  rows_.push_back(std::move(cells));
}

std::string Table::ToString(size_t line_columns) const {
  std::vector<std::string> headings;
  for (const Column& column : columns_) headings.push_back(column.heading);
  std::vector<const std::vector<std::string>*> lines = {&headings};
  for (const auto& row : rows_) lines.push_back(&row);

  std::vector<size_t> widths(columns_.size(), 0);
  for (const auto* line : lines) {
    for (size_t i = 0; i < widths.size(); ++i) {
      widths[i] = std::max(widths[i], CountCharacters((*line)[i]));
    }
  }
  size_t before_last = 0;
  for (size_t i = 0; i + 1 < widths.size(); ++i) before_last += widths[i] + kGap.size();
  const size_t last_columns =
      line_columns == 0
          ? 0
          : std::max(line_columns - std::min(line_columns, before_last), kLastColumnMin);

  std::string text;
  for (const auto* line : lines) {
    for (size_t i = 0; i < widths.size(); ++i) {
      const bool last = i + 1 == widths.size();
      const std::string cell = last ? CutToColumns((*line)[i], last_columns) : (*line)[i];
      const std::string padding(widths[i] - std::min(widths[i], CountCharacters(cell)), ' ');
      if (columns_[i].align == Align::kRight) text += padding;
      text += cell;
      if (columns_[i].align == Align::kLeft && !last) text += padding;
      text += last ? std::string_view("\n") : kGap;
    }
  }
  return text;
}

void Table::Print() const { std::fputs(ToString(TerminalColumns(stdout)).c_str(), stdout); }

}  // namespace engram
