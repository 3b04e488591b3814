// What waits to be linked, where it has become too much to be scanned (see space.h): it is listed
// in inverted lists of its own, by the codes that the graph is walked with, and leaves them as it
// is linked. The list of fresh nodes holds it meanwhile as it holds all that is not linked, so that
// readers on other cores, which cannot look into lists that change, scan it there.

#include <algorithm>
#include <array>

#include "index/space.h"
#include "src/core/check.h"

namespace engram {

bool Space::WantsListing() const {
  return HasWaitingLists() && codes_step_ != CodesStep::kRecoding &&
         fresh_.size() > waiting_count_ + options_.list_from;
}

// Whatever became of a node meanwhile, it is listed until it leaves the list of fresh nodes: a
// recall of an earlier snapshot may look for it.
size_t Space::ListSome(size_t most) {
  const FreshList::Snapshot unlisted = UnlistedNodes();
  const size_t count = std::min<size_t>({unlisted.size(), most, InvertedLists::kMostAtOnce});
  WalkCodes* const codes = walk_codes_.load(std::memory_order_relaxed);
  if (count == 0 || !waiting_->Reserve(node_count())) return 0;
  std::array<InvertedLists::Row, InvertedLists::kMostAtOnce> rows;
  std::array<InvertedLists::Choice, InvertedLists::kMostAtOnce> choices;
  for (size_t i = 0; i < count; ++i) {
    const NodeId node = unlisted[i];
    const bool has_code = graph_.IsLinked(node) || graph_.IsDoomed(node);
    if (!has_code && !EncodeNode(codes, node)) return 0;
    if (next_codes_ != nullptr && node < next_encoded_ && !EncodeNode(next_codes_, node)) return 0;
    rows[i] = {codes_->Row(node), codes->rows().Row(node)};
  }
  waiting_->Choose(block_products_, std::span(rows).first(count), 0, choices.data());
  size_t listed = 0;
  for (; listed < count; ++listed) {
    const NodeId node = unlisted[listed];
    if (!waiting_->Add(choices[listed].home, node, codes->rows().Row(node))) break;
    ++waiting_count_;
  }
  if (!waiting_->SplitOne()) (void)waiting_->MergeOne(block_products_);
  return listed;
}

size_t Space::ChooseWaiting(const QueryForms& query, float members,
                            std::span<uint32_t> lists) const {
  const bool by_signs = !*query.signs_are_far && codes_step_ != CodesStep::kRecoding;
  return waiting_->ChooseMany(block_products_, {query.code, by_signs ? query.signs : nullptr},
                              members, lists);
}

// The first of the list of fresh nodes leaves it.
void Space::PopFresh() {
  if (waiting_) waiting_->Remove(fresh_.first());
  if (waiting_count_ > 0) --waiting_count_;
  fresh_.PopFirst();
  ++taken_first_;
}

void Space::MoveFreshToEnd() {
  if (waiting_) waiting_->Remove(fresh_.first());
  if (waiting_count_ > 0) --waiting_count_;
  fresh_.MoveFirstToEnd();
  ++taken_first_;
}

}  // namespace engram
