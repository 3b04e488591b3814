#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "dataplane/ring_mesh.h"
#include "index/shard.h"
#include "perf/shard_producer.h"
#include "src/checkpointer.h"
#include "src/core/clock.h"
#include "src/core/disk.h"
#include "src/core/read_pins.h"
#include "src/core/space_catalogue.h"
#include "src/log_store.h"

namespace engram {

struct ShardOnDiskOptions {
  std::string folder{};  // made, and removed at the end
  std::string_view space{};
  SpaceSettings settings{};
  uint32_t segment_bytes = 0;  // of the log
  CheckpointerOptions checkpoints{};
  ShardOptions shard{};
};

// A shard with one space, its log, checkpoints and freeing on a real disk as in the daemon, and
// what sends to it; all for one thread.
class ShardOnDisk {
 public:
  // The shard has started; the producer's session is not open.
  explicit ShardOnDisk(const ShardOnDiskOptions& options);
  ShardOnDisk(const ShardOnDisk&) = delete;
  ShardOnDisk& operator=(const ShardOnDisk&) = delete;
  ~ShardOnDisk();

  Clock& clock() { return clock_; }
  const std::string& folder() const { return folder_; }
  Shard& shard() { return *shard_; }
  const Shard& shard() const { return *shard_; }
  ShardProducer& producer() { return *producer_; }
  const ShardProducer& producer() const { return *producer_; }
  const LogStore& logs() const { return *logs_; }
  const Checkpointer& checkpointer() const { return *checkpointer_; }

  // The control plane's part. Says on stderr which checkpoint failed.
  void PollControl();

 private:
  const std::string folder_;
  SystemClock clock_;
  SpaceCatalogue catalogue_;
  ReadPins pins_{1};
  std::unique_ptr<LogStore> logs_;
  std::unique_ptr<Disk> root_;
  std::unique_ptr<Checkpointer> checkpointer_;
  std::optional<RingMesh> mesh_;
  std::optional<ShardProducer> producer_;
  std::unique_ptr<Shard> shard_;
};

}  // namespace engram
