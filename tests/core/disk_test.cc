#include "src/core/disk.h"

#include <gtest/gtest.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <new>
#include <random>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "src/core/clock.h"
#include "src/core/simulated_disk.h"
#include "tests/support/allocation_counter.h"
#include "tests/support/scratch_directory.h"

namespace engram {
namespace {

class AlignedBuffer {
 public:
  explicit AlignedBuffer(size_t bytes)
      : bytes_(bytes), memory_(std::aligned_alloc(4'096, (bytes + 4'095) / 4'096 * 4'096)) {
    std::memset(memory_, 0, bytes);
  }
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;
  ~AlignedBuffer() { std::free(memory_); }
  std::span<std::byte> span() { return {static_cast<std::byte*>(memory_), bytes_}; }
  void Fill(uint64_t seed) {
    std::mt19937_64 random(seed);
    for (std::byte& byte : span()) byte = static_cast<std::byte>(random());
  }

 private:
  size_t bytes_;
  void* memory_;
};

class DiskTest : public testing::TestWithParam<std::string_view> {
 protected:
  void SetUp() override {
    if (GetParam() != "io_uring") return;
    const auto disk = CreateUringDisk(scratch_.path(), {}, nullptr);
    if (!disk) GTEST_SKIP() << "needs io_uring: " << disk.error().message;
  }

  std::unique_ptr<Disk> MakeDisk(const DiskOptions& options = {}) {
    if (GetParam() == "simulated") return medium_.Open(scratch_.path(), options);
    auto disk = GetParam() == "posix" ? CreatePosixDisk(scratch_.path(), options)
                                      : CreateUringDisk(scratch_.path(), options, nullptr);
    EXPECT_TRUE(disk.has_value()) << disk.error().message;
    return *std::move(disk);
  }

  // Takes completions until nothing is under way.
  static std::vector<DiskCompletion> Drain(Disk& disk) {
    std::vector<DiskCompletion> ends;
    std::array<DiskCompletion, 7> some;
    while (disk.in_flight() > 0) {
      const size_t count = disk.Poll(some);
      ends.insert(ends.end(), some.begin(), some.begin() + static_cast<std::ptrdiff_t>(count));
      if (count == 0) disk.Wait(kNanosPerSecond);
    }
    return ends;
  }
  static DiskCompletion One(Disk& disk) {
    const std::vector<DiskCompletion> ends = Drain(disk);
    EXPECT_EQ(ends.size(), 1u);
    return ends.empty() ? DiskCompletion{} : ends[0];
  }
  static std::vector<std::string> NamesIn(Disk& disk) {
    std::vector<std::string> names;
    const auto entries = disk.List();
    for (const DirectoryEntry& entry : *entries) names.push_back(entry.name);
    return names;
  }

