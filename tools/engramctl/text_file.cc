#include "tools/engramctl/text_file.h"

#include <zlib.h>

#include <array>
#include <cerrno>
#include <charconv>
#include <memory>
#include <string_view>
#include <system_error>
#include <utility>

namespace engram {

namespace {

constexpr size_t kChunkBytes = 128 * 1024;
constexpr size_t kColumns = 5;

struct GzipCloser {
  void operator()(gzFile_s* file) const { gzclose(file); }
};
using GzipFile = std::unique_ptr<gzFile_s, GzipCloser>;

std::unexpected<Error> FailLine(const std::string& path, size_t line, const std::string& what) {
  return Fail(ErrorCode::kCorrupt, path + ": line " + std::to_string(line + 1) + ": " + what);
}

// Splits lines off a stream that comes in chunks, and turns each into a row.
class RowReader {
 public:
  RowReader(const std::string& path, const TextLimits& limits)
      : path_(path), limits_(limits), has_columns_(HasTextColumns(path)) {}

  Result<void> Add(std::string_view chunk) {
    while (!chunk.empty()) {
      const size_t end = chunk.find('\n');
      line_.append(chunk.substr(0, end));
      if (line_.size() > limits_.line_bytes_max) {
        return FailLine(path_, rows_.size(),
                        "longer than " + std::to_string(limits_.line_bytes_max) +
                            " bytes; shorten the text or split it");
      }
      if (end == std::string_view::npos) return {};
      chunk.remove_prefix(end + 1);
      if (auto taken = TakeLine(); !taken) return taken;
    }
    return {};
  }

  // The last line may lack its newline.
  Result<std::vector<TextRow>> Finish() {
    if (!line_.empty()) {
      if (auto taken = TakeLine(); !taken) return std::unexpected(std::move(taken.error()));
    }
    if (rows_.empty()) {
      return Fail(ErrorCode::kCorrupt, path_ + ": holds no text; was it copied whole?");
    }
    return std::move(rows_);
  }

 private:
  Result<void> TakeLine() {
    if (rows_.size() >= limits_.rows_max) {
      return Fail(
          ErrorCode::kResourceExhausted,
          path_ + ": more than " + std::to_string(limits_.rows_max) + " lines; split the file");
    }
    TextRow row;
    if (has_columns_) {
      if (auto split = Split(row); !split) return split;
    } else {
      row.id = rows_.size();
      row.text = line_;
    }
    rows_.push_back(std::move(row));
    line_.clear();
    return {};
  }

  Result<void> Split(TextRow& row) const {
    std::array<std::string_view, kColumns> columns;
    size_t count = 0;
    for (std::string_view rest = line_;; ++count) {
      const size_t tab = rest.find('\t');
      if (count < kColumns) columns[count] = rest.substr(0, tab);
      if (tab == std::string_view::npos) break;
      rest.remove_prefix(tab + 1);
    }
    if (++count != kColumns) {
      return FailLine(path_, rows_.size(),
                      "has " + std::to_string(count) +
                          " columns, not id, source, category, key, text; name a file of plain "
                          "texts .txt");
    }
    const std::string_view id = columns[0];
    const auto [end, error] = std::from_chars(id.data(), id.data() + id.size(), row.id);
    if (error != std::errc() || end != id.data() + id.size()) {
      return FailLine(path_, rows_.size(), "id is not a decimal number below 2^64");
    }
    row.source = columns[1];
    row.category = columns[2];
    row.key = columns[3];
    row.text = columns[4];
    return {};
  }

  const std::string path_;
  const TextLimits limits_;
  const bool has_columns_;
  std::string line_;
  std::vector<TextRow> rows_;
};

std::unexpected<Error> FailStream(const std::string& path, gzFile file) {
  int code = Z_OK;
  const std::string message = gzerror(file, &code);
  if (code == Z_ERRNO) return FailErrno(path + ": cannot read it", errno);
  return Fail(ErrorCode::kCorrupt,
              path + ": gzip stream is damaged or cut short (" + message + "); copy it again");
}

}  // namespace

std::optional<TextColumn> FindTextColumn(std::string_view name) {
  for (const TextColumn& column :
       {TextColumn{"source", &TextRow::source}, TextColumn{"category", &TextRow::category},
        TextColumn{"key", &TextRow::key}}) {
    if (column.name == name) return column;
  }
  return std::nullopt;
}

bool HasTextColumns(std::string_view path) {
  return path.ends_with(".tsv") || path.ends_with(".tsv.gz");
}

Result<std::vector<TextRow>> ReadTexts(const std::string& path, const TextLimits& limits) {
  errno = 0;
  const GzipFile file(gzopen(path.c_str(), "rb"));
  if (!file) {
    return FailErrno(path + ": cannot open it; give a .tsv, .tsv.gz or .txt file",
                     errno == 0 ? ENOMEM : errno);
  }
  RowReader reader(path, limits);
  std::vector<char> chunk(kChunkBytes);
  uint64_t total = 0;
  for (;;) {
    const int got = gzread(file.get(), chunk.data(), static_cast<unsigned>(chunk.size()));
    if (got < 0) return FailStream(path, file.get());
    if (got == 0) break;
    total += static_cast<uint64_t>(got);
    if (total > limits.file_bytes_max) {
      return Fail(ErrorCode::kResourceExhausted, path + ": more than " +
                                                     std::to_string(limits.file_bytes_max) +
                                                     " bytes of text; split the file");
    }
    if (auto added = reader.Add({chunk.data(), static_cast<size_t>(got)}); !added) {
      return std::unexpected(std::move(added.error()));
    }
  }
  // A stream that ends in the middle reads like a short one; only the error code tells.
  int code = Z_OK;
  gzerror(file.get(), &code);
  if (code != Z_OK && code != Z_STREAM_END) return FailStream(path, file.get());
  return reader.Finish();
}

}  // namespace engram
