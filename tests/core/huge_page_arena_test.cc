#include "src/core/huge_page_arena.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

namespace engram {
namespace {

constexpr size_t kMiB = size_t{1} << 20;

HugePageArena MakeArena(size_t bytes, HugePagePolicy policy = HugePagePolicy::kAuto) {
  Result<HugePageArena> arena =
      HugePageArena::Create({.reserve_bytes = bytes, .huge_pages = policy});
  EXPECT_TRUE(arena.has_value()) << arena.error().message;
  return *std::move(arena);
}

// The flags of the mapping that holds `address`, as in /proc/self/smaps: "rd wr ... nh".
std::string VmFlagsOf(const void* address) {
  std::ifstream smaps("/proc/self/smaps");
  std::string line;
  bool inside = false;
  while (std::getline(smaps, line)) {
    unsigned long begin = 0;
    unsigned long end = 0;
    if (std::sscanf(line.c_str(), "%lx-%lx ", &begin, &end) == 2) {
      const auto at = reinterpret_cast<uintptr_t>(address);
      inside = at >= begin && at < end;
    } else if (inside && line.starts_with("VmFlags:")) {
      return line.substr(8) + " ";
    }
  }
  return "";
}

size_t PresentPages(std::byte* base, size_t bytes) {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  std::vector<unsigned char> present(bytes / page);
  EXPECT_EQ(mincore(base, bytes, present.data()), 0);
  return static_cast<size_t>(
      std::ranges::count_if(present, [](unsigned char p) { return (p & 1) != 0; }));
}

TEST(HugePageArenaTest, RoundsTheReserveUpToHugePages) {
  EXPECT_EQ(MakeArena(1).reserve_bytes(), 2 * kMiB);
  EXPECT_EQ(MakeArena(2 * kMiB).reserve_bytes(), 2 * kMiB);
  EXPECT_EQ(MakeArena(2 * kMiB + 1).reserve_bytes(), 4 * kMiB);
}

TEST(HugePageArenaTest, AlignsZeroesAndKeepsApart) {
  for (const HugePagePolicy policy : {HugePagePolicy::kAuto, HugePagePolicy::kOff}) {
    HugePageArena arena = MakeArena(16 * kMiB, policy);
    std::byte* end_of_last = nullptr;
    for (size_t alignment = 1; alignment <= 2 * kMiB; alignment *= 2) {
      std::byte* block = arena.Allocate(3, alignment);
      ASSERT_NE(block, nullptr);
      EXPECT_EQ(reinterpret_cast<uintptr_t>(block) % alignment, 0u) << alignment;
      EXPECT_GE(block, end_of_last);
      for (int i = 0; i < 3; ++i) EXPECT_EQ(block[i], std::byte{0});
      std::memset(block, 0xAB, 3);
      end_of_last = block + 3;
    }
  }
}

TEST(HugePageArenaTest, ExhaustionGivesNullptrAndTakesNothing) {
  HugePageArena arena = MakeArena(2 * kMiB);
  ASSERT_NE(arena.Allocate(2 * kMiB - 100, 64), nullptr);
  const size_t used = arena.used_bytes();
  EXPECT_EQ(arena.Allocate(101, 1), nullptr);
  EXPECT_EQ(arena.Allocate(1, 2 * kMiB), nullptr) << "the alignment alone is past the end";
  EXPECT_EQ(arena.Allocate(SIZE_MAX, 1), nullptr);
  EXPECT_EQ(arena.Allocate(SIZE_MAX - 50, 64), nullptr);
  EXPECT_EQ(arena.used_bytes(), used);
  std::byte* last = arena.Allocate(100, 1);
  ASSERT_NE(last, nullptr) << "what fits exactly is given";
  last[99] = std::byte{1};  // The mapping does reach to the end.
  EXPECT_EQ(arena.used_bytes(), arena.reserve_bytes());
  EXPECT_EQ(arena.Allocate(1, 1), nullptr);
}

TEST(HugePageArenaTest, OffMeansPlainPagesWhateverTheSystemsDefault) {
  HugePageArena arena = MakeArena(4 * kMiB, HugePagePolicy::kOff);
  EXPECT_EQ(arena.page_kind(), PageKind::kPlain);
  std::byte* block = arena.Allocate(1, 1);
  std::ifstream enabled("/sys/kernel/mm/transparent_hugepage/enabled");
  if (!enabled) GTEST_SKIP() << "needs a kernel with transparent huge pages";
  EXPECT_NE(VmFlagsOf(block).find(" nh "), std::string::npos) << VmFlagsOf(block);
}

TEST(HugePageArenaTest, AutoSaysWhatItGot) {
  HugePageArena arena = MakeArena(4 * kMiB);
  std::byte* block = arena.Allocate(1, 1);
  const std::string flags = VmFlagsOf(block);
  if (arena.page_kind() == PageKind::kHugeTlb) {
    EXPECT_NE(flags.find(" ht "), std::string::npos) << flags;
    return;
  }
  EXPECT_EQ(flags.find(" ht "), std::string::npos) << flags;
  std::string enabled;
  std::getline(std::ifstream("/sys/kernel/mm/transparent_hugepage/enabled"), enabled);
  const bool allowed = !enabled.empty() && enabled.find("[never]") == std::string::npos;
  EXPECT_EQ(arena.page_kind(), allowed ? PageKind::kTransparent : PageKind::kPlain) << enabled;
}

TEST(HugePageArenaTest, TakesReservedHugePages) {
  int free_pages = 0;
  std::ifstream("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages") >> free_pages;
  if (free_pages < 2) GTEST_SKIP() << "needs 2 free huge pages: set vm.nr_hugepages to at least 2";
  HugePageArena arena = MakeArena(4 * kMiB);
  EXPECT_EQ(arena.page_kind(), PageKind::kHugeTlb);
  std::byte* block = arena.Allocate(4 * kMiB, 64);
  ASSERT_NE(block, nullptr);
  std::memset(block, 1, 4 * kMiB);
}

TEST(HugePageArenaTest, PrefaultsInSteps) {
  HugePageArena arena = MakeArena(16 * kMiB, HugePagePolicy::kOff);
  std::byte* base = arena.Allocate(1, 1);
  const size_t first = arena.PrefaultAhead(6 * kMiB, 1);
  if (first == 0) GTEST_SKIP() << "needs Linux 5.14 (MADV_POPULATE_WRITE)";
  EXPECT_EQ(first, 2 * kMiB) << "a step is rounded up to a huge page";
  EXPECT_EQ(arena.PrefaultAhead(6 * kMiB, 64 * kMiB), 6 * kMiB);
  EXPECT_EQ(arena.PrefaultAhead(6 * kMiB, 64 * kMiB), 0u) << "nothing is left to do";
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  EXPECT_EQ(PresentPages(base, 8 * kMiB), 8 * kMiB / page);
  EXPECT_EQ(PresentPages(base + 8 * kMiB, 8 * kMiB), 0u) << "further than was asked";
  ASSERT_NE(arena.Allocate(8 * kMiB, 64), nullptr);
  EXPECT_EQ(arena.PrefaultAhead(2 * kMiB, 64 * kMiB), 4 * kMiB) << "it follows what is used";
}

// "All of it" must not wrap around to nothing.
TEST(HugePageArenaTest, PrefaultsTheWholeReserveAndNoFurther) {
  HugePageArena arena = MakeArena(4 * kMiB, HugePagePolicy::kOff);
  ASSERT_NE(arena.Allocate(100, 1), nullptr);
  const size_t done = arena.PrefaultAhead(SIZE_MAX, SIZE_MAX);
  if (done == 0) GTEST_SKIP() << "needs Linux 5.14 (MADV_POPULATE_WRITE)";
  EXPECT_EQ(done, arena.reserve_bytes());
}

TEST(HugePageArenaTest, PrefaultKeepsContent) {
  HugePageArena arena = MakeArena(4 * kMiB);
  std::byte* block = arena.Allocate(kMiB, 64);
  std::memset(block, 0x5A, kMiB);
  arena.PrefaultAhead(4 * kMiB, 4 * kMiB);
  EXPECT_TRUE(std::all_of(block, block + kMiB, [](std::byte b) { return b == std::byte{0x5A}; }));
}

TEST(HugePageArenaTest, MovesWithItsMemory) {
  HugePageArena first = MakeArena(2 * kMiB);
  std::byte* block = first.Allocate(64, 64);
  block[0] = std::byte{7};
  HugePageArena second(std::move(first));
  EXPECT_EQ(first.Allocate(1, 1), nullptr);  // NOLINT(bugprone-use-after-move): what is tested.
  EXPECT_EQ(block[0], std::byte{7});
  EXPECT_EQ(second.used_bytes(), 64u);
  HugePageArena third = MakeArena(4 * kMiB);
  third = std::move(second);
  EXPECT_EQ(block[0], std::byte{7});
  EXPECT_EQ(third.reserve_bytes(), 2 * kMiB);
  EXPECT_EQ(third.Allocate(64, 64), block + 64);
}

TEST(HugePageArenaTest, AnImpossibleSizeIsAnErrorThatNamesIt) {
  const Result<HugePageArena> arena = HugePageArena::Create({.reserve_bytes = size_t{1} << 60});
  ASSERT_FALSE(arena.has_value());
  EXPECT_EQ(arena.error().code, ErrorCode::kResourceExhausted);
  EXPECT_NE(arena.error().message.find("1099511627776 MiB"), std::string::npos)
      << arena.error().message;
}

TEST(HugePageArenaTest, AcceptsANode) {
  Result<HugePageArena> arena = HugePageArena::Create({.reserve_bytes = kMiB, .numa_node = 0});
  ASSERT_TRUE(arena.has_value());
  std::memset(arena->Allocate(kMiB, 64), 1, kMiB);
}

TEST(HugePageArenaDeathTest, AlignmentIsAPowerOfTwo) {
  HugePageArena arena = MakeArena(2 * kMiB);
  EXPECT_DEATH((void)arena.Allocate(1, 3), "power of two");
  EXPECT_DEATH((void)arena.Allocate(1, 0), "power of two");
  EXPECT_DEATH((void)arena.Allocate(1, 4 * kMiB), "power of two");
}

}  // namespace
}  // namespace engram
