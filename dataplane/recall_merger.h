#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "dataplane/hit_window.h"
#include "dataplane/record_reader.h"
#include "src/core/huge_page_arena.h"
#include "src/core/observation.h"
#include "src/core/refusal_reason.h"
#include "src/core/result.h"
#include "src/core/shard_port.h"

namespace engram {

// Makes one answer of what the partitions of a space answered to a recall: best first, equal scores
// by the earlier stamp, one hit an id of a space (the one of the later stamp), at most k.
//
// 1. Begin takes a merge for so many partitions.
// 2. Add copies each batch at once, so that result slots go straight back: a core that held some of
//    one shard while it waited for another could stop both.
// 3. FinishPartition counts; the last one puts the hits in order. What is to come first of a long
//    recall is put in order once every partition has said which it has of that, and stays first.
// 4. Emit hands them out batch by batch; the payloads of all of them are bounded, those beyond are
//    left out and the hit says so. Records that the hits refer to are read a window ahead
//    (HitWindow).
// 5. Release gives back the merge and its memory, also when it was not handed out.
//
// Thread safety: one core's alone. Takes no memory after Create; pages are touched as they are used
// first, and what was given back is used again first.
// Invariants: a block is free or of one merge; hits are whole within a block and never move.
class RecallMerger {
 public:
  using MergeId = uint32_t;
  static constexpr MergeId kNone = UINT32_MAX;

  // At most `merges` at a time, each over at most `max_partitions`, none of which sends more than
  // `max_payload_bytes` in an answer; nor does the merger. They share address space for
  // kUsualPoolBytes of hits, or for the largest single answer where that is more. `records`
  // outlives the merger; nullptr: no hit refers to a record. Errors:
  // kResourceExhausted.
  static Result<std::unique_ptr<RecallMerger>> Create(uint32_t merges, uint16_t max_partitions,
                                                      size_t max_payload_bytes,
                                                      HugePagePolicy huge_pages,
                                                      RecordReader* records = nullptr);

  // kNone: all are in use. `k` is 1 to kMaxRecallResults. `first`: of a long recall, as the
  // partitions were asked; else 0.
  struct Order {
    uint32_t first = 0;
    bool latest_first = false;  // by when_ns, not by score
  };
  MergeId Begin(uint16_t partitions, uint32_t k, const Order& order);
  MergeId Begin(uint16_t partitions, uint32_t k) { return Begin(partitions, k, Order()); }
  // The bytes of a result slot: ResultBatch, then its hits. Where no memory is left for them the
  // merge ends with kMergesFull.
  void Add(MergeId id, std::span<const std::byte> batch);
  // One partition is done, with or without an answer. True when all are.
  bool FinishPartition(MergeId id, RefusalReason reason);
  bool is_whole(MergeId id) const { return merges_[id].waiting == 0; }
  // Some of the answer can be handed out.
  bool can_emit(MergeId id) const { return is_whole(id) || merges_[id].has_first; }
  // Once all are done: kNone, or the worst that was said. That some partitions do not know the
  // space only says that they hold nothing of it.
  RefusalReason reason(MergeId id) const { return merges_[id].reason; }
  // Once it can, and there is no reason against it: writes the next ResultBatch and its hits, at
  // most `max_hits`, to `out`, which holds any one hit (kResultSlotBytes). Returns the bytes; 0
  // when the last batch was handed out (handed_out), while records of the next one are read, or
  // until what follows the first ones is there. An empty answer is one batch without hits.
  size_t Emit(MergeId id, std::span<std::byte> out, uint32_t max_hits = kMaxRecallResults);
  bool handed_out(MergeId id) const { return merges_[id].emitted_last; }
  // Gives up the memory of what was read ahead, where nobody takes it now. Emit reads it again.
  void DropReads(MergeId id) { merges_[id].window.Clear(records_); }
  // Once all are done.
  void Release(MergeId id);

  uint32_t free_merges() const { return static_cast<uint32_t>(free_merges_.size()); }
  uint32_t used_blocks() const { return blocks_used_ - static_cast<uint32_t>(free_blocks_.size()); }

 private:
  static constexpr size_t kBlockBytes = size_t{128} * 1024;
  static constexpr size_t kUsualPoolBytes = size_t{256} << 20;
  static constexpr uint32_t kNoBlock = UINT32_MAX;
  static_assert(kResultSlotBytes <= kBlockBytes, "a batch fits a block");

  struct Merge {
    bool in_use = false;
    bool emitted_last = false;
    bool has_first = false;  // the first ones are in order
    Metric metric = Metric::kUnspecified;
    RefusalReason reason = RefusalReason::kNone;
    uint16_t partitions = 0;
    uint16_t waiting = 0;      // partitions that are not done
    uint16_t unknown = 0;      // partitions that do not know the space
    uint16_t ended_first = 0;  // partitions that have sent their first ones
    uint32_t k = 0;
    Order order;
    uint32_t hits = 0;     // that were added
    uint32_t kept = 0;     // of the order
    uint32_t emitted = 0;  // of the order
    uint32_t first_block = kNoBlock;
    uint32_t last_block = kNoBlock;
    HitWindow window{0};  // on what follows
  };
  struct Block {
    uint32_t next = kNoBlock;
    uint32_t used_bytes = 0;
  };
  // A hit while the order is made.
  struct Found {
    float distance = 0;  // nearest is least, whatever the metric
    bool superseded = false;
    bool is_in_order = false;  // already
    int64_t when_ns = 0;
    uint64_t stamp = 0;
    const std::byte* hit = nullptr;
  };

  RecallMerger(uint32_t merges, uint16_t max_partitions, size_t max_payload_bytes, uint32_t blocks,
               HugePageArena arena, RecordReader* records);

  std::byte* TakeRoom(Merge* merge, size_t bytes);
  std::byte* BlockAt(uint32_t block) const { return pool_ + size_t{block} * kBlockBytes; }
  const std::byte** OrderOf(MergeId id) const { return &orders_[size_t{id} * kMaxRecallResults]; }
  void NoteFirst(MergeId id);
  void MakeOrder(MergeId id, uint32_t most);
  void ReadAhead(MergeId id);
  bool IsWorthABatch(const Merge& merge, size_t room, uint32_t max_hits) const;
  std::span<Found> Gather(MergeId id);
  size_t Supersede(std::span<Found> found);
  static void NoteReason(Merge* merge, RefusalReason reason);

  // Constant after construction.
  const uint16_t max_partitions_;
  const size_t max_payload_bytes_;  // of an answer
  const uint32_t max_blocks_;
  RecordReader* const records_;

  HugePageArena arena_;
  std::byte* const pool_;
  std::vector<Merge> merges_;
  std::vector<MergeId> free_merges_;
  std::vector<Block> blocks_;
  std::vector<uint32_t> free_blocks_;  // below blocks_used_
  uint32_t blocks_used_ = 0;           // blocks ever used
  // By merge, kMaxRecallResults places each: the hits that are handed out, best first.
  const std::unique_ptr<const std::byte*[]> orders_;
  // For the merge whose order is being made.
  const std::unique_ptr<Found[]> found_;
  std::vector<const std::byte*> in_order_;   // already, by address
  const std::unique_ptr<uint32_t[]> by_id_;  // hash table of places in found_ + 1; 0: nothing
};

}  // namespace engram
