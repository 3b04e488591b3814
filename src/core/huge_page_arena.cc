#include "src/core/huge_page_arena.h"

#include <fcntl.h>
#include <numa.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <utility>

#include "src/core/check.h"

namespace engram {

namespace {

constexpr size_t kHugePageBytes = size_t{2} << 20;

constexpr size_t RoundUp(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

std::byte* Map(size_t bytes, int extra_flags) {
  void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | extra_flags, -1, 0);
  return base == MAP_FAILED ? nullptr : static_cast<std::byte*>(base);
}

void BindToNode(std::byte* base, size_t bytes, int node) {
  if (node < 0 || numa_available() < 0 || numa_max_node() < 1) return;
  // Preferred, not strict: reserved huge pages are counted machine-wide, so a strict binding to a
  // node that has too few of them would end in SIGBUS at the first touch.
  numa_set_bind_policy(0);
  numa_tonode_memory(base, bytes, node);
}

// madvise succeeds also where the operator has set transparent huge pages to "never".
bool TransparentPagesAllowed() {
  const int fd = open("/sys/kernel/mm/transparent_hugepage/enabled", O_RDONLY | O_CLOEXEC);
  if (fd < 0) return false;
  std::array<char, 64> text{};
  const ssize_t bytes = read(fd, text.data(), text.size());
  close(fd);
  return bytes > 0 && std::string_view(text.data(), static_cast<size_t>(bytes)).find("[never]") ==
                          std::string_view::npos;
}

}  // namespace

std::string_view PageKindName(PageKind kind) {
  switch (kind) {
    case PageKind::kHugeTlb:
      return "hugetlb 2 MiB";
    case PageKind::kTransparent:
      return "transparent 2 MiB";
    case PageKind::kPlain:
      return "plain 4 KiB";
  }
  return "?";
}

Result<HugePageArena> HugePageArena::Create(const ArenaOptions& options) {
  CHECK(options.reserve_bytes > 0, "an arena needs a size");
  const size_t bytes = RoundUp(options.reserve_bytes, kHugePageBytes);
  if (options.huge_pages == HugePagePolicy::kAuto) {
    // Without MAP_NORESERVE the kernel sets the pages aside now, so touching them later cannot end
    // in SIGBUS.
    if (std::byte* base = Map(bytes, MAP_HUGETLB | (21 << MAP_HUGE_SHIFT)); base != nullptr) {
      BindToNode(base, bytes, options.numa_node);
      return HugePageArena(base, bytes, PageKind::kHugeTlb);
    }
  }
  // One huge page more than asked, so that the base can be aligned to a huge page.
  std::byte* raw = Map(bytes + kHugePageBytes, MAP_NORESERVE);
  if (raw == nullptr) {
    return FailErrno("arena of " + std::to_string(bytes >> 20) +
                         " MiB: set a smaller memory limit, or raise vm.max_map_count or ulimit -v",
                     errno);
  }
  const size_t skip =
      (kHugePageBytes - std::bit_cast<uintptr_t>(raw) % kHugePageBytes) % kHugePageBytes;
  if (skip > 0) munmap(raw, skip);
  std::byte* base = raw + skip;
  if (kHugePageBytes - skip > 0) munmap(base + bytes, kHugePageBytes - skip);
  PageKind kind = PageKind::kPlain;
  if (options.huge_pages == HugePagePolicy::kOff) {
    // The kernel's default may be "always". Where it has no such pages at all this fails, as it
    // may.
    (void)madvise(base, bytes, MADV_NOHUGEPAGE);
  } else if (madvise(base, bytes, MADV_HUGEPAGE) == 0 && TransparentPagesAllowed()) {
    kind = PageKind::kTransparent;
  }
  BindToNode(base, bytes, options.numa_node);
  return HugePageArena(base, bytes, kind);
}

HugePageArena::HugePageArena(HugePageArena&& other) noexcept
    : base_(std::exchange(other.base_, nullptr)),
      reserve_bytes_(std::exchange(other.reserve_bytes_, 0)),
      page_kind_(other.page_kind_),
      used_(other.used_.load(std::memory_order_relaxed)),
      prefaulted_(other.prefaulted_),
      can_prefault_(other.can_prefault_) {}

HugePageArena& HugePageArena::operator=(HugePageArena&& other) noexcept {
  if (this != &other) {
    std::swap(base_, other.base_);
    std::swap(reserve_bytes_, other.reserve_bytes_);
    page_kind_ = other.page_kind_;
    used_.store(other.used_.load(std::memory_order_relaxed), std::memory_order_relaxed);
    prefaulted_ = other.prefaulted_;
    can_prefault_ = other.can_prefault_;
  }
  return *this;
}

HugePageArena::~HugePageArena() {
  if (base_ != nullptr) munmap(base_, reserve_bytes_);
}

std::byte* HugePageArena::Allocate(size_t bytes, size_t alignment) {
  CHECK(std::has_single_bit(alignment) && alignment <= kHugePageBytes,
        "an alignment is a power of two up to a huge page");
  const size_t used = used_.load(std::memory_order_relaxed);
  const size_t start = RoundUp(used, alignment);
  if (start > reserve_bytes_ || bytes > reserve_bytes_ - start) return nullptr;
  used_.store(start + bytes, std::memory_order_relaxed);
  return base_ + start;
}

size_t HugePageArena::PrefaultAhead(size_t ahead_bytes, size_t step_bytes) {
  if (!can_prefault_) return 0;
  const size_t used = used_bytes();
  prefaulted_ = std::max(prefaulted_, used / kHugePageBytes * kHugePageBytes);
  const size_t ahead = std::min(ahead_bytes, reserve_bytes_ - used);
  const size_t target = RoundUp(used + ahead, kHugePageBytes);  // The reserve is whole huge pages.
  if (prefaulted_ >= target) return 0;
  const size_t step = RoundUp(std::min(target - prefaulted_, step_bytes), kHugePageBytes);
  if (madvise(base_ + prefaulted_, step, MADV_POPULATE_WRITE) != 0) {
    // EINVAL: an older kernel. ENOMEM: memory is short; the owner's own fault will say so.
    can_prefault_ = errno != EINVAL;
    return 0;
  }
  prefaulted_ += step;
  return step;
}

}  // namespace engram
