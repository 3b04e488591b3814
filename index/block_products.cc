// For the VNNI kernel; before any header of Highway.
#define HWY_WANT_AVX3_DL

#include "index/block_products.h"

#include <cstring>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "index/block_products_kernels.h"
#include "src/core/check.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "index/block_products.cc"
#include <hwy/foreach_target.h>  // Compiles what follows once per instruction set.
#include <hwy/highway.h>

#include "index/block_products-inl.h"
#include "index/block_products_tiles-inl.h"

ENGRAM_BEFORE_BLOCK_NAMESPACE();
namespace engram {
namespace HWY_NAMESPACE {

void Int8BlockProducts(const std::byte* rows, size_t row_stride, size_t row_count,
                       const std::byte* packed, size_t query_count, size_t width, int32_t* out,
                       size_t out_stride) {
  Int8Block(rows, row_stride, row_count, packed, query_count, width, out, out_stride);
}

#if HWY_TARGET == HWY_AVX3_DL && defined(__x86_64__)
void PackForTiles(const std::byte* const* queries, size_t query_count, size_t width,
                  std::byte* packed) {
  PackTiles(queries, query_count, width, packed);
}
void Int8TileProducts(const std::byte* rows, size_t row_stride, size_t row_count,
                      const std::byte* packed, size_t query_count, size_t width, int32_t* out,
                      size_t out_stride) {
  Int8WithTiles(rows, row_stride, row_count, packed, query_count, width, out, out_stride);
}
#endif

}  // namespace HWY_NAMESPACE
}  // namespace engram
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace engram {
namespace {

HWY_EXPORT(Int8BlockProducts);

// One query after the other, as they are.
void PackRows(const std::byte* const* queries, size_t query_count, size_t width,
              std::byte* packed) {
  for (size_t q = 0; q < query_count; ++q) std::memcpy(packed + q * width, queries[q], width);
}

BlockKernels VectorKernels() {
  // Without this the table's first entry would choose the target anew on every call.
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  return {
      .pack_queries = &PackRows,
      .products = &HWY_DYNAMIC_DISPATCH(Int8BlockProducts),
  };
}

#if defined(__x86_64__) && defined(__linux__) && (HWY_TARGETS & HWY_AVX3_DL)

bool ProcessorHasTiles() {
  unsigned a = 0;
  unsigned b = 0;
  unsigned c = 0;
  unsigned d = 0;
  // SDM volume 2, CPUID. Leaf 7: AMX-TILE is bit 24 of EDX, AMX-INT8 bit 25.
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d >> 24 & 3) != 3) return false;
  // Leaf 1DH, palette 1: 8 tiles of 16 rows of 64 bytes, or more.
  if (__get_cpuid_count(0x1D, 1, &a, &b, &c, &d) == 0) return false;
  return (b & 0xFFFF) >= 64 && b >> 16 >= 8 && (c & 0xFFFF) >= 16;
}

// XCR0: the system saves the state of the tiles' configuration (bit 17) and of the tiles (18).
bool SystemSavesTiles() {
  unsigned low = 0;
  unsigned high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low >> 17 & 3) == 3;
}

// The system call fails on a kernel without AMX and where a thread's alternate signal stack is too
// small for the state of the tiles (Linux, Documentation/arch/x86/xstate.rst).
bool SystemGrantsTiles() {
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM of arch_prctl(2).
  constexpr int kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// Null where this process may not use tiles. Asks once.
const BlockKernels* TileKernels() {
  static const BlockKernels kernels = {
      .pack_queries = &N_AVX3_DL::PackForTiles,
      .products = &N_AVX3_DL::Int8TileProducts,
  };
  static const bool granted = (hwy::SupportedTargets() & HWY_AVX3_DL) != 0 && ProcessorHasTiles() &&
                              SystemSavesTiles() && SystemGrantsTiles();
  return granted ? &kernels : nullptr;
}

#else
const BlockKernels* TileKernels() { return nullptr; }
#endif

void CheckShape(size_t query_count, size_t width) {
  CHECK(query_count >= 1 && query_count <= BlockProducts::kMaxQueries, "1 to 32 queries a block");
  CHECK(width >= 64 && width <= BlockProducts::kMaxWidth && width % 64 == 0,
        "a block's width is a multiple of 64 up to 4,096");
}

}  // namespace

bool BlockProducts::HasTiles() { return TileKernels() != nullptr; }

BlockProducts::BlockProducts(Kernel kernel)
    : kernel_(kernel != Kernel::kVectors && HasTiles() ? Kernel::kTiles : Kernel::kVectors),
      kernels_(kernel_ == Kernel::kTiles ? *TileKernels() : VectorKernels()) {}

void BlockProducts::PackQueries(const std::byte* const* queries, size_t query_count, size_t width,
                                std::byte* packed) const {
  CheckShape(query_count, width);
  kernels_.pack_queries(queries, query_count, width, packed);
}

void BlockProducts::Products(const std::byte* rows, size_t row_stride, size_t row_count,
                             const std::byte* packed, size_t query_count, size_t width,
                             int32_t* out, size_t out_stride) const {
  CheckShape(query_count, width);
  CHECK(out_stride >= row_count, "a query's products must not overlap the next one's");
  if (row_count == 0) return;
  kernels_.products(rows, row_stride, row_count, packed, query_count, width, out, out_stride);
}

}  // namespace engram
#endif  // HWY_ONCE
