#include "perf/shard_on_disk.h"

#include <cstdio>
#include <filesystem>
#include <system_error>

#include "perf/bench_support.h"
#include "src/core/check.h"

namespace engram {

ShardOnDisk::ShardOnDisk(const ShardOnDiskOptions& options)
    : folder_(options.folder), catalogue_(4, 1, 1, {}) {
  std::filesystem::create_directories(folder_);
  CHECK(catalogue_.Configure(options.space, options.settings) != nullptr,
        "there is room for a space");
  LogStoreOptions log_options;
  log_options.instance.fill(7);
  log_options.keeper.segment_bytes = options.segment_bytes;
  logs_ = Must(LogStore::Open(
      log_options, &clock_,
      [this](const std::string& name, const DiskOptions& disk, std::string* why) {
        return CreateDisk(DiskBackend::kAuto, folder_ + "/" + name, disk, why);
      },
      nullptr));
  root_ = Must(CreateDisk(DiskBackend::kPosix, folder_, DiskOptions{}, nullptr));
  checkpointer_ = std::make_unique<Checkpointer>(options.checkpoints, root_.get(), logs_.get(),
                                                 &clock_, CheckpointManifest{}, &pins_);
  mesh_.emplace(Must(RingMesh::Create(
      {.producer_numa_node = {}, .shard_numa_node = {}, .catalogue = &catalogue_})));
  producer_.emplace(mesh_->TakeProducer(ProducerId(0)));
  shard_ =
      Must(Shard::Create(options.shard, &clock_, mesh_->TakeShard(ShardId(0)), logs_->ForShard(0)));
  while (shard_->is_recovering()) shard_->Poll();
  Must(logs_->PrepareFirst());
}

ShardOnDisk::~ShardOnDisk() {
  shard_.reset();
  checkpointer_.reset();
  logs_.reset();
  std::error_code ignored;
  std::filesystem::remove_all(folder_, ignored);
}

void ShardOnDisk::PollControl() {
  logs_->Poll();
  checkpointer_->Poll([](const Note& note) {
    if (note.severity == Severity::kError) std::fprintf(stderr, "%s\n", note.text.c_str());
  });
}

}  // namespace engram