  ScratchDirectory scratch_;
  SimulatedClock clock_;
  SimulatedDisk medium_{&clock_, 1};
};
INSTANTIATE_TEST_SUITE_P(Backends, DiskTest, testing::Values("posix", "io_uring", "simulated"),
                         [](const testing::TestParamInfo<std::string_view>& backend) {
                           return std::string(backend.param);
                         });

TEST_P(DiskTest, KnowsWhatItIs) {
  const auto disk = MakeDisk();
  EXPECT_EQ(disk->backend(), GetParam());
  EXPECT_EQ(disk->directory(), scratch_.path());
  EXPECT_EQ(disk->in_flight(), 0u);
  disk->Wait(kNanosPerSecond * 1'000);  // Returns at once when nothing is under way.
}

TEST_P(DiskTest, ReadsWhatItWrote) {
  const auto disk = MakeDisk();
  for (const Caching caching : {Caching::kBuffered, Caching::kDirect}) {
    const std::string name = caching == Caching::kDirect ? "direct" : "buffered";
    const auto file = disk->Open(name, OpenMode::kCreate, caching);
    ASSERT_TRUE(file.has_value()) << file.error().message;
    EXPECT_EQ(file->size_bytes, 0u);
    ASSERT_TRUE(file->alignment > 0 && 4'096 % file->alignment == 0) << file->alignment;
    EXPECT_TRUE(file->direct || file->alignment == 1);
    AlignedBuffer wrote(16'384);
    wrote.Fill(1);
    ASSERT_TRUE(disk->Write(file->id, 4'096, wrote.span(), 17));
    DiskCompletion end = One(*disk);
    EXPECT_EQ(end.tag, 17u);
    EXPECT_EQ(end.error, 0);
    EXPECT_EQ(end.bytes, 16'384u);
    ASSERT_TRUE(disk->Flush(file->id, 18));
    end = One(*disk);
    EXPECT_EQ(end.tag, 18u);
    EXPECT_EQ(end.error, 0);
    AlignedBuffer read(4'096 + 16'384);
    ASSERT_TRUE(disk->Read(file->id, 0, read.span(), 19));
    end = One(*disk);
    EXPECT_EQ(end.tag, 19u);
    EXPECT_EQ(end.error, 0);
    EXPECT_EQ(end.bytes, read.span().size());
    EXPECT_TRUE(std::ranges::all_of(read.span().first(4'096),
                                    [](std::byte b) { return b == std::byte{0}; }));
    EXPECT_TRUE(std::ranges::equal(read.span().subspan(4'096), wrote.span()));
    disk->Close(file->id);
    const auto again = disk->Open(name, OpenMode::kRead, caching);
    ASSERT_TRUE(again.has_value());
    EXPECT_EQ(again->size_bytes, 4'096u + 16'384u);
  }
}

TEST_P(DiskTest, AReadAtTheEndIsShort) {
  const auto disk = MakeDisk();
  AlignedBuffer buffer(8'192);
  buffer.Fill(2);
  const auto file = disk->Open("odd", OpenMode::kCreate, Caching::kBuffered);
  ASSERT_TRUE(disk->Write(file->id, 0, buffer.span().first(5'000), 1));
  EXPECT_EQ(One(*disk).bytes, 5'000u);
  // Also direct, where the end lies inside of a block.
  for (const Caching caching : {Caching::kBuffered, Caching::kDirect}) {
    const auto reader = disk->Open("odd", OpenMode::kRead, caching);
    AlignedBuffer read(8'192);
    ASSERT_TRUE(disk->Read(reader->id, 0, read.span(), 2));
    DiskCompletion end = One(*disk);
    EXPECT_EQ(end.error, 0);
    EXPECT_EQ(end.bytes, 5'000u);
    EXPECT_TRUE(std::ranges::equal(read.span().first(5'000), buffer.span().first(5'000)));
    ASSERT_TRUE(disk->Read(reader->id, 4'096, read.span().first(4'096), 3));
    EXPECT_EQ(One(*disk).bytes, 904u);
    ASSERT_TRUE(disk->Read(reader->id, 1 << 20, read.span(), 4));
    end = One(*disk);
    EXPECT_EQ(end.error, 0);
    EXPECT_EQ(end.bytes, 0u);
  }
}

TEST_P(DiskTest, NothingIsDoneWithNothing) {
  const auto disk = MakeDisk();
  const auto file = disk->Open("f", OpenMode::kCreate, Caching::kBuffered);
  ASSERT_TRUE(disk->Write(file->id, 100, {}, 1));
  ASSERT_TRUE(disk->Read(file->id, 0, {}, 2));
  const auto ends = Drain(*disk);
  ASSERT_EQ(ends.size(), 2u);
  for (const DiskCompletion& end : ends) {
    EXPECT_EQ(end.error, 0);
    EXPECT_EQ(end.bytes, 0u);
  }
  EXPECT_EQ((*disk->List())[0].size_bytes, 0u);
}

TEST_P(DiskTest, RefusesMoreThanMaxInFlightAndEndsEachOnce) {
  const auto disk = MakeDisk({.max_in_flight = 5, .max_open_files = 4, .registered_buffers = {}});
  const auto file = disk->Open("f", OpenMode::kCreate, Caching::kBuffered);
  AlignedBuffer buffer(5 * 512);
  buffer.Fill(3);
  for (int round = 0; round < 20; ++round) {
    std::set<uint64_t> tags;
    for (uint64_t i = 0; i < 5; ++i) {
      ASSERT_TRUE(disk->Write(file->id, i * 512, buffer.span().subspan(i * 512, 512), 100 + i));
      tags.insert(100 + i);
    }
    EXPECT_EQ(disk->in_flight(), 5u);
    EXPECT_FALSE(disk->Write(file->id, 0, buffer.span(), 1));
    EXPECT_FALSE(disk->Read(file->id, 0, buffer.span(), 1));
    EXPECT_FALSE(disk->Flush(file->id, 1));
    std::array<DiskCompletion, 2> two;
    while (!tags.empty()) {
      const size_t count = disk->Poll(two);
      ASSERT_LE(count, 2u);
      for (size_t i = 0; i < count; ++i) ASSERT_EQ(tags.erase(two[i].tag), 1u) << two[i].tag;
      EXPECT_EQ(disk->in_flight(), tags.size());
      if (count == 0) disk->Wait(kNanosPerSecond);
    }
    EXPECT_EQ(disk->Poll(two), 0u);
  }
}

// Random writes and reads of several blocks, many under way at once, against plain memory.
TEST_P(DiskTest, BehavesLikeMemory) {
  constexpr size_t kBlock = 4'096;
  constexpr size_t kBlocks = 64;
  for (const Caching caching : {Caching::kBuffered, Caching::kDirect}) {
    std::mt19937_64 random(4);
    // Registered or not must make no difference: the buffers lie on both sides of the edge.
    AlignedBuffer arena(2 * kBlocks * kBlock);
    const auto disk = MakeDisk({.max_in_flight = 16,
                                .max_open_files = 4,
                                .registered_buffers = {arena.span().first(kBlocks * kBlock)}});
    const auto file =
        disk->Open(caching == Caching::kDirect ? "d" : "b", OpenMode::kCreate, caching);
    std::vector<std::byte> model(kBlocks * kBlock);
    ASSERT_TRUE(disk->Write(file->id, 0, arena.span().first(model.size()), 0));
    ASSERT_EQ(One(*disk).error, 0);
    struct UnderWay {
      bool is_read;
      size_t first;
      size_t count;
      size_t memory;
    };
    for (int round = 0; round < 60; ++round) {
      // Disjoint runs of blocks, for operations under way have no order.
      std::map<uint64_t, UnderWay> under_way;
      for (size_t block = 0; block < kBlocks;) {
        const size_t count = std::min(kBlocks - block, 1 + random() % 6);
        if (random() % 3 != 0) {
          const size_t memory = (block + (random() % 2) * kBlocks) * kBlock;
          const auto span =
              arena.span().subspan(memory, std::min(count * kBlock, 2 * kBlocks * kBlock - memory));
          const bool is_read = random() % 2 == 0;
          const uint64_t tag = under_way.size();
          bool taken = false;
          if (is_read) {
            taken = disk->Read(file->id, block * kBlock, span, tag);
          } else {
            for (std::byte& byte : span) byte = static_cast<std::byte>(random());
            taken = disk->Write(file->id, block * kBlock, span, tag);
          }
          if (taken) under_way.emplace(tag, UnderWay{is_read, block, span.size(), memory});
        }
        block += count;
      }
      for (const DiskCompletion& end : Drain(*disk)) {
        ASSERT_EQ(end.error, 0);
        const UnderWay& what = under_way.at(end.tag);
        ASSERT_EQ(end.bytes, what.count);
        const auto memory = arena.span().subspan(what.memory, what.count);
        const auto at = model.begin() + static_cast<std::ptrdiff_t>(what.first * kBlock);
        if (what.is_read) {
          ASSERT_TRUE(std::equal(memory.begin(), memory.end(), at));
        } else {
          std::copy(memory.begin(), memory.end(), at);
        }
        under_way.erase(end.tag);
      }
      ASSERT_TRUE(under_way.empty());
    }
  }
}

TEST_P(DiskTest, ListsRenamesAndRemoves) {
  const auto disk = MakeDisk();
  EXPECT_TRUE(disk->List()->empty());
  for (const char* name : {"b", "a", "c"}) {
    const auto file = disk->Open(name, OpenMode::kCreate, Caching::kBuffered);
    ASSERT_TRUE(file.has_value());
    ASSERT_TRUE(disk->Write(file->id, 0, std::as_bytes(std::span(name, 1)), 0));
    One(*disk);
    disk->Close(file->id);
  }
  EXPECT_EQ(NamesIn(*disk), (std::vector<std::string>{"a", "b", "c"}));
  EXPECT_EQ((*disk->List())[0].size_bytes, 1u);
  ASSERT_TRUE(disk->Rename("a", "z").has_value());
  ASSERT_TRUE(disk->Rename("b", "z").has_value()) << "takes the place of what was there";
  EXPECT_EQ(NamesIn(*disk), (std::vector<std::string>{"c", "z"}));
  EXPECT_EQ((*ReadWholeFile(*disk, "z", 100))[0], std::byte{'b'});
  ASSERT_TRUE(disk->Remove("c").has_value());
  ASSERT_TRUE(disk->SyncDirectory().has_value());
  EXPECT_EQ(NamesIn(*disk), (std::vector<std::string>{"z"}));
}

TEST_P(DiskTest, MissingFilesAreNotFound) {
  const auto disk = MakeDisk();
  for (const OpenMode mode : {OpenMode::kRead, OpenMode::kReadWrite}) {
    const auto file = disk->Open("absent", mode, Caching::kBuffered);
    ASSERT_FALSE(file.has_value());
    EXPECT_EQ(file.error().code, ErrorCode::kNotFound);
    EXPECT_NE(file.error().message.find(scratch_.path() + "/absent"), std::string::npos)
        << file.error().message;
  }
  EXPECT_EQ(disk->Remove("absent").error().code, ErrorCode::kNotFound);
  EXPECT_EQ(disk->Rename("absent", "x").error().code, ErrorCode::kNotFound);
  EXPECT_TRUE(disk->List()->empty()) << "a failed open makes nothing";
}

// Names come from lists and manifests: none may lead out of the directory.
TEST_P(DiskTest, NamesStayInTheDirectory) {
  const auto disk = MakeDisk();
  for (const std::string& name :
       {std::string(), std::string("."), std::string(".."), std::string("../x"), std::string("a/b"),
        std::string("/etc"), std::string("a\0b", 3)}) {
    const auto file = disk->Open(name, OpenMode::kCreate, Caching::kBuffered);
    ASSERT_FALSE(file.has_value()) << name;
    EXPECT_EQ(file.error().code, ErrorCode::kInvalidArgument);
    EXPECT_FALSE(disk->Rename("x", name).has_value());
    EXPECT_FALSE(disk->Rename(name, "x").has_value());
    EXPECT_FALSE(disk->Remove(name).has_value());
  }
}

TEST_P(DiskTest, OpenFilesAreBounded) {
  const auto disk = MakeDisk({.max_in_flight = 2, .max_open_files = 2, .registered_buffers = {}});
  const auto first = disk->Open("a", OpenMode::kCreate, Caching::kBuffered);
  const auto second = disk->Open("b", OpenMode::kCreate, Caching::kBuffered);
  ASSERT_TRUE(first && second);
  const auto third = disk->Open("c", OpenMode::kCreate, Caching::kBuffered);
  ASSERT_FALSE(third.has_value());
  EXPECT_EQ(third.error().code, ErrorCode::kResourceExhausted);
  disk->Close(first->id);
  const auto again = disk->Open("c", OpenMode::kCreate, Caching::kBuffered);
  ASSERT_TRUE(again.has_value());
  EXPECT_FALSE(again->id == first->id) << "the same place, another generation";
}

TEST_P(DiskTest, OneHolderOfTheLock) {
  auto first = MakeDisk();
  auto second = MakeDisk();
  ASSERT_TRUE(first->LockDirectory().has_value());
  EXPECT_TRUE(first->LockDirectory().has_value()) << "it is ours already";
  const auto refused = second->LockDirectory();
  ASSERT_FALSE(refused.has_value());
  EXPECT_EQ(refused.error().code, ErrorCode::kAlreadyExists);
  EXPECT_NE(refused.error().message.find(scratch_.path()), std::string::npos);
  EXPECT_NE(refused.error().message.find("choose another directory"), std::string::npos);
  if (GetParam() != "simulated") {
    EXPECT_NE(refused.error().message.find("process " + std::to_string(getpid())),
              std::string::npos)
        << refused.error().message;
  }
  first.reset();
  EXPECT_TRUE(second->LockDirectory().has_value()) << "the lock ends with its Disk";
}

// Whoever takes LOCK for a leftover must not let a second holder in.
TEST_P(DiskTest, TheLockHoldsWithoutItsFile) {
  if (GetParam() == "simulated") GTEST_SKIP() << "it has no such file";
  auto first = MakeDisk();
  auto second = MakeDisk();
  ASSERT_TRUE(first->LockDirectory().has_value());
  ASSERT_TRUE(std::filesystem::remove(scratch_.path() + "/LOCK"));
  const auto refused = second->LockDirectory();
  ASSERT_FALSE(refused.has_value());
  EXPECT_EQ(refused.error().code, ErrorCode::kAlreadyExists);
  EXPECT_NE(refused.error().message.find("another process"), std::string::npos);
  first.reset();
  EXPECT_TRUE(second->LockDirectory().has_value());
}

TEST_P(DiskTest, ReplacesWholeFiles) {
  const auto disk = MakeDisk();
  const auto bytes = [](std::string_view text) { return std::as_bytes(std::span(text)); };
  ASSERT_TRUE(ReplaceFile(*disk, "m", bytes("a long first version")).has_value());
  // What a crash may leave behind, longer than what comes.
  ASSERT_TRUE(ReplaceFile(*disk, "m.new", bytes("left over, and much longer")).has_value());
  ASSERT_TRUE(ReplaceFile(*disk, "m", bytes("second")).has_value());
  const auto content = ReadWholeFile(*disk, "m", 6);
  ASSERT_TRUE(content.has_value());
  EXPECT_TRUE(std::ranges::equal(*content, bytes("second")));
  EXPECT_EQ(NamesIn(*disk), (std::vector<std::string>{"m"}));
  ASSERT_TRUE(ReplaceFile(*disk, "m", {}).has_value());
  EXPECT_TRUE(ReadWholeFile(*disk, "m", 0)->empty());
  EXPECT_EQ(ReadWholeFile(*disk, "absent", 10).error().code, ErrorCode::kNotFound);
  ASSERT_TRUE(ReplaceFile(*disk, "m", bytes("1234567")).has_value());
  const auto too_long = ReadWholeFile(*disk, "m", 6);
  ASSERT_FALSE(too_long.has_value());
  EXPECT_EQ(too_long.error().code, ErrorCode::kCorrupt);
}

TEST_P(DiskTest, DestructionWaitsForWhatIsUnderWay) {
  AlignedBuffer buffer(1 << 20);
  buffer.Fill(5);
  {
    const auto disk = MakeDisk();
    const auto file = disk->Open("f", OpenMode::kCreate, Caching::kBuffered);
    for (uint64_t i = 0; i < 8; ++i) {
      ASSERT_TRUE(disk->Write(file->id, i << 20, buffer.span(), i));
    }
    std::array<DiskCompletion, 1> one;
    (void)disk->Poll(one);
  }
  // A late read by the kernel is invisible here; what is left to see is that the end is clean and
  // that the writes which were begun are there in whole blocks.
  const auto disk = MakeDisk();
  EXPECT_EQ((*disk->List())[0].size_bytes % buffer.span().size(), 0u);
}

TEST_P(DiskTest, HotCallsDoNotAllocate) {
  if (GetParam() == "simulated") GTEST_SKIP() << "the simulated disk may allocate";
  if (!AllocationsAreCounted()) GTEST_SKIP() << "a sanitizer has its own allocator";
  const auto disk = MakeDisk({.max_in_flight = 8, .max_open_files = 4, .registered_buffers = {}});
  const auto file = disk->Open("f", OpenMode::kCreate, Caching::kDirect);
  AlignedBuffer buffer(8 * 4'096);
  std::array<DiskCompletion, 8> ends;
  const uint64_t before = AllocationCount();
  for (int round = 0; round < 50; ++round) {
    for (uint64_t i = 0; i < 4; ++i) {
      const auto block = buffer.span().subspan(i * 4'096, 4'096);
      if (!disk->Write(file->id, i * 4'096, block, i)) std::abort();
    }
    if (!disk->Read(file->id, 4 * 4'096, buffer.span().subspan(4 * 4'096, 4'096), 5)) std::abort();
    if (!disk->Flush(file->id, 6)) std::abort();
    while (disk->in_flight() > 0) {
      if (disk->Poll(ends) == 0) disk->Wait(kNanosPerSecond);
    }
  }
  EXPECT_EQ(AllocationCount(), before);
}

// A limit of the process stands for a full or failing disk: the error reaches the completion.
TEST_P(DiskTest, ErrorsComeWithTheCompletion) {
  if (GetParam() == "simulated") GTEST_SKIP() << "simulated_disk_test.cc has its faults";
  const auto disk = MakeDisk();
  const auto file = disk->Open("f", OpenMode::kCreate, Caching::kBuffered);
  rlimit old{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &old), 0);
  const auto old_handler = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit small{.rlim_cur = 8'192, .rlim_max = old.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  AlignedBuffer buffer(4'096);
  ASSERT_TRUE(disk->Write(file->id, 1 << 20, buffer.span(), 1));
  const DiskCompletion failed = One(*disk);
  ASSERT_TRUE(disk->Write(file->id, 4'096, buffer.span(), 2));
  const DiskCompletion fits = One(*disk);
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &old), 0);
  std::signal(SIGXFSZ, old_handler);
  EXPECT_EQ(failed.error, EFBIG);
  EXPECT_EQ(failed.bytes, 0u);
  EXPECT_EQ(fits.error, 0);
  EXPECT_EQ(fits.bytes, 4'096u);
}

class DiskDeathTest : public DiskTest {
 protected:
  void SetUp() override {
    // The kernel's workers for io_uring count as threads of this process.
    GTEST_FLAG_SET(death_test_style, "threadsafe");
    DiskTest::SetUp();
  }
};
INSTANTIATE_TEST_SUITE_P(Backends, DiskDeathTest, testing::Values("posix", "io_uring", "simulated"),
                         [](const testing::TestParamInfo<std::string_view>& backend) {
                           return std::string(backend.param);
                         });

TEST_P(DiskDeathTest, CatchesMisuse) {
  const auto disk = MakeDisk();
  AlignedBuffer buffer(8'192);
  const auto file = disk->Open("f", OpenMode::kCreate, Caching::kDirect);
  ASSERT_TRUE(file.has_value());
  const auto reader = disk->Open("f", OpenMode::kRead, Caching::kBuffered);
  EXPECT_DEATH((void)disk->Write(reader->id, 0, buffer.span(), 1), "opened for reading");
  disk->Close(reader->id);
  EXPECT_DEATH((void)disk->Flush(reader->id, 1), "the file is not open");
  EXPECT_DEATH((void)disk->Flush({.index = 99'999, .generation = 1}, 1), "not a file of this disk");
  if (file->alignment > 1) {
    EXPECT_DEATH((void)disk->Write(file->id, 1, buffer.span(), 1), "aligned");
    EXPECT_DEATH((void)disk->Write(file->id, 0, buffer.span().first(100), 1), "aligned");
    EXPECT_DEATH((void)disk->Read(file->id, 0, buffer.span().subspan(1, 4'096), 1), "aligned");
  }
  ASSERT_TRUE(disk->Write(file->id, 0, buffer.span(), 1));
  EXPECT_DEATH(disk->Close(file->id), "nothing of it is under way");
  EXPECT_DEATH((void)ReadWholeFile(*disk, "f", 1), "completions are not ours");
  Drain(*disk);
}

TEST(CreateDiskTest, MakesTheDirectoryForItsOwnerOnly) {
  const ScratchDirectory scratch;
  const std::string path = scratch.path() + "/data";
  ASSERT_TRUE(CreateDisk(DiskBackend::kPosix, path, {}, nullptr).has_value());
  struct stat status{};
  ASSERT_EQ(stat(path.c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777, 0700u);
  EXPECT_TRUE(CreateDisk(DiskBackend::kPosix, path + "/", {}, nullptr).has_value()) << "again";
}

TEST(CreateDiskTest, DirectoriesThatCannotBeAreNamed) {
  const ScratchDirectory scratch;
  std::string note;
  const auto no_parent = CreateDisk(DiskBackend::kAuto, scratch.path() + "/a/b", {}, &note);
  ASSERT_FALSE(no_parent.has_value());
  EXPECT_NE(no_parent.error().message.find(scratch.path() + "/a/b"), std::string::npos);
  EXPECT_NE(no_parent.error().message.find("make the directory above it"), std::string::npos);
  ASSERT_TRUE(ReplaceFile(**CreatePosixDisk(scratch.path(), {}), "file", {}).has_value());
  const auto not_a_directory = CreateDisk(DiskBackend::kAuto, scratch.path() + "/file", {}, &note);
  ASSERT_FALSE(not_a_directory.has_value());
  EXPECT_NE(not_a_directory.error().message.find(scratch.path() + "/file"), std::string::npos);
  EXPECT_FALSE(CreateDisk(DiskBackend::kAuto, "", {}, &note).has_value());
}

TEST(CreateDiskTest, LinksAndSpecialFilesAreRefused) {
  const ScratchDirectory scratch;
  const auto disk = CreateDisk(DiskBackend::kPosix, scratch.path(), {}, nullptr);
  ASSERT_EQ(symlink("/etc/passwd", (scratch.path() + "/link").c_str()), 0);
  ASSERT_EQ(mkdir((scratch.path() + "/sub").c_str(), 0700), 0);
  EXPECT_FALSE((*disk)->Open("link", OpenMode::kRead, Caching::kBuffered).has_value());
  EXPECT_FALSE((*disk)->Open("sub", OpenMode::kRead, Caching::kBuffered).has_value());
}

TEST(CreateDiskTest, AutoTakesIoUringWhereItCan) {
  const ScratchDirectory scratch;
  if (const auto uring = CreateUringDisk(scratch.path(), {}, nullptr); !uring) {
    GTEST_SKIP() << "needs io_uring: " << uring.error().message;
  }
  std::string note = "stale";
  const auto disk = CreateDisk(DiskBackend::kAuto, scratch.path(), {}, &note);
  ASSERT_TRUE(disk.has_value());
  EXPECT_EQ((*disk)->backend(), "io_uring");
  EXPECT_EQ(note, "");
}

// Makes io_uring_setup fail like the seccomp profile of a container does.
void ForbidIoUring() {
  std::array<sock_filter, 4> filter{{
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),  // seccomp_data.nr
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_io_uring_setup, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  }};
  const sock_fprog program{.len = filter.size(), .filter = filter.data()};
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 ||
      prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0) {
    std::_Exit(77);
  }
}

TEST(CreateDiskDeathTest, FallsBackToPosixAndSaysWhy) {
  const ScratchDirectory scratch;
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(
      {
        ForbidIoUring();
        std::string note;
        const auto disk = CreateDisk(DiskBackend::kAuto, scratch.path(), {}, &note);
        const auto uring = CreateDisk(DiskBackend::kUring, scratch.path(), {}, nullptr);
        std::fprintf(stderr, "note: %s\n", note.c_str());
        const bool right = disk && (*disk)->backend() == "posix" && !uring &&
                           uring.error().code == ErrorCode::kPermissionDenied;
        std::_Exit(right ? 0 : 1);
      },
      testing::ExitedWithCode(0),
      "note: io_uring is forbidden here \\(.*Operation not permitted\\); using pread and pwrite");
}

}  // namespace
}  // namespace engram
