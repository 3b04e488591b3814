#include "tools/engramctl/vector_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <optional>
#include <string_view>
#include <system_error>
#include <utility>

#include "src/core/check.h"
#include "src/core/vector_dtype.h"

namespace engram {

namespace {

// Wider rows are no vectors that the appliance takes, but ground truth may be wide.
constexpr uint32_t kColumnsMax = 65'536;
constexpr std::string_view kNpyMagic = "\x93NUMPY";
constexpr size_t kNpyHeaderBytesMax = 65'536;

std::unexpected<Error> Corrupt(const std::string& path, const std::string& what) {
  return Fail(ErrorCode::kCorrupt, path + ": " + what);
}

template <typename T>
T Load(const std::byte* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

// What the header of an .npy file says.
struct NpyHeader {
  std::string descr;
  bool fortran_order = false;
  uint64_t rows = 0;
  uint64_t columns = 0;
};

// Reads the Python literal that NumPy writes, {'descr': '<f4', 'fortran_order': False,
// 'shape': (2, 3), }, and nothing more of the language.
class NpyHeaderParser {
 public:
  explicit NpyHeaderParser(std::string_view text) : rest_(text) {}

  std::optional<NpyHeader> Parse() {
    NpyHeader header;
    bool has_descr = false;
    bool has_order = false;
    bool has_shape = false;
    if (!Take("{")) return std::nullopt;
    while (!Take("}")) {
      std::string key;
      if (!TakeQuoted(key) || !Take(":")) return std::nullopt;
      if (key == "descr" && !has_descr) {
        has_descr = TakeQuoted(header.descr);
        if (!has_descr) return std::nullopt;
      } else if (key == "fortran_order" && !has_order) {
        has_order = true;
        header.fortran_order = Take("True");
        if (!header.fortran_order && !Take("False")) return std::nullopt;
      } else if (key == "shape" && !has_shape) {
        has_shape = Take("(") && TakeNumber(header.rows) && Take(",") &&
                    TakeNumber(header.columns) && (Take(",") || true) && Take(")");
        if (!has_shape) return std::nullopt;
      } else {
        return std::nullopt;
      }
      Take(",");
    }
    SkipSpaces();
    if (!has_descr || !has_order || !has_shape || !rest_.empty()) return std::nullopt;
    return header;
  }

 private:
  void SkipSpaces() {
    const size_t end = rest_.find_first_not_of(" \t\n");
    rest_.remove_prefix(std::min(end, rest_.size()));
  }
  bool Take(std::string_view token) {
    SkipSpaces();
    if (!rest_.starts_with(token)) return false;
    rest_.remove_prefix(token.size());
    return true;
  }
  bool TakeQuoted(std::string& text) {
    if (!Take("'")) return false;
    const size_t end = rest_.find('\'');
    if (end == std::string_view::npos) return false;
    text = rest_.substr(0, end);
    rest_.remove_prefix(end + 1);
    return true;
  }
  bool TakeNumber(uint64_t& number) {
    SkipSpaces();
    const auto [end, error] = std::from_chars(rest_.data(), rest_.data() + rest_.size(), number);
    if (error != std::errc()) return false;
    rest_.remove_prefix(static_cast<size_t>(end - rest_.data()));
    return true;
  }

  std::string_view rest_;
};

std::optional<ElementType> TypeOfDescr(std::string_view descr) {
  if (descr == "<f4") return ElementType::kF32;
  if (descr == "<f2") return ElementType::kF16;
  if (descr == "|u1") return ElementType::kU8;
  if (descr == "|i1") return ElementType::kI8;
  if (descr == "<i4") return ElementType::kI32;
  return std::nullopt;
}

}  // namespace

size_t ElementTypeBytes(ElementType type) {
  switch (type) {
    case ElementType::kF32:
    case ElementType::kI32:
      return 4;
    case ElementType::kF16:
      return 2;
    case ElementType::kU8:
    case ElementType::kI8:
      break;
  }
  return 1;
}

void VectorFile::Unmapper::operator()(const std::byte* bytes) const {
  munmap(const_cast<std::byte*>(bytes), size);
}

Result<VectorFile> VectorFile::Open(const std::string& path, uint64_t rows_max) {
  VectorFile file;
  const bool is_npy = path.ends_with(".npy");
  if (path.ends_with(".fvecs")) {
    file.type_ = ElementType::kF32;
  } else if (path.ends_with(".bvecs")) {
    file.type_ = ElementType::kU8;
  } else if (path.ends_with(".ivecs")) {
    file.type_ = ElementType::kI32;
  } else if (!is_npy) {
    return Fail(ErrorCode::kInvalidArgument,
                path + ": its name does not end in .fvecs, .bvecs, .ivecs or .npy");
  }

  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return FailErrno(path + ": cannot open it", errno);
  struct stat status = {};
  const bool sized = fstat(fd, &status) == 0;
  if (!sized || !S_ISREG(status.st_mode) || status.st_size <= 0) {
    close(fd);
    return Corrupt(path, "is empty or no ordinary file; was it copied whole?");
  }
  file.size_ = static_cast<size_t>(status.st_size);
  void* const mapped = mmap(nullptr, file.size_, PROT_READ, MAP_PRIVATE, fd, 0);
  const int map_errno = errno;
  close(fd);
  if (mapped == MAP_FAILED) return FailErrno(path + ": cannot map it", map_errno);
  file.mapping_ = Mapping(static_cast<const std::byte*>(mapped), Unmapper{file.size_});

  const Result<void> laid_out =
      is_npy ? file.ReadNpyLayout(path, rows_max) : file.ReadVecsLayout(path, rows_max);
  if (!laid_out) return std::unexpected(laid_out.error());
  return file;
}

Result<void> VectorFile::ReadVecsLayout(const std::string& path, uint64_t rows_max) {
  const auto dimension_at = [&](uint64_t offset) { return Load<int32_t>(mapping_.get() + offset); };
  if (size_ < sizeof(int32_t)) return Corrupt(path, "is cut short; copy it again");
  const int32_t dimension = dimension_at(0);
  if (dimension < 1 || static_cast<uint32_t>(dimension) > kColumnsMax) {
    return Corrupt(path, "its first row claims " + std::to_string(dimension) +
                             " numbers; is it the format that its name says?");
  }
  dimension_ = static_cast<uint32_t>(dimension);
  first_ = sizeof(int32_t);
  stride_ = first_ + dimension_ * ElementTypeBytes(type_);
  const uint64_t rows = size_ / stride_;
  rows_ = std::min(rows, rows_max);
  for (uint64_t row = 0; row < rows_; ++row) {
    const int32_t of_row = dimension_at(row * stride_);
    if (of_row != dimension) {
      return Corrupt(path, "row " + std::to_string(row) + " claims " + std::to_string(of_row) +
                               " numbers, row 0 has " + std::to_string(dimension) +
                               "; rows must be equally long");
    }
  }
  if (rows * stride_ != size_ && rows_max >= rows) {
    return Corrupt(path, "ends within row " + std::to_string(rows) + "; copy it again");
  }
  return {};
}

Result<void> VectorFile::ReadNpyLayout(const std::string& path, uint64_t rows_max) {
  // 1. Magic and version say how the length of the header is written.
  constexpr size_t kVersionEnd = 8;
  const std::string_view bytes(reinterpret_cast<const char*>(mapping_.get()), size_);
  if (!bytes.starts_with(kNpyMagic) || size_ < kVersionEnd + sizeof(uint32_t)) {
    return Corrupt(path, "is no .npy file: it does not begin with its magic bytes");
  }
  const int major = static_cast<unsigned char>(bytes[6]);
  if (major < 1 || major > 3) {
    return Corrupt(path, "is .npy version " + std::to_string(major) + "; 1 to 3 are read");
  }
  const size_t length_bytes = major == 1 ? sizeof(uint16_t) : sizeof(uint32_t);
  const size_t header_bytes = major == 1 ? Load<uint16_t>(mapping_.get() + kVersionEnd)
                                         : Load<uint32_t>(mapping_.get() + kVersionEnd);
  first_ = kVersionEnd + length_bytes + header_bytes;
  if (header_bytes > kNpyHeaderBytesMax || first_ > size_) {
    return Corrupt(path, "claims a header of " + std::to_string(header_bytes) +
                             " bytes, which it does not hold; copy it again");
  }

  // 2. The header says what the rows are.
  const std::optional<NpyHeader> header =
      NpyHeaderParser(bytes.substr(kVersionEnd + length_bytes, header_bytes)).Parse();
  if (!header) {
    return Corrupt(path,
                   "its header is not that of a two-dimensional array; save one of shape "
                   "(rows, dimension)");
  }
  const std::optional<ElementType> type = TypeOfDescr(header->descr);
  if (!type) {
    return Corrupt(path,
                   "its numbers are not <f4, <f2, |u1, |i1 or <i4; save it with .astype('f4')");
  }
  if (header->fortran_order) {
    return Corrupt(path, "is in Fortran order; save numpy.ascontiguousarray of it");
  }
  type_ = *type;
  if (header->columns < 1 || header->columns > kColumnsMax || header->rows < 1) {
    return Corrupt(path, "its shape is empty or has rows of more than " +
                             std::to_string(kColumnsMax) + " numbers");
  }
  dimension_ = static_cast<uint32_t>(header->columns);
  stride_ = dimension_ * ElementTypeBytes(type_);

  // 3. The size of the file has to agree; divided, so that no claim of rows can overflow.
  const size_t data_bytes = size_ - first_;
  if (data_bytes / stride_ != header->rows || data_bytes % stride_ != 0) {
    return Corrupt(path, "holds " + std::to_string(data_bytes) + " bytes of rows, but " +
                             std::to_string(header->rows) + " rows of " + std::to_string(stride_) +
                             " bytes are claimed; copy it again");
  }
  rows_ = std::min(header->rows, rows_max);
  return {};
}

std::span<const std::byte> VectorFile::RowBytes(uint64_t row) const {
  CHECK(row < rows_, "row is one of the file");
  return {mapping_.get() + first_ + row * stride_, dimension_ * ElementTypeBytes(type_)};
}

void VectorFile::ReadRow(uint64_t row, std::span<float> to) const {
  CHECK(to.size() == dimension_, "the room is one row");
  const std::byte* const from = RowBytes(row).data();
  switch (type_) {
    case ElementType::kF32:
      std::memcpy(to.data(), from, to.size_bytes());
      break;
    case ElementType::kF16:
      DecodeVector(VectorDtype::kF16, dimension_, 1, from, to.data());
      break;
    case ElementType::kU8:
      for (uint32_t i = 0; i < dimension_; ++i) to[i] = std::to_integer<uint8_t>(from[i]);
      break;
    case ElementType::kI8:
      DecodeVector(VectorDtype::kInt8, dimension_, 1, from, to.data());
      break;
    case ElementType::kI32:
      for (uint32_t i = 0; i < dimension_; ++i) to[i] = static_cast<float>(IntegerAt(row, i));
      break;
  }
}

int32_t VectorFile::IntegerAt(uint64_t row, uint32_t column) const {
  CHECK(type_ == ElementType::kI32 && column < dimension_, "the file holds integers there");
  return Load<int32_t>(RowBytes(row).data() + column * sizeof(int32_t));
}

Result<FvecsWriter> FvecsWriter::Create(const std::string& path) {
  std::FILE* const file = std::fopen(path.c_str(), "wbe");
  if (file == nullptr) return FailErrno(path + ": cannot create it", errno);
  return FvecsWriter(file, path);
}

Result<void> FvecsWriter::Append(std::span<const float> row) {
  const auto dimension = static_cast<int32_t>(row.size());
  if (std::fwrite(&dimension, sizeof(dimension), 1, file_.get()) != 1 ||
      std::fwrite(row.data(), sizeof(float), row.size(), file_.get()) != row.size()) {
    return FailErrno(path_ + ": cannot write it", errno);
  }
  return {};
}

Result<void> FvecsWriter::Finish() {
  if (std::fflush(file_.get()) != 0) return FailErrno(path_ + ": cannot write it", errno);
  return {};
}

}  // namespace engram
