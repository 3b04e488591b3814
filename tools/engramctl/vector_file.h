#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <span>
#include <string>

#include "src/core/result.h"

namespace engram {

enum class ElementType : uint8_t { kF32, kF16, kU8, kI8, kI32 };

size_t ElementTypeBytes(ElementType type);

// A file of equally long rows of numbers, mapped into memory and read in place:
//   .fvecs, .bvecs, .ivecs: each row is a little-endian int32 count and that many float32, uint8,
//     int32 (the TEXMEX formats, http://corpus-texmex.irisa.fr/).
//   .npy: NumPy's format 1 to 3, of <f4, <f2, |u1, |i1 or <i4, two-dimensional, in C order
//     (https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html).
//
// Thread safety: immutable after Open. A file that someone shortens while it is open ends the
// process with SIGBUS, as with every mapped file.
class VectorFile {
 public:
  // Rows beyond `rows_max` are neither looked at nor offered. Errors: kNotFound, kPermissionDenied,
  // kInvalidArgument (no such format), kCorrupt (cut short, hostile header, rows of unequal
  // length); the message names the file, the place and the remedy.
  static Result<VectorFile> Open(const std::string& path, uint64_t rows_max = UINT64_MAX);

  uint64_t rows() const { return rows_; }
  uint32_t dimension() const { return dimension_; }
  ElementType type() const { return type_; }

  // The bytes of a row, dimension() * ElementTypeBytes(type()) of them, without any alignment.
  std::span<const std::byte> RowBytes(uint64_t row) const;
  // Converts a row to floats. `to` has dimension() elements.
  void ReadRow(uint64_t row, std::span<float> to) const;
  // One number of a row of a kI32 file.
  int32_t IntegerAt(uint64_t row, uint32_t column) const;

 private:
  struct Unmapper {
    size_t size;
    void operator()(const std::byte* bytes) const;
  };
  using Mapping = std::unique_ptr<const std::byte[], Unmapper>;

  VectorFile() = default;
  Result<void> ReadVecsLayout(const std::string& path, uint64_t rows_max);
  Result<void> ReadNpyLayout(const std::string& path, uint64_t rows_max);

  Mapping mapping_;
  size_t size_ = 0;
  uint64_t rows_ = 0;
  uint32_t dimension_ = 0;
  ElementType type_ = ElementType::kF32;
  // Where the numbers of row 0 begin, and the bytes from one row to the next.
  size_t first_ = 0;
  size_t stride_ = 0;
};

// Writes an .fvecs file row by row.
class FvecsWriter {
 public:
  static Result<FvecsWriter> Create(const std::string& path);
  Result<void> Append(std::span<const float> row);
  // Writes out what is buffered; without it the file may lack its end.
  Result<void> Finish();

 private:
  struct Closer {
    void operator()(std::FILE* file) const { std::fclose(file); }
  };

  FvecsWriter(std::FILE* file, std::string path) : file_(file), path_(std::move(path)) {}

  std::unique_ptr<std::FILE, Closer> file_;
  std::string path_;
};

}  // namespace engram
