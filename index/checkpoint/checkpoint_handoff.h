#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "index/checkpoint/live_table.h"
#include "src/core/commit_stamp.h"
#include "src/core/log_address.h"

namespace engram {

// Between the control plane, which conducts checkpoints, and one shard. A round goes:
// 1. `note`: the shard notes from where its log would have to be replayed, and forgets no tombstone
//    from then on. It answers with `noted`.
// 2. Once every shard has noted, `save`: it saves itself. It answers with `saved`, or `failed`.
// 3. Once every shard has saved, `sync`: it waits until its log is durable up to its end of then,
//    and answers with `synced`, or `failed`.
// 4. Once every shard has, the manifest is written, and `ended` is set; also after a failure.
// So what was answered before its shard noted was stored, wherever, before any shard was saved; all
// later ones are replayed. Step 3 is for spaces whose observations are visible before they are
// durable: one shard may have been saved before such an observation came and another one after it,
// and then it has to be in the log.
//
// Between two rounds records may have been taken over into the vault (src/retention.h). Then `move`
// rises: the shard lets the nodes in `moves` name the new places, and answers with `moved`.
//
// Thread safety: each member has one writer; what stands behind a round's number is read after it.
struct CheckpointHandoff {
  // The control plane's.
  std::atomic<uint32_t> note{0};
  std::atomic<uint32_t> save{0};
  std::atomic<CommitStamp> hold{kNoStamp};  // before `save`: the least of what the shards noted
  std::atomic<LiveTable*> live{nullptr};    // likewise: filled by the save; nullptr: none
  std::atomic<uint32_t> sync{0};
  std::atomic<uint32_t> ended{0};
  std::atomic<uint32_t> move{0};
  std::atomic<const std::vector<OriginMove>*> moves{nullptr};  // before `move`
  // The shard's.
  std::atomic<uint32_t> noted{0};
  std::atomic<LogPosition> replay_from{0};      // before `noted`: where a block begins
  std::atomic<uint32_t> epoch{0};               // likewise: of the log there
  std::atomic<CommitStamp> complete{kNoStamp};  // likewise: nothing earlier is unanswered
  std::atomic<uint32_t> saved{0};
  std::atomic<uint64_t> bytes{0};  // before `saved`: of the file
  std::atomic<uint32_t> synced{0};
  std::atomic<uint32_t> failed{0};
  std::atomic<int> error{0};  // before `failed`: an errno value
  std::atomic<uint32_t> moved{0};
  size_t next_move = 0;  // for the shard alone
};

}  // namespace engram
