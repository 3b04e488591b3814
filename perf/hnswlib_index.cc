// Compiled for the machine at hand (-march=native), as hnswlib is meant to be: it chooses its
// kernels at compile time. A shared library of its own keeps what the compiler makes here, inline
// functions of the standard library among them, out of the engine's code.

#include "perf/hnswlib_index.h"

#include <hnswlib/hnswlib.h>
#include <malloc.h>
#include <sys/mman.h>

#include <bit>
#include <cstring>

namespace engram {

namespace {

size_t AllocatedBytes() {
  const struct mallinfo2 info = mallinfo2();
  return info.uordblks + info.hblkhd;
}

// The memory that the allocator gave out, less what it took back, while this lives.
class AllocationMeter {
 public:
  explicit AllocationMeter(uint64_t* total) : total_(total), before_(AllocatedBytes()) {}
  AllocationMeter(const AllocationMeter&) = delete;
  AllocationMeter& operator=(const AllocationMeter&) = delete;
  ~AllocationMeter() { *total_ += AllocatedBytes() - before_; }

 private:
  uint64_t* total_;
  size_t before_;
};

class HnswlibIndex final : public ComparedIndex {
 public:
  explicit HnswlibIndex(const HnswlibOptions& options) {
    const AllocationMeter meter(&bytes_);
    if (options.metric == Metric::kL2) {
      space_ = std::make_unique<hnswlib::L2Space>(options.dimension);
    } else {
      space_ = std::make_unique<hnswlib::InnerProductSpace>(options.dimension);
    }
    graph_ = std::make_unique<hnswlib::HierarchicalNSW<float>>(
        space_.get(), options.capacity, options.M, options.ef_construction, options.seed);
    Prefault(graph_->data_level0_memory_, options.capacity * graph_->size_data_per_element_);
  }

  void Insert(const VectorSet& base, size_t first, size_t last) override {
    const AllocationMeter meter(&bytes_);
    for (size_t row = first; row < last; ++row) graph_->addPoint(base.Bytes(row), row);
  }

  size_t linked() const override { return graph_->cur_element_count; }

  void Recall(const VectorSet& queries, size_t first, size_t last, uint32_t k, uint32_t ef,
              int64_t* rows) override {
    graph_->setEf(ef);
    for (size_t query = first; query < last; ++query) {
      auto found = graph_->searchKnn(queries.Bytes(query), k);
      for (uint32_t place = 0; place < k; ++place) {
        *rows++ = found.empty() ? -1 : static_cast<int64_t>(found.top().second);
        if (!found.empty()) found.pop();
      }
    }
  }

  uint64_t bytes() const override { return bytes_; }

 private:
  static void Prefault(char* block, size_t bytes) {
    constexpr uintptr_t kPageBytes = 4096;
    const auto address = std::bit_cast<uintptr_t>(block);
    const size_t skip = (kPageBytes - address % kPageBytes) % kPageBytes;
    // Where the kernel has no huge pages to give, plain ones do.
    if (bytes > skip) (void)madvise(block + skip, bytes - skip, MADV_HUGEPAGE);
    std::memset(block, 0, bytes);
  }

  uint64_t bytes_ = 0;
  std::unique_ptr<hnswlib::SpaceInterface<float>> space_;
  std::unique_ptr<hnswlib::HierarchicalNSW<float>> graph_;
};

}  // namespace

std::unique_ptr<ComparedIndex> MakeHnswlibIndex(const HnswlibOptions& options) {
  return std::make_unique<HnswlibIndex>(options);
}

}  // namespace engram
