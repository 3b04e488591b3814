#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "index/checkpoint/graph_restorer.h"
#include "index/checkpoint/space_extent.h"
#include "index/space.h"
#include "index/vector_format.h"
#include "src/core/commit_stamp.h"
#include "src/core/ids.h"
#include "src/core/observation.h"
#include "src/core/result.h"

namespace engram {

// The bytes of the extent that `bytes` begins with, by its header alone: at most kMaxExtentBytes,
// maybe more than are there. kCorrupt where it has no header. For cutting a stream into extents.
Result<size_t> PeekExtent(std::span<const std::byte> bytes);

// What a saved space was.
struct SavedSpace {
  std::string name;
  Metric metric = Metric::kUnspecified;
  Precision precision = Precision::kUnspecified;
  Traversal traversal = Traversal::kInt8;
  uint32_t dimension = 0;  // 0: not settled
  uint32_t M = 0;
  uint32_t M0 = 0;
  uint32_t node_count = 0;
  uint32_t code_row_bytes = 0;   // 0 without a dimension
  uint32_t exact_row_bytes = 0;  // 0 where there is none beside the code
  CommitStamp latest_stamp = kNoStamp;
  CommitStamp hold = kNoStamp;  // see SpaceSaver::Begin
  bool has_payload = false;
};
// Reads the extent that a saved space begins with. kCorrupt, or kInvalidArgument for a format that
// this build does not know.
Result<SavedSpace> ReadSpaceExtent(std::span<const std::byte> bytes);

// Fills an empty space with what a SpaceSaver wrote.
//
// Steps:
// 1. The description is compared with the space's own. Rows that the space keeps in another form
//    are encoded from the best that are there. With another M or M0 the graph is left out: all
//    nodes are unlinked then.
// 2. The graph's lists are taken as they are.
// 3. Each node gets its place again. Of the nodes with one id the one with the latest content
//    stands, of these the one that began last; what does not stand ends: it stays where the graph
//    leads over it, as retired, and else its place is free.
// 4. Finish: the graph is made sound (GraphRestorer). Nodes that do not get back into it, and those
//    that were being linked, are listed as unlinked, in the order of their stamps.
// Every length is bounded before it is used; the bytes may be anything.
//
// Thread safety: the shard's alone. No reader is in the space before Finish.
// Invariants: after Finish without an error the space is sound (Space::CheckInvariants), and its
// horizon is its latest stamp: no snapshot from before may be asked for. After an error it holds
// some of the nodes and may only be dropped.
class SpaceLoader {
 public:
  // `space` outlives the loader; nothing was stored in it.
  explicit SpaceLoader(Space* space);
  SpaceLoader(const SpaceLoader&) = delete;
  SpaceLoader& operator=(const SpaceLoader&) = delete;

  // Takes the next extents, whole ones, of the stream. Errors: kCorrupt with the offset in the
  // stream and what is wrong; kInvalidArgument where this is another format, or a space of another
  // name, metric or dimension; kResourceExhausted.
  Result<void> Take(std::span<const std::byte> bytes);
  // Once the stream is at its end. Errors: kCorrupt where it is not complete; kResourceExhausted.
  Result<void> Finish();

  // The end of the saved space has been taken.
  bool is_complete() const { return phase_ == Phase::kComplete; }
  bool loads_graph() const { return loads_graph_; }
  // What was not of one moment, and was mended.
  const GraphRestorer& graph() const { return graph_; }
  uint64_t ended_duplicates() const { return ended_duplicates_; }

 private:
  enum class Phase : uint8_t { kSpace, kLinks, kNodes, kComplete, kFinished, kFailed };

  std::unexpected<Error> Corrupt(std::string_view what) const;
  std::unexpected<Error> MemoryFull() const;
  Result<void> TakeExtent(std::span<const std::byte> extent);
  Result<void> TakeSpace(std::span<const std::byte> extent);
  Result<void> CompareSpace() const;
  Result<void> TakeLinks(const ExtentHeader& header, std::span<const std::byte> extent);
  Result<void> TakeNodes(const ExtentHeader& header, std::span<const std::byte> extent);
  Result<void> CheckSlots(const ExtentHeader& header) const;
  Result<void> TakeEnd(const ExtentHeader& header, std::span<const std::byte> body);
  Result<void> CheckRecord(const SavedNode& saved, const ExtentHeader& header,
                           const std::byte* body) const;
  Result<std::span<const std::byte>> AttributesIn(const SavedNode& saved,
                                                  const std::byte* body) const;
  Result<void> CheckOrigin(const SavedNode& saved) const;
  Result<void> CheckKind(const SavedNode& saved) const;
  Result<void> CheckStamps(const SavedNode& saved) const;
  Result<void> CheckLinks(const SavedLinks& saved, const std::byte* words) const;
  size_t RowBytes(const SavedNode& saved) const;
  Result<void> TakeNode(const SavedNode& saved, const std::byte* body);
  Result<void> LoadRows(NodeId node, const std::byte* rows);
  bool LoadRow(const VectorFormat& format, const std::byte* rows, std::byte* to);
  bool LoadText(const SavedNode& saved, const std::byte* text);
  bool LoadLinks(const SavedLinks& saved, const std::byte* words);
  void LeaveLinksWithoutNode();
  bool Stand(NodeId node);
  void EndNode(NodeId node, CommitStamp stamp);
  void SettleNodes();
  bool ListUnlinked();
  void ListTombstones();

  Space* const space_;
  GraphRestorer graph_;
  Phase phase_ = Phase::kSpace;
  bool loads_graph_ = false;
  uint64_t offset_ = 0;  // in the stream, of what is looked at
  uint32_t ordinal_ = 0;
  SavedSpace saved_;
  std::optional<VectorFormat> saved_code_;
  std::optional<VectorFormat> saved_exact_;
  uint32_t next_slot_ = 0;  // in the phase
  uint64_t nodes_ = 0;
  uint64_t linked_nodes_ = 0;
  uint64_t ended_duplicates_ = 0;
  CommitStamp latest_ = kNoStamp;
  NodeId entry_point_ = kNoNode;
  bool has_graph_ = false;
  std::array<float, kMaxDimension> numbers_;
};

}  // namespace engram
